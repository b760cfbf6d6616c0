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
