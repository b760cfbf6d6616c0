"""Parameters whose gradient is zero whatever the data, so that a client sends rounding."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rgap.limits import VOID
from rgap.network.batch_statistics import without_running_statistics
from rgap.network.running import run

__all__ = ["cancelled"]


def cancelled(model: nn.Module, shape: tuple[int, ...]) -> frozenset[str]:
    """Names of the parameters that no output depends on, though each of its terms does.

    A shift before a batch norm in train mode, or before any normalisation that subtracts means, is
    such: ``∂L/∂b_f = Σ_p k_{f,p} = 0``.  In float64 the sum leaves 2⁻²⁹ of what it leaves in
    float32; gradients of others are the same in both.

    Args:
        model: left as it was; copies run once, on a random batch.
        shape: of the batch, [B, *input_shape].

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> sorted(cancelled(net, (5, 3))), sorted(cancelled(net.eval(), (5, 3)))
    (['0.bias'], [])
    """
    fine, coarse = (_sizes(model, shape, dtype) for dtype in (torch.float64, torch.float32))
    return frozenset(n for n, size in coarse.items() if fine[n] < VOID * size)


def _sizes(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    """Norm of the derivative of one direction of the outputs, by parameter name."""
    twin = without_running_statistics(copy.deepcopy(model).to(dtype)).requires_grad_()
    named: dict[str, Tensor] = dict(twin.named_parameters())
    place = next(iter(named.values())).device
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator, dtype=torch.float64).to(place, dtype)
    with torch.enable_grad():
        outputs = run(twin, x)
        k = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        slopes = torch.autograd.grad(
            outputs, list(named.values()), k.to(outputs), allow_unused=True
        )
    sizes = zip(named, slopes, strict=True)
    return {n: 0.0 if slope is None else float(slope.norm()) for n, slope in sizes}
