"""Every stage's equations against the dense matrix that autograd writes down."""

from __future__ import annotations

from math import inf
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Geometry, dense_blocks, dense_rank, layers
from torch import Tensor

from rgap.constraints import convnd, gradient_constraint, gradient_rows, weight_constraint
from rgap.constraints.nullspace import null_directions
from rgap.constraints.ranks import overlap_bound, stage_joint_rank, weight_row_spaces
from rgap.network.affine import Affine
from rgap.network.modules import build
from rgap.precision import UNKNOWN, Estimate, Precision
from rgap.recursion.stage import solve_stage
from rgap.testing import dense, dot_test

MASKS = st.sampled_from([0.0, 0.0, 0.3, 0.7])


def draw_batch(case: Geometry, masked: float) -> tuple[Affine, Tensor, Tensor, Tensor]:
    """The layer's affine map, an input batch, a cotangent with dead units, and the live ones."""
    generator = torch.Generator().manual_seed(case.seed)
    names = {id(p): n for n, p in case.module.named_parameters()}
    affine = build(case.module, "layer", case.shape, names)
    x = torch.rand(case.batch, *case.shape, generator=generator, dtype=torch.float64)
    k = torch.randn(case.batch, *affine.out_shape, generator=generator, dtype=torch.float64)
    alive = torch.rand(k.shape, generator=generator) >= masked
    return affine, x, k * alive, alive


@settings(max_examples=120, deadline=None)
@given(case=layers(), masked=MASKS)
def test_ranks_and_solution_equal_the_dense_reference(case: Geometry, masked: float) -> None:
    affine, x, k, alive = draw_batch(case, masked)
    rows_k, rows_w = dense_blocks(case.module, k, case.shape)
    rows_w = rows_w[alive.flatten()]  # the z of a dead unit is unknown
    stacked = torch.cat([rows_k, rows_w])
    kronecker = gradient_constraint(affine, k)
    assert kronecker.rank().rank == dense_rank(rows_k)
    weight = weight_row_spaces(affine, alive)
    assert sum(space.rank.rank for space in weight) == dense_rank(rows_w)
    joint = stage_joint_rank(affine, kronecker, weight)
    # rows of unit size: a block of tiny cotangents must not vanish next to the weights
    balanced = torch.cat(
        [rows_k / rows_k.norm().clamp_min(1e-300), rows_w / rows_w.norm().clamp_min(1e-300)]
    )
    singular = torch.linalg.svdvals(balanced)
    expected = dense_rank(balanced)
    assert joint.rank == expected, singular
    if not masked:
        assert joint.rank <= dense_rank(rows_k) + dense_rank(rows_w) - overlap_bound(affine, k)
    solved = solve_stage(
        affine,
        affine.weight_gradient(x, k),
        with_unknown(exact(affine.forward(x)), alive),
        exact(k),
        Precision(torch.float64),
    )
    read = affine.reads.expand(case.batch, *case.shape)
    unknowns = int(read.sum()) or x.numel()  # what no kernel reads is no unknown of the equations
    if expected == unknowns and singular[unknowns - 1] > 1e-5 * singular[0]:
        assert solved.solution.solved
        target = torch.cat([rows_k, rows_w]) @ x.flatten()
        driver = "gelsd" if unknowns < x.numel() else "gels"
        dense = torch.linalg.lstsq(stacked, target[:, None], driver=driver).solution.flatten()
        found = solved.solution.value
        assert torch.equal(found.known, read)
        assert (found.value - x)[read].abs().max() < 1e-8
        assert (found.value.flatten() - dense)[read.flatten()].abs().max() < 1e-8
    if expected < unknowns:
        assert not solved.solution.solved
        assert solved.solution.stats.joint.nullity == unknowns - expected


def with_unknown(z: Estimate, alive: Tensor) -> Estimate:
    return Estimate(z.value * alive, torch.where(alive, z.error, UNKNOWN))


def exact(value: Tensor) -> Estimate:
    return Estimate(value, Precision(torch.float64, seed=1).rounding(value))


