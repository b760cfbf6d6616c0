"""Masks are taken only where the gradient and the weights could have refuted them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.network.affine import Affine
from rgap.network.chain import parse
from rgap.network.flow import Flow, flow_of
from rgap.precision import Estimate
from rgap.recursion import steps_above as above_module
from rgap.recursion.steps_above import StepsAbove, mask_of, steps_above
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.confirmed import Solved, Through, confirmed
from rgap.separation.shifts.masks import Masked
from rgap.separation.shifts.projections import masks_by_projection

F64 = torch.float64
RECTIFIER = Through(lambda s: s > 0.5, 0.5, lambda z, far: (z > 0, z.abs() > far), True)


def case(
    channels: int, filters: int, size: int, seed: int = 0
) -> tuple[Affine, Tensor, Tensor, Tensor, Tensor]:
    """A layer below a rectifier, its gradient, the cotangent above, the mask and the input."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(channels, filters, 3, 1, 1).double()
    affine = parse(nn.Sequential(layer, nn.Flatten()), (channels, size, size)).stages[0].affine
    x = torch.randn(1, channels, size, size, dtype=F64).relu()
    k = torch.randn(1, filters, size, size, dtype=F64)
    mask = affine.forward(x) > 0
    return affine, affine.weight_gradient(x, k * mask), k, mask, x


def shrunk(seed: int, filters: int = 16, weight: float = 1e-4, bias: float = 0.0) -> nn.Module:
    """A convolution whose gradient has as many rows as its input has positions."""
    torch.manual_seed(seed)
    conv, norm = nn.Conv2d(24, filters, 3, 1, 1), nn.BatchNorm2d(filters)
    with torch.no_grad():
        norm.running_var.uniform_(0.5, 2)
        norm.weight.fill_(weight)
        norm.bias.normal_(0, 0.3 * weight)
        assert conv.bias is not None
        conv.bias[0] -= bias
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, 1, 1), nn.ReLU(), conv, nn.Identity() if bias else norm, nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36 * filters, 10),
    ).double().eval()  # fmt: skip


@pytest.mark.cases(2)
@pytest.mark.parametrize("filters", [16, 17])
@pytest.mark.parametrize(("weight", "bias"), [(1e-4, 0.0), (1.0, 1e4)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_features_behind_a_mask_are_right_whatever_the_scale_of_its_kink(
    seed: int, weight: float, bias: float, filters: int
) -> None:
    model, x = shrunk(seed, filters, weight, bias), torch.rand(1, 1, 12, 12, dtype=F64)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor([seed])), time_limit=2.0)
    value = recovery.features.get("2")
    if value is not None:
        gap = (value - model[:2](x)).square().mean().sqrt()
        assert float(gap) <= 10.0 * recovery.features_error["2"] + 1e-12


@pytest.mark.parametrize("weight", [1.0, 1e-6])
def test_a_map_that_shrinks_its_values_loses_nothing(weight: float) -> None:
    model, x = shrunk(0, 40, weight), torch.rand(1, 1, 12, 12, dtype=F64)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor([1])))
    assert recovery.status is rgap.Status.EXACT, recovery.reason


@pytest.mark.parametrize(("weight", "shift"), [(1e-6, 0.0), (-3.0, 0.5), (1.0, -1e4)])
def test_a_unit_is_decided_in_the_scale_of_its_own_step(weight: float, shift: float) -> None:
    norm = nn.BatchNorm2d(2).double()
    with torch.no_grad():
        norm.weight[0], norm.bias[0] = weight, shift * abs(weight)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), norm, nn.ReLU(), nn.Flatten()).double().eval()
    flow = flow_of(model, (1, 2, 3))
    assert isinstance(flow, Flow)
    steps = steps_above(flow, 1, [3])
    z = torch.tensor([[-2.0, -1e-9, 1e-9], [0.5, 1.0, 2.0]], dtype=F64).expand(1, 2, 2, 3)
    on, sure = steps.forward(z, torch.full_like(z, 1e-8))
    assert torch.equal(on, norm(z) > 0)
    kink = -shift * abs(weight) / weight * (1 + norm.eps) ** 0.5
    assert torch.equal(sure[0, 0], (z[0, 0] - kink).abs() > 1e-8)
    assert torch.equal(sure[0, 1], z[0, 1].abs() > 1e-8)


