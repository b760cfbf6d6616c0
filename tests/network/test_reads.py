"""Which entries of its input an affine map reads, against the dense matrix of the map."""

from __future__ import annotations

import random

import pytest
import torch

from rgap.network.affine import Geometry, convolution, linear


def _random_convolution(seed):
    draw = random.Random(seed)
    dims = draw.choice((1, 2, 2, 3))
    groups = draw.choice((1, 1, 2))
    channels, filters = groups * draw.randint(1, 2), groups * draw.randint(1, 2)
    kernel = tuple(draw.randint(1, 4 - (dims == 3)) for _ in range(dims))
    dilation = tuple(draw.randint(1, 3) for _ in range(dims))
    space = tuple(d * (k - 1) + draw.randint(1, 6) for d, k in zip(dilation, kernel, strict=True))
    w = torch.rand(filters, channels // groups, *kernel, dtype=torch.float64) + 0.1
    return convolution(
        "c",
        w,
        None,
        ("c.weight", None),
        (channels, *space),
        Geometry.of(
            kernel,
            stride=tuple(draw.randint(1, 5) for _ in range(dims)),
            padding=tuple(draw.randint(0, k // 2) for k in kernel),
            dilation=dilation,
            groups=groups,
        ),
    )


@pytest.mark.parametrize("seed", range(40))
def test_reads_are_the_columns_of_the_map_that_are_not_zero(seed):
    affine = _random_convolution(seed)
    columns = affine.adjoint(torch.ones(1, *affine.out_shape, dtype=torch.float64))[0]
    assert torch.equal(affine.reads, columns > 0)
    # ... and of the gradient constraint, whatever the weights are.
    k = torch.rand(1, *affine.out_shape, dtype=torch.float64) + 0.1
    unread = torch.where(affine.reads, 0.0, 1.0).double()[None]
    assert not affine.weight_gradient(unread, k).any()
    assert affine.weight_gradient(torch.ones_like(unread), k).any()


def test_some_random_maps_leave_entries_unread():
    found = [_random_convolution(seed).reads for seed in range(40)]
    assert 5 <= sum(not bool(mask.all()) for mask in found) <= 38


def test_a_fully_connected_layer_reads_everything_even_where_its_weights_are_zero():
    affine = linear("l", torch.zeros(2, 3), None, ("l.weight", None), (3,))
    assert affine.reads.tolist() == [True, True, True]
