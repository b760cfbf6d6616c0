"""Γ and the cotangents at the output together: samples that no head has told apart.

Below the last layer the cotangent of every sample is a known linear map of its own at the output,
``T κ`` with the C numbers κ unknown.  A rectifier passes its entries or stops them, so that with
K̃ the cotangents of a convolution below it up to Γ, and g a column of Γ,

    K̃ g = (T κ) ⊙ u,    u ∈ {0, 1},    hence    (K̃ g)² = (T κ) ⊙ (K̃ g)    entry by entry.

That is linear in g gᵀ and κ gᵀ together, and every sample solves it: the null space of a matrix
with a row for every entry of the cotangent is spanned by the B pairs (g_b g_bᵀ, κ_b g_bᵀ).
Symmetric matrices ``Σ_b c_b g_b g_bᵀ`` have the g_b as their common diagonalisation, an eigenvalue
problem (Leurgans, Ross and Abel 1993).  No search, no label, no softmax, and no bound B < C.  Of
each sample g and κ share one free scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from rgap.limits import MASKED, SAFETY
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.masks import ROUNDS, products, symmetric
from rgap.solvers.limits import SMALL_GAP
from rgap.solvers.rank import numerical_rank, resolve_rcond
from rgap.solvers.svd import right_singular_vectors
from rgap.solvers.tall import tall_qr

__all__ = ["Spanned", "common", "gauge_by_span", "lifted"]

DRAWS = 8  # pairs of combinations, of which that with the furthest eigenvalues is taken
HELD = 3.0  # matrices of the lifted system that are held at a time


@dataclass(frozen=True)
class Spanned:
    """Samples in any order, each up to a factor.

    Attributes:
        coordinates: κ [B, C], each row of any length and sign.
        roots: [B, C, n], R Rᵀ the covariance of a row of ``coordinates``.
        open: u, bool [B, F, *out]; meaningless where T κ is 0.
        distance: largest distance of an entry of u from 0 or 1, over what its error allows.
        gap: between the B pairs and the next singular value.
    """

    coordinates: Tensor
    roots: Tensor
    open: Tensor
    distance: float
    gap: float


def gauge_by_span(cotangents: Tensor, span: Tensor, room: float = inf) -> Spanned | Unseparated:
    """Every κ_b and u_b of cotangents ``K̃ g_b = (T κ_b) ⊙ u_b``.

    Args:
        cotangents: K̃ [B, F, *out], a basis of the samples' cotangents below the rectifier.
        span: T, the cotangent [C, F, *out] above it for each unit vector at the output.
        room: bytes.

    Returns:
        The :class:`Spanned`, or an :class:`Unseparated` with the number that says why not.

    >>> generator = torch.Generator().manual_seed(0)
    >>> t = torch.randn(3, 40, 1, dtype=torch.float64, generator=generator).expand(3, 40, 8)
    >>> kappa, mixing = torch.randn(2, 5, 5, dtype=torch.float64, generator=generator)
    >>> u = torch.rand(5, 40, 8, generator=generator) < 0.5
    >>> k = torch.einsum("bc,cfp->bfp", kappa[:, :3], t) * u
    >>> told = gauge_by_span(torch.einsum("ab,bfp->afp", mixing, k), t)
    >>> told.coordinates.shape, {tuple(m.tolist()) for m in told.open[:, 0]} == {
    ...     tuple(m.tolist()) for m in u[:, 0]
    ... }
    (torch.Size([5, 3]), True)
    """
    batch, outputs = len(cotangents), len(span)
    basis, _ = tall_qr(cotangents.flatten(1).T)
    through, sizes, turned = torch.linalg.svd(span.flatten(1).T, full_matrices=False)
    rank = numerical_rank(sizes, outputs, resolve_rcond(None, (len(basis), outputs)))
    if rank.rank < outputs:
        return Unseparated(
            f"what stands above passes {rank.rank} of the {outputs} numbers of a cotangent at the "
            "output on"
        )
    unknown = batch * (batch + 1) // 2 + batch * outputs
    if len(basis) < unknown:
        return Unseparated(
            f"{len(basis)} entries of a cotangent are equations for {unknown} products of unknowns"
        )
    if HELD * 8.0 * len(basis) * unknown > room:
        return Unseparated(f"{len(basis)} equations for {unknown} unknowns exceed the memory")
    table, gap = lifted(basis, through, batch)
    if gap < SMALL_GAP:
        return Unseparated(f"no {batch} masks stand out (gap {gap:.1f})")
    places = cotangents[0, 0].numel()
    masks, coordinates, roots, furthest = [], [], [], 0.0
    for sample, g in enumerate(common(table).T):
        on, vector, root, far = _settled(basis, through, g, places)
        furthest = max(furthest, far)
        if not far <= MASKED:
            return Unseparated(f"an entry of the mask of sample {sample} is {far:.2f} off 0 or 1")
        masks.append(on.reshape(cotangents.shape[1:]))
        coordinates.append(turned.T @ (vector / sizes))
        roots.append(turned.T @ (root / sizes[:, None]))
    return Spanned(torch.stack(coordinates), torch.stack(roots), torch.stack(masks), furthest, gap)


def lifted(basis: Tensor, through: Tensor, count: int) -> tuple[Tensor, float]:
    """As many combinations ``Σ_b c_b g_b g_bᵀ`` as there are g_b, and the gap beside them.

    Args:
        basis: of the cotangents that were passed, [n, r].
        through: of those that come from above, [n, C]: ``(U g)² = (T κ) ⊙ (U g)``, T κ their span.
        count: of the g.

    Returns:
        Matrices [count, r, r], and the gap.
    """
    squares = products(basis)
    linear = -(through[:, :, None] * basis[:, None]).flatten(1)
    matrix = torch.cat([squares, linear], 1)
    scale = matrix.norm(dim=0).clamp_min(1e-300)
    values, vh = right_singular_vectors(matrix / scale)
    pairs = (vh[-count:] / scale)[:, : squares.shape[1]]
    gap = float(values[-count - 1] / values[-count].clamp_min(1e-300))
    return symmetric(pairs, basis.shape[1]), gap


def common(table: Tensor) -> Tensor:
    """The g_b, as columns [r, B], of B symmetric matrices ``Σ_b c_b g_b g_bᵀ`` [B, r, r].

    In the range that they share, of two combinations A, A′ of the matrices ``A A′⁻¹`` has them as
    its eigenvectors, as far from each other as its eigenvalues.
    """
    count, size = table.shape[:2]
    if count < size:
        span = torch.linalg.svd(table.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :count]
        own: Tensor = span @ common(span.T @ table @ span)
        return own
    generator, best, furthest = torch.Generator().manual_seed(0), None, -1.0
    for _ in range(DRAWS):
        weights = torch.randn(2, count, generator=generator, dtype=torch.float64)
        one, other = torch.einsum("di,ijk->djk", weights.to(table), table)
        values, vectors = torch.linalg.eig(torch.linalg.solve(other, one).T)
        apart = (values[:, None] - values).abs() / (values[:, None].abs() + values.abs())
        nearest = float((apart + torch.eye(len(apart)).to(apart)).min())
        if best is None or nearest > furthest:
            best, furthest = vectors.real, nearest
    assert isinstance(best, Tensor)
    return best


def _settled(
    basis: Tensor, through: Tensor, g: Tensor, places: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """One sample from its direction: u [n], the coordinates of T κ, their root, how far u is off.

    With u known all is linear: ``K̃ g = 0`` where it is 0, ``K̃ g = T κ`` where it is 1, one null
    vector of B + C unknowns.  Its residual is the error of K̃, alike at all places of a filter: they
    were walked from one to the next.
    """
    passed, before = basis @ g, None
    known = torch.linalg.lstsq(through * passed[:, None], passed.square()[:, None]).solution[:, 0]
    for _ in range(ROUNDS):
        above = through @ known
        on = passed * above.sign() > above.abs() / 2
        if before is not None and torch.equal(on, before):
            break
        values, vh = right_singular_vectors(torch.cat([basis, -through * on[:, None]], 1))
        vector, before = vh[-1], on
        passed, known = basis @ vector[: len(g)], vector[len(g) :]
    length = known.norm().clamp_min(1e-300)
    apart = max(1.0, (len(basis) - len(vector)) / places)
    error = values[-1] / apart**0.5 + torch.finfo(basis.dtype).eps
    shares = passed / torch.where(above == 0, 1.0, above)
    off = (shares - on.to(shares)).abs() - SAFETY * error / above.abs().clamp_min(1e-300)
    far = float(off[above != 0].max()) if bool((above != 0).any()) else inf
    root = (vh[:-1, len(g) :] * (error / values[:-1])[:, None]).T
    return on, known / length, root / length, far
