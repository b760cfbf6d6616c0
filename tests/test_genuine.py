"""A genuine update is never called contradictory, whatever it was sent in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgap import Loss, Status, Update, capture, invert


class Reversal(torch.autograd.Function):
    """Gradient reversal: the identity forwards, −λ backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        """The identity."""
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Reversed."""
        return -ctx.weight * grads[0], None


class Halved(torch.autograd.Function):
    """The same written without a second argument, which tracing would take for the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The identity."""
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Reversed and halved."""
        return -0.5 * grads[0]


class Reversed(nn.Module):
    """One of the two as a module."""

    def __init__(self, *weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """One pass."""
        return (Reversal if self.weight else Halved).apply(x, *self.weight)  # type: ignore


def sent(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss | None = None, **fields: Any
) -> Update:
    return capture(model.eval(), inputs, targets, loss or Loss(), **fields)


@pytest.mark.parametrize("weight", [(0.3,), ()])
@pytest.mark.parametrize(
    ("place", "batch"), [("first", 1), ("second", 2), ("convolution", 1), ("end", 1)]
)
def test_a_gradient_reversal_is_named_and_what_lies_below_comes_back(
    weight: tuple[float, ...], batch: int, place: str
) -> None:
    torch.manual_seed(0)
    layer, data = Reversed(*weight), torch.rand(batch, 12)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh())
    if place == "convolution":
        data = torch.rand(batch, 1, 6, 6)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), layer, nn.Flatten(), nn.Linear(64, 5))
    elif place == "first":
        model.insert(2, layer).append(nn.Linear(16, 5))
    else:
        model.append(nn.Linear(16, 5)).insert(4 if place == "second" else 5, layer)
    recovery = invert(model, sent(model, data, torch.arange(batch)))
    below = place != "convolution" and (batch == 1 or place != "first")
    assert ("inputs" in recovery.certified) is below
    assert recovery.status is not Status.INCONSISTENT
    assert "is a custom autograd function" in recovery.reason
    if batch == 1 and below:
        assert recovery.inputs is not None and recovery.error_bound is not None
        assert float((recovery.inputs - data).abs().max()) <= recovery.error_bound
