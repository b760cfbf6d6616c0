"""Winners of a max-pool by the gradient of the convolution below it, where shifts are too few."""

from __future__ import annotations

import time
from math import inf

import pytest
import torch
from torch import Tensor, nn

from rgap.network.activations import Activation
from rgap.network.affine import Affine
from rgap.network.flow import Flow, flow_of
from rgap.network.pooling import MaxPool
from rgap.precision import Estimate, Precision
from rgap.recursion.steps_above import steps_above
from rgap.recursion.winners import Above, Missed, winners_of

SIDE, CHANNELS, FILTERS = 8, 16, 32  # 64 positions: more than filters, fewer than their 288 rows


def network(kind: str, seed: int) -> nn.Sequential:
    """A convolution that reads what a rectifier gives, and a pool above it."""
    torch.manual_seed(seed)
    flat = kind == "1d"
    conv, norm, pool = (
        (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d) if flat
        else (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
    )  # fmt: skip
    layers = [conv(3, CHANNELS, 3, padding=1), nn.ReLU()]
    layers += [conv(CHANNELS, FILTERS, 3, padding=1)]
    if kind == "norm":
        of = norm(FILTERS)
        of.weight.data.uniform_(-2.0, 2.0)
        of.bias.data.normal_()
        of.running_var.uniform_(0.5, 2.0)
        layers.append(of)
    layers += [pool(2), nn.ReLU()] if kind == "pool first" else [nn.ReLU(), pool(2)]
    return nn.Sequential(*layers).double().eval()


class Case:
    """A batch through such a network, and the cotangent at its output."""

    def __init__(self, kind: str, batch: int, seed: int, dtype: torch.dtype) -> None:
        model = network(kind, seed)
        space = (2 * SIDE,) if kind == "1d" else (SIDE, SIDE)
        flow = flow_of(model, (3, *space))
        assert isinstance(flow, Flow)
        self.flow, values = flow, [torch.rand(batch, 3, *space, dtype=torch.float64)]
        for node in flow.nodes[1:]:
            values.append(node.forward([values[source] for source in node.sources]))
        self.places = [
            place for place, node in enumerate(flow.nodes)
            if node.link is not None and ("pool" in node.link.kind or node.link.kind == "relu")
        ]  # fmt: skip
        self.conv = 3
        self.input = values[self.conv - 1]
        link = flow.nodes[self.conv].link
        assert isinstance(link, Affine)
        self.affine = link
        self.behind = tuple(p for p in sorted(self.places, reverse=True) if p > self.conv)
        z = values[self.conv].clone().requires_grad_()
        top = z
        for node in flow.nodes[self.conv + 1 :]:
            top = node.forward([top])
        self.kappa = torch.randn_like(top)
        (self.k,) = torch.autograd.grad((top * self.kappa).sum(), z)
        ones = torch.ones_like(top)
        (slopes,) = torch.autograd.grad((self.passed(z) * ones).sum(), z)
        self.open, self.value = slopes != 0, top.detach()
        gradient = link.weight_gradient(values[self.conv - 1], self.k)
        self.gradient = gradient.to(dtype).double()
        self.precision = Precision(dtype=dtype, samples=4)

    def passed(self, z: Tensor) -> Tensor:
        """The output of the steps above z."""
        for node in self.flow.nodes[self.conv + 1 :]:
            z = node.forward([z])
        return z

    def told(self, deadline: float = inf) -> Tensor | Missed | str:
        """What the library says the steps let through."""
        steps = steps_above(self.flow, self.conv, self.behind, self.precision.unit)
        noise = self.precision.rms(self.affine.weight_name, self.gradient)
        above = Above(self.value, self.kappa, self.value > 0)
        k = self.kappa
        for node in reversed(steps.path):
            link = node.link
            if isinstance(link, MaxPool):
                k = link.spread(k * (self.value > 0))
            elif not isinstance(link, Activation):
                assert link is not None
                k = link.adjoint(k)
        known = Estimate(k, k.new_zeros(4, *k.shape))
        return winners_of(self.affine, self.gradient, known, steps, above, noise, deadline)


@pytest.mark.parametrize(("kind", "batch"), [("plain", 1), ("plain", 2), ("norm", 1), ("1d", 1)])
def test_the_winners_are_those_of_the_client(kind: str, batch: int) -> None:
    """Everything that is let through is found, and nothing else."""
    case = Case(kind, batch, 3, torch.float64)
    told = case.told()
    assert isinstance(told, Tensor), told
    assert torch.equal(told != 0, case.open)


@pytest.mark.parametrize("seed", range(3))
def test_rounded_gradients_tell_them_too(seed: int) -> None:
    """In float32 too."""
    case = Case("plain", 1, seed, torch.float32)
    told = case.told()
    assert isinstance(told, Tensor), told
    assert torch.equal(told != 0, case.open)


def test_a_pool_below_its_rectifier_is_refused() -> None:
    """What is on is said of windows, not of places: that is not read."""
    told = Case("pool first", 1, 0, torch.float64).told()
    assert isinstance(told, str)
    assert "shapes change" in told


def test_more_positions_than_equations_are_refused() -> None:
    """288 rows do not tell 320 entries of a channel."""
    told = Case("plain", 5, 0, torch.float64).told()
    assert isinstance(told, str)
    assert "too few" in told


def test_a_gradient_that_was_changed_has_no_winners() -> None:
    """A thousandth on one filter: no winners meet it, and none are stated; the input is near."""
    case = Case("plain", 1, 0, torch.float64)
    case.gradient[5] *= 1.001
    told = case.told()
    assert isinstance(told, Missed), "winners for a gradient that no input sends"
    assert "misses its gradient" in told.reason
    assert float((told.near - case.input).norm()) < 0.01 * float(case.input.norm())


def test_no_winners_are_told_when_the_time_is_up() -> None:
    """Nor is the answer much later than that."""
    case, began = Case("plain", 1, 0, torch.float64), time.perf_counter()
    told = case.told(began + 0.05)
    assert isinstance(told, str)
    assert "time was up" in told
