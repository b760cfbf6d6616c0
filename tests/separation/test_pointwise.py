"""Positions of a convolution of one tap, told apart by masks alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.separation.batch import Unseparated
from rgap.separation.shifts.pointwise import masks_alone

F64 = torch.float64


def _case(
    filters: int, channels: int, batch: int, places: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """G, k and u of neighbouring positions: what they let through is alike."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    k = drawn(batch, filters, 1).expand(batch, filters, places)
    u = drawn(batch, filters, 1) + 0.7 * drawn(batch, filters, places) > 0
    x = (drawn(batch, channels, 1) + 0.7 * drawn(batch, channels, places)).relu()
    return torch.einsum("bfp,bcp->fc", k * u, x), k, u


def _columns(masks: Tensor) -> list[set[tuple[bool, ...]]]:
    return [{tuple(one) for one in of.T.tolist()} for of in masks]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.0, 6e-8])
def test_every_position_of_every_sample_comes_back(seed: int, noise: float) -> None:
    batch, places = 1 + seed % 3, (4, 6, 9)[seed // 2]
    size = batch * places
    enough = size * (size + 1) // 2 + size - places
    gradient, k, u = _case(enough + 40, size + 10, batch, places, seed)
    noise *= float(gradient.square().mean().sqrt())
    generator = torch.Generator().manual_seed(seed)
    gradient = gradient + noise * torch.randn(gradient.shape, generator=generator, dtype=F64)
    told = masks_alone(gradient, k, noise)
    assert isinstance(told, Tensor) and _columns(told) == _columns(u)


def test_what_is_not_told_is_refused_with_its_number() -> None:
    def refused(gradient: Tensor, k: Tensor, room: float = 1e12) -> str:
        told = masks_alone(gradient, k, room=room)
        assert isinstance(told, Unseparated)
        return told.reason

    gradient, k, u = _case(40, 20, 1, 6, 0)
    assert isinstance(masks_alone(gradient, k), Tensor)
    few, above, _ = _case(20, 20, 1, 6, 0)
    assert "20 filters are equations for 27 products" in refused(few, above)
    assert "exceed the memory" in refused(gradient, k, 100.0)
    assert "expected that of 6 positions" in refused(*_case(40, 5, 1, 6, 0)[:2])
    assert "differs from position to position" in refused(gradient, k * torch.arange(1, 7))
    assert "stand out" in refused(gradient, k.flip(1))  # of other filters
    twins = u.clone()
    twins[..., 1] = u[..., 0]
    x = torch.rand(6, 20, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert "rank 5" in refused((k * twins)[0] @ x, k)
