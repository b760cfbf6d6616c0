"""A completion below a barrier: the data pass through the model, not the layers above it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap.recovery import Status


class Branched(nn.Module):
    """Two layers above the place where branches meet or a step is that no equation covers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.c = nn.Conv2d(8 if kind == "concat" else 4, 8, 3, stride=2, padding=1)
        self.d = nn.Linear(8 if kind == "mean" else 72, 12)
        self.e = nn.Linear(12, 5, bias=kind != "bare")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.kind == "concat":
            h = torch.cat([h, torch.tanh(self.b(h))], 1)
        elif self.kind == "norm":
            h = torch.relu(self.norm(self.b(h)))
        else:
            h = h + torch.tanh(self.b(h))
        h = torch.tanh(self.c(h))
        h = h.mean((2, 3)) if self.kind == "mean" else h.flatten(1)
        return self.e(F.relu(self.d(h)))


@pytest.mark.cases(6)
@pytest.mark.parametrize("seconds", [0.05, 2.0])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["sum", "concat", "norm", "mean", "bare"])
def test_a_completion_below_a_barrier_raises_nothing(kind: str, batch: int, seconds: float) -> None:
    torch.manual_seed(0)
    model, x, labels = Branched(kind).eval(), torch.rand(batch, 2, 6, 6), torch.tensor([3, 1])
    update = rgap.capture(model, x, labels[:batch])
    found = rgap.invert(model, update, complete=True, time_limit=seconds)
    assert found.status is not Status.INCONSISTENT
    if found.exact:
        assert found.inputs is not None and found.error_bound is not None
        off = torch.cdist(found.inputs.flatten(1), x.double().flatten(1), p=torch.inf).amin(1)
        assert float(off.max()) <= found.error_bound
    if found.status is Status.COMPLETED:
        assert found.labels is not None and found.labels.tolist() == sorted(labels[:batch].tolist())
    labelled = rgap.invert(model, update, complete=True, time_limit=seconds, labels=labels[:batch])
    assert labelled.status is not Status.INCONSISTENT


def test_labels_above_a_barrier_are_those_of_the_features_above_it() -> None:
    torch.manual_seed(0)
    model, x = Branched("mean").eval(), torch.rand(1, 2, 6, 6)
    update = rgap.capture(model, x, torch.tensor([3]))
    found = rgap.invert(model, update, complete=True, time_limit=5.0)
    labels = found.labels if found.candidates == () else found.candidates[0].labels
    assert labels is not None and labels.tolist() == [3], found.reason


@pytest.mark.parametrize("batch", [2, 4])
def test_a_completion_of_a_dead_network_is_answered(batch: int) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    norm.bias.data -= 1e4
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, 1, 1), norm, nn.SiLU(), nn.Flatten(), nn.Linear(256, 10)
    ).double().eval()  # fmt: skip
    x, y = torch.rand(batch, 2, 4, 4).double(), torch.arange(batch) % 3
    update = rgap.capture(model, x, y, value_range=None)
    for size in (batch, None):
        sent = replace(update, batch_size=size)
        found = rgap.invert(model, sent, complete=True, time_limit=2.0)
        assert found.status not in (Status.EXACT, Status.INCONSISTENT)


def test_labels_of_a_completion_that_are_not_0_and_1_are_replayed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1), nn.SiLU(), nn.Flatten(), nn.Linear(512, 32), nn.SiLU(),
        nn.Linear(32, 20),
    ).double().eval()  # fmt: skip
    y = (torch.rand(2, 20) > 0.5).double()
    x = torch.rand(2, 1, 4, 4).double()
    update = rgap.capture(model, x, y, "binary_cross_entropy_with_logits")
    found = rgap.invert(model, update, complete=True, time_limit=2.0)
    assert found.status not in (Status.EXACT, Status.INCONSISTENT)
