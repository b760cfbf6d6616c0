"""Lower bounds on the generic ranks of one layer: ranks at a point that somebody looked at.

A rank is generic if almost all k and W have it, and no point has a higher one.  A rank modulo a
prime at an integer point is at most the rank at that point, so it is a certain lower bound: the
point is a witness.  Where a count from above meets it, the count is proved; no probability enters.

Any point will do, so simple ones come first.  With W in blocks, some filters reading some channels
only, the equations fall apart channel by channel, and in most layers their number stays what it is:
all F filters of K and f filters of W in a block share F·f relations, F² in all blocks together.

All units are on here; a group is counted once and taken as often as there are groups.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rgap.analysis.generic_rank.layout import Layout, layout
from rgap.analysis.generic_rank.modular import (
    gradient_matrix,
    projected,
    random_point,
    sparse_null_space,
)
from rgap.network.affine import Affine
from rgap.solvers.modular import Residues, multiply, random_prime, reduce, residue_rank

__all__ = ["EFFORT", "Witness"]

EFFORT = 3e10  # a few seconds
Block = tuple[int, int]  # filters of W, and the channels that they read


class Witness:
    """Ranks of a layer at points of its own.

    Args:
        affine: the layer; its weights are not read.
        most: multiplications that one elimination may take; what would take more is left out, which
            leaves lower bounds lower bounds.

    >>> import torch
    >>> from rgap.network.affine import Geometry, convolution
    >>> around = Geometry.of((3, 3), padding=1)
    >>> conv = convolution("c", torch.ones(2, 3, 3, 3), None, ("w", None), (3, 6, 6), around)
    >>> seen = Witness(conv)
    >>> seen.gradient(2), 2 * seen.weight(72), seen.joint(2, 194)
    (54, 144, 194)
    """

    def __init__(self, affine: Affine, most: float = EFFORT) -> None:
        self.plan = layout(affine)
        self.most = most
        rng = random.Random(affine.kind)
        self.prime = random_prime(rng)
        self.point = np.random.default_rng(rng.getrandbits(64))
        self._weight = _one_tap_each(self.plan)
        self._cotangents: list[Residues] = []

    def gradient(self, batch: int) -> int:
        """At least this many gradient constraints of B samples are independent."""
        plan = self.plan
        rows, columns = plan.filters * plan.offsets, batch * plan.positions
        if _effort(rows, columns) > self.most:
            return 0
        matrix = gradient_matrix(plan, self._k(batch), self.prime)
        return plan.groups * plan.channels * residue_rank(matrix, self.prime)

    def weight(self, enough: int) -> int:
        """At least this many weight constraints of one sample are independent.

        Args:
            enough: an upper bound; once a point reaches it, no other is tried.
        """
        plan = self.plan
        for blocks in _splits(plan):
            if self._weight * plan.groups >= enough:
                break
            shapes = [(f * plan.outputs, c * plan.positions) for f, c in blocks]
            if max(_effort(*shape) for shape in shapes) > self.most:
                break
            rank = sum(
                times
                * residue_rank(_weight_matrix(plan, self._filters(block), self.prime), self.prime)
                for block, times in blocks.items()
            )
            self._weight = max(self._weight, rank)
        return self._weight * plan.groups

    def joint(self, batch: int, enough: int) -> int:
        """At least this many constraints of both kinds are independent for B samples.

        Args:
            batch: B.
            enough: an upper bound; once a point reaches it, no other is tried.
        """
        plan = self.plan
        gradient = self.gradient(batch)
        best = max(gradient, batch * plan.groups * self._weight)
        rank_k = gradient // (plan.groups * plan.channels)
        for blocks in _splits(plan):
            if best >= enough:
                break
            if max(min(self._efforts(batch, rank_k, block)) for block in blocks) > self.most:
                break
            rank = sum(times * self._block(batch, rank_k, b) for b, times in blocks.items())
            best = max(best, plan.groups * rank)
        return best

    def _efforts(self, batch: int, rank_k: int, block: Block) -> tuple[float, float]:
        """Multiplications to take W N(K), and K N(W): the rank of either is that of the block."""
        plan, (filters, channels) = self.plan, block
        on_k = _effort(batch * filters * plan.outputs, channels * (batch * plan.positions - rank_k))
        size = channels * plan.positions
        rows = plan.filters * channels * plan.offsets
        on_w = _effort(rows, batch * max(0, size - filters * plan.outputs))
        return on_k, on_w + _effort(filters * plan.outputs, size)

    def _block(self, batch: int, rank_k: int, block: Block) -> int:
        on_k, on_w = self._efforts(batch, rank_k, block)
        return self._w_on_kernel(batch, block) if on_k <= on_w else self._k_on_kernel(batch, block)

    def _w_on_kernel(self, batch: int, block: Block) -> int:
        plan, (filters, channels) = self.plan, block
        kernel = sparse_null_space(gradient_matrix(plan, self._k(batch), self.prime), self.prime)
        part = Layout(1, filters, channels, plan.positions, plan.outputs, plan.table)
        on = np.ones((batch, filters, plan.outputs), dtype=np.bool_)
        rest = projected(part, self._filters(block), kernel, on, self.prime)
        rank_k = len(kernel) - int(kernel.shape[1])
        return channels * rank_k + residue_rank(rest, self.prime)

    def _k_on_kernel(self, batch: int, block: Block) -> int:
        """B rank W and the rank of [K_1 V, …, K_B V] with V the null space of W."""
        plan, channels = self.plan, block[1]
        kernel = sparse_null_space(
            _weight_matrix(plan, self._filters(block), self.prime), self.prime
        )
        width = int(kernel.shape[1])
        rank_w = len(kernel) - width
        v = kernel.reshape(channels, plan.positions, width)
        v = np.concatenate([v, np.zeros((channels, 1, width))], axis=1)  # −1 reads the padding
        read = v[:, plan.table].transpose(2, 0, 1, 3).reshape(plan.outputs, -1)
        rows = plan.filters * channels * plan.offsets
        parts = [multiply(k, read, self.prime).reshape(rows, width) for k in self._k(batch)]
        return batch * rank_w + residue_rank(np.concatenate(parts, axis=1), self.prime)

    def _k(self, batch: int) -> Residues:
        """Cotangents [B, F, O]; those of a smaller batch are the first ones of a larger."""
        shape = (self.plan.filters, self.plan.outputs)
        while len(self._cotangents) < batch:
            self._cotangents.append(random_point(shape, self.prime, self.point))
        return np.stack(self._cotangents[:batch])

    def _filters(self, block: Block) -> Residues:
        return random_point((*block, self.plan.offsets), self.prime, self.point)


def _effort(rows: int, columns: int) -> float:
    return float(rows) * columns * min(rows, columns)


def _splits(plan: Layout) -> Iterator[Counter[Block]]:
    """Blocks of W and how often each occurs, from the smallest blocks to a single one."""
    parts = min(plan.filters, plan.channels)
    while parts >= 1:
        filters = [len(range(i, plan.filters, parts)) for i in range(parts)]
        channels = [len(range(i, plan.channels, parts)) for i in reversed(range(parts))]
        yield Counter(zip(filters, channels, strict=True))
        parts //= 2


def _weight_matrix(plan: Layout, w: Residues, prime: int) -> Residues:
    """W of one sample for filters [f, c, offsets]: [O·f, N·c], outputs first and so banded."""
    filters, channels, _ = w.shape
    matrix = np.zeros((filters, plan.outputs, channels, plan.positions))
    for offset, position in enumerate(plan.table):
        inside = np.flatnonzero(position >= 0)
        matrix[:, inside, :, position[inside]] += w[:, :, offset]
    if plan.again:
        reduce(matrix, prime)
    rows = matrix.transpose(1, 0, 2, 3)
    return rows.reshape(plan.outputs * filters, channels * plan.positions)


def _one_tap_each(plan: Layout) -> int:
    """Rank of one group's W with a single tap in every filter: every row of it reads one pixel.

    Filters are given to the (channel, tap) that reads most pixels which no filter reads yet.  A
    convolution of stride one that keeps its size has full rank at such a point as soon as it has as
    many filters as channels, whatever its size.
    """
    seen: NDArray[np.bool_] = np.zeros(plan.positions, dtype=np.bool_)
    left = [row[row >= 0] for row in plan.table]
    gains: list[int] = []
    while left and len(gains) * plan.channels < plan.filters:  # gains only fall
        fresh = [len(np.unique(row[~seen[row]])) for row in left]
        best = int(np.argmax(fresh))
        if fresh[best] == 0:
            break
        gains.append(fresh[best])
        seen[left.pop(best)] = True
    every = sorted((gain for gain in gains for _ in range(plan.channels)), reverse=True)
    return sum(every[: plan.filters])
