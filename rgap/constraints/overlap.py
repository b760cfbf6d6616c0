"""Equations that the gradient and the weight constraints of a layer have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.constraints.ranks import overlap_bound
from rgap.network.affine import Affine

LARGEST = 2048  # products compared; fewer leave a bound a bound
CHUNK = 16


def shared_equations(
    affine: Affine, cotangent: Tensor, active: Tensor, rcond: float = 1e-10
) -> int:
    """Dimension of span{W_fᵀ k_f' : supp k_f' ⊆ active(f), f and f' of one group}.

    Every such vector is in both row spaces, because Σ_u w_f(u) (K_f' x)_u = ⟨k_f', W_f x⟩ and all
    rows of W_f that this reads are known; so ``joint rank ≤ rank K + rank W − dimension``.  A unit
    that is off leaves its row of W_f out, and only filters f that are on wherever f' is keep
    their product: f = f' always does.

    Args:
        affine: the layer.
        cotangent: k, [B, *out_shape].
        active: True where z is known, [B, *out_shape].
        rcond: relative cutoff for the dimension.
    """
    if bool(active.all()):
        return overlap_bound(affine, cotangent)
    k = cotangent.transpose(0, 1).flatten(1)
    support = k != 0
    off = ~active.transpose(0, 1).flatten(1)
    covered = (off.double() @ support.double().T) == 0
    groups = 1 if affine.geometry is None else affine.geometry.groups
    group = torch.arange(len(k), device=k.device) * groups // len(k)
    usable = covered & (group[:, None] == group[None, :]) & support.any(1)
    pairs = usable.nonzero()
    if len(pairs) > LARGEST:
        pairs = pairs[pairs[:, 0] == pairs[:, 1]][:LARGEST]
    if not len(pairs):
        return 0
    products = torch.cat([_products(affine, cotangent, part) for part in torch.split(pairs, CHUNK)])
    products = products / products.norm(dim=1, keepdim=True).clamp_min(1e-300)
    values = torch.linalg.eigvalsh(products @ products.T)
    return int((values > rcond * values.max()).sum())


def _products(affine: Affine, cotangent: Tensor, pairs: Tensor) -> Tensor:
    """W_fᵀ k_f' for pairs (f, f'), [pairs, B·n]."""
    if affine.geometry is None:
        rows = cotangent.T[pairs[:, 1]][:, :, None] * affine.weight[pairs[:, 0]][:, None, :]
        return rows.flatten(1)
    placed = cotangent.new_zeros(len(pairs), *cotangent.shape)
    for row, (own, source) in enumerate(pairs.tolist()):
        placed[row, :, own] = cotangent[:, source]
    return affine.adjoint(placed.flatten(0, 1)).reshape(len(pairs), -1)
