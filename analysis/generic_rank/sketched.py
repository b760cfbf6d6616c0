"""Rank of a gradient block from a random compression of its longer side."""

from __future__ import annotations

import torch

from rgap.jacobian.update_map import SignSketch
from rgap.solvers.kronecker import Kronecker
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.solvers.svd import singular_values

__all__ = ["sketched_rank"]

ROOM = 2  # width of a sketch over the smaller side of what it compresses
SPARE = 64  # columns beyond it: a small K is compressed by less, or not at all


def sketched_rank(kronecker: Kronecker, seed: int = 0) -> Rank:
    """Rank of ``I_C ⊗ K`` from random signs on the longer side of K, never above the rank.

    The longer side is compressed to twice the shorter, which keeps the rank with probability
    close to one and changes σ_1/σ_r by a small factor.

    Args:
        kronecker: K, [groups, rows, columns], and its channels.
        seed: of the signs.

    >>> found = sketched_rank(Kronecker(torch.ones(1, 2, 500).double(), 3))
    >>> found.rank, found.size
    (3, 1500)
    """
    matrix = kronecker.matrix
    groups, rows, columns = matrix.shape
    wide = columns >= rows
    places = ROOM * min(rows, columns) + SPARE
    if max(rows, columns) <= places:
        return kronecker.rank()
    sketch = SignSketch(max(rows, columns), places, seed)
    small = torch.stack([sketch(part if wide else part.T) for part in matrix])
    cutoff = resolve_rcond(None, (rows, columns))
    ranks = [numerical_rank(values, columns, cutoff) for values in singular_values(small)]
    return Rank.summed(ranks, kronecker.channels // groups)
