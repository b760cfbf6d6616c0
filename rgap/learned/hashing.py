"""Signed feature hashing: a long vector in a few numbers, whose products are kept in the mean.

    h(g)_i = Σ_{j : b(j) = i} s(j) g_j,    E⟨h(a), h(b)⟩ = ⟨a, b⟩

with a bucket b(j) < m and a sign s(j) = ±1 of every entry j.  Both are mixed from j and a seed, so
that nothing of the matrix ``[m, n]`` is ever kept: entries are hashed a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["FeatureHash"]

CHUNK = 1 << 16  # entries whose buckets are held at a time


@dataclass(frozen=True)
class FeatureHash:
    """The linear map from all tensors of a gradient, one after another, to m numbers.

    Source: Weinberger, Dasgupta, Langford, Smola and Attenberg (2009); of gradients: Wu et al.
    (2023).

    Attributes:
        size: m; None: every entry is kept as it is.
        seed: of buckets and signs.

    >>> few = FeatureHash(8, seed=1)
    >>> a, b = torch.randn(2, 3), torch.randn(5)
    >>> bool(torch.allclose(few.of([2 * a, b]), 2 * few.of([a, 0 * b]) + few.of([0 * a, b])))
    True
    """

    size: int | None
    seed: int = 0

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The hash of one gradient, [m], in the precision of the tensors."""
        return self.rows([tensor[None] for tensor in tensors])[0]

    def rows(self, tensors: Sequence[Tensor], chunk: int = CHUNK) -> Tensor:
        """The hashes of several gradients at once, [N, m].

        Args:
            tensors: in the model's order, ``[N, *shape]`` each.
            chunk: entries at a time; the result does not depend on it but for rounding.
        """
        flat = [tensor.flatten(1) for tensor in tensors]
        if self.size is None:
            return torch.cat(flat, 1)
        total = flat[0].new_zeros(self.size, len(flat[0]))
        offset = 0
        for rows in flat:
            for first in range(0, rows.shape[1], chunk):
                part = rows[:, first : first + chunk]
                buckets, signs = self.places(offset + first, part.shape[1])
                signed = (part * signs.to(part)).T.contiguous()  # twice as fast to add
                total.index_add_(0, buckets.to(part.device), signed)
            offset += rows.shape[1]
        return total.T

    def places(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Buckets and signs of entries ``first``, ``first + 1``, …, [count] each."""
        assert self.size is not None
        keys = np.arange(first, first + count, dtype=np.uint64)
        mixed = _mixed(keys + _mixed(np.array([self.seed % 2**64], dtype=np.uint64)))
        signs = (mixed & np.uint64(1)).astype(np.int8) * 2 - 1
        buckets = (mixed >> np.uint64(1)) % np.uint64(self.size)
        return torch.from_numpy(buckets.astype(np.int64)), torch.from_numpy(signs)


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood 2014): neighbouring keys give unrelated numbers."""
    z = keys + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
