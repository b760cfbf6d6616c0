"""Units near zero by the gradient of the bias below their rectifier."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from rgap.arithmetic.rounding import ABSENT
from rgap.network.flow import Flow, flow_of
from rgap.precision import Estimate, Precision
from rgap.recursion.bias_sums import bias_below, opened, told_by_bias
from rgap.recursion.patterns import shares_of


class Residual(nn.Module):
    """A rectifier above a sum of two norms, and one right above a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.conv, self.skip = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.Conv2d(6, 8, 1)
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = torch.relu(self.first(x))
        return torch.relu(self.norm(self.conv(u)) - self.other(self.skip(u)))


def graph(model: nn.Module) -> Flow:
    flow = flow_of(model, (3, 5, 5))
    assert isinstance(flow, Flow)
    return flow


def test_the_bias_below_is_that_which_collects_the_cotangent() -> None:
    flow = graph(Residual().double().eval())
    relus = [p for p, node in enumerate(flow.nodes) if getattr(node.link, "kind", "") == "relu"]
    found = [bias_below(flow, place) for place in relus]
    assert found[0] == ("first.bias", 1.0)
    assert found[1] in (("norm.bias", 1.0), ("other.bias", -1.0))
    shared = nn.Conv2d(3, 3, 3, padding=1)
    twice = graph(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU()).double().eval())
    assert bias_below(twice, 2) is None


class Doubled(nn.Module):
    """A sum that reads one value twice: its bias has twice the cotangents."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return torch.relu(y + y)


def test_a_value_that_a_sum_reads_twice_has_no_bias_below() -> None:
    flow = graph(Doubled().double().eval())
    assert bias_below(flow, len(flow.nodes) - 1) is None


def test_units_that_may_be_exchanged_are_not_told() -> None:
    """Below an average all cotangents of a channel are equal: a sum counts units, no more."""
    c = case(1, torch.float64, 1e-3)
    k = Estimate(torch.ones_like(c.k.value), torch.zeros_like(c.k.error))
    near = torch.zeros_like(c.true)
    near[0, :, :, :2] = True  # ten units of a channel, of which eight are on
    share = torch.where(near, 2.0, torch.where(c.true, 1e9, -1e9))
    sums = (c.true & ~near).double().sum((0, 2, 3)) + 8.0
    gradients = {"norm.bias": sums, "other.bias": -sums}
    told = told_by_bias(c.flow, c.place, k, (share, 1.0), gradients, c.precision)
    assert told is None or not bool(told[1].any())


@dataclass
class Case:
    """The upper rectifier: what it gives and its cotangent, known up to errors."""

    flow: Flow
    place: int
    true: Tensor
    known: Estimate
    k: Estimate
    gradients: dict[str, Tensor]
    precision: Precision


def case(seed: int, dtype: torch.dtype, error: float) -> Case:
    torch.manual_seed(seed)
    flow = graph(Residual().double().eval())
    place = len(flow.nodes) - 1
    x = torch.rand(3, 8, 5, 5).double()
    x = torch.where(torch.rand_like(x) < 0.5, 0.0, x)
    near = torch.rand_like(x) < 0.003  # on, but by less than they are known
    x = torch.where(near, error * torch.rand_like(x), x)
    kappa = torch.randn_like(x)
    sums = (kappa * (x > 0)).sum((0, 2, 3)).to(dtype).double()
    gradients = {"norm.bias": sums, "other.bias": -sums}
    noise = error * torch.randn(13, *x.shape).double()
    known = Estimate(torch.where(x > 0, x + noise[0], noise[0]), noise[1:])
    k = Estimate(kappa, 1e-7 * kappa * torch.randn(12, *x.shape).double())
    return Case(flow, place, x > 0, known, k, gradients, Precision(dtype=dtype, samples=12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(8))
def test_units_that_are_on_by_less_than_their_error_are_told(seed: int, dtype: torch.dtype) -> None:
    c = case(seed, dtype, 1e-3)
    on, unsure = opened(c.flow, c.place, c.known, c.k, c.gradients, c.precision)
    wrong = (on > 0) != c.true
    told = told_by_bias(c.flow, c.place, c.k, shares_of(c.known), c.gradients, c.precision)
    assert told is not None
    channels = told[1].reshape(1, -1, 1, 1)
    assert not bool((wrong & channels).any()), "a channel that is told has no wrong unit"
    assert float(told[1].double().mean()) >= 0.5
    assert not bool((unsure & channels).any())


def test_a_bias_that_was_not_sent_or_does_not_agree_tells_nothing() -> None:
    c = case(0, torch.float64, 1e-3)
    shares = shares_of(c.known)
    assert told_by_bias(c.flow, c.place, c.k, shares, {}, c.precision) is None
    absent = torch.full((8,), ABSENT).double()
    frozen = replace(c.precision, entries={"norm.bias": absent, "other.bias": absent})
    assert told_by_bias(c.flow, c.place, c.k, shares, c.gradients, frozen) is None
    other = {name: g + 0.0123 for name, g in c.gradients.items()}
    assert told_by_bias(c.flow, c.place, c.k, shares, other, c.precision) is None
