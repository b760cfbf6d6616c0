"""A unit of a rectifier that is on by less than the error of its value refutes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from rgap.network.chain import parse
from rgap.precision import Estimate, Precision
from rgap.recursion.descend import descend
from rgap.recursion.reached import Descent, Reached

F64 = torch.float64
SEEDS = (0, 1, 2, 4, 5, 7)  # whose smallest unit is far below the others


def convolution() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 10)
    ).to(F64)  # fmt: skip


def connected() -> nn.Sequential:
    return nn.Sequential(nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 10)).to(F64)


def told(model: nn.Sequential, x: Tensor, size: float, seed: int) -> Descent:
    """The descent from features whose smallest unit lies at five of its standard errors."""
    generator = torch.Generator().manual_seed(seed)
    head = model[-1]
    u = model[:-1](x).detach()
    y = torch.full((len(x),), 3)
    sent = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    gradients = {name: g.detach() for name, g in grad(loss)(sent).items()}
    gradients["0.weight"] = gradients["0.weight"] * size
    std = float(u[u > 0].min()) / 5.0
    assert std < 1e-3
    precision = Precision(dtype=torch.float32)
    errors = std * torch.randn(precision.samples, *u.shape, generator=generator, dtype=F64)
    off = 0.1 * std * torch.randn(u.shape, generator=generator, dtype=F64)
    k = (torch.softmax(head(u), 1) - nn.functional.one_hot(y, 10)).detach() / len(x)
    start = Reached(1, Estimate(k, precision.rounding(k)), Estimate(u + off, errors), None)
    return descend(parse(model, tuple(x.shape[1:])), gradients, start, precision)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_unit_on_within_its_error_is_settled_by_its_filter(seed: int) -> None:
    torch.manual_seed(seed)
    convolved = seed % 2 == 0
    model = convolution() if convolved else connected()
    x = torch.rand(2, *((1, 6, 6) if convolved else (36,)), dtype=F64)
    found = told(model, x, size=1.0, seed=seed)
    assert not found.refuted, found.worst
    data = found.require_data()
    assert float((data.value - x).abs().max()) < 10.0 * float(data.std.max())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_gradient_of_another_size_is_refuted_beside_such_a_unit(seed: int) -> None:
    torch.manual_seed(seed)
    model = convolution() if seed % 2 == 0 else connected()
    x = torch.rand(2, *((1, 6, 6) if seed % 2 == 0 else (36,)), dtype=F64)
    found = told(model, x, size=1.5, seed=seed)
    assert found.refuted
