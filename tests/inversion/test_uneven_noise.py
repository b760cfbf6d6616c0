"""Noise of another size in every tensor, pictures under two labels, updates of nobody's loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap import Loss, Recovery, Status


class Folded(nn.Module):
    """|z|: of no logit is the sign known."""

    def forward(self, z: Tensor) -> Tensor:
        """Of logits."""
        return z.abs()


def held(found: Recovery, x: Tensor) -> None:
    """Certified inputs are within their bound, and a genuine update contradicts nothing."""
    assert found.status is not Status.INCONSISTENT, found.reason
    if "inputs" in found.certified:
        assert found.inputs is not None
        assert found.error_bound is not None
        assert float((found.inputs - x).abs().max()) <= found.error_bound


@pytest.mark.parametrize("noisy", ["0.bias", "0.weight", "2.weight", "2.bias"])
def test_one_tensor_alone_is_noisy(noisy: str) -> None:
    """x = Gᵀ∂b/‖∂b‖² is as wrong as ∂b, where G is known to the last bit: that is no contradiction.

    The step behind the head leaves the data to their own layer's gradient, with nothing to polish.
    """
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(18, 6), nn.Tanh(), nn.Linear(6, 26), nn.Tanh(), nn.Linear(26, 8), Folded()
        ).double().eval()  # fmt: skip
        x = torch.rand(1, 18, dtype=torch.float64)
        sent = rgap.capture(model, x, torch.tensor([2]))
        sigma = 0.05 * float(sent.gradients[noisy].square().mean()) ** 0.5
        gradients = dict(sent.gradients)
        gradients[noisy] = gradients[noisy] + sigma * torch.randn_like(gradients[noisy])
        noise = {noisy: torch.full_like(gradients[noisy], sigma)}
        found = rgap.invert(model, replace(sent, gradients=gradients, noise=noise))
        held(found, x)


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_labels_that_nearly_cancel(dtype: torch.dtype) -> None:
    """Of two classes p − y₀ + p − y₁ is small: every start ends at one root, which is no factor."""
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(12, 9), nn.Tanhshrink(), nn.Linear(9, 7), nn.Tanhshrink(), nn.Linear(7, 2)
        ).to(dtype).eval()  # fmt: skip
        with torch.no_grad():
            model[-1].weight.mul_(0.1)
            model[-1].bias.mul_(0.1)
        x = torch.rand(1, 12, dtype=dtype).expand(2, 12).clone()
        found = rgap.invert(model, rgap.capture(model, x, torch.tensor([0, 1])))
        assert found.status is not Status.INCONSISTENT, (seed, found.reason)


def test_refuted_targets_of_a_batch_that_nobody_counted() -> None:
    """Four samples that send a gradient of rank one, under another loss, and no batch size."""
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(11, 3)).eval()
        sent = rgap.capture(model, torch.rand(1, 11), torch.tensor([1]))
        bent = {n: g * (1.1 if n.endswith("bias") else 1.0) for n, g in sent.gradients.items()}
        own = Loss("own", function=lambda z, y: nn.functional.multi_margin_loss(z / 0.07, y))
        found = rgap.invert(model, replace(sent, gradients=bent, loss=own, batch_size=None))
        assert not found.certified
        assert found.reason


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        ("binary_cross_entropy_with_logits", torch.tensor([[1.0]], dtype=torch.float64)),
        ("mse_loss", torch.tensor([[1.0]], dtype=torch.float64)),
        ("cross_entropy", torch.tensor([1])),
    ],
)
def test_a_bias_gradient_that_was_lost_in_stated_noise(loss: str, target: Tensor) -> None:
    """All its entries were pruned, and their sizes are declared: that a zero is sent is no news."""
    outputs = 1 if target.is_floating_point() else 3
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, outputs)).double().eval()
        x = torch.rand(1, 8, dtype=torch.float64)
        sent = rgap.capture(model, x, target, loss=loss)
        lost = {"2.bias": torch.zeros_like(sent.gradients["2.bias"])}
        noise = {"2.bias": sent.gradients["2.bias"].abs()}
        update = replace(sent, gradients={**sent.gradients, **lost}, noise=noise)
        found = rgap.invert(model, update)
        assert found.certified == {"inputs"}, found.reason
        held(found, x)


@pytest.mark.parametrize("bent", [nn.ELU, nn.SELU, nn.CELU])
def test_noise_leaves_a_unit_on_either_side_of_a_kink(bent: type[nn.Module]) -> None:
    """A unit that is estimated just above 0 may be below it, where the slope is another."""
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(30, 24, bias=False), bent(), nn.Linear(24, 5)).double()
        x = torch.rand(1, 30, dtype=torch.float64)
        sent = rgap.capture(model, x, torch.tensor([1]), value_range=None)
        gradients = dict(sent.gradients)
        sigma = 1.0 * float(gradients["2.weight"].abs().mean())
        gradients["2.weight"] = gradients["2.weight"] + sigma * torch.randn(5, 24).double()
        noise = {"2.weight": torch.full_like(gradients["2.weight"], sigma)}
        found = rgap.invert(model, replace(sent, gradients=gradients, noise=noise))
        held(found, x)


def test_a_layer_of_which_all_is_noise_contradicts_nothing() -> None:
    """Features above it are known to the last digits; its own gradient is stated to say nothing."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(20, 32), nn.Sigmoid(), nn.Linear(32, 8), nn.Sigmoid(), nn.Linear(8, 3)
        ).double().eval()  # fmt: skip
        sent = rgap.capture(model, torch.rand(2, 20).double(), torch.tensor([2, 0]))
        g = sent.gradients["2.weight"]
        sigma = 3.0 * float(g.abs().mean()) * 10 ** (3 * torch.rand_like(g) - 2)
        gradients = {**sent.gradients, "2.weight": g + sigma * torch.randn_like(g)}
        found = rgap.invert(model, replace(sent, gradients=gradients, noise={"2.weight": sigma}))
        assert found.status is not Status.INCONSISTENT, (seed, found.reason)
