"""Steps behind the last layer of a network that is a chain above a barrier only: words, no error.

The batch is told apart above the barrier, where the loss is that of the steps too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap.recovery import Status

STEPS = {
    "pad": lambda z: F.pad(z, (0, 1)),
    "scale": lambda z: z / 0.5 + 0.1,
    "slice": lambda z: z[:, 1:],
}


class Above(nn.Module):
    """A normalisation that no equation covers, three layers, and a step."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = STEPS[step]
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)
        self.a, self.b, self.c = nn.Linear(64, 24), nn.Linear(24, 17), nn.Linear(17, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.selu(self.norm(self.conv(x))).flatten(1)
        return self.step(self.c(torch.selu(self.b(torch.selu(self.a(h))))))


@pytest.mark.parametrize("step", STEPS)
def test_steps_behind_the_head_are_read_above_a_barrier(step: str) -> None:
    torch.manual_seed(3)
    network = Above(step).double().eval()
    x = torch.rand(3, 1, 6, 6, dtype=torch.float64)
    found = rgap.invert(network, rgap.capture(network, x, torch.arange(3)))
    assert found.inputs is None and found.status is Status.UNSUPPORTED, found.reason
    assert "'norm' (GroupNorm)" in found.reason


class Below(nn.Module):
    """A layer that gives its input, and a normalisation above it that no equation covers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(9, 12), nn.Linear(12, 4), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h + torch.tanh(self.norm(h)))


@pytest.mark.parametrize("loss", [
    rgap.Loss("mse_loss"), rgap.Loss(targets="probability"),
    rgap.Loss("binary_cross_entropy_with_logits", targets="probability"),
])  # fmt: skip
def test_stated_targets_below_a_barrier_have_the_bound_of_those_that_are_read(
    loss: rgap.Loss,
) -> None:
    torch.manual_seed(0)
    model = Below().eval()
    x, y = torch.rand(1, 9), torch.rand(1, 4).softmax(1)
    update = rgap.capture(model, x, y, loss)
    stated = y + 1e-7 * torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    read = rgap.invert(model, update)
    for labels in (y, stated):
        recovery = rgap.invert(model, update, labels=labels)
        assert recovery.status is Status.EXACT, recovery.reason
        assert recovery.targets_error_bound is not None and read.targets_error_bound is not None
        assert float((recovery.labels - y).abs().max()) <= recovery.targets_error_bound
        assert recovery.targets_error_bound <= 2 * read.targets_error_bound
