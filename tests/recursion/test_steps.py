"""Back through an activation: what its output says of its input, and with which error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgap.network.chain import parse
from rgap.precision import Estimate, Precision
from rgap.recursion.steps import through

F64 = torch.float64


@pytest.mark.parametrize(
    ("activation", "far"),
    [
        (nn.SELU, -900.0), (nn.ELU, -400.0), (nn.CELU, -400.0), (nn.Tanh, 40.0),
        (nn.Tanh, -40.0), (nn.Sigmoid, 90.0), (nn.Softsign, 1e12),
    ],
)  # fmt: skip
def test_within_its_error_of_an_asymptote_a_value_tells_no_input(
    activation: type[nn.Module], far: float
) -> None:
    net = nn.Sequential(nn.Linear(4, 64), activation(), nn.Linear(64, 2)).to(F64)
    tail = parse(net, (4,)).stages[0].tail
    z = torch.linspace(-1.5, 1.5, 64, dtype=F64)[None].clone()
    z[0, ::2] = far
    precision, off = Precision(torch.float32), 1e-6
    value = net[1](z) + off * torch.randn(1, 64, dtype=F64)
    if bool((value.abs() >= 1.0).any()) and activation in (nn.Tanh, nn.Softsign):
        value = value.clamp(-1.0 + 1e-9, 1.0 - 1e-9)
    if activation is nn.Sigmoid:
        value = value.clamp(1e-9, 1.0 - 1e-9)
    known = Estimate(value, precision.normal(torch.full_like(value, off)))
    ones = torch.ones_like(value)
    taken = through(tail, known, Estimate(ones, precision.normal(0.0 * ones)), precision)
    assert isinstance(taken, tuple)
    back, _ = taken
    assert not bool(back.known[0, ::2].any()) and bool(back.known[0, 1::2].all())
    gap = (back.value - z)[0, 1::2].abs()
    assert bool((gap <= 8.0 * back.std[0, 1::2]).all())
