"""How often a picture occurs in a batch, and the size of one that is not stated: whole numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rgap.jacobian.batch_loss import loss_scale
from rgap.limits import WHOLE
from rgap.update.losses import Loss

EVEN = 1.5  # ratio of two weights below which they are taken for equal
NEAR = 0.02  # the same where no batch size is stated: any ratios are near some fractions
MOST = 1024  # copies of one picture that are looked for where no batch size is stated


def multiplicity(share: float, loss: Loss, batch: int, classes: int) -> float:
    """How often a sample occurs in a batch of ``batch``; whole if share and size are right."""
    return 1.0 / (loss_scale(loss, batch, classes) * share)


def whole(m: float, most: int | None = None) -> bool:
    """True if m is a positive whole number, at most ``most``, up to the error of a target."""
    if not 0.5 <= m <= (MOST if most is None else most) + WHOLE:
        return False
    return abs(m - round(m)) <= WHOLE


def smallest_batch(shares: Sequence[float], loss: Loss, classes: int) -> int | None:
    """The smallest batch size in which every sample occurs a whole number of times.

    Args:
        shares: xᵀG⁺k of every sample.
        loss: the client's.
        classes: entries of an output.

    Returns:
        B, or None if none up to ``MOST`` copies a picture fits.

    >>> smallest_batch([4.0, 4.0, 2.0], Loss(), 10)  # B/m: the third picture occurs twice
    4
    """
    if loss.reduction == "sum":
        counts = [1.0 / share if share > 0 else 0.0 for share in shares]
        return sum(round(m) for m in counts) if all(whole(m) for m in counts) else None
    one = loss_scale(loss, 1.0, classes)
    ratios = [share * one for share in shares]
    if min(ratios) <= 0:
        return None
    for copies in range(1, MOST + 1):  # of the picture that occurs least
        batch = round(copies * max(ratios))
        if abs(batch - copies * max(ratios)) > NEAR * batch:
            continue
        counts = [batch / ratio for ratio in ratios]
        near = all(abs(m - round(m)) <= NEAR * m and round(m) >= 1 for m in counts)
        if near and sum(round(m) for m in counts) == batch:
            return batch
    return None


def split_counts(probabilities: Tensor, excess: Tensor) -> tuple[int, Tensor] | None:
    """Copies m and class counts n of one picture with several labels: m p − n = κ/s.

    Args:
        probabilities: p, [C].
        excess: κ/s, [C].

    Returns:
        (m, n [C]) with the smallest m, or None.
    """
    for m in range(1, MOST + 1):
        n = m * probabilities - excess
        nearest = n.round()
        near = float((n - nearest).abs().max()) <= 0.05 and float(nearest.min()) >= 0
        if near and int(nearest.sum()) == m:
            return m, nearest
    return None


def batch_of(stated: int | None, shares: Tensor, loss: Loss, classes: int) -> int | None:
    """The stated batch size, or the smallest that fits."""
    if stated is not None:
        return stated
    finite = shares[torch.isfinite(shares)].tolist()
    if finite and loss.reduction == "mean" and 0 < max(finite) < EVEN * min(finite):
        return len(shares)  # rough weights that are alike: each occurs once
    return smallest_batch(finite, loss, classes) if finite else len(shares)
