"""Joint rank of a Kronecker block and a sample-wise block from the angle between row spaces.

rank [I_C ⊗ K; I_B ⊗ W] = rank(I_C ⊗ K) + rank(I_B ⊗ W) − dim(row space ∩ row space), and the
intersection is the set of principal vectors at angle zero.  Only the small matrix of inner
products between the two orthonormal bases is formed, never the stacked system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .kronecker import Kronecker
from .positive import backsolve, extremes
from .rank import Rank, numerical_rank, resolve_rcond
from .svd import right_singular_vectors, singular_values

SMALL = 800  # matrices up to this size are decomposed in full
SAFE = 1e3  # of the cutoff: an estimated σ_n above it needs no SVD
SUSPECT = 1e-3  # sines below this are recomputed without cancellation


@dataclass(frozen=True)
class RowSpace:
    """Orthonormal rows [rank, columns] with the rank decision behind them."""

    basis: Tensor
    rank: Rank


def row_space(matrix: Tensor, rcond: float | None = None, noise: float = 0.0) -> RowSpace:
    """Orthonormal basis of the row space of a dense matrix [rows, columns].

    A well-conditioned matrix of full row rank goes through two rounds of Cholesky QR, which costs
    a tenth of an SVD.  One of clearly full column rank, by its triangular factor, has all of space
    for its row space.  Everything else goes through the SVD.
    """
    rows, columns = matrix.shape
    if rows >= columns > 64:
        ends = _triangular_extremes(matrix)
        if ends[1] > SAFE * resolve_rcond(rcond, (rows, columns), noise=noise) * ends[0]:
            identity = torch.eye(columns, dtype=matrix.dtype, device=matrix.device)
            return RowSpace(identity, Rank(columns, columns, 0.0, inf, *ends, columns))
    if 64 < rows <= columns:
        basis = _cholesky_qr(matrix)
        if basis is not None:
            largest, smallest, orthonormal = basis
            return RowSpace(orthonormal, Rank(rows, columns, 0.0, inf, largest, smallest, rows))
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
    return (largest, smallest) if smallest > 1e-6 * largest else None


def _triangular_extremes(matrix: Tensor) -> tuple[float, float]:
    """Estimated (σ_1, σ_n) of a tall matrix from its QR factor, which loses nothing of σ_n."""
    upper = torch.linalg.qr(matrix, mode="r").R
    if float(upper.diagonal().abs().min()) == 0.0:
        return 1.0, 0.0
    squares = extremes(
        lambda x: upper.T @ (upper @ x), lambda x: backsolve(upper.T, x), upper.shape[1], upper
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
    shifted, info = torch.linalg.cholesky_ex((1.0 + 1e-8) * eye - matrix)
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


def joint_rank(
    gradient: Kronecker,
    sample_rows: Sequence[Tensor],
    rcond: float | None = None,
    noise: float = 0.0,
) -> Rank:
    """Rank of [I_C ⊗ K; I_B ⊗ W] by principal angles.

    Args:
        gradient: the Kronecker block, K [groups, rows, B·N].
        sample_rows: orthonormal rows of W, one [rank W_b, C, N] for each of the B samples.
        rcond: relative cutoff on singular values and on the sine of an angle.
        noise: relative error of the entries of K.

    Returns:
        The joint :class:`Rank`; ``smallest`` is the smallest sine above the cutoff (σ in units
        where both blocks have orthonormal rows) and ``gap`` the ratio of sines at the cutoff.
    """
    groups, rows, size = gradient.matrix.shape
    channels, batch = gradient.channels, len(sample_rows)
    total = channels * size
    tolerance = resolve_rcond(rcond, (rows, size), noise=noise)
    weight_rank = sum(len(q) for q in sample_rows)
    # Angles inherit the error of both bases, amplified by the smallest singular value kept.
    cutoff = max(tolerance * 1e2, 1e-10)
    if weight_rank == total:  # the weight rows span everything, no angle is asked for
        return Rank(total, total, cutoff, inf, 1.0, 1.0, total)
    bases = _group_bases(gradient, rcond, noise)
    gradient_rank = sum(b.shape[0] for b in bases) * (channels // groups)
    sines = _sines(bases, sample_rows, channels // groups, size // batch)
    shared = int((sines <= cutoff).sum())
    kept = sines[sines > cutoff]
    smallest = float(kept.min()) if kept.numel() else 1.0
    dropped = float(sines[sines <= cutoff].max()) if shared else 0.0
    gap = smallest / dropped if dropped > 0 else inf
    rank = gradient_rank + weight_rank - shared
    return Rank(rank, total, cutoff, gap, 1.0, smallest, rank)


def _group_bases(gradient: Kronecker, rcond: float | None, noise: float) -> list[Tensor]:
    values, vh = right_singular_vectors(gradient.matrix)
    _, rows, size = gradient.matrix.shape
    tolerance = resolve_rcond(rcond, (rows, size), noise=noise)
    return [v[: numerical_rank(s, size, tolerance).rank] for s, v in zip(values, vh, strict=True)]


def _sines(
    bases: list[Tensor], samples: Sequence[Tensor], per_group: int, positions: int
) -> Tensor:
    """Sines of the principal angles between the two row spaces, the small ones accurately."""
    blocks = []
    for g, basis in enumerate(bases):
        v = basis.reshape(-1, len(samples), positions)
        own = slice(g * per_group, (g + 1) * per_group)
        # rows (channel, i), columns (sample, j): ⟨v_i restricted to channel and sample, q_j⟩
        parts = [torch.einsum("in,jcn->cij", v[:, b], q[:, own]) for b, q in enumerate(samples)]
        blocks.append(torch.cat(parts, 2).flatten(0, 1))
    t = torch.cat(blocks)
    if min(t.shape) == 0:
        return t.new_ones(0)
    flip = t.shape[0] > t.shape[1]
    small = t.T @ t if flip else t @ t.T
    values, vectors = top_eigenpairs(small, 1.0 - SUSPECT**2)
    squared = (1.0 - values).clamp_min(0.0)
    sines = squared.sqrt()
    suspect = sines < SUSPECT
    if not bool(suspect.any()):
        return sines
    # sin² = 1 − cos² has lost half the digits here: measure the distance between the spaces.
    chosen = vectors[:, suspect]
    across = t @ chosen if flip else t.T @ chosen
    exact = _distance(bases, samples, per_group, *((across, chosen) if flip else (chosen, across)))
    return torch.cat([sines[~suspect], exact])


def _distance(
    bases: list[Tensor],
    samples: Sequence[Tensor],
    per_group: int,
    in_gradient: Tensor,
    in_weight: Tensor,
) -> Tensor:
    """Singular values of (vectors in one space) − (their projection on the other)."""
    count = in_gradient.shape[1]
    rows = []
    start = 0
    for basis in bases:
        stop = start + per_group * basis.shape[0]
        part = in_gradient[start:stop].reshape(per_group, basis.shape[0], count)
        rows.append(torch.einsum("ip,cik->kcp", basis, part))
        start = stop
    gradient = torch.cat(rows, dim=1)
    shares = torch.split(in_weight, [len(q) for q in samples])
    weight = torch.stack(
        [torch.einsum("jcn,jk->kcn", q, own) for q, own in zip(samples, shares, strict=True)], 2
    )
    return singular_values(gradient.flatten(1) - weight.reshape(count, -1))
