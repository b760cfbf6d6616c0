"""Inputs that no equation reads, and channels that no equation joins, make no system larger."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.analysis import audit
from rgap.constraints import gradient_constraint, weight_constraint
from rgap.constraints.ranks import stage_joint_rank, weight_row_spaces
from rgap.network import affine as maps
from rgap.network.affine import Affine
from rgap.recursion import stage
from rgap.solvers import joint_rank as joint
from rgap.solvers import kronecker, subspace


def _layer(seed: int) -> tuple[Affine, Tensor, Tensor]:
    """A random convolution with unread edges, gaps and groups, cotangents, and what is known."""
    rng, dims = random.Random(seed), 1 + seed % 2
    torch.manual_seed(seed)
    groups = rng.choice([1, 1, 2])
    channels, filters = groups * rng.choice([1, 2]), groups * rng.choice([1, 2, 3, 5])
    kernel, stride, dilation, padding = (
        tuple(rng.choice(sizes) for _ in range(dims))
        for sizes in ([1, 2, 3], [1, 2, 3], [1, 2], [0, 1])
    )
    space = tuple(rng.choice([5, 6, 9]) for _ in range(dims))
    weight = torch.randn(filters, channels // groups, *kernel)
    layer = maps.convolution(
        "conv", weight, None, ("w", None), (channels, *space),
        maps.Geometry.of(
            kernel, stride=stride, padding=padding, dilation=dilation, groups=groups),
    )  # fmt: skip
    k = torch.randn(rng.choice([1, 2, 3]), *layer.out_shape).double()
    if seed % 3 == 1:
        k = k * (torch.rand_like(k) > 0.4)
    if seed % 3 == 2 and layer.out_shape[-1] > 1:
        k[..., -1] = 0  # the next layer reads no last column
    return layer, k, k != 0


@pytest.mark.parametrize("seed", range(40))
def test_ranks_equal_the_dense_ones_with_unread_inputs(seed: int) -> None:
    layer, k, active = _layer(seed)
    size = len(k) * torch.Size(layer.in_shape).numel()
    eye = torch.eye(size).double().reshape(size, len(k), *layer.in_shape)
    gradient = torch.stack([layer.weight_gradient(e, k).flatten() for e in eye], 1)
    weight = torch.stack([layer.linear(e).flatten() for e in eye], 1)[active.flatten()]
    spaces = weight_row_spaces(layer, active)
    found = stage_joint_rank(
        layer, gradient_constraint(layer, k), spaces, cotangent=k if seed % 2 else None
    )
    assert sum(space.rank.rank for space in spaces) == int(torch.linalg.matrix_rank(weight))
    assert found.rank == int(torch.linalg.matrix_rank(torch.cat([gradient, weight])))
    assert found.size == size


def test_an_audit_with_unread_borders_decomposes_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix whose singular vectors are asked for is smaller than the layer."""
    sizes: list[int] = []

    def noted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(max(matrix.shape[-2:]))
        return plain(matrix)

    plain = subspace.right_singular_vectors
    monkeypatch.setattr(subspace, "right_singular_vectors", noted)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2), nn.Tanh(), nn.Conv2d(16, 32, 3, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(32 * 4, 10),
    ).eval()  # fmt: skip
    rows = audit(net, (3, 16, 16), (1, 2)).rows
    # 13 of 16 lines are read by outputs of the first layer that the second one reads, 5 of 6 there
    assert [row.joint_rank for row in rows if row.layer == "0"] == [3 * 13**2, 2 * 3 * 13**2]
    assert [row.joint_rank for row in rows if row.layer == "2"] == [16 * 25, 2 * 16 * 25]
    assert max(sizes, default=0) < 16 * 36


def test_groups_are_factored_apart_and_to_the_same_solution() -> None:
    torch.manual_seed(0)
    layer = maps.convolution(
        "conv",
        torch.randn(8, 2, 3, 3),
        None,
        ("w", None),
        (8, 6, 6),
        maps.Geometry.of((3, 3), padding=1, groups=4),
    )
    k = torch.randn(1, *layer.out_shape).double()
    first = gradient_constraint(layer, k)
    weights = torch.rand(first.matrix.shape[:2]).double() + 0.5
    coupling = weight_constraint(layer, 1)
    rows = torch.rand(coupling.rows).double() + 0.5
    whole = kronecker.factor(first, weights, coupling, rows)
    apart = kronecker.factor(first, weights, coupling, rows, apart=True)
    assert whole is not None and apart is not None
    assert whole.cholesky.shape == (288, 288) and apart.cholesky.shape == (4, 72, 72)
    rhs = torch.randn(3, 8, 36).double()
    assert torch.allclose(whole.precondition(rhs), apart.precondition(rhs), rtol=1e-8)
    assert apart.condition == pytest.approx(whole.condition, rel=0.2)


def test_a_dear_joint_factor_is_left_out_where_the_gradient_is_sharp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 32, 3, stride=2, padding=3, dilation=3, groups=2), nn.Tanh(),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=4), nn.Tanh(), nn.Flatten(),
        nn.Linear(32 * 16, 10),
    ).eval()  # fmt: skip
    x = torch.rand(1, 4, 8, 8)
    update = rgap.capture(model, x, torch.tensor([3]))
    errors, routes = [], []
    for dear in (stage.DEAR, 0.0):
        monkeypatch.setattr(stage, "DEAR", dear)
        found = rgap.invert(model, update)
        assert found.exact and found.inputs is not None
        errors.append(float((found.inputs - x.double()).square().mean().sqrt()))
        routes.append([report.route for report in found.layers])
    assert routes[0][0] == "cholesky" and routes[1][0] == "gradient"
    assert errors[1] < 3 * errors[0] + 1e-9  # the polish hears the weights


def test_the_rank_on_what_the_gradient_leaves_open_is_that_by_angles() -> None:
    compared = 0
    for seed in range(0, 40, 2):
        layer, k, active = _layer(seed)
        spaces = weight_row_spaces(layer, active)
        shape = (-1, layer.in_shape[0], torch.Size(layer.in_shape[1:]).numel())
        tables = [space.basis.reshape(shape) for space in spaces]
        gradient = gradient_constraint(layer, k)
        found = joint.rank_on_open(gradient, tables)
        if found is not None:
            compared += 1
            assert found.rank == joint.JointRows(gradient, tables).rank.rank
    assert compared > 2
