"""The rounding of values that a client computes in single precision."""

from __future__ import annotations

import pytest
import torch
from residual import Block
from torch import nn

import rgap
from rgap.jacobian.frontier import rounded
from rgap.network.flow import Flow, flow_of

UNIT = 2.0**-24


def plain(depth: int) -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers)


def residual(depth: int) -> nn.Module:
    blocks = [Block(16, 16) for _ in range(depth)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), *blocks)
    model.train()(rgap.photos.load(16, 16, dtype=torch.float32))
    return model.eval()


def perceptron(depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(768, 128)]
    for _ in range(depth):
        layers += [nn.Tanh(), nn.Linear(128, 128)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("depth", [1, 4, 9])
@pytest.mark.parametrize("build", [plain, residual, perceptron])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_clients_rounding_is_covered_and_not_by_far(
    build: type[nn.Module], depth: int, seed: int
) -> None:
    """The last value, computed in float32 as a client does and in float64 from the same weights."""
    torch.manual_seed(seed)
    model, x = build(depth), rgap.photos.load(1, 16, start=seed, dtype=torch.float32)
    with torch.no_grad():
        sent = model(x).double()
        exact = model.double()(x.double())
    flow = flow_of(model, (3, 16, 16))
    assert isinstance(flow, Flow)
    off = float((sent - exact).square().mean().sqrt())
    share = off / rounded(flow, len(flow.nodes) - 1, exact, UNIT)
    assert 0.005 < share <= 1.0
