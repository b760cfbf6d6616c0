"""Counts nearest to an estimate whose errors are correlated: a lattice search."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.labels.integers import nearest_counts

__all__ = ["costs_of", "search", "swaps"]

REACH = 3.0  # standard deviations to look along a principal direction
FIRST, SECOND = 61, 9  # at most so many places along the first and the second of them
SWAPS = 200


def search(estimates: Tensor, covariance: Tensor, total: int) -> Tensor:
    """Counts n that minimise ``(n - v)^T S^-1 (n - v)`` with ``n >= 0`` and ``sum(n) = total``.

    Rounding is the special case of uncorrelated errors. Errors of label counts are not: a wrong
    mean feature moves all of them together, mostly along one direction, and rounding one by one
    undoes that. The search rounds from places along the two principal directions of S, within
    three standard deviations, then moves single labels between classes while that helps.

    Args:
        estimates: v, [C].
        covariance: S, [C, C], positive definite.
        total: what the counts add up to.

    Returns:
        The counts found, long [C].

    Source: the closest-vector problem of integer least squares (Teunissen 1995).

    Example:
        >>> v = torch.tensor([2.6, 1.4, 3.0], dtype=torch.float64)
        >>> u = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
        >>> search(v, 0.01 * torch.eye(3).double(), 7)
        tensor([3, 1, 3])
        >>> search(v + 0.3 * u, torch.outer(u, u) + 0.01 * torch.eye(3).double(), 7)
        tensor([3, 1, 3])
    """
    precision = torch.linalg.inv(covariance)
    rounded = torch.unique(_rounded_along(estimates, covariance, total), dim=0)
    best: Tensor = rounded[costs_of(rounded, estimates, precision).argmin()]
    for _ in range(SWAPS):
        gains = swaps(best, estimates, precision)
        up, down = divmod(int(gains.argmin()), len(best))
        if float(gains[up, down]) >= -1e-9:
            break
        best = best.clone()
        best[up] += 1
        best[down] -= 1
    return best


def costs_of(counts: Tensor, estimates: Tensor, precision: Tensor) -> Tensor:
    """``(n - v)^T P (n - v)`` for counts [N, C], [N]."""
    away = counts.double() - estimates
    cost: Tensor = ((away @ precision) * away).sum(dim=1)
    return cost


def _rounded_along(estimates: Tensor, covariance: Tensor, total: int) -> Tensor:
    """Nearest counts from places along the two principal directions, [N, C]."""
    values, vectors = torch.linalg.eigh(covariance)
    places = estimates[None]
    for order, most in ((-1, FIRST), (-2, SECOND)):
        if len(values) < -order:
            continue
        step = values[order].clamp_min(0.0).sqrt() * vectors[:, order]
        # Half a count between places is as fine as rounding can tell.
        number = min(int(4.0 * REACH * float(step.abs().max())), most // 2)
        along = torch.linspace(
            -REACH, REACH, 2 * number + 1, dtype=torch.float64, device=estimates.device
        )
        if not number:
            along = along.new_zeros(1)
        places = (places[:, None] + along[:, None] * step).flatten(0, 1)
    return torch.stack([nearest_counts(place, total) for place in places])


def swaps(counts: Tensor, estimates: Tensor, precision: Tensor) -> Tensor:
    """Change of cost for every move of one label to class i from class j, [C, C]."""
    slope = precision @ (counts.double() - estimates)
    own = precision.diagonal()
    gains = 2.0 * (slope[:, None] - slope) + own[:, None] + own - 2.0 * precision
    gains[:, counts == 0] = torch.inf
    return gains.fill_diagonal_(torch.inf)
