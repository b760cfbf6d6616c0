"""Ranks of one stage's equations: gradient block, weight block, and both together."""

from __future__ import annotations

from math import inf, prod

import torch

from rgap.affine import Affine
from rgap.solvers.kronecker import Kronecker
from rgap.solvers.rank import Rank
from rgap.solvers.subspace import RowSpace, full_column_rank, joint_rank, row_space

from . import weight_constraint


def weight_row_space(affine: Affine, rcond: float | None = None) -> RowSpace:
    """Row space of W for one sample, basis [rank, C·positions] in the order of ``in_shape``."""
    size = prod(affine.in_shape)
    if prod(affine.out_shape) >= size > 64:
        coupling = weight_constraint(affine, 1)
        gram = torch.zeros(size, size, dtype=torch.float64)
        channels = affine.in_shape[0]
        ones = torch.ones(coupling.rows, dtype=torch.float64)
        coupling.add_gram(ones, gram.view(channels, -1, channels, size // channels))
        extremes = full_column_rank(gram)
        if extremes is not None:
            return RowSpace(torch.empty(0, size), Rank(size, size, 0.0, inf, *extremes, size))
    identity = torch.eye(size, dtype=torch.float64).reshape(size, *affine.in_shape)
    dense = affine.linear(identity).reshape(size, -1).T
    return row_space(dense, rcond)


def stage_joint_rank(
    affine: Affine,
    gradient: Kronecker,
    batch: int,
    noise: float = 0.0,
    weight: RowSpace | None = None,
) -> Rank:
    """Rank of gradient and weight constraints together, ``rank ≤ B·n``."""
    weight = weight_row_space(affine) if weight is None else weight
    size = prod(affine.in_shape)
    if weight.rank.rank == size:
        return Rank(
            batch * size,
            batch * size,
            0.0,
            weight.rank.gap,
            weight.rank.largest,
            weight.rank.smallest,
            batch * size,
        )
    channels = affine.in_shape[0]
    return joint_rank(
        gradient, weight.basis.reshape(-1, channels, size // channels), batch, noise=noise
    )


def overlap_bound(affine: Affine, cotangent: torch.Tensor, rcond: float = 1e-10) -> int:
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
    if bool((cotangent != 0).all()):
        return groups * per_group**2  # nothing is masked: independent for generic weights
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
