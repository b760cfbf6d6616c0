"""Row spaces of the two blocks of a layer, a Kronecker and a sample-wise one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kronecker import Kronecker
from .rank import numerical_rank, resolve_rcond
from .svd import right_singular_vectors


@dataclass(frozen=True)
class RowSpaces:
    """Orthonormal rows of both blocks over tables x[c, (b, position)].

    Attributes:
        gradient: of K, one basis [rank, B·N] per group, for each channel of the group.
        weight: of W, one basis [rank, C, N] per sample.
        channels: C.
    """

    gradient: Sequence[Tensor]
    weight: Sequence[Tensor]
    channels: int

    @property
    def per_group(self) -> int:
        """Channels of one group."""
        return self.channels // len(self.gradient)

    @property
    def positions(self) -> int:
        """N, of one sample."""
        return self.gradient[0].shape[1] // len(self.weight)

    @property
    def ranks(self) -> tuple[int, int]:
        """Dimension of either space."""
        rows = sum(len(basis) for basis in self.gradient)
        return self.per_group * rows, sum(len(basis) for basis in self.weight)

    def cosines(self) -> Tensor:
        """T, [rank of I_C ⊗ K, rank of I_B ⊗ W]: inner products of the two bases."""
        blocks = []
        for g, basis in enumerate(self.gradient):
            v = basis.reshape(len(basis), len(self.weight), self.positions)
            own = slice(g * self.per_group, (g + 1) * self.per_group)
            # rows (channel, i), columns (sample, j): ⟨v_i restricted to channel and sample, q_j⟩
            parts = [
                torch.einsum("in,jcn->cij", v[:, b], q[:, own]) for b, q in enumerate(self.weight)
            ]
            blocks.append(torch.cat(parts, 2).flatten(0, 1))
        return torch.cat(blocks)

    def to_gradient(self, x: Tensor) -> Tensor:
        """Coordinates of tables [S, C, B·N] in the gradient rows, [S, rank]."""
        parts = []
        for g, basis in enumerate(self.gradient):
            own = x[:, g * self.per_group : (g + 1) * self.per_group]
            parts.append((own @ basis.T).flatten(1))
        return torch.cat(parts, 1)

    def from_gradient(self, y: Tensor) -> Tensor:
        """Tables [S, C, B·N] from coordinates [S, rank]: the transpose of `to_gradient`."""
        parts, start = [], 0
        for basis in self.gradient:
            stop = start + self.per_group * len(basis)
            own = y[:, start:stop].reshape(len(y), self.per_group, len(basis))
            parts.append(own @ basis)
            start = stop
        return torch.cat(parts, 1)

    def to_weight(self, x: Tensor) -> Tensor:
        """Coordinates of tables [S, C, B·N] in the weight rows, [S, rank]."""
        each = x.reshape(len(x), self.channels, len(self.weight), self.positions)
        parts = [each[:, :, b].flatten(1) @ q.flatten(1).T for b, q in enumerate(self.weight)]
        return torch.cat(parts, 1)

    def from_weight(self, y: Tensor) -> Tensor:
        """Tables [S, C, B·N] from coordinates [S, rank]: the transpose of `to_weight`."""
        shares = torch.split(y, [len(q) for q in self.weight], 1)
        parts = [
            (own @ q.flatten(1)).reshape(len(y), self.channels, self.positions)
            for q, own in zip(self.weight, shares, strict=True)
        ]
        return torch.stack(parts, 2).flatten(2)


def group_bases(gradient: Kronecker, rcond: float | None, noise: float) -> list[Tensor]:
    """Orthonormal rows of K, one basis [rank, B·N] per group."""
    values, vh = right_singular_vectors(gradient.matrix)
    _, rows, size = gradient.matrix.shape
    tolerance = resolve_rcond(rcond, (rows, size), noise=noise)
    return [v[: numerical_rank(s, size, tolerance).rank] for s, v in zip(values, vh, strict=True)]
