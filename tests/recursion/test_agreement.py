"""Values that one changed gradient gives are held against those of other layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap

WIDTH = 96
INSIDE = ("2.one", "2.two", "3.one", "3.two")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, bias=False)
        self.two = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norms[0](self.one(x)))
        return torch.relu(self.norms[1](self.two(inner)) + x)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, 2, 1), nn.ReLU(), Residual(), Residual(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10),
    ).eval()  # fmt: skip


def taken_in(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    seen = dict[str, Tensor]()
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].detach().clone())
        )
        for name in INSIDE
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


def off(found: Tensor, truth: Tensor) -> float:
    """Rms error, whatever the order of the batch."""
    orders = [found, found.flip(0)]
    return min(float((one - truth.double()).square().mean().sqrt()) for one in orders)


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_changed_gradient_gives_no_features(batch: int) -> None:
    model = network(batch)
    x = torch.rand(batch, 3, 8, 8)
    sent, truth = rgap.capture(model, x, torch.arange(batch)), taken_in(model, x)
    genuine = rgap.invert(model, sent)
    assert {"3.one", "3.two"} <= genuine.features.keys() or genuine.inputs is not None
    for name in INSIDE[2:]:
        for factor in (3.0, 0.99, -1.0):
            own = dict(sent.gradients)
            own[f"{name}.weight"] = factor * own[f"{name}.weight"]
            found = rgap.invert(model, replace(sent, gradients=own))
            for layer in found.features.keys() & truth.keys():
                error = off(found.features[layer], truth[layer])
                assert error <= 10 * found.features_error[layer], (name, factor, layer)
