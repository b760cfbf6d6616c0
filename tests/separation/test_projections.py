"""Masks and winners by alternating least squares: right, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgap.network.affine import Affine
from rgap.network.chain import parse
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.projections import Projected, Through, masks_by_projection

F64 = torch.float64


def conv(channels: int, filters: int, size: int) -> Affine:
    layer = nn.Conv2d(channels, filters, 3, 1, 1).double()
    return parse(nn.Sequential(layer, nn.Flatten()), (channels, size, size)).stages[0].affine


def winners(shares: Tensor) -> Tensor:
    _, places = F.max_pool2d(shares, 2, return_indices=True)
    flat = torch.zeros_like(shares, dtype=torch.bool).flatten(2)
    return flat.scatter_(2, places.flatten(2), True).reshape(shares.shape)


def pooled(z: Tensor, far: float) -> tuple[Tensor, Tensor]:
    return winners(z.relu()) & (z > 0), torch.ones_like(z, dtype=torch.bool)


def rectified(z: Tensor, far: float) -> tuple[Tensor, Tensor]:
    return z > 0, z.abs() > far


RECTIFIER = Through(lambda s: s > 0.5, 0.5, rectified, True)
POOL = Through(winners, 0.25, pooled, True)


def case(
    steps: Through, batch: int, width: int, size: int, seed: int
) -> tuple[Affine, Tensor, Tensor, Tensor, Tensor]:
    """A layer, its gradient, the cotangent above it, the mask and the input."""
    torch.manual_seed(seed)
    affine = conv(width, width, size)
    x = torch.randn(batch, width, size, size, dtype=F64).relu()
    mask, _ = steps.forward(affine.forward(x), 0.0)
    if steps is POOL:
        alive = mask.double().reshape(batch, width, size // 2, 2, size // 2, 2).sum((3, 5))
        k = torch.randn(batch, width, size // 2, size // 2, dtype=F64) * alive
        above = k.repeat_interleave(2, 2).repeat_interleave(2, 3)
    else:
        above = torch.randn(batch, width, size, size, dtype=F64)
    return affine, affine.weight_gradient(x, above * mask), above, mask, x


@pytest.mark.parametrize("steps", [RECTIFIER, POOL], ids=["rectifier", "pool"])
@pytest.mark.parametrize(("batch", "width", "size"), [(1, 32, 8), (2, 32, 6), (1, 40, 10)])
def test_what_is_let_through_is_right_or_refused(
    steps: Through, batch: int, width: int, size: int
) -> None:
    """Shifts bear 32 positions there at most; here are 64, 72, and 100 where 40 are borne."""
    solved = 0
    for seed in range(6):
        affine, gradient, above, mask, x = case(steps, batch, width, size, seed)
        told = masks_by_projection(affine, gradient, above, steps)
        if isinstance(told, Projected):
            solved += 1
            assert bool((told.open == mask)[above != 0].all())
            torch.testing.assert_close(told.inputs, x, rtol=0, atol=1e-9)
    assert solved >= 3


def test_errors_of_the_gradient_and_of_the_cotangent_are_allowed_for() -> None:
    affine, gradient, above, mask, _ = case(RECTIFIER, 1, 32, 8, 0)
    noise = 1e-6 * float(gradient.square().mean().sqrt())
    error = 1e-6 * float(above.square().mean().sqrt())
    sent = gradient + noise * torch.randn_like(gradient)
    off = above + error * torch.randn_like(above)
    told = masks_by_projection(affine, sent, off, RECTIFIER, noise, error)
    assert isinstance(told, Projected) and told.misfit < 3.0
    assert bool((told.open == mask).all())
    assert isinstance(masks_by_projection(affine, sent, off, RECTIFIER), Unseparated)


def test_what_is_no_gradient_of_the_layer_is_refused() -> None:
    affine, gradient, above, _, _ = case(RECTIFIER, 1, 32, 8, 0)
    for wrong in (torch.randn_like(gradient), gradient.roll(1, 0), gradient.flip(2)):
        told = masks_by_projection(affine, wrong, above, RECTIFIER)
        assert isinstance(told, Unseparated) and "standard errors" in told.reason
    few = masks_by_projection(conv(4, 4, 8), gradient[:4, :4], above[:, :4], RECTIFIER)
    assert isinstance(few, Unseparated) and "too few" in few.reason
    none = masks_by_projection(affine, 0.0 * gradient, above, RECTIFIER)
    assert isinstance(none, Unseparated)


def test_weights_that_are_not_the_clients_are_seen_by_what_the_input_gives() -> None:
    affine, gradient, above, _, _ = case(RECTIFIER, 1, 32, 8, 0)
    other = conv(32, 32, 8)
    told = masks_by_projection(other, gradient, above, RECTIFIER)
    assert isinstance(told, Unseparated) and "not what its input gives" in told.reason
    assert isinstance(masks_by_projection(affine, gradient, above, RECTIFIER), Projected)
