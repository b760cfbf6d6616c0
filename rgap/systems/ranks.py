"""Ranks of one stage's equations: gradient block, weight block, and both together."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod

import torch
from torch import Tensor

from rgap.affine import Affine
from rgap.solvers.kronecker import Kronecker
from rgap.solvers.rank import Rank
from rgap.solvers.subspace import RowSpace, full_column_rank, joint_rank, row_space

from . import weight_constraint

LARGE = 32  # filters per group up to which the span of the shared equations is measured


def weight_row_spaces(affine: Affine, active: Tensor) -> list[RowSpace]:
    """Row space of the weight constraints of every sample, from the rows whose z is known.

    Args:
        affine: the layer.
        active: True where z is known, [B, *out_shape]; a ReLU that is off leaves its row out.

    Returns:
        One row space per sample, basis [rank, C·positions] in the order of ``in_shape``.
    """
    full: RowSpace | None = None
    found = []
    for mask in active:
        if bool(mask.all()):
            full = full or _row_space(affine, None)
            found.append(full)
        else:
            found.append(_row_space(affine, mask.flatten()))
    return found


def _row_space(affine: Affine, mask: Tensor | None) -> RowSpace:
    size = prod(affine.in_shape)
    if mask is None and prod(affine.out_shape) >= size > 64:
        coupling = weight_constraint(affine, 1)
        gram = torch.zeros(size, size, dtype=torch.float64)
        channels = affine.in_shape[0]
        ones = torch.ones(coupling.rows, dtype=torch.float64)
        coupling.add_gram(ones, gram.view(channels, -1, channels, size // channels))
        extremes = full_column_rank(gram)
        if extremes is not None:
            identity = torch.eye(size, dtype=torch.float64)
            return RowSpace(identity, Rank(size, size, 0.0, inf, *extremes, size))
    if affine.geometry is None:
        dense = affine.weight
    else:
        identity = torch.eye(size, dtype=torch.float64).reshape(size, *affine.in_shape)
        dense = affine.linear(identity).reshape(size, -1).T
    return row_space(dense if mask is None else dense[mask.to(dense.device)])


def stage_joint_rank(
    affine: Affine, gradient: Kronecker, weight: Sequence[RowSpace], noise: float = 0.0
) -> Rank:
    """Rank of gradient and weight constraints together, ``rank ≤ B·n``.

    Args:
        affine: the layer.
        gradient: its gradient constraint.
        weight: row space of the weight constraints of every sample.
        noise: relative error of the cotangents.
    """
    size = prod(affine.in_shape)
    if all(space.rank.rank == size for space in weight):
        worst = min(weight, key=lambda space: space.rank.smallest).rank
        total = len(weight) * size
        return Rank(total, total, 0.0, worst.gap, worst.largest, worst.smallest, total)
    shape = (-1, affine.in_shape[0], size // affine.in_shape[0])
    return joint_rank(gradient, [space.basis.reshape(shape) for space in weight], noise=noise)


def overlap_bound(affine: Affine, cotangent: Tensor, rcond: float = 1e-10) -> int:
    """Dimension of span{W_fᵀ k_f'}: equations that both blocks contain.

    The identity Σ_u w_f(u) (K_f' x)_u = ⟨k_f', W_f x⟩ puts W_fᵀ k_f' into both row spaces
    wherever the row W_f is active on the support of k_f'; so
    ``joint rank ≤ rank K + rank W − overlap``, with equality for generic weights.

    Args:
        affine: the layer.
        cotangent: k, [B, *out_shape].
        rcond: relative cutoff for the dimension of the span.
    """
    if affine.geometry is None:  # W_f ⊗ k_f': the span of a product is the product of the spans
        return int(torch.linalg.matrix_rank(affine.weight)) * int(
            torch.linalg.matrix_rank(cotangent)
        )
    groups = affine.geometry.groups
    filters = affine.out_shape[0]
    per_group = filters // groups
    if per_group > LARGE:
        dense = cotangent.transpose(0, 1).flatten(1).reshape(groups, per_group, -1)
        kernels = affine.weight.flatten(1).reshape(groups, per_group, -1)
        ranks = torch.linalg.matrix_rank(dense) * torch.linalg.matrix_rank(kernels)
        return int(ranks.sum())  # independent factors have independent products, generically
    total = 0
    for group in range(groups):
        own = range(group * per_group, (group + 1) * per_group)
        vectors = []
        for target in own:
            placed = torch.zeros(per_group, *cotangent.shape, dtype=cotangent.dtype)
            for row, source in enumerate(own):
                placed[row, :, target] = cotangent[:, source]
            out = affine.adjoint(placed.flatten(0, 1))
            vectors.append(out.reshape(per_group, -1))
        stacked = torch.cat(vectors)
        gram = stacked @ stacked.T
        scale = gram.diagonal().clamp_min(1e-300).rsqrt()
        values = torch.linalg.eigvalsh(gram * scale[:, None] * scale[None, :])
        total += int((values > rcond * values.max()).sum())
    return total
