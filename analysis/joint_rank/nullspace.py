"""Null spaces by elimination: rank decided from singular values, basis from a pivoted QR.

Equations come in blocks.  Each block is restricted to what the blocks before it left open,
``A_i N``, so that its rank is decided in its own units; what remains open after it is
``N ← N·null(A_i N)``.  The ranks of the restricted blocks add up to the rank of all together.
Below: sets of directions ``[S, B, ...]``, their lengths, combinations and orthonormal bases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import numpy as np
import torch
from torch import Tensor

from rgap.machine.allowance import Ahead, freely
from rgap.progress import Watch, silent
from rgap.solvers.limits import CLEAR, GRAM, NOTHING
from rgap.solvers.positive import outer_products
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond

FAINT = 1e-8  # singular values, in units of the block, that rounding from above may reach
TALL = 1.5  # aspect ratio from which a QR factorisation first pays


@dataclass(frozen=True)
class RankOptions:
    """How every rank of an elimination is decided, and what it may take.

    Attributes:
        rcond: relative cutoff of singular values, None for the default.
        noise: relative error of the update's entries.
        dtype: precision in which the update is known.
        memory: bytes for everything.
        watch: told of every layer.
        ahead: asked before every factorisation whether there is time.
    """

    rcond: float | None = None
    noise: float = 0.0
    dtype: torch.dtype = torch.float64
    memory: float = inf
    watch: Watch = silent
    ahead: Ahead = freely


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
    scale: float | None = None,
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
        scale: σ_1 of the rows before they were restricted, where they are a restriction: what is
            below the cutoff relative to that is rounding, however large among its like.

    >>> found = eliminate(torch.tensor([[1.0, 1.0, 0.0]]).double())
    >>> found.rank.rank, found.basis.shape
    (1, torch.Size([3, 2]))
    """
    rows, size = matrix.shape
    cutoff = resolve_rcond(rcond, (max(rows, 1), max(size, 1)), dtype, noise)
    if rows == 0 or size == 0 or not bool(matrix.any()):
        return Elimination(
            numerical_rank(matrix.new_zeros(0), size, cutoff),
            torch.eye(size, dtype=matrix.dtype, device=matrix.device),
            matrix.new_zeros(0),
        )
    small = matrix
    if rows > TALL * size:
        small = torch.linalg.qr(matrix, mode="r").R
    if rows < size:
        quick = _by_gram(matrix, cutoff, scale)
        if quick is not None:
            return quick
    q, upper = _pivoted(small.T.contiguous())
    values = torch.linalg.svdvals(upper)
    rank = _count(values, size, cutoff, scale)
    return Elimination(rank, q[:, rank.rank :].clone(), values)


def doubted(made: Elimination, scale: float, carried: float = 0.0) -> Elimination:
    """The same with a gap of 1, which is no clear rank, where rounding may have been counted.

    Args:
        made: the decision.
        scale: of the block, in which what is below FAINT may be rounding.
        carried: relative error of the columns that came down from the decisions above.
    """
    counted = made.values[: made.rank.rank].clamp_min(1e-300)
    faint = carried > FAINT
    if len(counted) > 1:
        steps = counted[:-1] / counted[1:]
        most = int(steps.argmax())
        faint |= float(counted[most + 1]) < FAINT * scale and float(steps[most]) > made.rank.gap
    return replace(made, rank=replace(made.rank, gap=1.0)) if faint else made


def _count(values: Tensor, size: int, rcond: float, scale: float | None) -> Rank:
    largest = float(values[0])
    natural = max(largest, scale or 0.0)
    if largest > rcond * natural:
        return numerical_rank(values, size, rcond * natural / largest)
    return Rank.agreed(
        0, size, cutoff=rcond * natural, gap=natural / largest, largest=natural, smallest=0.0
    )


def _by_gram(matrix: Tensor, cutoff: float, scale: float | None) -> Elimination | None:
    """The same from AAᵀ where that can decide: no σ between CLEAR·σ_1 and what rounding leaves.

    The squares lose half the digits, so only a kept σ is read off them.  Of the rest U_0 a bound
    σ_{r+1} ≤ ‖AᵀU_0‖ is measured, after a step that takes the kept directions out of U_0.
    """
    squares, u = torch.linalg.eigh(matrix @ matrix.T)
    largest = float(squares[-1])
    kept = squares > CLEAR**2 * largest
    r = int(kept.sum())
    if bool((squares[~kept].abs() > NOTHING * largest).any()):
        return None
    if cutoff * max(1.0, (scale or 0.0) / largest**0.5) > CLEAR:
        return None
    top, values = u[:, -r:], squares[-r:].sqrt().flip(0)
    rest = u[:, : len(squares) - r]
    if rest.shape[1]:
        inside = top.T @ (matrix @ (matrix.T @ rest))
        rest = torch.linalg.qr(rest - top @ (inside / squares[-r:, None])).Q
        below = torch.linalg.svdvals(matrix.T @ rest)
        if float(below[0]) > cutoff * largest**0.5:
            return None
        values = torch.cat([values, below])
    q = torch.linalg.qr(matrix.T @ top, mode="complete").Q
    rank = _count(values, matrix.shape[1], cutoff, scale)
    return Elimination(rank, q[:, r:].contiguous(), values)


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
    basis: Tensor = torch.linalg.qr(flat.T).Q
    return basis.T.reshape(directions.shape).contiguous()


@dataclass(frozen=True)
class Open:
    """Directions left open: at some place, with the cotangent direction that each entails.

    Attributes:
        du: [S, B, ...].
        dk: [S, B, ...], of the cotangent there.
    """

    du: Tensor
    dk: Tensor


def orthonormalising(directions: Tensor) -> Tensor:
    """Change C with orthonormal Cᵀ du: by the Cholesky factor where that is accurate enough."""
    if len(directions) == 0:
        return directions.new_zeros(0, 0)
    scale = 1.0 / lengths(directions).clamp_min(1e-300)
    flat = directions.flatten(1)
    lower, info = torch.linalg.cholesky_ex(outer_products(flat) * scale[:, None] * scale)
    upper = lower.T
    diagonal = upper.diagonal().abs()
    if bool(info) or float(diagonal.min()) < GRAM * float(diagonal.max()):
        upper = torch.linalg.qr(flat.T * scale, mode="r").R
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return scale[:, None] * inverse


def combined(change: Tensor, directions: Tensor) -> Tensor:
    """changeᵀ directions, [a, b] and [a, *shape] → [b, *shape]."""
    return (change.T @ directions.flatten(1)).reshape(change.shape[1], *directions.shape[1:])


def padded(rows: Tensor, before: int) -> Tensor:
    """The rows below ``before`` rows of zeros."""
    return torch.cat([rows.new_zeros(before, rows.shape[1]), rows])


def lengths(directions: Tensor) -> Tensor:
    """Length of each direction, [S]."""
    length: Tensor = directions.flatten(1).norm(dim=1)  # norm() is untyped
    return length
