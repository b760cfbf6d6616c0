"""Row spaces of the two blocks of a layer, a Kronecker and a sample-wise one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.solvers.kronecker import Kronecker
from rgap.solvers.positive import outer_products
from rgap.solvers.rank import numerical_rank, resolve_rcond
from rgap.solvers.svd import right_singular_vectors

CHUNK = 4_000_000  # entries of an intermediate product; pages that small are used again


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

    def squares(self, swapped: bool) -> Tensor:
        """T Tᵀ, [rank of K, rank of K]; Tᵀ T, [rank of W, rank of W], where swapped."""
        if not swapped and self._one_projector_pays():
            return self._squares_by_projector()
        t = self.cosines()
        return outer_products(t.T.contiguous() if swapped else t)

    def _one_projector_pays(self) -> bool:
        """All samples have the same rows, and their projector takes fewer products than T."""
        first, batch = self.weight[0], len(self.weight)
        if any(q.data_ptr() != first.data_ptr() or q.shape != first.shape for q in self.weight):
            return False
        own, each = self.ranks[0], len(first)
        size = self.channels * self.positions
        by_projector = size**2 * each + batch * own * self.positions * (size + own)
        return by_projector < batch * each * (2 * own * self.positions + own**2)

    def _squares_by_projector(self) -> Tensor:
        """T Tᵀ = Σ_b V_b QᵀQ V_bᵀ by the blocks of QᵀQ, [C, N, C, N], channel by channel."""
        channels, size, batch = self.channels, self.positions, len(self.weight)
        flat = self.weight[0].flatten(1)
        projector = outer_products(flat.T.contiguous()).reshape(channels, size, channels, size)
        squares = flat.new_empty(self.ranks[0], self.ranks[0])
        places = self._places()
        for c in range(channels):
            left, row = self.gradient[c // self.per_group], places[c]
            many = max(1, CHUNK // max(1, left.shape[1] * len(left)))
            for g, basis in enumerate(self.gradient[: c // self.per_group + 1]):
                parts = basis.reshape(len(basis), batch, size)
                last = min((g + 1) * self.per_group, c + 1)
                for start in range(g * self.per_group, last, many):
                    stop = min(start + many, last)
                    block = projector[c, :, start:stop]
                    image = torch.einsum("nkm,rbm->bnkr", block, parts).flatten(0, 1).flatten(1)
                    own = slice(places[start].start, places[stop - 1].stop)
                    torch.mm(left, image, out=squares[row, own])
            squares[: row.start, row] = squares[row, : row.start].T
        return squares

    def _places(self) -> list[slice]:
        """Rows of T of every channel."""
        places, start = [], 0
        for c in range(self.channels):
            stop = start + len(self.gradient[c // self.per_group])
            places.append(slice(start, stop))
            start = stop
        return places

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
