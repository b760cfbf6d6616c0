"""Batches whose samples have several labels each, or none: 0/1 targets for every logit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap import Status
from rgap.inversion.batch_rows import errors_of_targets
from rgap.inversion.problem import prepare
from rgap.update.preflight import ClientView

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


@pytest.mark.parametrize(("batch", "seed"), [(3, 917), (6, 907)])
def test_features_that_are_nearly_alike_pass_on_the_rounding_of_the_update(
    batch: int, seed: int
) -> None:
    """Behind a sigmoid the head's features differ little; targets read by them are as uncertain."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(75, 50), nn.Sigmoid(), nn.Linear(50, LOGITS)).double()
    inputs, labels = torch.rand(batch, 75).double(), (torch.rand(batch, LOGITS) < 0.4).double()
    found = rgap.invert(model, rgap.capture(model, inputs, labels, BINARY))
    assert found.status is Status.EXACT, found.reason
    assert found.inputs is not None and found.labels is not None
    gaps = torch.cdist(found.inputs, inputs)
    assert torch.equal(found.labels.double(), labels[gaps.argmin(1)])


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


def test_noise_of_the_head_moves_targets_as_it_is_stated_by_name() -> None:
    """Against 4000 draws of it; one number for all of it would be off where rows differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    inputs, labels = torch.rand(2, 6).double(), torch.zeros(2, 4).double()
    update = rgap.capture(model, inputs, labels, BINARY, dtype=torch.float64)
    noise = {n: torch.zeros_like(g) for n, g in update.gradients.items()}
    noise["2.weight"], noise["2.bias"] = torch.rand(4, 9).double(), 3 * torch.rand(4).double()
    noisy = replace(update, noise=noise)
    problem = prepare(ClientView.of(model, noisy, batch_size=2), budget=4e9)
    features = torch.rand(2, 9, dtype=torch.float64)
    table = torch.nn.functional.pad(features, (0, 1), value=1.0)
    std = torch.cat([noise["2.weight"], noise["2.bias"][:, None]], 1)
    draws = std * torch.randn(4000, 4, 10, dtype=torch.float64)
    moved = torch.linalg.lstsq(table.T.expand(4000, 10, 2), draws.mT).solution.std(0)
    assert torch.allclose(errors_of_targets(problem, features), moved, rtol=0.06)
