"""One picture under two labels, and cotangents that are alike: no root refutes the batch size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import rgap
from rgap import Status


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["convolutional", "biasless"])
def test_a_picture_with_two_labels_is_genuine(kind: str) -> None:
    """Where probabilities are alike, p − e₂ is nearly a mixture of 2p − e₂ − e₇ and p − e₇."""
    for seed in (13, 61, 63, 73, 76, 79, 106, 112):  # a root with a third of a sample's weight
        torch.manual_seed(seed)
        x, y = torch.rand(3, 3, 5, 5), torch.tensor([2, 7, 7])
        x[1] = x[0]
        if kind == "convolutional":
            first = [nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 10)]
        else:
            first = [nn.Flatten(), nn.Linear(75, 147, bias=False), nn.Sigmoid(), nn.Linear(147, 10)]
        model = nn.Sequential(*first).eval()
        found = rgap.invert(model, rgap.capture(model, x, y))
        assert found.status is not Status.INCONSISTENT, (seed, found.reason)


@pytest.mark.parametrize("seed", range(12))
def test_a_bias_gradient_outside_the_range(seed: int) -> None:
    """Rows in another order: of dead units ``w = S⁻¹Uᵀ∂b`` is 0, and there is nothing to divide."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    sent = rgap.capture(
        model, torch.rand(1, 6).double(), torch.randn(1, 2).double(), "mse_loss",
        share_batch_size=False,
    )  # fmt: skip
    for name in ("0.weight", "0.bias"):
        own = sent.gradients
        turned = replace(sent, gradients={n: g.flip(0) if n == name else g for n, g in own.items()})
        for size in (None, 2):
            assert not rgap.invert(model, turned, batch_size=size).certified


@pytest.mark.parametrize(("act", "bias"), [(nn.Tanh, True), (nn.Sigmoid, False)])
def test_heads_that_are_sure_to_the_last_bit(act: type[nn.Module], bias: bool) -> None:
    """Where a softmax is flat a root may be anywhere: all together tell, or nothing is said."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 24, 3, padding=1, bias=bias), nn.BatchNorm2d(24), act(), nn.Flatten(),
            nn.Linear(384, 10),
        ).double().eval()  # fmt: skip
        model[-1].weight.data *= 1e3
        x, y = torch.rand(2, 2, 4, 4, dtype=torch.float64), torch.randperm(10)[:2]
        found = rgap.invert(model, rgap.capture(model, x, y))
        assert found.status is not Status.INCONSISTENT, (seed, found.reason)
        if found.status is Status.EXACT:
            assert found.inputs is not None and found.error_bound is not None
            apart = torch.cdist(found.inputs.flatten(1), x.flatten(1), p=float("inf"))
            assert float(apart.amin(1).max()) <= found.error_bound
