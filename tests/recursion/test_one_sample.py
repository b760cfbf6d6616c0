"""Below steps without a mask: the cotangent of one sample from the convolution alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from computed import computed
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap.limits import SAFETY
from rgap.precision import Estimate, Precision
from rgap.recovery import Status
from rgap.recursion.graph import descend_graph

F64 = torch.float64


class Bent(nn.Module):
    """Two convolutions with a skip past the second, and a step of any kind behind each."""

    def __init__(self, step: Callable[[Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.first, self.n1 = nn.Conv2d(3, 40, 5, 3, 2, bias=False), nn.BatchNorm2d(40)
        self.second, self.n2 = nn.Conv2d(40, 40, 3, 1, 1, bias=False), nn.BatchNorm2d(40)
        self.third = nn.Conv2d(40, 40, 3, 1, 1, bias=bias)
        self.pool, self.head, self.step = nn.AdaptiveAvgPool2d(1), nn.Linear(40, 4), step
        for norm in (self.n1, self.n2):
            norm.bias.requires_grad_(bias)

    def forward(self, x: Tensor) -> Tensor:
        a = self.step(self.n1(self.first(x)))
        b = self.step(self.n2(self.second(a)) + a)
        return self.head(self.pool(self.step(self.third(b))).flatten(1))


def network(step: Callable[[Tensor], Tensor], dtype: torch.dtype, bias: bool = True) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Bent(step, bias)
        model.train()(rgap.photos.load(16, 12, dtype=torch.float32))
    return model.to(dtype).eval()


@pytest.mark.parametrize("step", [F.silu, F.gelu, torch.sin, F.mish])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_values_below_steps_without_an_inverse(
    step: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    model, x = network(step, dtype), rgap.photos.load(1, 12, start=3).to(dtype)
    with torch.no_grad():
        a = step(model.n1(model.first(x)))
        b = step(model.n2(model.second(a)) + a)
    seen = {"second": a.double(), "third": b.double()}
    flow, gradients, top = computed(model, x, torch.arange(len(x)) % 4)
    precision = Precision(dtype=dtype)
    told = descend_graph(flow, gradients, Estimate(top, precision.rounding(top)), precision)
    names = {node.name: node.sources[0] for node in flow.nodes[1:]}
    for name in ("second", "third"):
        known = told.values[names[name]]
        off = (known.value - seen[name]).abs()
        size = float(seen[name].abs().max())
        assert float(off.max()) <= (1e-9 if dtype is F64 else 1e-3) * size, name
        rms = float(known.error.square().mean().sqrt())
        assert float(off.square().mean().sqrt()) <= SAFETY * rms + 1e-14 * size, name


def test_without_a_bias_the_size_is_open() -> None:
    model, x = network(F.silu, F64, bias=False), rgap.photos.load(1, 12, start=3)
    flow, gradients, top = computed(model, x, torch.arange(len(x)) % 4)
    precision = Precision()
    told = descend_graph(flow, gradients, Estimate(top, precision.rounding(top)), precision)
    assert any("no gradient of a bias above it says" in why for why in told.ends.values())


def test_two_samples_are_not_one() -> None:
    model, x = network(F.silu, F64), rgap.photos.load(2, 12, start=3)
    flow, gradients, top = computed(model, x, torch.arange(len(x)) % 4)
    precision = Precision()
    told = descend_graph(flow, gradients, Estimate(top, precision.rounding(top)), precision)
    assert not told.below


def altered(
    dtype: torch.dtype, step: Callable[[Tensor], Tensor], name: str, factor: float, rows: int = 1
) -> Any:
    model, x = network(step, dtype), rgap.photos.load(1, 12, start=3).to(dtype)
    sent = rgap.capture(model, x, torch.tensor([0]))
    changed = sent.gradients[name].clone()
    changed[:rows] *= factor
    return rgap.invert(model, replace(sent, gradients={**sent.gradients, name: changed}))


@pytest.mark.parametrize("name", ["first.weight", "n2.bias"])
def test_float64_is_not_reproduced_to_the_rounding_of_float32(name: str) -> None:
    assert altered(F64, F.leaky_relu, name, 1.0).status is Status.EXACT
    assert altered(F64, F.leaky_relu, name, 1.0 + 1e-6).status is not Status.EXACT


def test_layers_that_contradict_each_other_have_no_features() -> None:
    assert altered(torch.float32, F.silu, "head.bias", 1.0).status is Status.EXACT
    found = altered(torch.float32, F.silu, "head.bias", 1.001, 4)
    assert "no features are certified" in found.reason and not found.features


class Skipped(nn.Module):
    """A residual block of some width; its output as it is, or its mean, goes to the head."""

    def __init__(self, step: Callable[[Tensor], Tensor], width: int, side: int, pool: bool) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(2, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.a, self.n1 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.b, self.n2 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(1) if pool else nn.Identity()
        self.head, self.step = nn.Linear(width if pool else width * side * side, 6), step

    def forward(self, x: Tensor) -> Tensor:
        h = self.step(self.n0(self.stem(x)))
        h = self.step(self.n2(self.b(self.step(self.n1(self.a(h))))) + h)
        return self.head(self.pool(h).flatten(1))


STEPS = {"silu": F.silu, "leaky": lambda x: F.leaky_relu(x, 0.1), "gelu": F.gelu}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_errors_of_features_are_those_that_are_stated(step: str, pool: bool, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Skipped(STEPS[step], 24, 4, pool)
        for norm in (model.n0, model.n1, model.n2):
            with torch.no_grad():
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.5, 2)
                norm.bias.normal_(0, 0.2)
                norm.weight[::2] *= (1.0, 1e-2, 0.0)[seed]  # channels that hardly change anything
        x = torch.rand(1, 2, 4, 4) * (seed < 2)
    model.eval()
    u = rgap.capture(model, x, torch.tensor([1]))
    with torch.no_grad():
        h = model.step(model.n0(model.stem(x)))
        b = model.step(model.n1(model.a(h)))
    found = rgap.invert(model, u)
    if found.inputs is not None and found.status is Status.EXACT:
        assert float((found.inputs - x).abs().max()) <= found.error_bound
    truth = {"a": h.double(), "b": b.double()}
    for name in truth.keys() & found.features.keys():
        off = (found.features[name] - truth[name]).square().mean().sqrt()
        assert float(off) <= SAFETY * found.features_error[name], name
    if not pool and step == "leaky" and seed < 2:
        assert found.status is Status.EXACT or "b" in found.features
