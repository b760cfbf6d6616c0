"""The equations of one layer, inverted: null space, pseudo-inverse and rank of K and of W.

K acts on every channel by itself through one small matrix per group, so its null space is a null
space of that matrix for every channel; W acts on every sample by itself.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from rgap.constraints import dense_weights, weight_constraint
from rgap.network.affine import Affine
from rgap.solvers.limits import MARGIN, NORMAL
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.solvers.square import Square, factored
from rgap.solvers.subspace import full_column_rank


class GradientInverse:
    """Null space and pseudo-inverse of K, group by group.

    Args:
        affine: the layer.
        batch: B.
        matrix: K, [groups, rows, B·positions], as in `rgap.constraints.gradient_constraint`.
        rcond: relative cutoff, None for the default.
        noise: relative error of the cotangents.
        dtype: precision in which they are known.
    """

    def __init__(
        self,
        affine: Affine,
        batch: int,
        matrix: Tensor,
        rcond: float | None,
        noise: float,
        dtype: torch.dtype,
    ) -> None:
        self.affine, self.batch = affine, batch
        u, s, vh = torch.linalg.svd(matrix, full_matrices=True)
        cutoff = resolve_rcond(rcond, (matrix.shape[1], matrix.shape[2]), dtype, noise)
        ranks = [numerical_rank(values, matrix.shape[2], cutoff) for values in s]
        self.channels = affine.in_shape[0] // len(ranks)
        self.ranks = [rank.rank for rank in ranks]
        self.rank = min(ranks, key=lambda rank: rank.gap)
        self._u = [part[:, :r] for part, r in zip(u, self.ranks, strict=True)]
        self._s = [part[:r] for part, r in zip(s, self.ranks, strict=True)]
        self._v = [part[:r] for part, r in zip(vh, self.ranks, strict=True)]
        self._null = [part[r:] for part, r in zip(vh, self.ranks, strict=True)]
        self.free = self.channels * sum(len(part) for part in self._null)

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_j weights[j] n_j for weights [free, m], of the null directions: [m, B, *in_shape]."""
        parts, at = [], 0
        for part in self._null:
            own = weights[at : at + self.channels * len(part)].T
            at += self.channels * len(part)
            parts.append(own.reshape(weights.shape[1], self.channels, len(part)) @ part)
        return self._fold(torch.cat(parts, 1))

    def forward(self) -> Tensor:
        """W n_j of the orthonormal null directions, [free, B·outputs].

        Each touches one channel only, so it meets one channel's columns of W.
        """
        affine, batch = self.affine, self.batch
        outputs = prod(affine.out_shape)
        dense = dense_weights(affine).reshape(outputs, affine.in_shape[0], -1)
        parts = []
        for g, part in enumerate(self._null):
            own = dense[:, g * self.channels : (g + 1) * self.channels]
            each = part.reshape(len(part), batch, own.shape[2])
            moved = torch.einsum("pbs,fcs->cpbf", each, own)
            parts.append(moved.reshape(self.channels * len(part), batch * outputs))
        return torch.cat(parts)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(K⁺ y as directions, what of y no K du can reach) for y as `gradient_rows`."""
        y = rows.reshape(len(rows), len(self._s), self.channels, -1)
        parts, left = [], []
        for g, (u, s, v) in enumerate(zip(self._u, self._s, self._v, strict=True)):
            inside = y[:, g] @ u
            parts.append((inside / s) @ v)
            left.append(y[:, g] - inside @ u.T)
        return self._fold(torch.cat(parts, 1)), torch.stack(left, 1).flatten(1)

    def _fold(self, table: Tensor) -> Tensor:
        """[S, C, B·positions] → [S, B, *in_shape]."""
        positions = table.shape[2] // self.batch
        split = table.reshape(*table.shape[:2], self.batch, positions).transpose(1, 2)
        return split.reshape(len(table), self.batch, *self.affine.in_shape)


class WeightInverse:
    """Factors W of one sample once; every sample of the batch shares it.

    Square weights go through an LU factorisation, injective ones of moderate condition through the
    Cholesky factor of WᵀW with two steps of refinement, onto ones through WWᵀ, all others through
    the singular value decomposition.

    Args:
        affine: the layer.
        rcond, noise, dtype: as for :class:`GradientInverse`, of the weights.
    """

    def __init__(
        self,
        affine: Affine,
        rcond: float | None = None,
        noise: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.affine = affine
        self.size, self.outputs = prod(affine.in_shape), prod(affine.out_shape)
        self._lower: Tensor | None = None
        self._lu: Square | None = None
        self._pseudo: Tensor | None = None
        self._null: Tensor | None = None
        cutoff = resolve_rcond(rcond, (self.outputs, self.size), dtype, noise)
        if self.outputs == self.size and self._square(cutoff):
            return
        if self.outputs != self.size and self._moderate():
            return
        dense = dense_weights(self.affine)
        u, s, vh = torch.linalg.svd(dense, full_matrices=True)
        self.rank = numerical_rank(s, self.size, cutoff)
        r = self.rank.rank
        self._pseudo = (vh[:r].T / s[:r]) @ u[:, :r].T
        self._null = vh[r:]

    @property
    def onto(self) -> bool:
        """Every z is W u of some u."""
        return self.rank.rank == self.outputs

    def null(self) -> Tensor:
        """Orthonormal basis of {u: W u = 0}, [nullity, *in_shape]."""
        if self.rank.nullity == 0:
            return self.affine.weight.new_zeros(0, *self.affine.in_shape)
        if self._null is None:
            q = torch.linalg.qr(dense_weights(self.affine).T, mode="complete").Q
            self._null = q[:, self.rank.rank :].T.contiguous()
        return self._null.reshape(-1, *self.affine.in_shape)

    def solve(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(W⁺ z, z − W W⁺ z) for z [S, *out_shape]; what is left is 0 where W is onto."""
        u = self._once(z)
        for _ in range(2 if self._lower is not None else 0):
            u = u + self._once(z - self.affine.linear(u))
        return u, torch.zeros_like(z) if self.onto else z - self.affine.linear(u)

    def _once(self, z: Tensor) -> Tensor:
        shape = (len(z), *self.affine.in_shape)
        if self._pseudo is not None:
            return (z.flatten(1) @ self._pseudo.T).reshape(shape)
        if self._lu is not None:
            return self._lu.solve(z.flatten(1).T).T.reshape(shape)
        assert self._lower is not None
        if self._injective:
            right = self.affine.adjoint(z).flatten(1).T
            return torch.cholesky_solve(right, self._lower).T.reshape(shape)
        inner = torch.cholesky_solve(z.flatten(1).T, self._lower).T
        return self.affine.adjoint(inner.reshape(len(z), *self.affine.out_shape))

    def _square(self, cutoff: float) -> bool:
        """Factor square weights; False where they are singular or nearly so."""
        made = factored(dense_weights(self.affine))
        if made is None:
            return False
        largest, smallest = made.extremes
        if not smallest > MARGIN * cutoff * largest:
            return False
        self._lu = made
        self.rank = Rank.full(self.size, made.extremes, cutoff * largest)
        return True

    def _moderate(self) -> bool:
        """Factor the smaller Gram matrix; False where its condition squares too much away."""
        self._injective = self.outputs > self.size
        gram = self._gram(self._injective)
        ends = full_column_rank(gram)
        if ends is None or ends[0] > NORMAL * ends[1]:
            return False
        self.rank = Rank.agreed(len(gram), self.size, largest=ends[0], smallest=ends[1])
        self._lower = torch.linalg.cholesky(gram)
        return True

    def _gram(self, injective: bool) -> Tensor:
        affine = self.affine
        if not injective:
            dense = dense_weights(affine)
            return dense @ dense.T
        coupling = weight_constraint(affine, 1)
        gram = affine.weight.new_zeros(self.size, self.size)
        channels = affine.in_shape[0]
        view = gram.view(channels, -1, channels, self.size // channels)
        coupling.add_gram(gram.new_ones(coupling.rows), view)
        return gram
