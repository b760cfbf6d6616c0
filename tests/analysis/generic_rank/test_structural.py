"""Structural ranks and parts against matchings in the full pattern."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from random_layers import RandomLayer, layers
from scipy.sparse import csgraph, csr_array
from torch import Tensor

import rgap
from rgap.analysis.generic_rank.structural import structural_parts, structural_ranks
from rgap.network.affine import Affine, convolution
from rgap.network.chain import parse

SMALL = [layer for layer in layers(150) if layer.batch * prod(layer.affine.in_shape) <= 120]


def pattern(affine: Affine, batch: int, active: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both blocks of the dense pattern, from the layer's own forward and weight gradient."""
    ones = replace(affine, weight=torch.ones_like(affine.weight), bias=None)
    size = prod(affine.in_shape)
    unit = torch.eye(batch * size, dtype=torch.float64).reshape(-1, batch, *affine.in_shape)
    k = active.double()
    gradient = torch.stack([ones.weight_gradient(x, k).flatten() for x in unit], dim=1)
    weight = torch.stack([(ones.linear(x) * active).flatten() for x in unit], dim=1)
    return (gradient != 0).numpy(), (weight != 0).numpy()


def parts(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns that alternating paths reach from unmatched columns, and from unmatched rows."""
    row_of = csgraph.maximum_bipartite_matching(csr_array(matrix), perm_type="row")
    column_of = np.full(matrix.shape[0], -1)
    column_of[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)
    under, idle = row_of < 0, column_of < 0
    for _ in range(matrix.shape[1]):
        partners = column_of[matrix[:, under].any(axis=1)]
        under[partners[partners >= 0]] = True
        servers = row_of[matrix[idle].any(axis=0)]
        idle[servers[servers >= 0]] = True
    return under, matrix[idle].any(axis=0)


@pytest.mark.parametrize("layer", SMALL[:40], ids=lambda layer: f"{layer.index}: {layer.title}")
def test_flows_find_what_matchings_find(layer: RandomLayer) -> None:
    gradient, weight = pattern(layer.affine, layer.batch, layer.active)
    both = np.concatenate([gradient, weight])
    expected = tuple(csgraph.structural_rank(csr_array(m)) for m in (gradient, weight, both))
    assert structural_ranks(layer.affine, layer.batch, layer.active) == expected

    found = structural_parts(layer.affine, layer.batch, layer.active)
    under, over = parts(both)
    touched = both.any(axis=0)
    assert found.rank == expected[2]
    assert found.untouched.shape == (layer.batch, *layer.affine.in_shape)
    np.testing.assert_array_equal(found.untouched.flatten(), ~touched)
    np.testing.assert_array_equal(found.under.flatten(), under & touched)
    np.testing.assert_array_equal(found.over.flatten(), over)
    together = sum(m.int() for m in (found.untouched, found.under, found.well, found.over))
    assert bool((together == 1).all())
    assert (found.nullity > 0) == bool((found.untouched | found.under).any())


def conv(*shape: int, size: int, **options: int) -> Affine:
    weight = torch.zeros(shape)  # only the pattern counts
    return convolution("conv", weight, None, ("conv.weight", None), (3, size, size), **options)


def test_stride_two_and_a_single_tap_leave_three_quarters_untouched() -> None:
    found = structural_parts(conv(8, 3, 1, 1, size=8, stride=2), batch=2)
    expected = torch.ones(2, 3, 8, 8, dtype=torch.bool)
    expected[..., ::2, ::2] = False
    assert torch.equal(found.untouched, expected)
    assert found.nullity == 2 * 3 * 48
    assert found.explain() == (
        "384 unknowns: 288 read by no equation, 96 over-determined; structural nullity 288"
    )


def test_too_few_filters_leave_every_pixel_under_determined() -> None:
    found = structural_parts(conv(1, 3, 3, 3, size=8, padding=1), batch=1)
    assert bool(found.under.all())
    assert found.nullity == 3 * 64 - (27 + 64)


def test_a_unit_that_is_off_takes_its_pixels_with_it() -> None:
    active = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    active[..., 2, 1] = False
    affine = conv(4, 3, 2, 2, size=8, stride=2)
    found = structural_parts(affine, 1, active)
    expected = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    expected[..., 4:6, 2:4] = True
    assert torch.equal(found.untouched, expected)


def test_published_networks() -> None:
    lenet = parse(rgap.models.lenet(seed=0), (3, 32, 32)).stages
    assert structural_ranks(lenet[0].affine, 1) == (900, 3072, 3072)
    # the truth is 4992: the 144 shared equations are invisible to a matching
    assert structural_ranks(lenet[1].affine, 2) == (3600, 1536, 5136)
    cnn6d = parse(rgap.models.cnn6d(seed=0), (3, 32, 32)).stages
    # the naive count of the gradient block says 2160; the truth of both together is 3188
    assert structural_ranks(cnn6d[1].affine, 1) == (1968, 1620, 3468)


def test_malformed_masks_are_refused() -> None:
    affine = conv(4, 3, 2, 2, size=8, stride=2)
    with pytest.raises(ValueError, match=r"expected active of shape \[2, 4, 4, 4\], got \[1, 4"):
        structural_ranks(affine, 2, torch.ones(1, 4, 4, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="expected a boolean mask"):
        structural_parts(affine, 1, torch.ones(1, 4, 4, 4))
    with pytest.raises(ValueError, match="expected batch >= 1, got 0"):
        structural_parts(affine, 0)
