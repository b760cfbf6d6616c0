"""Equations of a convolution in any number of dimensions, in the unknown input u [B, C, *space].

* gradient constraint: ``Σ_{b,o} k[b,f,o] u[b,c, s·o + d·δ − p] = G[f,c,δ]``; the same matrix
  ``K[(f,δ),(b,position)]`` for every channel c of the group (Kronecker structure I_C ⊗ K);
* weight constraint: ``W ⋆ u = z − b``; the same map for every sample (I_B ⊗ W).

Padding is never an unknown: taps that fall on zeros outside the picture are left out of both, and
those that fall on a border that shows the picture again read what it shows.
"""

from __future__ import annotations

from itertools import combinations_with_replacement, product
from math import prod

import torch
from torch import Tensor

from rgap.network.affine import Affine, Geometry
from rgap.solvers.kronecker import Kronecker

SMALL = 4e7  # products up to which WᵀW is formed from W itself


def taps(
    geometry: Geometry,
    space: tuple[int, ...],
    out: tuple[int, ...],
    device: torch.device | None = None,
) -> Tensor:
    """Input position that output o reads through kernel offset δ, [offsets, outputs]; −1: padding.

    Args:
        geometry: of the convolution.
        space: sizes of the input.
        out: sizes of the output.
        device: of the table; default the CPU.

    >>> g = Geometry((3,), (2,), ((1, 1),), (1,), 1)
    >>> taps(g, (4,), (2,)).tolist()
    [[-1, 1], [0, 2], [1, 3]]
    """
    place = device or torch.device("cpu")
    position = torch.zeros((), dtype=torch.long, device=place)
    inside = torch.ones((), dtype=torch.bool, device=place)
    dims = len(space)
    for axis, size in enumerate(space):
        reach = torch.arange(out[axis], device=place) * geometry.stride[axis]
        shown = torch.tensor(geometry.shown(axis, size), device=place)
        offset = torch.arange(geometry.kernel[axis], device=place) * geometry.dilation[axis]
        line = shown[offset[:, None] + reach[None, :]]
        shape = [1] * (2 * dims)  # offsets of every axis, then outputs of every axis
        shape[axis], shape[dims + axis] = line.shape
        line = line.reshape(shape)
        position = position * size + line
        inside = inside & (line >= 0)
    index = torch.where(inside, position, -1)
    return index.reshape(prod(geometry.kernel), prod(out[:dims]))


