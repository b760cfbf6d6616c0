"""Null spaces by elimination: rank decided from singular values, basis from a pivoted QR.

Equations come in blocks.  Each block is restricted to what the blocks before it left open,
``A_i N``, so that its rank is decided in its own units; what remains open after it is
``N ← N·null(A_i N)``.  The ranks of the restricted blocks add up to the rank of all together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond

TALL = 1.5  # aspect ratio from which a QR factorisation first pays


@dataclass(frozen=True)
class Elimination:
    """What one block of equations says about m open directions.

    Attributes:
        rank: of the block, in m columns.
        basis: orthonormal columns [m, nullity]: what it leaves open.
        values: singular values, descending.
    """

    rank: Rank
    basis: Tensor
    values: Tensor


def eliminate(
    matrix: Tensor,
    *,
    rcond: float | None = None,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float64,
    basis: bool = True,
) -> Elimination:
    """Rank and null space of a block ``A [rows, m]``; SciPy has `scipy.linalg.null_space`.

    The singular values decide the rank; the basis is the last columns of Q in ``Aᵀ Π = Q R``,
    which costs a fraction of the right singular vectors and is as orthonormal.  Rows and columns
    are not scaled here.

    Args:
        matrix: A.
        rcond: relative cutoff, None for the default.
        noise: relative error of the entries.
        dtype: precision in which the entries are known.
        basis: False leaves the basis out (None columns are wanted, only the count).

    >>> found = eliminate(torch.tensor([[1.0, 1.0, 0.0]]).double())
    >>> found.rank.rank, found.basis.shape
    (1, torch.Size([3, 2]))
    """
    rows, size = matrix.shape
    cutoff = resolve_rcond(rcond, (max(rows, 1), max(size, 1)), dtype, noise)
    if rows == 0 or size == 0 or not bool(matrix.any()):
        return Elimination(
            numerical_rank(torch.zeros(0), size, cutoff),
            torch.eye(size, dtype=matrix.dtype),
            torch.zeros(0, dtype=matrix.dtype),
        )
    small = matrix
    if rows > TALL * size:
        small = torch.linalg.qr(matrix, mode="r").R
    if not basis:
        wide = small if len(small) >= size else small.T
        if len(wide) > TALL * wide.shape[1]:
            wide = torch.linalg.qr(wide, mode="r").R
        values = torch.linalg.svdvals(wide)
        return Elimination(
            numerical_rank(values, size, cutoff), matrix.new_zeros(size, 0), values
        )
    q, upper = _pivoted(small.T.contiguous())
    values = torch.linalg.svdvals(upper)
    rank = numerical_rank(values, size, cutoff)
    return Elimination(rank, q[:, rank.rank :].clone(), values)


def _pivoted(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q [m, m] and R of a QR factorisation with column pivoting."""
    from scipy.linalg import qr

    q, r, _ = qr(matrix.numpy(), mode="full", pivoting=True, check_finite=False)
    keep = min(r.shape)
    return torch.from_numpy(np.ascontiguousarray(q)), torch.from_numpy(r[:keep].copy())


def determined(basis: Tensor) -> Tensor:
    """Share of every unknown's variance that is determined: ``1 − Σ_j n_j²`` in [0, 1].

    Args:
        basis: orthonormal null directions [nullity, *shape].

    >>> determined(torch.tensor([[0.0, 1.0, 0.0]])).tolist()
    [1.0, 0.0, 1.0]
    """
    return (1.0 - basis.square().sum(0)).clamp(0.0, 1.0)


def orthonormal(directions: Tensor) -> Tensor:
    """Orthonormal basis of independent directions [m, *shape], of the same shape."""
    if len(directions) == 0:
        return directions
    flat = directions.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    return torch.linalg.qr(flat.T).Q.T.reshape(directions.shape).contiguous()
