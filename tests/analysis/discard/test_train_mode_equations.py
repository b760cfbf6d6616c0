"""Equations of a convolution below a batch norm in train mode, as the page on it has them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional as F

EPS = 1e-5
AXES = (0, 2, 3)


class Layer(NamedTuple):
    """Input, weights, cotangent of y, x̂, spread, κ and the gradient of the kernel."""

    u: Tensor
    weight: Tensor
    normed: Tensor
    sigma: Tensor
    kappa: Tensor
    gradient: Tensor


def layer(batch: int, channels: int, filters: int, side: int, *, rectified: bool) -> Layer:
    """A padded 3×3 convolution, a norm and a random cotangent, zero where y < 0 if rectified."""
    generator = torch.Generator().manual_seed(batch)
    drawn = {"generator": generator, "dtype": torch.float64}
    u = torch.randn(batch, channels, side, side, **drawn).relu()
    weight = torch.randn(filters, channels, 3, 3, **drawn) / (9 * channels) ** 0.5
    s = F.conv2d(u, weight, padding=1).requires_grad_()
    variance, mean = torch.var_mean(s, AXES, correction=0, keepdim=True)
    sigma = (variance + EPS).sqrt()
    normed = (s - mean) / sigma
    k = torch.randn(s.shape, **drawn)
    if rectified:
        k = k * (normed > 0)
    [kappa] = torch.autograd.grad((k * normed).sum(), s)
    [gradient] = vjp(lambda w: F.conv2d(u, w, padding=1), weight)[1](kappa)
    return Layer(u, weight, normed.detach(), sigma.detach(), kappa, gradient)


@pytest.mark.parametrize("sizes", [(1, 6, 4, 4), (2, 4, 6, 4), (2, 6, 4, 4)])
def test_a_stage_with_all_of_y_known_is_linear_up_to_a_factor(sizes: tuple[int, ...]) -> None:
    """Nullity 1 in (u, μ − b, σ), and u itself is what is left open."""
    found = layer(*sizes, rectified=False)
    u, weight, filters = found.u, found.weight, sizes[2]
    unit = torch.eye(u.numel(), dtype=u.dtype).reshape(-1, *u.shape)
    scaled = found.sigma * found.kappa
    outputs = vmap(lambda v: F.conv2d(v, weight, padding=1))(unit)
    slopes = vmap(lambda v: vjp(lambda w: F.conv2d(v, w, padding=1), weight)[1](scaled)[0])(unit)
    channel = torch.eye(filters, dtype=u.dtype)
    border = torch.einsum("bfij,fg->bfijg", found.normed, channel).reshape(-1, filters)
    ones = torch.einsum("bfij,fg->bfijg", torch.ones_like(found.normed), channel)
    sent = torch.einsum("fcij,fg->fcijg", found.gradient, channel).reshape(-1, filters)
    rows = [t.reshape(u.numel(), -1).T for t in (outputs, slopes)]
    weights = torch.cat([rows[0], -ones.reshape(-1, filters), -border], 1)
    gradients = torch.cat([rows[1], torch.zeros_like(sent), -sent], 1)
    system = torch.cat([weights / weights.norm(), gradients / gradients.norm()])
    values, null = torch.linalg.svd(system)[1:]
    assert int((values > 1e-12 * values[0]).sum()) == system.shape[1] - 1
    left = null[-1, : u.numel()]
    assert float((left @ u.flatten()).abs() / (left.norm() * u.norm())) > 1 - 1e-9


@pytest.mark.parametrize(("batch", "channels"), [(1, 40), (2, 40), (3, 60)])
def test_shifts_tell_differences_of_positions_apart(batch: int, channels: int) -> None:
    """The taps side by side have rank r − 1, the pairs of a line r(1 − 1/n) − 1 dimensions."""
    side, gradient = 4, layer(batch, channels, channels + 8, 4, rectified=True).gradient
    r = batch * side * side
    left, values, _ = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    assert int((values > 1e-11 * values[0]).sum()) == r - 1
    tap = torch.einsum("fr,fcij->ijrc", left[:, : r - 1], gradient)
    for pair in (torch.cat([tap[1:], -tap[:-1]], 2), torch.cat([tap[:, 1:], -tap[:, :-1]], 2)):
        stacked = pair.permute(2, 0, 1, 3).flatten(1)
        found = torch.linalg.svdvals(stacked)
        open_ = len(stacked) - int((found > 1e-10 * found[0]).sum())
        assert open_ == r - r // side - 1
