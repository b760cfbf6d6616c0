"""The smallest cases on which random campaigns found a wrong certificate or a raw traceback."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import rgap
from rgap.labels.posterior import inverse_of
from rgap.network.reshape import Rearrange


@pytest.mark.parametrize("seed", range(3))
def test_rank_one_of_an_unknown_batch_certifies_no_single_input(seed: int) -> None:
    """A linear network of one logit: five samples send a gradient of rank one."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 1)).double().eval()
    inputs = torch.rand(5, 6, dtype=torch.float64)
    labels = torch.tensor([1, 0, 0, 0, 1]).double().reshape(5, 1)
    update = rgap.capture(model, inputs, labels, "binary_cross_entropy_with_logits")
    found = rgap.invert(model, replace(update, batch_size=None))
    assert not found.certified
    assert found.inputs is None


def test_check_says_nothing_of_a_saturated_logit() -> None:
    """σ(z) − 1 = −1e-24: the other label fits with λ = −1e-24, but the true one is not excluded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).eval()
    with torch.no_grad():
        model[2].bias.fill_(-55.0)
    update = rgap.capture(
        model, torch.rand(1, 4), torch.zeros(1, 1), "binary_cross_entropy_with_logits"
    )
    assert rgap.check(model, update).ok


def test_check_takes_a_gradient_of_a_zero_input() -> None:
    """Of an input that is zero there is no relative error."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)
    ).eval()
    with torch.no_grad():
        model[0].bias.fill_(-9.0)
        model[2].bias.fill_(1.0)
    update = rgap.capture(model, torch.rand(1, 4), torch.tensor([1]))
    assert rgap.check(model, update).ok


def test_check_takes_losses_without_a_table() -> None:
    """Losses of which only indices are targets have no λ to look at."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    labels = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    for loss, targets in (("sigmoid_focal_loss", labels), ("focal_loss", torch.tensor([2]))):
        update = rgap.capture(model, torch.rand(1, 6), targets, rgap.Loss(loss))
        assert rgap.check(model, update).ok
        wrong = {n: 2 * g for n, g in update.gradients.items()}
        rgap.check(model, replace(update, gradients=wrong))


def test_a_singular_matrix_has_a_pseudoinverse() -> None:
    """Counts that no contrast sees leave a diagonal of zeros."""
    a = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert torch.equal(inverse_of(a), torch.diag(torch.tensor([0.5, 0.0], dtype=torch.float64)))


def test_rearranging_takes_no_samples() -> None:
    """Zero candidates are as many rows as any."""
    step = Rearrange("flip", "flip", (3,), torch.tensor([2, 1, 0]))
    assert step.forward(torch.zeros(0, 3)).shape == (0, 3)
    assert step.adjoint(torch.zeros(0, 3)).shape == (0, 3)
    assert step.inverse(torch.zeros(0, 3)).shape == (0, 3)


def test_check_misses_nothing_of_a_frozen_layer() -> None:
    """Parameters that the model has frozen need not be sent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    update = rgap.capture(model, torch.rand(1, 6), torch.tensor([2]))
    model[0].requires_grad_(False)
    sent = {n: g for n, g in update.gradients.items() if n.startswith("2")}
    assert rgap.check(model, replace(update, gradients=sent)).ok
