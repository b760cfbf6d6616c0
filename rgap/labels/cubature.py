"""The softmax averaged over a normal scatter of its logits, and how the average moves with them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MeanSoftmax", "roots_of"]

DIRECTIONS = 8  # of the scatter, along which the softmax is averaged
FOLLOWED = 32  # of the scatter, along which its slopes are taken


def roots_of(scatter: Tensor) -> Tensor:
    """U [q, r] with ``U U^T = S`` [q, q] in its r = 32 widest directions, narrowest first."""
    values, vectors = torch.linalg.eigh(scatter)
    roots: Tensor = (vectors * values.clamp_min(0.0).sqrt())[:, -FOLLOWED:]
    return roots


class MeanSoftmax:
    """Mean of ``softmax(Q z + b)`` for normal z of K centres, by two points per direction.

    Slopes are never formed for each centre alone, [K, C, q], but in sums over centres and along
    few directions.

    Args:
        basis: Q, [C, q].
        bias: b, [C].
        centres: means of z, [K, q].
        shares: by which part of the scatter each is spread, in [0, 1], [K].
        roots: of the scatter, as `roots_of`.

    Attributes:
        mean: [K, C].
        centre: the softmax of the centres themselves, [K, C].

    Example:
        >>> two = torch.eye(2, dtype=torch.float64)
        >>> z, none = torch.zeros(1, 2).double(), torch.zeros(2).double()
        >>> means = MeanSoftmax(two, none, z, torch.ones(1).double(), two)
        >>> means.mean.tolist(), bool((means.slope(torch.ones(1).double()).sum(0) < 1e-12).all())
        ([[0.5, 0.5]], True)
    """

    def __init__(
        self, basis: Tensor, bias: Tensor, centres: Tensor, shares: Tensor, roots: Tensor
    ) -> None:
        self.basis = basis
        wide = roots.T[-DIRECTIONS:]
        points = torch.cat([wide, -wide]) * len(wide) ** 0.5
        logits = centres[:, None] + shares.sqrt()[:, None, None] * points
        self.each = torch.softmax(logits @ basis.T + bias, dim=-1)  # [K, 2 r, C]
        self.mean = self.each.mean(1)
        self.centre = torch.softmax(centres @ basis.T + bias, dim=-1)

    def slope(self, weights: Tensor) -> Tensor:
        """``sum_k w_k d mean_k / dz``, [K] → [C, q]."""
        every = self.each.flatten(0, 1)
        per_point = (weights / self.each.shape[1]).repeat_interleave(self.each.shape[1])
        both = every.T @ (per_point[:, None] * (every @ self.basis))
        return (weights @ self.mean)[:, None] * self.basis - both

    def along(self, directions: Tensor) -> Tensor:
        """``d mean_k / dz · u`` for directions U [q, r], [K, C, r]."""
        steps = self.basis @ directions
        seen = self.each.transpose(1, 2) @ (self.each @ steps) / self.each.shape[1]
        slopes: Tensor = self.mean[:, :, None] * steps - seen
        return slopes
