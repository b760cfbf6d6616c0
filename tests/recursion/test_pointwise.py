"""Bottlenecks: positions by masks alone, their places by the shifts of the next layer down."""

from __future__ import annotations

import pytest
import torch
from computed import computed
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap.limits import SAFETY
from rgap.precision import Estimate, Precision
from rgap.recursion.graph import GraphDescent, descend_graph

F64 = torch.float64


class Bottleneck(nn.Module):
    """Two bottleneck blocks below a global average."""

    def __init__(self, width: int, out: int, place: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, out, 3, 2, 1)
        for number in range(2):
            kernel, padding = (3, 1) if place else (1, 0)
            self.add_module(f"a{number}", nn.Conv2d(out, width, 1, bias=False))
            self.add_module(f"n{number}", nn.BatchNorm2d(width))
            self.add_module(f"b{number}", nn.Conv2d(width, width, kernel, 1, padding, bias=False))
            self.add_module(f"m{number}", nn.BatchNorm2d(width))
            self.add_module(f"c{number}", nn.Conv2d(width, out, 1, bias=False))
            self.add_module(f"o{number}", nn.BatchNorm2d(out))
        self.head = nn.Linear(out, 5)

    def block(self, x: Tensor, number: int) -> Tensor:
        get = self.get_submodule
        h = get(f"n{number}")(get(f"a{number}")(x)).relu()
        h = get(f"m{number}")(get(f"b{number}")(h)).relu()
        return (get(f"o{number}")(get(f"c{number}")(h)) + x).relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(self.stem(x).relu(), 0), 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def descended(
    batch: int, dtype: torch.dtype, seed: int, out: int = 480, place: bool = True
) -> tuple[GraphDescent, dict[str, int], dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Bottleneck(40, out, place)
        model.train()(torch.rand(32, 3, 6, 6))
        x = torch.rand(batch, 3, 6, 6)
    model = model.eval().to(dtype)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, given, out, name=name: seen.__setitem__(name, given[0].double())
            )
    with torch.no_grad():
        model(x.to(dtype))
    true = dict(seen)
    flow, gradients, top = computed(model, x.to(dtype), torch.arange(batch) % 5)
    precision = Precision(dtype=dtype)
    told = descend_graph(flow, gradients, Estimate(top, precision.rounding(top)), precision)
    names = {node.name: node.sources[0] for node in flow.nodes[1:]}
    return told, names, true


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_values_below_a_bottleneck(batch: int, dtype: torch.dtype, seed: int) -> None:
    told, names, seen = descended(batch, dtype, seed)
    for name in ("c1", "b1", "a1", "c0", "b0", "a0"):
        known, true = told.values[names[name]], seen[name].detach()
        off, size = (known.value - true).abs(), float(true.abs().max())
        assert float(off.max()) <= (1e-9 if dtype is F64 else 1e-3) * size, name
        rms = float(known.error.square().mean().sqrt())
        assert float(off.square().mean().sqrt()) <= SAFETY * rms + 1e-14 * size, name


def test_few_filters_and_no_shifts_below_are_said() -> None:
    told, names, _ = descended(2, F64, 0, out=120)
    assert names["c1"] not in told.values
    assert any("120 filters are equations for 189 products" in why for why in told.ends.values())
    told, names, _ = descended(1, F64, 0, place=False)
    assert names["c1"] not in told.values
    assert any("told apart, not where they are" in why for why in told.ends.values())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_pictures_below_bottlenecks_come_back(batch: int, dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Bottleneck(40, 640)
        model.train()(torch.rand(32, 3, 6, 6))
        x = torch.rand(batch, 3, 6, 6).to(dtype)
    model, labels = model.eval().to(dtype), torch.arange(batch)
    found = rgap.invert(model, rgap.capture(model, x, labels))
    assert found.status is rgap.Status.EXACT and found.labels.tolist() == labels.tolist()
    assert float((found.inputs - x).abs().max()) <= found.error_bound
