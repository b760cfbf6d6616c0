"""The nearest counts: whole numbers of at least 0 with a given sum."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest_counts", "nearest_simplex"]


def nearest_counts(values: Tensor, total: int) -> Tensor:
    """Euclidean projection of ``values`` [C] on the counts ``n >= 0`` with ``sum(n) = total``.

    Adding one to ``n_j`` changes the squared distance by ``2 (n_j - v_j) + 1``, so the nearest
    counts are found by adding ``total`` ones, each where ``v_j - n_j`` is largest. All but the last
    C of these steps are skipped: projecting on the simplex first (``x_j = max(v_j - t, 0)``) and
    cutting off the fractions leaves the same n, and the rest goes to the largest fractions.

    Args:
        values: real numbers, of any sum and sign.
        total: what the counts add up to.

    Returns:
        Long tensor [C].

    Raises:
        ValueError: NaN or infinity, a total below 0, no class.

    Source: Ibaraki and Katoh 1988 (resource allocation); the simplex by Held, Wolfe and Crowder
    1974. iLRG repairs its rounded counts one by one, which does not give the nearest ones.

    Example:
        >>> nearest_counts(torch.tensor([0.6, 1.7, -0.4, 2.4]), 4)
        tensor([0, 2, 0, 2])
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values: expected [C] with C >= 1, got shape {tuple(values.shape)}.")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("values: NaN or infinity cannot be rounded; check the gradient.")
    if total < 0:
        raise ValueError(f"total: expected at least 0, got {total}; write the batch size.")
    v = values.detach().double()
    # Multiplicity in units of 1 is lost where |v| is beyond 2**52; only order matters there.
    v = (v - v.max()).clamp_min(-float(total) - 1.0)
    x = nearest_simplex(v, total)
    counts = x.floor().long()
    missing = total - int(counts.sum())
    if missing > 0:  # rounding of x itself can make it one more or less than the fractions
        fractions = x - counts
        for start in range(0, missing, len(v)):
            places = fractions.argsort(descending=True, stable=True)
            counts[places[: missing - start]] += 1
    elif missing < 0:
        spare = torch.where(counts > 0, x - counts, torch.inf)
        counts[spare.argsort(stable=True)[:-missing]] -= 1
    return counts


def nearest_simplex(values: Tensor, total: float) -> Tensor:
    """Euclidean projection of ``values`` [C] on ``x >= 0`` with ``sum(x) = total``, real-valued.

    Example:
        >>> nearest_simplex(torch.tensor([0.5, 2.0, -1.0]), 2.0)
        tensor([0.2500, 1.7500, 0.0000])
    """
    ordered = values.sort(descending=True).values
    places = torch.arange(1, len(values) + 1, device=values.device)
    shifts = (ordered.cumsum(0) - total) / places
    last = int((ordered > shifts).sum()) - 1
    return (values - shifts[max(last, 0)]).clamp_min(0.0)