def columns(affine: Affine, read_only: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Taps by number of column, and the position in the picture that each column stands for.

    Args:
        affine: a convolution.
        read_only: number the positions that some tap falls on; else all of them.
        device: of both.

    Returns:
        Taps [offsets, outputs] as of :func:`taps`, and positions [columns].
    """
    space, out = affine.in_shape[1:], affine.out_shape[1:]
    table = taps(_geometry(affine), space, out).to(device)
    every = torch.arange(prod(space), device=device)
    kept = every[affine.reads[0].flatten().to(device)]
    if not read_only or not len(kept):  # a layer of padding alone: no equation, so no solution
        return table, every
    number = torch.full_like(every, -1)
    number[kept] = torch.arange(len(kept), device=device)
    return torch.where(table >= 0, number[table.clamp_min(0)], -1), kept


def gradient_constraint(affine: Affine, cotangent: Tensor, *, read_only: bool = False) -> Kronecker:
    """K of the gradient constraint, [groups, (F/groups)·offsets, B·positions].

    Args:
        affine: a convolution.
        cotangent: k = ∂L/∂z, [B, F, *out].
        read_only: only the columns of positions that are read.
    """
    geometry = _geometry(affine)
    table, kept = columns(affine, read_only, cotangent.device)
    batch, filters = cotangent.shape[:2]
    k = cotangent.reshape(batch, filters, -1).transpose(0, 1)  # [F, B, O]
    matrix = k.new_zeros(filters, table.shape[0], batch, len(kept))
    for offset, position in enumerate(table):
        inside = position >= 0
        matrix[:, offset].index_add_(2, position[inside], k[:, :, inside])
    matrix = matrix.reshape(geometry.groups, -1, batch * len(kept))
    return Kronecker(matrix, affine.in_shape[0])


def gradient_rows(affine: Affine, gradient: Tensor) -> Tensor:
    """∂L/∂W as right-hand sides, [..., F, C/g, *kernel] → [..., C, (F/g)·offsets]."""
    geometry = _geometry(affine)
    batch = gradient.shape[: gradient.ndim - affine.weight.ndim]
    g = gradient.reshape(*batch, geometry.groups, -1, affine.weight.shape[1], prod(geometry.kernel))
    return g.movedim(-2, -3).flatten(-2).flatten(-3, -2)


def dense_weights(affine: Affine) -> Tensor:
    """W as a matrix [outputs, inputs], entry by entry."""
    geometry = _geometry(affine)
    groups, filters, channels = geometry.groups, affine.out_shape[0], affine.in_shape[0]
    place = affine.weight.device
    table = taps(geometry, affine.in_shape[1:], affine.out_shape[1:], place)
    weight = affine.weight.reshape(groups, filters // groups, channels // groups, -1)
    dense = weight.new_zeros(filters, table.shape[1], channels, prod(affine.in_shape[1:]))
    for offset, position in enumerate(table):
        inside = torch.nonzero(position >= 0).flatten()
        for g in range(groups):
            f = torch.arange(g * filters // groups, (g + 1) * filters // groups, device=place)
            c = torch.arange(g * channels // groups, (g + 1) * channels // groups, device=place)
            at = (f[:, None, None], inside[None, None], c[None, :, None], position[inside])
            dense[at] += weight[g, :, :, offset, None]
    return dense.reshape(filters * table.shape[1], -1)


class WeightConstraint:
    """W of the weight constraint as a coupling of the table u[c, (b, position)].

    Args:
        affine: a convolution.
        batch: B.
        read_only: the table leaves out positions that no kernel reads.
    """

    def __init__(self, affine: Affine, batch: int, *, read_only: bool = False) -> None:
        self.affine = affine
        self.batch = batch
        self.rows = batch * prod(affine.out_shape)
        self.read_only = read_only and 0 < int(affine.reads.sum()) < affine.reads.numel()

    def apply(self, x: Tensor) -> Tensor:
        """W ⋆ u without bias: [S, C, B·positions] → [S, B·F·outputs]."""
        return self.affine.linear(self.fold(x)).reshape(x.shape[0], -1)

    def adjoint(self, y: Tensor) -> Tensor:
        """Wᵀ y: [S, B·F·outputs] → [S, C, B·positions]."""
        out = self.affine.adjoint(y.reshape(-1, *self.affine.out_shape))
        return self.unfold(out, y.shape[0])

    def fold(self, x: Tensor) -> Tensor:
        """Table [S, C, B·positions] → samples [S·B, C, *space]."""
        x = x.reshape(x.shape[0], x.shape[1], self.batch, -1).transpose(1, 2)
        if self.read_only:
            kept = columns(self.affine, True, x.device)[1]
            full = x.new_zeros(*x.shape[:-1], prod(self.affine.in_shape[1:]))
            full[..., kept] = x
            x = full
        return x.reshape(-1, *self.affine.in_shape)

    def unfold(self, u: Tensor, count: int = 1) -> Tensor:
        """Samples [S·B, C, *space] → table [S, C, B·positions]."""
        u = u.reshape(count, self.batch, self.affine.in_shape[0], -1)
        if self.read_only:
            u = u[..., columns(self.affine, True, u.device)[1]]
        return u.transpose(1, 2).flatten(2)

    def add_gram(self, weights: Tensor, into: Tensor) -> None:
        """Add Wᵀ diag(weights) W, one difference of kernel offsets at a time.

        For offsets δ, δ' and output o the entry of positions (o+δ, o+δ') is
        Σ_f w[f,c,δ] w[f,c',δ'] weights[f,o].  Pairs with the same δ' − δ meet in the same
        entries: they are summed first, and scattered once, with their mirror image.

        Args:
            weights: of the rows, [B·F·outputs].
            into: [C, P, C, P], or the blocks of the groups, [groups, C/g, P, C/g, P].
        """
        geometry = _geometry(self.affine)
        groups = geometry.groups
        filters, per_group = self.affine.weight.shape[:2]
        w = self.affine.weight.reshape(groups, filters // groups, per_group, -1)
        table, kept = columns(self.affine, self.read_only, weights.device)
        d = weights.reshape(self.batch, groups, filters // groups, -1)
        positions = len(kept)
        split = (into.shape[-2], self.batch, positions)
        view = into.view(*into.shape[:-4], *split, *split)
        if self.rows * (self.affine.in_shape[0] * positions) ** 2 <= SMALL:
            self._add_dense(d, kept, view)
            return
        for b, g in product(range(self.batch), range(groups)):
            own = slice(g * per_group, (g + 1) * per_group)
            whole = into.ndim == 4
            block = view[own, b, :, own, b, :] if whole else view[g, :, b, :, :, b, :]
            scaled = torch.einsum("fci,fo->icfo", w[g], d[b, g])
            if geometry.border != "zeros":
                _add_pairs(scaled, w[g], table, block)
                continue
            for pairs in _differences(geometry.kernel):
                total = w.new_zeros(per_group, per_group, positions)
                partner = torch.full((positions,), -1, device=table.device)
                for i, j in pairs:
                    both = (table[i] >= 0) & (table[j] >= 0)
                    first = table[i, both]
                    part = torch.einsum("cfo,fe->ceo", scaled[i][:, :, both], w[g, :, :, j])
                    total.index_add_(2, first, part)
                    partner[first] = table[j, both]
                used = torch.nonzero(partner >= 0).flatten()
                entries = total[:, :, used].permute(2, 0, 1)
                block[:, used, :, partner[used]] += entries
                if pairs[0][0] != pairs[0][1]:
                    block[:, partner[used], :, used] += entries.transpose(1, 2)

    def _add_dense(self, weights: Tensor, kept: Tensor, into: Tensor) -> None:
        """The same with W written down: a small layer is one product, its offsets are hundreds."""
        channels = self.affine.in_shape[0]
        dense = dense_weights(self.affine).reshape(weights[0].numel(), channels, -1)[:, :, kept]
        groups = weights.shape[1] if into.ndim == 7 else 1
        own = channels // groups
        rows = dense.reshape(groups, -1, groups, own, len(kept))
        d = weights.reshape(self.batch, groups, -1)
        for b, g in product(range(self.batch), range(groups)):
            part = rows[g, :, g].flatten(1)
            gram = (part.T * d[b, g]) @ part
            block = into[g] if into.ndim == 7 else into
            block[:, b, :, :, b] += gram.reshape(own, len(kept), own, len(kept))


def _add_pairs(scaled: Tensor, weight: Tensor, table: Tensor, into: Tensor) -> None:
    """The same where a border shows the picture again: outputs with one difference do not meet.

    Args:
        scaled: w[f,c,δ] weights[f,o], [offsets, C, F, O].
        weight: w, [F, C, offsets].
        table: position of every tap, [offsets, O]; −1: nothing is read.
        into: [C, P, C, P].
    """
    block = into.permute(1, 3, 0, 2)
    for (i, first), (j, second) in product(enumerate(table), repeat=2):
        entries = torch.einsum("cfo,fe->oce", scaled[i], weight[:, :, j])
        block.index_put_((first, second), entries, accumulate=True)


def _differences(kernel: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """Pairs i ≤ j of flat kernel offsets, gathered by their difference."""
    offsets = list(product(*(range(k) for k in kernel)))
    by_step: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for (i, first), (j, second) in combinations_with_replacement(enumerate(offsets), 2):
        step = tuple(b - a for a, b in zip(first, second, strict=True))
        by_step.setdefault(step, []).append((i, j))
    return list(by_step.values())


def _geometry(affine: Affine) -> Geometry:
    if affine.geometry is None:
        raise TypeError(f"expected a convolution, got {affine.kind} '{affine.name}'")
    return affine.geometry
