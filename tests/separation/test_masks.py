"""What a rectifier lets through, read off cotangents that are known up to a matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.separation.batch import Unseparated
from rgap.separation.shifts.masks import Masked, gauge_by_masks

F64 = torch.float64


def _mixed(
    batch: int, filters: int = 40, seed: int = 0, alike: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """K̃, the cotangents above the mask, and the mask; ``alike``: how far apart samples are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, filters, 1, generator=generator, dtype=F64)
    own = torch.randn(batch, filters, 1, generator=generator, dtype=F64)
    above = (common + alike * own).expand(batch, filters, 9)
    open_ = torch.rand(batch, filters, 9, generator=generator) < 0.5
    gauge = torch.randn(batch, batch, generator=generator, dtype=F64)
    return torch.einsum("ab,bfp->afp", gauge, above * open_), above, open_


@pytest.mark.parametrize("batch", [1, 2, 5, 12])
@pytest.mark.parametrize("alike", [1.0, 1e-2])  # samples of one label have cotangents nearly alike
def test_masks_and_gauge_of_every_sample(batch: int, alike: float) -> None:
    mixed, above, open_ = _mixed(batch, alike=alike)
    told = gauge_by_masks(mixed, above)
    assert isinstance(told, Masked), told
    assert bool((told.open == open_).all())
    own = torch.einsum("ab,afp->bfp", told.gauge, mixed)
    torch.testing.assert_close(own, above * open_, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("unit", [1e-7, 1e-5])
def test_errors_of_the_cotangents_are_allowed_for(unit: float) -> None:
    mixed, above, open_ = _mixed(3)
    noise = torch.randn(above.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    told = gauge_by_masks(mixed + unit * noise, above + unit * noise.flip(0), unit)
    assert isinstance(told, Masked)
    assert bool((told.open == open_).all())


def test_filters_without_a_cotangent_say_nothing() -> None:
    mixed, above, open_ = _mixed(2)
    dead = torch.arange(40) < 7
    mixed[:, dead] = 0
    above = torch.where(dead[:, None], 0.0, above)
    told = gauge_by_masks(mixed, above)
    assert isinstance(told, Masked)
    assert bool((told.open == open_)[:, ~dead].all())


@pytest.mark.parametrize("kind", ["unrelated", "leaky", "same"])
def test_what_is_no_mask_is_refused(kind: str) -> None:
    mixed, above, _ = _mixed(2)
    if kind == "unrelated":
        mixed = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    if kind == "leaky":
        mixed = mixed + 0.3 * above
    if kind == "same":
        above = above[:1].expand_as(above)
    assert isinstance(gauge_by_masks(mixed, above), Unseparated)