def test_as_many_equations_as_unknowns_test_nothing() -> None:
    affine, gradient, k, mask, _ = case(24, 16, 12)
    for wrong in (mask, torch.rand(mask.shape) < 0.5):
        told = confirmed(affine, gradient, wrong, k)
        assert isinstance(told, str) and "144 equations" in told and "too few" in told
    assert isinstance(masks_by_projection(affine, gradient, k, RECTIFIER), Unseparated)
    gradient[:8], k[:, :8] = 0.0, 0.0  # what sends nothing is no equation, however many there are
    told = confirmed(affine, gradient, mask, k)
    assert isinstance(told, str) and "72 equations" in told


def test_few_equations_do_not_rule_out_many_masks() -> None:
    affine, gradient, k, mask, _ = case(2, 16, 10)
    found = confirmed(affine, gradient, mask, k, noise=1e-3 * float(gradient.std()))
    assert isinstance(found, str) and "do not rule out" in found
    assert isinstance(confirmed(affine, gradient, mask, k), Solved)


def test_each_contradiction_is_seen() -> None:
    affine, gradient, k, mask, x = case(24, 24, 8)
    right = confirmed(affine, gradient, mask, k, through=RECTIFIER)
    assert isinstance(right, Solved)
    torch.testing.assert_close(right.inputs.value, x, rtol=0, atol=1e-11)
    flipped = mask.clone()
    flipped[0, 3, 4, 4] ^= True
    told = confirmed(affine, gradient, flipped, k, through=RECTIFIER)
    assert isinstance(told, str) and "misses its gradient" in told
    # Met by X alone: an input below 0, other weights, a forward that says nothing.
    below = affine.weight_gradient(x - 0.1, k * mask)
    told = confirmed(affine, below, mask, k, through=RECTIFIER)
    assert isinstance(told, str) and "below 0" in told
    told = confirmed(case(24, 24, 8, 1)[0], gradient, mask, k, through=RECTIFIER)
    assert isinstance(told, str) and "not what its input gives" in told
    silent = Through(RECTIFIER.nearest, 0.5, lambda z, far: (z > 0, z != z), True)
    told = confirmed(affine, gradient, mask, k, through=silent)
    assert isinstance(told, str) and "0% of the units" in told


@pytest.mark.parametrize("alone", [True, False])
def test_masks_that_shifts_tell_are_tested_too(
    monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    affine, gradient, k, mask, _ = case(24, 24, 4)
    model = nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1), nn.ReLU(), nn.Flatten()).double()
    flow = flow_of(model, (24, 4, 4))
    assert isinstance(flow, Flow)
    steps = StepsAbove((flow.nodes[2],), None, True, "", alone)
    known = Estimate(k, torch.zeros(2, *k.shape, dtype=F64))
    args = affine, gradient, known, steps, 1e-16 * float(gradient.std()), float("inf")
    told = mask_of(*args)
    assert isinstance(told, Tensor) and torch.equal(told > 0.5, mask)
    wrong = mask.clone()
    wrong[0, 0, 1, 1] ^= True
    made = Masked(torch.eye(1, dtype=F64), wrong, 0.0, 1e9)
    monkeypatch.setattr(above_module, "_shifted", lambda *a: made)
    told = mask_of(*args)  # refused, or told by projections
    assert isinstance(told, str) or torch.equal(told > 0.5, mask)
    if not alone:
        assert isinstance(told, str) and "not confirmed" in told
