"""Units that are saturated for good: the layer below them sends zeros that say nothing of it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from rgap import Status, capture, invert
from rgap.limits import HEARD
from rgap.network.modules import build
from rgap.precision import Estimate, Precision
from rgap.recursion.readers import Reader
from rgap.recursion.stage import solve_stage

F64, F32 = torch.float64, torch.float32
WIDTH, UNITS, CLASSES = 20, 32, 10
TOLD = ("EXACT", "UNDERDETERMINED")


def network(
    act: type[nn.Module], mean: float, shift: float, dead: int, biases: tuple[bool, bool], seed: int
) -> nn.Sequential:
    """One layer below a batch norm whose first units are moved far into saturation."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(UNITS)
    norm.running_mean[:dead] += mean  # type: ignore[index]
    nn.init.normal_(norm.bias, 0, 0.3)
    with torch.no_grad():
        norm.bias[:dead] += shift
    first = nn.Linear(WIDTH, UNITS, bias=biases[0])
    return nn.Sequential(first, norm, act(), nn.Linear(UNITS, CLASSES, bias=biases[1])).eval()


def judged(net: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[str, str]:
    """Status and reason; no certificate may miss its picture."""
    x = x.to(dtype)
    update = capture(net.to(dtype), x, torch.tensor([3]))
    if not any(bool(g.any()) for g in update.gradients.values()):
        return "UNDERDETERMINED", "features of 0 under a head without a bias: refused as a mistake"
    recovery = invert(net, update)
    if recovery.status is Status.EXACT:
        assert recovery.inputs is not None and recovery.error_bound is not None
        gap = float((recovery.inputs - x.double()).abs().max())
        assert gap <= recovery.error_bound, (gap, recovery.error_bound)
    return recovery.status.name, recovery.reason


MOVED = [(10.0, 0.0), (30.0, 0.0), (60.0, 0.0), (1e3, 0.0), (0.0, 30.0), (0.0, 1e4), (-30.0, 0.0)]


@pytest.mark.cases(4)
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh, nn.ELU, nn.Softplus])
def test_layers_below_saturated_units_certify_no_zeros(
    act: type[nn.Module], dtype: torch.dtype
) -> None:
    for seed, ((mean, shift), first, head) in enumerate(product(MOVED, (0, 1), (0, 1))):
        net = network(act, mean, shift, UNITS, (bool(first), bool(head)), seed)
        status, reason = judged(net, torch.rand(1, WIDTH, dtype=F64), dtype)
        assert status in TOLD, (mean, shift, first, head, reason)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh])
def test_units_that_are_alive_are_heard_beside_dead_ones(
    act: type[nn.Module], dtype: torch.dtype
) -> None:
    for seed, (dead, first, head) in enumerate(product((0, 1, 20, 31), (0, 1), (0, 1))):
        net = network(act, 0.0, 1e4, dead, (bool(first), bool(head)), seed)
        status, reason = judged(net, torch.rand(1, WIDTH, dtype=F64), dtype)
        assert status == "EXACT", (dead, first, head, reason)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("black", [False, True])
def test_a_convolution_below_dead_units_tells_no_picture(black: bool, head: bool) -> None:
    for seed, dead in product(range(3), (1, 32)):
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(32)
        norm.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
        with torch.no_grad():
            norm.bias[:dead] = 1e4
        conv = nn.Conv2d(2, 32, 3, 1, 1, bias=False)
        end = nn.Linear(512, CLASSES, bias=head)
        net = nn.Sequential(conv, norm, nn.Sigmoid(), nn.Flatten(), end).eval()
        x = torch.rand(1, 2, 4, 4, dtype=F64) * (not black)
        status, reason = judged(net, x, F64)
        assert status == ("EXACT" if dead == 1 else "UNDERDETERMINED"), (seed, dead, reason)


@pytest.mark.parametrize("budget", [1e9, 0.0])
@pytest.mark.parametrize("sent", [0.0, 1e-26])
def test_a_cotangent_within_its_error_fixes_nothing(sent: float, budget: float) -> None:
    """With a matrix and without: no value where no row is heard, the right one where some are."""
    module = nn.Linear(WIDTH, UNITS, bias=False).to(F64)
    affine = build(module, "layer", (WIDTH,), {id(p): n for n, p in module.named_parameters()})
    precision = Precision(F64)
    torch.manual_seed(0)
    x, k = torch.rand(1, WIDTH, dtype=F64), torch.randn(1, UNITS, dtype=F64)
    z = Estimate(0.0 * k, torch.full((24, 1, UNITS), 1e150, dtype=F64))  # nothing is known of it
    for loud in (0, 3):
        std = torch.full_like(k, 1e-16)
        value = 1e-16 * k
        value[:, :loud] = k[:, :loud]
        gradient = affine.weight_gradient(x, value)
        gradient[loud:] = sent
        noisy = Estimate(value, precision.normal(std))
        assert noisy.silent.tolist() == [False] * loud + [True] * (UNITS - loud)
        assert Reader(affine, noisy).heard.sum() == loud
        found = solve_stage(affine, gradient, z, noisy, precision, budget)
        if not loud:
            assert found.solution.value is None
            continue
        assert found.solution.value is not None
        assert found.misfit < 3.0
        assert float((found.solution.value.value - x).abs().max()) < 1e-13


def test_a_channel_is_silent_within_its_errors_only() -> None:
    error = torch.ones(24, 1, 4, 5, dtype=F64)
    error[:, :, 3] = 0.0
    value = torch.ones(1, 4, 5, dtype=F64) * torch.tensor([0.0, 0.9, 1.1, 0.0])[:, None] * HEARD
    assert Estimate(value, error).silent.tolist() == [True, True, False, False]  # the last is exact
