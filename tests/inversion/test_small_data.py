"""Data that leave little to work with: two voxels a side, nothing but black, mostly noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap.recovery import Status


class Cube(nn.Module):
    """A residual block of 3-d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b = nn.Conv3d(3, 24, 3, 1, 1), nn.Conv3d(24, 24, 3, 1, 1)
        self.head = nn.Linear(24 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.stem(x), 0.1)
        return self.head(F.leaky_relu(self.b(h) + h, 0.1).flatten(1))


class Unbiased(nn.Module):
    """A residual block of which a black picture makes zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 40, 3, 1, 1, bias=False)
        self.a = nn.Conv2d(40, 40, 3, 1, 1, bias=False)
        self.b = nn.Conv2d(40, 40, 3, 1, 1)
        self.head = nn.Linear(40 * 16, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.b(torch.sin(self.a(h))) + h).flatten(1))


def test_three_dimensions_of_two_places_each() -> None:
    torch.manual_seed(0)
    model, x = Cube().eval(), torch.rand(1, 3, 2, 2, 2)
    found = rgap.invert(model, rgap.capture(model, x, torch.tensor([1])))
    assert found.status is Status.EXACT
    assert float((found.inputs - x).abs().max()) <= found.error_bound


def test_a_search_that_ends_nowhere_has_no_candidate() -> None:
    torch.manual_seed(0)
    model, x = Unbiased().eval(), torch.zeros(1, 1, 4, 4)
    found = rgap.invert(model, rgap.capture(model, x, torch.tensor([0])))
    assert found.status is not Status.EXACT
    assert all(bool(torch.isfinite(c.inputs).all()) for c in found.candidates)


@pytest.mark.parametrize(("sigma", "scale"), [(1.0, 255.0), (5.0, 1e5)])
def test_a_drowned_bias_does_not_contradict_its_weights(sigma: float, scale: float) -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6)).double()
        x = scale * torch.rand(1, 1, 4, 4, dtype=torch.float64)
        update = rgap.capture(model, x, torch.tensor([3]), value_range=(0, scale))
        noisy = {n: g + sigma * torch.randn_like(g) for n, g in update.gradients.items()}
        found = rgap.invert(model, replace(update, gradients=noisy), noise=sigma, time_limit=3.0)
        assert found.status is not Status.INCONSISTENT, seed


def test_noise_of_layers_below_does_not_explain_what_those_above_miss() -> None:
    for seed in (3, 9, 16, 20):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1),
            nn.ReLU(), nn.Flatten(), nn.Linear(24, 4),
        ).double().eval()  # fmt: skip
        x = torch.rand(1, 1, 4, 4, dtype=torch.float64)
        update = rgap.capture(model, x, torch.tensor([2]))
        flat = torch.cat([g.flatten() for g in update.gradients.values()])
        noise = 0.14 * float(flat.square().mean().sqrt())
        noisy = {n: g + noise * torch.randn_like(g) for n, g in update.gradients.items()}
        sent = replace(update, gradients=noisy)
        found = rgap.invert(model, sent, noise=noise, complete=True, time_limit=2.0)
        if found.status is Status.COMPLETED:
            size = torch.cat([g.flatten() for g in noisy.values()]).norm()
            assert found.residual <= 2**0.5 * noise * flat.numel() ** 0.5 / float(size)
