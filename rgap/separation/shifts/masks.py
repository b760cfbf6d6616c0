"""Γ from what rectifiers do to cotangents that are known above them: a linear problem.

A ReLU above the convolution passes each entry of the cotangent k or stops it, so that of a sample

    K̃ g = k ⊙ u,    u ∈ {0, 1},    hence    (K̃ g)² = k ⊙ (K̃ g)    entry by entry,

with K̃ the cotangents up to Γ and g its column of Γ.  That is quadratic in the B numbers of g, and
linear in the B(B + 1)/2 products g gᵀ and in g: one null vector of a matrix with a row for every
entry of k.  No start, no search.  (Such a lifting is usual in phase retrieval and in blind
separation of signals with constant modulus, van der Veen and Paulraj 1996.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.limits import MASKED
from rgap.separation.batch import Unseparated
from rgap.solvers.limits import SMALL_GAP
from rgap.solvers.svd import right_singular_vectors
from rgap.solvers.tall import tall_qr

__all__ = ["Masked", "gauge_by_masks", "products", "settled", "symmetric"]

ROUNDS = 3  # in which a mask and what follows from it settle


@dataclass(frozen=True)
class Masked:
    """Γ, and which entries of the cotangent above each sample's rectifier let through.

    Attributes:
        gauge: Γ [B, B], a column a sample.
        open: u, bool [B, F, *out]; meaningless where the cotangent above is 0.
        distance: largest distance of an entry of u from 0 or 1, over what the error of k allows.
        gap: smallest gap between the null vector of a sample and the next singular value.
    """

    gauge: Tensor
    open: Tensor
    distance: float
    gap: float


def gauge_by_masks(cotangents: Tensor, above: Tensor, error: float = 0.0) -> Masked | Unseparated:
    """Γ of cotangents K̃ that are those above, each entry passed or stopped.

    Args:
        cotangents: K̃ [B, F, *out], of a convolution whose output passes through a rectifier; with
            what is constant between the two (batch norm in eval form) divided out.
        above: k [B, F, *out], at the output of the rectifier, in any order of the samples.
        error: standard error of an entry of k.

    Returns:
        The :class:`Masked`, samples in the order of ``above``, or an :class:`Unseparated`.

    >>> generator = torch.Generator().manual_seed(0)
    >>> k = torch.randn(2, 30, 1, dtype=torch.float64, generator=generator).expand(2, 30, 8)
    >>> u = torch.rand(2, 30, 8, generator=generator) < 0.5
    >>> mixed = torch.einsum("ab,bfp->afp", torch.tensor([[1.0, 2], [3, 4]]).double(), k * u)
    >>> told = gauge_by_masks(mixed, k)
    >>> bool((told.open == u).all())
    True
    """
    batch = len(cotangents)
    basis, upper = tall_qr(cotangents.flatten(1).T)
    columns, weakest, furthest = [], float("inf"), 0.0
    masks = torch.zeros(above.shape, dtype=torch.bool, device=above.device)
    for sample, k in enumerate(above.flatten(1)):
        if not bool(k.any()):
            return Unseparated(f"no cotangent of sample {sample} comes from above")
        g, gap = _column(basis, k)
        g, share, on = settled(basis, k, g)
        known = k != 0
        masks[sample] = on.reshape(above.shape[1:])
        own = (share - on.to(share)).abs()
        doubt = own - error * share.abs() / k.abs().clamp_min(1e-300)
        far, weakest = float(doubt[known].max()), min(weakest, gap)
        furthest = max(furthest, far)
        if gap < SMALL_GAP:
            return Unseparated(f"no mask of sample {sample} stands out (gap {gap:.1f})")
        if far > MASKED:
            return Unseparated(f"an entry of the mask of sample {sample} is {far:.2f} off 0 or 1")
        columns.append(g)
    gauge = torch.linalg.solve_triangular(upper, torch.stack(columns, 1), upper=True)
    ends = torch.linalg.svdvals(torch.stack(columns, 1))
    if float(ends[-1]) < torch.finfo(gauge.dtype).eps * batch * float(ends[0]):
        return Unseparated("two samples have one mask")
    return Masked(gauge, masks, furthest, weakest)


def settled(basis: Tensor, k: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A column g from its direction, the share of k that it passes, and the mask, in turn.

    Args:
        basis: orthonormal, [n, r].
        k: what comes from above, [n].
        direction: of g, [r], of any length and sign.
    """
    known, passed = k != 0, basis @ direction
    g = direction * (k * passed.pow(3)).sum() / passed.pow(4).sum()
    for _ in range(ROUNDS):
        share = torch.where(known, basis @ g / torch.where(known, k, 1.0), 0.0)
        on = share > 0.5
        g = basis.T @ (k * on)  # with u known the equations are linear
    return g, share, on


def products(basis: Tensor) -> Tensor:
    """``(basis g)²`` as a matrix for the entries g_a g_b, a ≤ b, of g gᵀ; [n, B(B + 1)/2]."""
    size = basis.shape[1]
    first, second = torch.triu_indices(size, size, device=basis.device)
    return basis[:, first] * basis[:, second] * torch.where(first == second, 1.0, 2.0).to(basis)


def symmetric(entries: Tensor, size: int) -> Tensor:
    """Matrices [..., B, B] of their entries a ≤ b, as :func:`products` has them."""
    first, second = torch.triu_indices(size, size, device=entries.device)
    lifted = entries.new_zeros(*entries.shape[:-1], size, size)
    lifted[..., first, second] = lifted[..., second, first] = entries
    return lifted


def _column(basis: Tensor, k: Tensor) -> tuple[Tensor, float]:
    """Direction g of one sample in an orthonormal basis [n, B], and the gap beside it."""
    size, squares = basis.shape[1], products(basis)
    linear = -k[:, None] * basis
    scale = linear.norm() / squares.norm().clamp_min(1e-300)
    values, vh = right_singular_vectors(torch.cat([scale * squares, linear], 1))
    eigenvalues, vectors = torch.linalg.eigh(symmetric(vh[-1, : squares.shape[1]], size))
    gap = float(values[-2] / values[-1].clamp_min(1e-300))
    return vectors[:, int(eigenvalues.abs().argmax())], gap
