"""The matrix-free route against the structured one."""

from __future__ import annotations

import pytest
import torch
from allocations import smallest_routes
from cases import picture, small_conv
from reference import dense_blocks
from torch import nn

from rgap import Status, capture, invert
from rgap.network.modules import build
from rgap.precision import Estimate, Precision
from rgap.recursion.matrix_free import MatrixFree, memory
from rgap.recursion.stage import BUDGET, solve_stage
from rgap.testing import dense_test

LAYERS = [
    (nn.Conv2d(2, 6, 3, 1, 1), (2, 6, 6)),
    (nn.Conv2d(2, 6, 3, 1, (1, 2), 2, groups=2), (2, 5, 4)),
    (nn.Conv1d(2, 5, 3, 1, 1), (2, 9)),
    (nn.Linear(12, 15), (12,)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS)
def test_products_equal_the_dense_rows(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = module.double()
    affine = build(module, "layer", shape, {id(p): n for n, p in module.named_parameters()})
    k = torch.randn(2, *affine.out_shape, dtype=torch.float64)
    ones = torch.ones_like(k)
    system = MatrixFree(affine, k, ones.new_ones(1), ones, torch.ones(2, *shape).double())
    dense = torch.cat(dense_blocks(module, k, shape))
    dense_test(system.apply, dense, dense.shape[1:], adjoint=system.adjoint, name=str(module))
    scaled = system.scaled().scale.flatten()
    assert torch.allclose(scaled, dense.norm(dim=0).reciprocal())


@pytest.mark.parametrize(("module", "shape"), LAYERS)
def test_both_routes_agree(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = module.double()
    affine = build(module, "layer", shape, {id(p): n for n, p in module.named_parameters()})
    x = torch.rand(1, *shape).double()
    k = torch.randn(1, *affine.out_shape).double()
    precision = Precision(torch.float32)
    known = [Estimate(v, precision.rounding(v)) for v in (affine.forward(x), k)]
    gradient = affine.weight_gradient(x, k)
    fast = solve_stage(affine, gradient, *known, precision)
    slow = solve_stage(affine, gradient, *known, precision, budget=0.0)
    assert slow.solution.stats.route == "lsmr"
    assert (slow.solution.value.value - x).abs().max() < 1e-9
    ratio = slow.solution.value.std.mean() / fast.solution.value.std.mean()
    assert 0.3 < ratio < 3


def test_a_deficient_layer_is_noticed() -> None:
    module = nn.Conv2d(3, 2, 3, 2, 1).double()
    affine = build(module, "layer", (3, 8, 8), {id(p): n for n, p in module.named_parameters()})
    x, k = torch.rand(1, 3, 8, 8).double(), torch.randn(1, *affine.out_shape).double()
    precision = Precision(torch.float32)
    known = [Estimate(v, precision.rounding(v)) for v in (affine.forward(x), k)]
    found = solve_stage(affine, affine.weight_gradient(x, k), *known, precision, budget=0.0)
    assert found.solution.value is None
    assert found.solution.stats.joint is None


def test_a_whole_network_without_matrices() -> None:
    model = small_conv("sigmoid", channels=8, seed=0)
    x = picture((2, 8, 8), 1)
    update = capture(model, x, torch.tensor([1]))
    with smallest_routes():
        recovery = invert(model, update)
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.inputs is not None
    assert recovery.error_bound is not None
    assert (recovery.inputs - x).abs().max() <= recovery.error_bound
    assert {layer.route for layer in recovery.layers} == {"lsmr", "bias attack"}


def test_the_budget_sends_large_layers_there() -> None:
    module = nn.Conv2d(3, 64, 7, 2, 3)
    names = {id(p): n for n, p in module.named_parameters()}
    assert memory(build(module, "stem", (3, 224, 224), names), 1) > 3e11
    assert memory(build(module, "stem", (3, 32, 32), names), 1) < BUDGET
