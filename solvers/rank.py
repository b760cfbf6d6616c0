"""Numerical rank: the one place where a tolerance decides what counts as zero.

A :class:`Rank` is counted: from singular values, or exactly.  Where nothing was counted and the
equations are known to leave nothing open by other means, there is an :class:`Evidence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import erf, inf

import torch
from torch import Tensor

from rgap.solvers.limits import SMALL_GAP

DECADES = 1e3  # about the cutoff, in which another rank is looked for and named


def resolve_rcond(
    rcond: float | None,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float64,
    noise: float = 0.0,
) -> float:
    """Relative cutoff below which a singular value counts as zero.

    ``rcond`` wins when it is given.  Otherwise the cutoff is ``max(shape)`` rounding units of
    ``dtype`` (the convention of ``numpy.linalg.matrix_rank``), or the relative ``noise`` of the
    matrix entries where that is larger: the precision of the *data* decides a rank, not the
    precision of the arithmetic.

    Args:
        rcond: explicit relative cutoff, or None.
        shape: rows and columns of the matrix.
        dtype: precision in which the entries are known.
        noise: relative error of the entries, 0 if they carry only rounding.

    Returns:
        The cutoff relative to the largest singular value.

    Raises:
        ValueError: if ``rcond`` or ``noise`` is negative.

    >>> resolve_rcond(None, (100, 80)) < 1e-13
    True
    >>> resolve_rcond(1e-6, (100, 80))
    1e-06
    """
    if rcond is not None:
        if rcond < 0:
            raise ValueError(f"expected rcond >= 0, got {rcond}; write rcond=None for the default")
        return float(rcond)
    if noise < 0:
        raise ValueError(f"expected noise >= 0, got {noise}; write the relative standard deviation")
    return float(max(max(shape) * torch.finfo(dtype).eps, noise))


@dataclass(frozen=True)
class Rank:
    """A numerical rank together with what it was decided from.

    Attributes:
        rank: number of singular values above ``cutoff``.
        size: number of columns (unknowns); ``nullity`` is ``size - rank``.
        cutoff: absolute cutoff.
        gap: σ_r / σ_{r+1}; infinite when nothing was cut or what was cut is exactly zero.
        largest, smallest: σ_1 and σ_r.
        alternative: the rank on the other side of the widest nearby gap when ``gap`` is small,
            otherwise ``rank`` itself.
    """

    rank: int
    size: int
    cutoff: float
    gap: float
    largest: float
    smallest: float
    alternative: int

    @classmethod
    def agreed(
        cls, rank: int, size: int, *, cutoff: float = 0.0, gap: float = inf,
        largest: float = 1.0, smallest: float = 1.0,
    ) -> Rank:  # fmt: skip
        """A rank that the values on the other side of the cutoff leave as it is."""
        return cls(rank, size, cutoff, gap, largest, smallest, rank)

    @classmethod
    def full(cls, size: int, ends: tuple[float, float] = (1.0, 1.0), cutoff: float = 0.0) -> Rank:
        """That of equations which fix everything; ``ends``: σ_1 and σ_r."""
        return cls.agreed(size, size, cutoff=cutoff, largest=ends[0], smallest=ends[1])

    @classmethod
    def none(cls, size: int) -> Rank:
        """That of no equations, or of zeros alone."""
        return cls.agreed(0, size, largest=0.0, smallest=0.0)

    @classmethod
    def summed(cls, ranks: Sequence[Rank], copies: int) -> Rank:
        """That of a block diagonal matrix, in which each block of ``ranks`` stands so often."""
        return cls(
            copies * sum(rank.rank for rank in ranks),
            copies * sum(rank.size for rank in ranks),
            max(rank.cutoff for rank in ranks),
            min(rank.gap for rank in ranks),
            max(rank.largest for rank in ranks),
            min((rank.smallest for rank in ranks if rank.rank), default=0.0),
            copies * sum(rank.alternative for rank in ranks),
        )

    @property
    def nullity(self) -> int:
        """Unknowns that the equations leave open."""
        return self.size - self.rank

    @property
    def condition(self) -> float:
        """σ_1/σ_r over the determined part."""
        return self.largest / self.smallest if self.smallest > 0 else inf

    @property
    def clear(self) -> bool:
        """True when the singular values on both sides of the cutoff are well separated."""
        return self.gap >= SMALL_GAP


class EvidenceKind(Enum):
    """Why equations are taken to leave nothing open where no rank was counted."""

    AGREEMENT = "iterations from two random starts end at one answer"
    ERROR = "the direction that the equations fix least is known well enough"
    ENTRIES = "the entries that are given, of an input with open ones, are known well enough"


@dataclass(frozen=True)
class Evidence:
    """That equations leave nothing open, from errors instead of singular values.

    An iteration that is started at x₀ leaves the part of x₀ in the null space as it is, so two
    answers differ there as much as their starts do (AGREEMENT).  Equations weighed by their errors
    know the direction of their smallest singular value to the standard error 1/σ (ERROR).  Neither
    is a ratio of singular values on both sides of a cutoff: there is no gap.

    Attributes:
        kind: see :class:`EvidenceKind`.
        value: ‖difference of the answers‖/‖difference of the starts‖, or a standard error in units
            of the data.
        threshold: value up to which it speaks for the equations; how far below it has to be for a
            certificate is the certificate's business.
        unknowns: that it speaks of.

    >>> seen = Evidence(EvidenceKind.AGREEMENT, 1e-9, 1e-3, 10_000)
    >>> seen.nullity, f"{seen.chance:.1e}"
    (0, '8.0e-08')
    """

    kind: EvidenceKind
    value: float
    threshold: float
    unknowns: int

    @property
    def rank(self) -> int:
        """The unknowns: none of them was found open."""
        return self.unknowns

    @property
    def nullity(self) -> int:
        """0: no direction was found open."""
        return self.unknowns - self.rank

    @property
    def chance(self) -> float:
        """Chance that two random starts agree by chance as well as they do, one direction open.

        The share that one of n directions has in a random difference is ``|g|/√n`` with g normal,
        so ``P(|g| ≤ value·√n) = erf(value·√(n/2))``.
        """
        return erf(self.value * (self.unknowns / 2) ** 0.5)


def numerical_rank(singular: Tensor, size: int, rcond: float) -> Rank:
    """Count singular values above ``rcond`` times the largest, and measure the gap there.

    Args:
        singular: singular values in any order, [r].
        size: number of columns of the matrix they belong to.
        rcond: relative cutoff from :func:`resolve_rcond`.

    Returns:
        The :class:`Rank`.

    >>> numerical_rank(torch.tensor([3.0, 1.0, 1e-17]), 3, 1e-12).rank
    2
    """
    values = singular.double().flatten().sort(descending=True).values
    if values.numel() == 0 or float(values[0]) == 0.0:
        return Rank.none(size)
    largest = float(values[0])
    cutoff = rcond * largest
    rank = int((values > cutoff).sum())
    smallest = float(values[rank - 1])
    below = float(values[rank]) if rank < values.numel() else 0.0
    gap = smallest / below if below > 0 else inf
    return Rank(rank, size, cutoff, gap, largest, smallest, _alternative(values, rank, gap))


def _alternative(values: Tensor, rank: int, gap: float) -> int:
    """Rank at the widest ratio between neighbours within three decades of the cutoff."""
    if gap >= SMALL_GAP:
        return rank
    positive = values.clamp_min(torch.finfo(values.dtype).tiny)
    ratios = positive[:-1] / positive[1:]
    near = (positive[:-1] < positive[rank - 1] * DECADES) & (
        positive[:-1] > positive[rank - 1] / DECADES
    )
    if not bool(near.any()):
        return rank
    return int(torch.where(near, ratios, torch.zeros_like(ratios)).argmax()) + 1