@settings(max_examples=60, deadline=None)
@given(case=layers(), masked=MASKS)
def test_blocks_are_the_dense_ones(case: Geometry, masked: float) -> None:
    affine, x, k, _ = draw_batch(case, masked)
    rows_k, rows_w = dense_blocks(case.module, k, case.shape)
    coupling = weight_constraint(affine, case.batch)
    table = coupling.unfold(x)
    assert torch.equal(coupling.fold(table), x)
    image = gradient_constraint(affine, k).apply(table)[0]
    sent = gradient_rows(affine, affine.weight_gradient(x, k))
    assert torch.allclose(image, sent, atol=1e-12)
    assert torch.allclose(rows_k @ x.flatten(), affine.weight_gradient(x, k).flatten(), atol=1e-12)
    assert torch.allclose(coupling.apply(table).flatten(), rows_w @ x.flatten(), atol=1e-12)
    dot_test(coupling.apply, coupling.adjoint, table, name=str(case))
    weights = torch.rand(coupling.rows, dtype=torch.float64)
    size = table.shape[1] * table.shape[2]
    moved = dense(coupling.apply, table)
    for small in (0.0, inf):  # offset by offset, and from the dense matrix
        gram = torch.zeros(size, size, dtype=torch.float64)
        with patch.object(convnd, "SMALL", small):
            coupling.add_gram(weights, gram.view(*table.shape[1:], *table.shape[1:]))
        assert torch.allclose(gram, (moved.T * weights) @ moved, atol=1e-10)


def test_overlap_bound_is_met_by_generic_weights() -> None:
    hits = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        module = torch.nn.Conv2d(2, 3, 3, 1, 1).double()
        with torch.no_grad():
            module.weight.copy_(torch.randn(3, 2, 3, 3, generator=generator, dtype=torch.float64))
        names = {id(p): n for n, p in module.named_parameters()}
        affine = build(module, "layer", (2, 6, 6), names)
        k = torch.randn(3, *affine.out_shape, generator=generator, dtype=torch.float64)
        kronecker = gradient_constraint(affine, k)
        weight = weight_row_spaces(affine, torch.ones(k.shape, dtype=torch.bool))
        joint = stage_joint_rank(affine, kronecker, weight)
        rows = kronecker.rank().rank + sum(space.rank.rank for space in weight)
        bound = min(joint.size, rows - overlap_bound(affine, k))
        assert joint.rank <= bound
        hits += joint.rank == bound
    assert hits >= 36


def test_null_directions_are_seen_by_neither_block() -> None:
    torch.manual_seed(0)
    module = torch.nn.Conv2d(3, 2, 3, 2, 1).double()
    names = {id(p): n for n, p in module.named_parameters()}
    affine = build(module, "layer", (3, 8, 8), names)
    k = torch.randn(2, *affine.out_shape, dtype=torch.float64)
    active = torch.ones(k.shape, dtype=torch.bool)
    weight = weight_row_spaces(affine, active)
    joint = stage_joint_rank(affine, gradient_constraint(affine, k), weight)
    assert joint.nullity > 0
    directions = null_directions(affine, k, active, joint.nullity, 4)
    assert directions.shape == (4, 2, 3, 8, 8)
    for direction in directions:
        assert affine.linear(direction).abs().max() < 1e-8
        assert affine.weight_gradient(direction, k).abs().max() < 1e-8


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_predicted_error_matches_the_error_made(kind: str) -> None:
    torch.manual_seed(1)
    if kind == "linear":
        module, shape, batch = torch.nn.Linear(40, 12), (40,), 3
    else:
        module, shape, batch = torch.nn.Conv2d(2, 8, 3, 1, 1), (2, 8, 8), 1
    names = {id(p): n for n, p in module.named_parameters()}
    affine = build(module, "layer", shape, names)
    precision = Precision(torch.float64, noise=1e-6)
    ratios = []
    for trial in range(10):
        x = torch.rand(batch, *shape, dtype=torch.float64)
        k = torch.randn(batch, *affine.out_shape, dtype=torch.float64)
        g = affine.weight_gradient(x, k)
        z = Estimate(
            affine.forward(x),
            Precision(torch.float64, seed=trial).normal(
                torch.full((batch, *affine.out_shape), 1e-6, dtype=torch.float64)
            ),
        )
        sent = g + 1e-6 * torch.randn_like(g)
        noisy = Estimate(z.value + 1e-6 * torch.randn_like(z.value), z.error)
        solved = solve_stage(affine, sent, noisy, Estimate(k, 0 * exact(k).error), precision)
        found = solved.solution.value
        true = float((found.value - x).square().mean().sqrt())
        ratios.append(float(found.error.square().mean().sqrt()) / true)
    assert 0.6 < sum(ratios) / len(ratios) < 1.6
