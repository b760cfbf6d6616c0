"""Genuine updates of networks with saturated units, as the client's own arithmetic computes them.

Half of the units are far out on the tail of their activation.  What autograd makes of a slope there
is all rounding, and differs from one activation to the next: 1 − y² of a rounded y, an exponential
that overflowed, a difference of two quotients.  None of it may look like a contradiction.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgap import Status, capture, invert

F64, F32 = torch.float64, torch.float32
WIDTH, UNITS, CLASSES = 32, 24, 10
TOLD = (Status.EXACT, Status.UNDERDETERMINED)


class Called(nn.Module):
    """An activation as a function that overwrites its argument."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """φ(x)."""
        return self.function(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "logsigmoid": nn.LogSigmoid,
    "elu": nn.ELU,
    "elu in place": lambda: nn.ELU(inplace=True),
    "selu in place": lambda: nn.SELU(inplace=True),
    "celu in place": lambda: nn.CELU(0.7, inplace=True),
    "elu_": lambda: Called(F.elu_),
    "mish": nn.Mish,
}


def saturated(
    act: str, variance: float, *affines: nn.Linear | nn.Conv2d, seed: int, head: bool = True
) -> nn.Sequential:
    """Layers that are each followed by a batch norm which blows half of their units up."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()] if isinstance(affines[0], nn.Linear) else []
    for affine in affines:
        affine.reset_parameters()
        kind = nn.BatchNorm1d if isinstance(affine, nn.Linear) else nn.BatchNorm2d
        norm = kind(UNITS, eps=min(1e-5, variance))
        norm.running_var[: UNITS // 2] = variance  # type: ignore[index]
        layers += [affine, norm, ACTIVATIONS[act]()]
    wide = UNITS if isinstance(affines[-1], nn.Linear) else UNITS * 16
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(wide, CLASSES, bias=head)).eval()


def judged(net: nn.Module, dtype: torch.dtype, batch: int = 1) -> tuple[Status, str]:
    """Status and reason of a batch; no certificate may miss one of its pictures."""
    x = torch.rand(batch, 2, 4, 4, dtype=F64).to(dtype)
    update = capture(net.to(dtype), x, torch.randperm(CLASSES)[:batch])
    if not any(bool(g.any()) for g in update.gradients.values()):
        return Status.UNDERDETERMINED, "the loss is 0 to the last digit: refused as a mistake"
    recovery = invert(net, update)
    if "inputs" in recovery.certified:
        assert recovery.inputs is not None and recovery.error_bound is not None
        apart = (recovery.inputs.double()[:, None] - x.double()[None]).abs().flatten(2).amax(2)
        assert float(apart.amin(0).max()) <= recovery.error_bound
    return recovery.status, recovery.reason


@pytest.mark.cases(5)
@pytest.mark.parametrize("act", [a for a in ACTIVATIONS if a != "mish"])
def test_one_layer_is_read_in_either_precision(act: str) -> None:
    for seed, (variance, bias, head) in enumerate(product((1e-4, 1e-6), (0, 1), (0, 1))):
        first = nn.Linear(WIDTH, UNITS, bias=bool(bias))
        net = saturated(act, variance, first, seed=seed, head=bool(head))
        status, why = judged(net, F32)
        assert status in TOLD, (variance, bias, head, why)
    for seed, (variance, bias) in enumerate(product((1e-6, 1e-10, 1e-14), (0, 1))):
        first = nn.Linear(WIDTH, UNITS, bias=bool(bias))
        status, why = judged(saturated(act, variance, first, seed=seed), F64)
        assert status in TOLD, (variance, bias, why)


@pytest.mark.parametrize("seed", [0, 2, 3, 11, 19])
def test_a_sigmoid_that_overflowed_contradicts_nothing(seed: int) -> None:
    """In float32 it is 0 below z = −88.7, where values down to 1e-45 could be written."""
    net = saturated("sigmoid", 1e-5, nn.Linear(WIDTH, UNITS, bias=False), seed=seed)
    status, why = judged(net, F32)
    assert status is Status.EXACT, why


@pytest.mark.parametrize("act", ["sigmoid", "softsign", "elu in place"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_convolution_is_read_all_the_same(act: str, dtype: torch.dtype) -> None:
    for seed, variance in enumerate((1e-4, 1e-6)):
        conv = nn.Conv2d(2, UNITS, 3, 1, 1, bias=seed == 0)
        status, why = judged(saturated(act, variance, conv, seed=seed), dtype)
        assert status in TOLD, (variance, why)


@pytest.mark.cases(8)
@pytest.mark.parametrize("act", ["sigmoid", "tanh", "softplus", "elu in place", "mish"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_two_layers_above_each_other_contradict_nothing(act: str, batch: int) -> None:
    for seed, dtype in enumerate((F32, F64)):
        first, second = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, UNITS)
        status, why = judged(saturated(act, 1e-5, first, second, seed=seed), dtype, batch)
        assert status in TOLD, (dtype, why)
