"""Cotangents at the output, read off what a rectifier lets through of them."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap.separation.batch import Unseparated
from rgap.separation.shifts.spanned import Spanned, gauge_by_span

F64 = torch.float64


def _mixed(
    batch: int, outputs: int, filters: int = 60, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K̃, T, κ and u of normal numbers; κ sums to 0, as that of a softmax."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.randn(outputs, filters, 1, generator=generator, dtype=F64)
    span = span.expand(outputs, filters, 9)
    kappa = torch.randn(batch, outputs, generator=generator, dtype=F64)
    kappa = kappa - kappa.mean(1, keepdim=True)
    open_ = torch.rand(batch, filters, 9, generator=generator) < 0.5
    gauge = torch.randn(batch, batch, generator=generator, dtype=F64)
    below = torch.einsum("bc,cfp->bfp", kappa, span) * open_
    return torch.einsum("ab,bfp->afp", gauge, below), span, kappa, open_


def _paired(told: Spanned, kappa: Tensor, open_: Tensor) -> tuple[list[int], Tensor]:
    """Which true sample each row is, by its mask, and the rows at their length and sign."""
    apart = (told.open[:, None] != open_).flatten(2).double().mean(2)
    _, mate = linear_sum_assignment(apart.numpy())
    assert float(apart[range(len(mate)), mate].max()) == 0.0
    size = (told.coordinates * kappa[mate]).sum(1) / told.coordinates.square().sum(1)
    return list(mate), size[:, None] * told.coordinates


@pytest.mark.parametrize("batch", [1, 2, 5, 14])
@pytest.mark.parametrize("outputs", [2, 3, 10])  # also fewer than there are samples
def test_cotangents_and_masks_of_every_sample(batch: int, outputs: int) -> None:
    mixed, span, kappa, open_ = _mixed(batch, outputs)
    told = gauge_by_span(mixed, span)
    assert isinstance(told, Spanned), told
    mate, rows = _paired(told, kappa, open_)
    torch.testing.assert_close(rows, kappa[mate], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("unit", [1e-9, 1e-6])
def test_errors_are_carried(unit: float) -> None:
    mixed, span, kappa, open_ = _mixed(4, 3)
    noise = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    told = gauge_by_span(mixed + unit * noise, span)
    assert isinstance(told, Spanned)
    mate, rows = _paired(told, kappa, open_)
    own = told.roots.square().sum(2).sqrt() * (rows / told.coordinates).abs()
    off = (rows - kappa[mate]).abs()
    assert float((off.square().mean() / own.square().mean()).sqrt()) < 3.0
    assert float(own.max()) < 1e3 * unit


def test_equal_cotangents_are_told_apart_by_their_masks() -> None:
    """Samples of one label, of which the network is equally sure."""
    _, span, kappa, open_ = _mixed(6, 4)
    below = torch.einsum("bc,cfp->bfp", kappa[:1].expand(6, -1), span) * open_
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=F64)
    told = gauge_by_span(torch.einsum("ab,bfp->afp", mixing, below), span)
    assert isinstance(told, Spanned), told
    alike = kappa[:1].expand(6, -1)
    _, rows = _paired(told, alike, open_)
    torch.testing.assert_close(rows, alike, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["unrelated", "leaky", "same mask", "more outputs than filters"])
def test_what_is_no_mask_is_refused(kind: str) -> None:
    mixed, span, kappa, open_ = _mixed(3, 4)
    if kind == "unrelated":
        mixed = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    if kind == "leaky":
        slopes = torch.where(open_, 1.0, 0.1)
        mixed = torch.einsum("bc,cfp->bfp", kappa, span) * slopes
    if kind == "same mask":  # any two combinations are samples too
        mixed = torch.einsum("bc,cfp->bfp", kappa, span) * open_[:1]
    if kind == "more outputs than filters":
        mixed, span = mixed[:, :3], span[:, :3]
    told = gauge_by_span(mixed, span)
    assert isinstance(told, Unseparated), told


def test_what_does_not_fit_the_memory_is_refused() -> None:
    mixed, span, _, _ = _mixed(5, 4)
    told = gauge_by_span(mixed, span, room=1e4)
    assert isinstance(told, Unseparated) and "memory" in told.reason
