"""Generic ranks of one layer's equations, modulo random primes at random integer points.

The unknown x of a layer satisfies [I_C ⊗ K(k); I_B ⊗ W] x = [G; z − b].  Its **generic rank** is
the one for almost all k and W; a unit that is off (ReLU) has k = 0 and no weight row.  What a rank
modulo a prime proves about it stands in :mod:`rgap.solvers.modular`; every entry here is one
unknown or 0, so a minor of r rows has degree r.

The stacked matrix is never formed.  Groups are independent.  Z, the null space of K, is the same
for every channel, and so ``joint rank = C·rank K + rank W (I_C ⊗ Z)``, exactly, modulo p.  K falls
into one piece per residue of positions modulo the stride.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from math import log2, prod

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csgraph, csr_array
from torch import Tensor

from rgap.analysis.generic_rank.layout import Layout, active_units, layout
from rgap.network.affine import Affine
from rgap.solvers.modular import (
    Residues,
    failure_bound,
    multiply,
    null_space,
    random_prime,
    reduce,
    residue_rank,
)


@dataclass(frozen=True)
class BlockRanks:
    """Ranks of the gradient block, the weight block, and both together."""

    gradient: int
    weight: int
    joint: int

    @property
    def shared(self) -> int:
        """Independent equations that follow from either block: gradient + weight − joint."""
        return self.gradient + self.weight - self.joint

    def largest(self, other: BlockRanks) -> BlockRanks:
        """The larger of every rank."""
        return BlockRanks(
            max(self.gradient, other.gradient),
            max(self.weight, other.weight),
            max(self.joint, other.joint),
        )


@dataclass(frozen=True)
class ModularRanks(BlockRanks):
    """Ranks at random integer points modulo random primes.

    Attributes:
        primes: one per point; every rank is the largest of those found.
        failure: probability, at most, that a rank is below the generic rank (it is never above).
        agree: True when every prime gave the same ranks.
    """

    primes: tuple[int, ...]
    failure: float
    agree: bool


def modular_ranks(
    affine: Affine, batch: int, active: Tensor | None = None, *, points: int = 2, seed: int = 0
) -> ModularRanks:
    """Generic ranks of a layer's gradient block, weight block, and both together.

    Args:
        affine: the layer; its weights are not read.
        batch: B.
        active: True where a unit is on, [B, *out_shape]; None: all.
        points: number of independent points, each with its own prime.
        seed: of the primes and points.

    Raises:
        ValueError: a batch or a number of points below 1, a mask of another shape.
        TypeError: a mask that is not boolean.

    >>> import torch
    >>> from rgap.network.affine import Geometry, convolution
    >>> w = torch.ones(2, 3, 3, 3)
    >>> around = Geometry.of((3, 3), padding=1)
    >>> conv = convolution("conv", w, None, ("conv.weight", None), (3, 6, 6), around)
    >>> found = modular_ranks(conv, 2)
    >>> found.gradient, found.weight, found.joint, found.shared
    (54, 144, 194, 4)
    >>> found.failure < 1e-12
    True
    """
    if points < 1:
        raise ValueError(f"expected points >= 1, got {points}; write points=2")
    plan, on = layout(affine), active_units(affine, batch, active)
    rng = random.Random(f"modular ranks {seed}")
    primes, counts, failure = [], [], 1.0
    rows = prod(affine.weight.shape) * int(on.any()) + int(on.sum())
    degree = min(rows, batch * prod(affine.in_shape))
    longest = max(batch * plan.outputs, plan.channels * plan.offsets)
    for _ in range(points):
        prime = random_prime(rng)
        point = np.random.default_rng(rng.getrandbits(64))
        counts.append(_at(plan, on, prime, point))
        primes.append(prime)
        failure *= failure_bound(degree, degree, degree * log2(longest) / 2, prime)
    best = counts[0]
    for other in counts[1:]:
        best = best.largest(other)
    agree = all(ranks == counts[0] for ranks in counts)
    return ModularRanks(best.gradient, best.weight, best.joint, tuple(primes), failure, agree)


def _at(plan: Layout, on: NDArray[np.bool_], prime: int, point: np.random.Generator) -> BlockRanks:
    """Ranks at one random point; ``on`` is [B, groups, F/g, O]."""
    gradient = weight = joint = 0
    for group in range(plan.groups):
        mask = on[:, group]
        k = random_point(mask.shape, prime, point) * mask
        w = random_point((plan.filters, plan.channels, plan.offsets), prime, point)
        kernel = sparse_null_space(gradient_matrix(plan, k, prime), prime)
        own = plan.channels * (len(kernel) - kernel.shape[1])
        gradient += own
        alone = _weight_rank(plan, w, mask, prime)
        weight += alone
        unknowns = plan.channels * len(kernel)
        if own == unknowns or alone == unknowns:  # nothing is left to measure
            joint += unknowns
        else:
            joint += own + residue_rank(projected(plan, w, kernel, mask, prime), prime)
    return BlockRanks(gradient, weight, joint)


def random_point(shape: tuple[int, ...], prime: int, point: np.random.Generator) -> Residues:
    """Independent residues modulo a prime, all equally likely.

    Args:
        shape: of the array.
        prime: p; residues lie in (−p/2, p/2).
        point: draws them.
    """
    return reduce(point.integers(0, prime, shape).astype(np.float64), prime)


def gradient_matrix(plan: Layout, k: Residues, prime: int) -> Residues:
    """K of one group, [F/g · offsets, B·N], from k [B, F/g, O]."""
    batch = len(k)
    matrix = np.zeros((plan.filters, plan.offsets, batch, plan.positions))
    for offset, position in enumerate(plan.table):
        inside = np.flatnonzero(position >= 0)
        rows, own = k[:, :, inside].transpose(2, 1, 0), matrix[:, offset].transpose(2, 0, 1)
        if plan.again:
            np.add.at(own, position[inside], rows)
        else:
            own[position[inside]] = rows
    matrix = reduce(matrix, prime) if plan.again else matrix
    return matrix.reshape(plan.filters * plan.offsets, batch * plan.positions)


def sparse_null_space(matrix: Residues, prime: int) -> Residues:
    """Null space of K, [columns, nullity], piece by piece."""
    height, width = matrix.shape
    row, column = np.nonzero(matrix)
    edges = csr_array((np.ones(len(row)), (row, height + column)), (height + width,) * 2)
    count, piece = csgraph.connected_components(edges, directed=False)
    if count == 1:
        return null_space(matrix, prime)
    order = np.argsort(piece, kind="stable")
    ends = np.cumsum(np.bincount(piece, minlength=count))[:-1]
    blocks = []
    for nodes in np.split(order, ends):
        columns = nodes[nodes >= height] - height
        if not len(columns):
            continue
        part = null_space(matrix[np.ix_(nodes[nodes < height], columns)], prime)
        block = np.zeros((width, part.shape[1]))
        block[columns] = part
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


def _weight_rank(plan: Layout, w: Residues, mask: NDArray[np.bool_], prime: int) -> int:
    """Rank of I_B ⊗ W of one group: every different mask is counted once."""

    @cache
    def rank_of(bits: bytes) -> int:
        on = np.frombuffer(bits, dtype=np.bool_).reshape(mask.shape[1:])
        matrix = np.zeros((*on.shape, plan.positions, plan.channels))
        for offset, position in enumerate(plan.table):
            inside = np.flatnonzero(position >= 0)
            matrix[:, inside, position[inside]] += w[:, None, :, offset]
        # outputs first: neighbours read neighbouring pixels, which keeps the elimination banded
        if plan.again:
            reduce(matrix, prime)
        rows = matrix.transpose(1, 0, 2, 3)[on.T]
        return residue_rank(rows.reshape(len(rows), plan.positions * plan.channels), prime)

    return sum(rank_of(own.tobytes()) for own in mask)


def projected(
    plan: Layout, w: Residues, kernel: Residues, mask: NDArray[np.bool_], prime: int
) -> Residues:
    """``W (I_C ⊗ Z)``: weight constraints of the units that are on, on the null space of K.

    Args:
        plan: which position each tap of an output reads.
        w: weights of one group as residues, [F/g, C/g, offsets].
        kernel: Z, null space of K, [B·N, nullity].
        mask: True where a unit is on, [B, F/g, O].
        prime: p.

    Returns:
        [Σ_b units, C/g · nullity].
    """
    batch, nullity = len(mask), kernel.shape[1]
    z = kernel.reshape(batch, plan.positions, nullity)
    z = np.concatenate([z, np.zeros((batch, 1, nullity))], axis=1)  # −1 reads the padding
    rows = []
    for b, own in enumerate(mask):
        read = z[b, plan.table].reshape(plan.offsets, -1)  # [offsets, O·nullity]
        shape = (plan.filters, plan.outputs, nullity)
        parts = [multiply(w[:, c], read, prime).reshape(shape)[own] for c in range(plan.channels)]
        rows.append(np.stack(parts, axis=1).reshape(int(own.sum()), plan.channels * nullity))
    return np.concatenate(rows)
