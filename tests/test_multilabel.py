"""Batches whose samples have several labels each, or none: 0/1 targets for every logit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap import Status

LOGITS = 14
BINARY = "binary_cross_entropy_with_logits"


def client(batch: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(batch)
    widths = [nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, LOGITS)]
    model = nn.Sequential(nn.Flatten(), *widths).to(dtype).eval()
    labels = (torch.rand(batch, LOGITS) > 0.7).to(dtype)
    return model, torch.rand(batch, 3, 4, 4, dtype=dtype), labels


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_is_recovered_with_its_labels(
    batch: int, dtype: torch.dtype, reduction: str
) -> None:
    model, inputs, labels = client(batch, dtype)
    update = rgap.capture(model, inputs, labels, rgap.Loss(BINARY, reduction=reduction))
    found = rgap.invert(model, update)
    assert found.status is Status.EXACT, found.reason
    assert found.inputs is not None and found.labels is not None
    gaps = torch.cdist(found.inputs.double().flatten(1), inputs.double().flatten(1))
    assert float(gaps.min(1).values.max()) < 1e-4
    assert found.labels.dtype == torch.long and found.labels.shape == (batch, LOGITS)
    assert torch.equal(found.labels.to(dtype), labels[gaps.argmin(1)])


def test_stated_labels_give_the_order_and_wrong_ones_contradict() -> None:
    model, inputs, labels = client(3, torch.float64)
    update = rgap.capture(model, inputs, labels, BINARY)
    found = rgap.invert(model, update, labels=labels)
    assert found.status is Status.EXACT and found.inputs is not None
    torch.testing.assert_close(found.inputs, inputs, atol=1e-8, rtol=0)
    wrong = labels.clone()
    wrong[0, 0] = 1 - wrong[0, 0]
    assert rgap.invert(model, update, labels=wrong).status is Status.INCONSISTENT


def test_targets_between_0_and_1_are_not_declared_labels() -> None:
    """Soft targets in an update that declares labels are refuted, not rounded."""
    model, inputs, _ = client(3, torch.float64)
    soft = torch.rand(3, LOGITS, dtype=torch.float64)
    update = rgap.capture(model, inputs, soft, rgap.Loss(BINARY, targets="probability"))
    found = rgap.invert(model, replace(update, loss=rgap.Loss(BINARY)))
    assert found.status is not Status.EXACT
