"""What one step along an axis does to the positions: a linear relation, and its chains.

With M = L Y of rank r and U its left singular vectors, ``R_u = Uᵀ M_u = A Y_u`` with A = UᵀL
invertible.  Let v_q be the rows of A⁻¹.  Since position q + e reads through tap u what q reads
through u + e,

    v_qᵀ R_{u+e} = v_{q+e}ᵀ R_u    for every tap u,

and where what the positions and their neighbours read is independent, no other pair (v, w) has
``vᵀ R_{u+e} = wᵀ R_u`` but sums of these.  The longest chains ``v → w → …`` begin at the first
position of a line; those of all axes begin together at the corner of each sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.separation.shifts.arrangement import Arrangement, Place
from rgap.solvers.limits import ABOVE
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.solvers.svd import right_singular_vectors

__all__ = ["Relation", "corners", "relation"]


@dataclass(frozen=True)
class Relation:
    """All pairs (v, w) of a step, as the columns of two matrices.

    Attributes:
        before: v, [r, pairs].
        after: w, [r, pairs].
        rank: that of the equations; its nullity is the number of pairs.
    """

    before: Tensor
    after: Tensor
    rank: Rank

    def step(self, v: Tensor) -> Tensor:
        """For each column v [r, n] its w."""
        combined: Tensor = torch.linalg.lstsq(self.before, v).solution
        return self.after @ combined

    def first(self, length: int) -> tuple[Tensor, float]:
        """Where the chains of that length begin, [r, pairs/(length − 1)], and the weakest gap.

        Args:
            length: positions of a line.
        """
        count = self.before.shape[1] // (length - 1)
        turn = torch.linalg.lstsq(self.before, self.after).solution
        outside = self.after - self.before @ turn
        begin = torch.eye(len(turn), dtype=turn.dtype, device=turn.device)
        end, weakest = begin, float("inf")
        for left in range(length - 2, 0, -1):  # those whose end has one step more
            kept, gap = _null(outside @ end, count * left)
            begin, end, weakest = begin @ kept, turn @ (end @ kept), min(weakest, gap)
        return self.before @ begin, weakest


def relation(
    blocks: Mapping[Place, Tensor], arrangement: Arrangement, axis: int, noise: float
) -> Relation:
    """The pairs of one step along an axis.

    Args:
        blocks: R_u, [r, C], by tap.
        arrangement: that they are of.
        axis: of the step.
        noise: standard error of an entry.
    """
    taps = list(arrangement.pairs(axis))
    table = torch.cat([torch.cat([blocks[w], -blocks[u]]) for u, w in taps], 1)
    values, vh = _all_right(table.T)
    rows, columns = table.shape
    expected = ABOVE * noise * 2**0.5 * (rows**0.5 + columns**0.5)
    rcond = resolve_rcond(None, (rows, columns), noise=expected / max(float(values[0]), 1e-300))
    rank = numerical_rank(values, rows, rcond)
    null = vh[rank.rank :].T
    half = rows // 2
    return Relation(null[:half], null[half:], rank)


def corners(firsts: Sequence[Tensor], count: int) -> tuple[Tensor, float]:
    """What spaces [r, ·] have in common, B orthonormal columns, and the gap of their sines.

    Args:
        firsts: where the chains of each axis begin.
        count: B.
    """
    common = torch.linalg.qr(firsts[0]).Q
    weakest = float("inf")
    for number, other in enumerate(firsts[1:], start=2):
        basis = torch.linalg.qr(other).Q
        keep = count if number == len(firsts) else common.shape[1] * basis.shape[1] // len(common)
        kept, gap = _null(common - basis @ (basis.T @ common), keep)
        common, weakest = common @ kept, min(weakest, gap)
    return common, weakest


def _null(matrix: Tensor, count: int) -> tuple[Tensor, float]:
    """The ``count`` right singular vectors of the smallest singular values, and the gap above."""
    values, vh = _all_right(matrix)
    above, below = float(values[-count - 1]), float(values[-count])
    return vh[len(vh) - count :].T, above / max(below, 1e-300)


def _all_right(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors of all columns, also of those beyond the rows; values with zeros."""
    rows, columns = matrix.shape
    if rows < columns:
        matrix = torch.cat([matrix, matrix.new_zeros(columns - rows, columns)])
    return right_singular_vectors(matrix)
