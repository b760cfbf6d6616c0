"""A genuine update is never ``INCONSISTENT``: what does not certify need not refute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import dense
from torch import Tensor, nn

import rgap
from rgap.recovery import Status


class Cold(nn.Module):
    """Logits over a temperature."""

    def forward(self, z: Tensor) -> Tensor:
        return z / 0.07


@pytest.mark.parametrize("seed", range(2))
def test_near_copies_with_other_labels_under_two_logits(seed: int) -> None:
    """κ of both labels is ±(1, −1): two samples look like one of any weight."""
    model = dense(18, 28, 14, 2, act=nn.SELU, seed=seed, flat=True)
    x = torch.rand(1, 18) + torch.tensor([[0.0], [1e-8]])
    update = rgap.capture(model, x, torch.tensor([1, 0]), rgap.Loss(reduction="sum"))
    assert rgap.invert(model, update).status is Status.UNDERDETERMINED


@pytest.mark.parametrize("seed", [1, 3])
def test_three_samples_of_two_parallel_logits(seed: int) -> None:
    """On one affine piece all cotangents are parallel: the weights are those of mixtures."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 12), nn.PReLU(), nn.Linear(12, 8), nn.PReLU(),
                          nn.Linear(8, 2)).eval()  # fmt: skip
    with torch.no_grad():
        model[0].bias.add_(5.0)
    x, y = torch.rand(3, 9), torch.tensor([1, 0, 1])
    for loss in (rgap.Loss(), rgap.Loss(reduction="sum")):
        update = rgap.capture(model, x, y, loss)
        assert rgap.invert(model, update).status is Status.UNDERDETERMINED


@pytest.mark.parametrize("seed", [3, 11, 19])
def test_a_root_of_a_cold_head_carries_its_own_error(seed: int) -> None:
    """Behind a temperature of 0.07 logits round fourteen times as much; roots come in pairs."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(29, 8, bias=False), Cold()).eval()
    x = torch.rand(1, 29)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor([seed % 8])))
    assert recovery.exact and recovery.labels.tolist() == [seed % 8]
    assert float((recovery.inputs - x).abs().max()) <= recovery.error_bound


def test_an_unknown_batch_size_is_refuted_by_nothing() -> None:
    """Three samples of one logit are no single one; more than one may still send the update."""
    for seed in range(3):
        model = dense(7, 1, act=nn.SELU, seed=seed, flat=True).double()
        x, y = torch.rand(3, 7, dtype=torch.float64), torch.tensor([[1.0], [0.0], [1.0]])
        update = rgap.capture(model, x, y.double(), "binary_cross_entropy_with_logits")
        found = rgap.invert(model, replace(update, batch_size=None))
        assert found.status is Status.UNDERDETERMINED and not found.certified
        assert "state batch_size" in found.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integers_are_seen_in_small_layers(dtype: torch.dtype) -> None:
    """Sixteen entries a row, two rows that mirror each other: levels of all tensors count."""
    for seed in range(4):
        model = dense(15, 2, act=nn.SELU, seed=seed, flat=True).to(dtype)
        update = rgap.capture(model, torch.rand(1, 15).to(dtype), torch.tensor([1]))
        coarse = {}
        for name, g in update.gradients.items():
            step = float(g.abs().max()) / 127
            coarse[name] = (g / step).round() * step
        found = rgap.invert(model, replace(update, gradients=coarse))
        assert found.status is Status.UNDERDETERMINED, found.reason


def test_check_leaves_a_frozen_bias_out_of_the_balance() -> None:
    """⟨W, G⟩ + ⟨b, ∂b⟩ of one layer is ⟨W, G⟩ of the next; a part that was not sent is no zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    update = rgap.capture(model, torch.rand(4, 9), torch.tensor([0, 1, 2, 3]))
    gradients = {n: g for n, g in update.gradients.items() if n != "0.bias"}
    model[0].bias.requires_grad_(False)
    best = rgap.check(model, replace(update, gradients=gradients)).best
    assert best is None or "balance" not in best.sentence
