"""Hashed gradients as a network reads them: every number of mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Standard"]

FARTHEST = 10.0  # standard deviations, beyond which a number is cut: one from a rare bucket


@dataclass(frozen=True, eq=False)
class Standard:
    """``z_i = (h_i − μ_i) / σ_i``, with the mean and the deviation of each batch size.

    Attributes:
        centres: μ, [S, m].
        spreads: σ, [S, m].
        scale_free: whether h is divided by its length first.

    >>> own = Standard.of([torch.tensor([[0.0, 5.0], [2.0, 5.0]])], scale_free=False)
    >>> own.rows(torch.tensor([[3.0, 5.0]]), 0)
    tensor([[2., 0.]])
    """

    centres: Tensor
    spreads: Tensor
    scale_free: bool

    @classmethod
    def of(cls, hashed: Sequence[Tensor], scale_free: bool) -> Standard:
        """Measured on batches of every size, [N, m] each."""
        rows = [_sized(part, scale_free) for part in hashed]
        spreads = torch.stack([part.std(0, correction=0) for part in rows])
        return cls(
            torch.stack([part.mean(0) for part in rows]),
            torch.where(spreads > 0, spreads, torch.ones_like(spreads)),
            scale_free,
        )

    def rows(self, hashed: Tensor, place: int) -> Tensor:
        """What a network reads of batches of the size at a place, [N, m]."""
        rows = _sized(hashed, self.scale_free)
        return ((rows - self.centres[place]) / self.spreads[place]).clamp(-FARTHEST, FARTHEST)


def _sized(rows: Tensor, scale_free: bool) -> Tensor:
    return torch.nn.functional.normalize(rows) if scale_free else rows
