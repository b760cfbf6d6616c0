"""Positions of a convolution of one tap, told apart by what rectifiers let through alone.

Such a kernel has no shifts: its gradient is ``G = Σ_bp κ_bp x_bpᵀ``, the same for positions in any
order.  Where the cotangent k_b above a rectifier is known, and the same at all positions of a
sample (below a global pool), every ``κ_bp = k_b ⊙ u_bp`` with ``u ∈ {0, 1}`` lies in the column
space of G.  With U a basis of that space [F, r], r = B times the positions,

    U g = k_b ⊙ u,    hence    (U g)² = k_b ⊙ (U g)    entry by entry,

which is linear in the products g gᵀ and in g: the positions of sample b span its null space, where
F is at least ``r (r + 1)/2 + r`` less their number, and common diagonalisation (as in
:mod:`~rgap.separation.shifts.spanned`) takes them apart.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rgap.limits import MASKED
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.masks import settled
from rgap.separation.shifts.positions import range_of
from rgap.separation.shifts.spanned import common, lifted
from rgap.solvers.limits import SMALL_GAP

__all__ = ["masks_alone"]

HELD = 3.0  # matrices of the lifted system that are held at a time
ALIKE = 1e-3  # of k, by which its positions may differ and count as one


def masks_alone(
    gradient: Tensor, above: Tensor, noise: float = 0.0, room: float = inf
) -> Tensor | Unseparated:
    """U of every position, bool [B, F, P] in any order of the positions of a sample.

    Args:
        gradient: G [F, C], float64.
        above: k [B, F, P], the cotangent above the rectifier, the same at all P positions.
        noise: standard error of an entry of G.
        room: bytes.

    Returns:
        The masks, or an :class:`Unseparated` with the number that says why not.

    >>> generator = torch.Generator().manual_seed(0)
    >>> k = torch.randn(1, 60, 1, dtype=torch.float64, generator=generator).expand(1, 60, 6)
    >>> u = torch.rand(1, 60, 6, generator=generator) < 0.5
    >>> x = torch.randn(20, 6, dtype=torch.float64, generator=generator)
    >>> told = masks_alone((k * u)[0] @ x.T, k)
    >>> {tuple(m.tolist()) for m in told[0].T} == {tuple(m.tolist()) for m in u[0].T}
    True
    """
    batch, filters, places = above.shape
    first = above[..., :1]
    if float((above - first).abs().max()) > ALIKE * float(above.abs().max()):
        return Unseparated("the cotangent above differs from position to position")
    size = batch * places
    unknown = size * (size + 1) // 2 + size
    if filters < unknown - places:
        return Unseparated(f"{filters} filters are equations for {unknown} products of unknowns")
    if HELD * 8.0 * filters * unknown > room:
        return Unseparated(f"{filters} equations for {unknown} unknowns exceed the memory")
    least = torch.finfo(gradient.dtype).eps * float(gradient.square().mean().sqrt())
    basis, rank = range_of(gradient, max(noise, least))
    if rank.rank != size or not rank.clear:
        return Unseparated(
            f"the gradient has rank {rank.rank} (gap {rank.gap:.1f}), expected that of {size} "
            "positions"
        )
    masks = torch.zeros(above.shape, dtype=torch.bool, device=above.device)
    for sample, k in enumerate(first[..., 0]):
        if not bool(k.any()):
            return Unseparated(f"no cotangent of sample {sample} comes from above")
        k = k / k.abs().max()  # its square may be below all numbers
        table, gap = lifted(basis, k[:, None] / k.norm(), places)
        if gap < SMALL_GAP:
            return Unseparated(f"no {places} masks of sample {sample} stand out (gap {gap:.1f})")
        told = _settled(basis, k, common(table))
        if isinstance(told, float):
            return Unseparated(f"an entry of a mask of sample {sample} is {told:.2f} off 0 or 1")
        masks[sample] = told
        if len({tuple(one) for one in told.T.tolist()}) < places:
            return Unseparated(f"two positions of sample {sample} have one mask")
    return masks


def _settled(basis: Tensor, k: Tensor, directions: Tensor) -> Tensor | float:
    """Masks [F, P] from directions [r, P], or how far the furthest entry is off 0 and 1."""
    masks = []
    for direction in directions.T:
        _, share, on = settled(basis, k, direction)
        far = float((share - on.to(share)).abs()[k != 0].max())
        if far > MASKED:
            return far
        masks.append(on)
    return torch.stack(masks, 1)
