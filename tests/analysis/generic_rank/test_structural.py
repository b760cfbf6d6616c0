"""Structural ranks against matchings in the full pattern."""

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
from rgap.analysis.generic_rank.structural import structural_ranks
from rgap.network.affine import Affine, Geometry, convolution
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


@pytest.mark.parametrize("layer", SMALL[:40], ids=lambda layer: f"{layer.index}: {layer.title}")
def test_flows_find_what_matchings_find(layer: RandomLayer) -> None:
    gradient, weight = pattern(layer.affine, layer.batch, layer.active)
    both = np.concatenate([gradient, weight])
    expected = tuple(csgraph.structural_rank(csr_array(m)) for m in (gradient, weight, both))
    assert structural_ranks(layer.affine, layer.batch, layer.active) == expected


def conv(*shape: int, size: int, **options: int) -> Affine:
    weight = torch.zeros(shape)  # only the pattern counts
    geometry = Geometry.of(shape[2:], **options)
    return convolution("conv", weight, None, ("conv.weight", None), (3, size, size), geometry)


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
        structural_ranks(affine, 1, torch.ones(1, 4, 4, 4))
    with pytest.raises(ValueError, match="expected batch >= 1, got 0"):
        structural_ranks(affine, 0)
