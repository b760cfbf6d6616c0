"""The gradient constraint of one layer, inverted: null space and pseudo-inverse of ``du ↦ K du``.

K acts on every channel by itself through one small matrix per group, so its null space is a null
space of that matrix for every channel.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from rgap.constraints import dense_weights
from rgap.network.affine import Affine
from rgap.solvers.rank import numerical_rank, resolve_rcond


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
