"""Row spaces of matrices: orthonormal bases, full rank by a Cholesky factor, leading eigenpairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.solvers.limits import GRAM, SURE
from rgap.solvers.positive import backsolve, extremes, transposed_product
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.solvers.square import factored
from rgap.solvers.svd import right_singular_vectors

SHIFT = 1e-8  # δ that keeps (1 + δ)I − M definite: it separates eigenvalues near 1, no more
SMALL = 800  # matrices up to this size are decomposed in full


@dataclass(frozen=True)
class RowSpace:
    """Orthonormal rows [rank, columns] with the rank decision behind them."""

    basis: Tensor
    rank: Rank


def row_space(matrix: Tensor, rcond: float | None = None, noise: float = 0.0) -> RowSpace:
    """Orthonormal basis of the row space of a dense matrix [rows, columns].

    A well-conditioned matrix of full row rank goes through two rounds of Cholesky QR, which costs
    a tenth of an SVD.  One of clearly full column rank, by its triangular factors, has all of space
    for its row space.  Everything else goes through the SVD.
    """
    rows, columns = matrix.shape
    if rows >= columns > 64:
        made = factored(matrix) if rows == columns else None
        ends = _triangular_extremes(matrix) if made is None else made.extremes
        if ends[1] > SURE * resolve_rcond(rcond, (rows, columns), noise=noise) * ends[0]:
            identity = torch.eye(columns, dtype=matrix.dtype, device=matrix.device)
            return RowSpace(identity, Rank.full(columns, ends))
    if 64 < rows <= columns:
        basis = _cholesky_qr(matrix)
        if basis is not None:
            largest, smallest, orthonormal = basis
            rank = Rank.agreed(rows, columns, largest=largest, smallest=smallest)
            return RowSpace(orthonormal, rank)
    values, vh = right_singular_vectors(matrix)
    rank = numerical_rank(values, columns, resolve_rcond(rcond, (rows, columns), noise=noise))
    return RowSpace(vh[: rank.rank], rank)


def full_column_rank(gram: Tensor) -> tuple[float, float] | None:
    """(σ_1, σ_n) when AᵀA is safely positive definite (cond A < 1e6), otherwise None."""
    lower, info = torch.linalg.cholesky_ex(gram)
    if bool(info.any()):
        return None
    squares = extremes(lambda x: gram @ x, lambda x: backsolve(lower, x), len(gram), gram)
    largest, smallest = squares[0] ** 0.5, squares[1] ** 0.5
    return (largest, smallest) if smallest > GRAM * largest else None


def _triangular_extremes(matrix: Tensor) -> tuple[float, float]:
    """Estimated (σ_1, σ_n) of a tall matrix from its QR factor, which loses nothing of σ_n."""
    upper = torch.linalg.qr(matrix, mode="r").R
    if float(upper.diagonal().abs().min()) == 0.0:
        return 1.0, 0.0
    squares = extremes(
        lambda x: transposed_product(upper, upper @ x),
        lambda x: backsolve(upper.T, x),
        upper.shape[1],
        upper,
    )
    return squares[0] ** 0.5, squares[1] ** 0.5


def _cholesky_qr(matrix: Tensor) -> tuple[float, float, Tensor] | None:
    gram = matrix @ matrix.T
    ends = full_column_rank(gram)
    if ends is None:
        return None
    first = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), matrix, upper=False)
    again = torch.linalg.cholesky(first @ first.T)
    return (*ends, torch.linalg.solve_triangular(again, first, upper=False))


def top_eigenpairs(matrix: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Every eigenpair of a symmetric matrix with spectrum in [0, 1] above ``threshold``, and more.

    Large matrices go through subspace iteration with the inverse of (1 + δ)I − M, which separates
    eigenvalues near 1 by 1/δ; that none is left out is proved by a Cholesky factorisation of
    ``threshold·I − M`` with the found ones taken away.  Where the proof fails, and for small
    matrices, the full decomposition decides.

    Args:
        matrix: [n, n], a product of orthonormal bases, so 0 ≤ M ≤ 1 up to rounding.
        threshold: in (0, 1).

    Returns:
        Eigenvalues [m] and eigenvectors [n, m], at least those above the threshold.
    """
    size = matrix.shape[0]
    if size <= SMALL:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    shifted, info = torch.linalg.cholesky_ex((1.0 + SHIFT) * eye - matrix)
    generator = torch.Generator().manual_seed(0)
    block = 192
    while not bool(info) and 2 * block <= size:
        vectors = torch.randn(size, block, generator=generator, dtype=matrix.dtype).to(matrix)
        for _ in range(3):
            vectors = torch.linalg.qr(backsolve(shifted, vectors)).Q
        values, rotation = torch.linalg.eigh(vectors.T @ matrix @ vectors)
        vectors = vectors @ rotation
        if float(values[0]) < threshold:
            above = vectors[:, values > threshold]
            rest = threshold * eye - matrix + above @ above.T
            if not bool(torch.linalg.cholesky_ex(rest).info):
                return values, vectors
            break
        block *= 2
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
