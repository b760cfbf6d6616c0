"""One tensor off by a few roundings, below layers that are only replayed: the bound has to hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from residual import Residual
from torch import nn

import rgap


def _residual() -> nn.Module:
    return Residual(nn.Sequential(nn.Linear(5, 5), nn.Tanh()))


@pytest.mark.cases(5)
@pytest.mark.parametrize("build", [_residual, lambda: nn.LayerNorm(5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("roundings", [0, 16, 64, 256, 1024])
def test_inputs_below_a_tensor_that_is_off(
    build: Callable[[], nn.Module], dtype: torch.dtype, roundings: int
) -> None:
    """x = Gᵀ∂b/‖∂b‖² is off by c where ∂b is: G is still of rank one, and a replay lets it pass."""
    certified = 0
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(13, 5), nn.Tanh(), build(), nn.Linear(5, 27), nn.ReLU(), nn.Linear(27, 3)
        ).to(dtype).eval()  # fmt: skip
        x = torch.rand(1, 13, dtype=dtype)
        sent = rgap.capture(model, x, torch.tensor([1]))
        for name in ("0.bias", "0.weight"):
            factor = 1.0 + roundings * torch.finfo(dtype).eps / 2
            bent = {n: g * (factor if n == name else 1.0) for n, g in sent.gradients.items()}
            found = rgap.invert(model, replace(sent, gradients=bent))
            if "inputs" in found.certified:
                certified += 1
                assert found.inputs is not None
                assert found.error_bound is not None
                off = float((found.inputs - x).abs().max())
                assert off <= found.error_bound, (seed, name)
    if not roundings:
        assert certified == 8
