"""Ranks of one stage's equations: gradient block, weight block, what both share, and together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf, prod

import torch
from torch import Tensor

from rgap.constraints import dense_weights, weight_constraint
from rgap.machine.allowance import PLAIN, SYMMETRIC, factorisation
from rgap.network.affine import Affine
from rgap.solvers.joint_rank import JointRows, rank_on_open
from rgap.solvers.kronecker import Kronecker
from rgap.solvers.rank import Rank
from rgap.solvers.subspace import RowSpace, full_column_rank, row_space

LARGE = 32  # filters per group up to which the span of the shared equations is measured
ROOM = 5e7  # entries up to which the shared equations are written down
LARGEST = 2048  # of their products that are compared; fewer leave a bound a bound
CHUNK = 16  # products formed at a time


def weight_row_spaces(affine: Affine, active: Tensor) -> list[RowSpace]:
    """Row space of the weight constraints of every sample, from the rows whose z is known.

    Args:
        affine: the layer.
        active: True where z is known, [B, *out_shape]; a ReLU that is off leaves its row out.

    Returns:
        One row space per sample, basis [rank, C·positions] in the order of ``in_shape``.
    """
    masks = {mask.numpy().tobytes(): mask for mask in active.flatten(1).cpu()}
    known = {
        key: _row_space(affine, None if bool(mask.all()) else mask) for key, mask in masks.items()
    }  # samples mostly have the same units on
    return [known[mask.numpy().tobytes()] for mask in active.flatten(1).cpu()]


def _row_space(affine: Affine, mask: Tensor | None) -> RowSpace:
    size = prod(affine.in_shape)
    on = prod(affine.out_shape) if mask is None else int(mask.sum())
    if min(on, size) > 64:
        full = _full_on_what_is_read(affine, mask, on)
        if full is not None:
            return full
    dense = dense_weights(affine)
    matrix = dense if mask is None else dense[mask.to(dense.device)]
    read = (matrix != 0).any(0)
    if bool(read.all()):
        return row_space(matrix)
    space = row_space(matrix[:, read])
    return _spread(space.basis, read, space.rank)


def _full_on_what_is_read(affine: Affine, mask: Tensor | None, on: int) -> RowSpace | None:
    """The space of all inputs that some row reads, where a factor proves that the rows fill it.

    What no row reads would make such a matrix look deficient in its columns, and send it through a
    decomposition that takes twenty times as long as this.
    """
    size, channels = prod(affine.in_shape), affine.in_shape[0]
    reads = affine.adjoint_of_squares(
        (affine.weight.new_ones(on) if mask is None else mask.to(affine.weight)).reshape(
            1, *affine.out_shape
        )
    )
    read = (reads != 0).flatten()
    used = int(read.sum())
    if used > on:
        return None
    coupling = weight_constraint(affine, 1)
    gram = affine.weight.new_zeros(size, size)
    rows = gram.new_ones(coupling.rows) if mask is None else mask.to(gram)
    coupling.add_gram(rows, gram.view(channels, -1, channels, size // channels))
    extremes = full_column_rank(gram if used == size else gram[read][:, read])
    if extremes is None:
        return None
    basis = torch.eye(used, dtype=gram.dtype, device=gram.device)
    return _spread(basis, read, Rank(used, size, 0.0, inf, *extremes, used))


def _spread(basis: Tensor, read: Tensor, rank: Rank) -> RowSpace:
    """Rows over the inputs that are read as rows over all of them."""
    wide = basis.new_zeros(len(basis), len(read))
    wide[:, read] = basis
    return RowSpace(wide, replace(rank, size=len(read)))


def gradient_blocks(affine: Affine, batch: int) -> tuple[int, int, int]:
    """K of a layer: groups, rows and columns of each."""
    geometry = affine.geometry
    groups, offsets = (1, 1) if geometry is None else (geometry.groups, prod(geometry.kernel))
    return groups, affine.out_shape[0] // groups * offsets, batch * prod(affine.in_shape[1:])


def joint_rank_work(affine: Affine, batch: int) -> float:
    """Work of the weights' row space and of the joint rank, K's own rank apart.

    As :func:`rgap.machine.allowance.factorisation` counts it.
    """
    size = prod(affine.in_shape)
    of_gradient = affine.in_shape[0] * min(gradient_blocks(affine, batch)[1:])
    of_weight = min(prod(affine.out_shape), size)
    return (
        factorisation(of_weight, size, PLAIN)
        + factorisation(of_gradient, batch * of_weight, PLAIN)
        + SYMMETRIC * min(of_gradient, batch * of_weight) ** 3
    )


def stage_joint_rank(
    affine: Affine,
    gradient: Kronecker,
    weight: Sequence[RowSpace],
    noise: float = 0.0,
    cotangent: Tensor | None = None,
) -> Rank:
    """Rank of gradient and weight constraints together, ``rank ≤ B·n``.

    Positions that neither block reads are no part of the decision, and neither are samples of
    which the weights alone fix everything that is read: they are counted and struck out.

    Args:
        affine: the layer.
        gradient: its gradient constraint.
        weight: row space of the weight constraints of every sample.
        noise: relative error of the cotangents.
        cotangent: k, [B, *out_shape], from which the equations that both have in common are
            written down; without it they are searched for, which takes longer.
    """
    channels, batch = affine.in_shape[0], len(weight)
    total = batch * prod(affine.in_shape)
    read = read_positions(gradient, weight)
    settled = [
        space.rank.rank == channels * int(own.sum())
        for space, own in zip(weight, read, strict=True)
    ]
    fixed = sum(space.rank.rank for space, done in zip(weight, settled, strict=True) if done)
    if all(settled):
        worst = min(weight, key=lambda space: space.rank.smallest).rank
        return Rank(fixed, total, 0.0, worst.gap, worst.largest, worst.smallest, fixed)
    open_ones = [b for b, done in enumerate(settled) if not done]
    if len(open_ones) < batch:
        matrix = gradient.matrix
        columns = matrix.reshape(*matrix.shape[:2], batch, -1)[:, :, open_ones].flatten(2)
        gradient = Kronecker(columns, channels)
        cotangent = None if cotangent is None else cotangent[open_ones]
    rest = [weight[b] for b in open_ones]
    kept = read[open_ones].any(0)
    gradient, tables = _kept(affine, gradient, rest, kept)
    rank = rank_on_open(gradient, tables, noise=noise)
    if rank is None:
        rank = _joint_rows(affine, gradient, tables, noise, cotangent, kept).rank
    return replace(rank, rank=rank.rank + fixed, size=total, alternative=rank.alternative + fixed)


def read_positions(gradient: Kronecker, weight: Sequence[RowSpace]) -> Tensor:
    """True where some equation reads a position in any channel, [B, positions]."""
    by_gradient = (gradient.matrix != 0).any(1).any(0).reshape(len(weight), -1)
    by_weight = [
        (space.basis != 0).any(0).reshape(gradient.channels, -1).any(0) for space in weight
    ]
    return by_gradient | torch.stack(by_weight)


def joint_rows(
    affine: Affine, gradient: Kronecker, weight: Sequence[RowSpace], cotangent: Tensor | None = None
) -> JointRows:
    """Both constraints as row spaces, for their rank and what they leave open.

    Args as for :func:`stage_joint_rank`.
    """
    places, device = prod(affine.in_shape[1:]), gradient.matrix.device
    every = torch.ones(places, dtype=torch.bool, device=device)
    _, tables = _kept(affine, gradient, weight, every)
    return _joint_rows(affine, gradient, tables, 0.0, cotangent, every)


def _kept(
    affine: Affine, gradient: Kronecker, weight: Sequence[RowSpace], kept: Tensor
) -> tuple[Kronecker, list[Tensor]]:
    """K and the rows of W as tables [rank, C, positions], at the positions that are kept."""
    shape, everything = (-1, affine.in_shape[0], len(kept)), bool(kept.all())
    known: dict[int, Tensor] = {}  # samples of one space have one table
    for space in weight:
        if id(space) not in known:
            table = space.basis.reshape(shape)
            known[id(space)] = table if everything else table[:, :, kept]
    tables = [known[id(space)] for space in weight]
    if everything:
        return gradient, tables
    matrix = gradient.matrix
    columns = matrix.reshape(*matrix.shape[:2], len(weight), -1)[..., kept].flatten(2)
    return Kronecker(columns, gradient.channels), tables


def _joint_rows(
    affine: Affine,
    gradient: Kronecker,
    rows: Sequence[Tensor],
    noise: float,
    cotangent: Tensor | None,
    kept: Tensor,
) -> JointRows:
    size = prod(affine.in_shape)

    def shared() -> Tensor:
        assert cotangent is not None
        products = torch.cat(list(shared_products(affine, cotangent)))
        tables = products.movedim(1, 2).flatten(3)
        return (tables if bool(kept.all()) else tables[..., kept]).flatten(2)

    groups = affine.out_shape[0] if affine.geometry is None else affine.geometry.groups
    entries = affine.out_shape[0] ** 2 // groups * len(rows) * size
    written = cotangent is not None and affine.geometry is not None and entries <= ROOM
    return JointRows(gradient, rows, noise=noise, shared=shared if written else None)


def shared_products(affine: Affine, cotangent: Tensor) -> Iterator[Tensor]:
    """W_fᵀ k_f' of every pair of filters of a group, [pairs, B, *in_shape], group by group.

    Σ_u w_f(u) (K_f' x)_u = ⟨k_f', W_f x⟩ puts each of them into both row spaces wherever the row
    W_f is active on the support of k_f'.

    Args:
        affine: a convolution.
        cotangent: k, [B, *out_shape].
    """
    groups = 1 if affine.geometry is None else affine.geometry.groups
    per_group = affine.out_shape[0] // groups
    for own in torch.split(torch.arange(affine.out_shape[0], device=cotangent.device), per_group):
        parts = torch.split(torch.cartesian_prod(own, own), per_group)
        vectors = torch.cat([_products(affine, cotangent, part) for part in parts])
        yield vectors.reshape(-1, len(cotangent), *affine.in_shape)


def overlap_bound(affine: Affine, cotangent: Tensor, rcond: float = 1e-10) -> int:
    """Dimension of span{W_fᵀ k_f'}: equations that both blocks contain.

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
    for products in shared_products(affine, cotangent):
        stacked = products.flatten(1)
        gram = stacked @ stacked.T
        scale = gram.diagonal().clamp_min(1e-300).rsqrt()
        values = torch.linalg.eigvalsh(gram * scale[:, None] * scale[None, :])
        total += int((values > rcond * values.max()).sum())
    return total


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
