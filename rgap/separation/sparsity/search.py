"""Search for directions whose cotangents have many zeros: random subsets of rows, and exchanges."""

from __future__ import annotations

import time
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

import torch
from torch import Tensor

from rgap.separation.sparsity.coordinates import Layer

__all__ = ["Directions", "RowSearch"]

CHECKS = 16  # rows that a kernel is tried on before all rows are
HITS = 16  # kernels of one round that are looked at closely
LEAVES = 1 << 15  # kernels of one round
SHARED = 10  # levels of the tree at which subsets branch
SLICE = 4  # rows that each level of the tree chooses from
# How strongly units are preferred that are off in the mean picture (0) or in the weighted mean of
# least norm, which is close to the darkest picture (1), by pairs of rounds.
PREFERENCES = ((4.0, 0), (2.0, 1), (1.0, 0), (0.0, 0), (4.0, 1), (2.0, 0))
EXCHANGES = 8  # rows of a direction that are tried without
STEPS = 8  # exchanges of rows from one kernel, those to the most zeros first
NEW = 1e-3  # share of a kernel outside the span of the directions found
SIFTED = 4096  # kernels of one round that are compared with those seen


@dataclass(frozen=True)
class Directions:
    """Directions and their zeros, those refused too: their kernels are not looked at again."""

    vectors: Tensor  # [F, B], unit length
    zeros: Tensor  # [F, live], boolean
    errors: Tensor  # relative error of each direction, [F]
    kept: Tensor  # [F], boolean

    def contains(self, picks: Tensor, since: int) -> Tensor:
        """True where all rows of a subset [H, B − 1] are zeros of one direction, [H].

        Directions before place ``since`` were asked already.
        """
        zeros = self.zeros[since:].float()
        mask = torch.zeros(len(picks), zeros.shape[1], device=picks.device)
        mask.scatter_(1, picks, 1.0)
        return (mask @ zeros.T > picks.shape[1] - 0.5).any(1)

    def with_one(
        self, direction: Tensor | None, zeros: Tensor, error: float, kept: bool
    ) -> Directions:
        """One direction more, or rows that are done with."""
        if direction is None:
            direction = self.vectors.new_zeros(self.vectors.shape[1])
        return Directions(
            torch.cat([self.vectors, direction[None]]),
            torch.cat([self.zeros, zeros[None]]),
            torch.cat([self.errors, self.errors.new_tensor([error])]),
            torch.cat([self.kept, self.kept.new_tensor([kept])]),
        )


class RowSearch:
    """Random trees of row subsets; collects the sparse directions that they lead to."""

    def __init__(self, layer: Layer, seed: int, guided: bool) -> None:
        rows, rank = layer.white.shape
        self.layer, self.guided, self.rounds = layer, guided, 0
        place = layer.white.device
        none = torch.zeros(0, dtype=torch.bool, device=place)
        double = torch.zeros(0, rank, dtype=torch.float64, device=place)
        self.directions = Directions(double, none.reshape(0, rows), double[:, 0], none)
        self.generator = torch.Generator().manual_seed(seed)
        self.checks = min(CHECKS, rows - rank + 1)
        self.needed = min(2, self.checks)
        self.width = max(1, min(SLICE, (rows - self.checks) // max(1, rank - 1)))
        self.columns = layer.white.T.contiguous()
        z = layer.centres
        self.lean = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True).clamp_min(1e-30)
        self.seen: set[bytes] = set()
        if rank == 1:
            one = torch.ones(1, dtype=torch.float64, device=place)
            self.directions = self.directions.with_one(one, none.new_zeros(rows), 0.0, True)
        if rank == 2:
            nothing = torch.zeros(0, dtype=torch.long, device=place)
            self._look(nothing, nothing)

    @property
    def count(self) -> int:
        """Number of sparse directions found."""
        return int(self.directions.kept.sum())

    def round(self, goal: int, deadline: float) -> int:
        """Form the kernels of one batch of subsets and judge the best; the number of subsets.

        Ends early with ``goal`` directions or at the ``deadline`` of ``time.perf_counter``.
        """
        rank = self.layer.white.shape[1]
        order = self._order()
        slices = order[: (rank - 1) * self.width].reshape(rank - 1, self.width)
        checks = order[(rank - 1) * self.width :]
        basis, picks = self._bases(slices[:-1])
        # Kernels within the planes that are left: e = t_2 n_1 − t_1 n_2 for a row u and t = uᵀN.
        tested = self.layer.white[torch.cat([slices[-1], checks])]
        planes = (tested @ basis.flatten(0, 1).reshape(2, rank, -1)).unbind(0)
        subsets, passed, kernels = [], [], []
        for pivot, row in enumerate(slices[-1]):
            first, second = planes[0][pivot], planes[1][pivot]
            size = self.layer.loose * (first * first + second * second).sqrt_()
            values = second * planes[0][self.width :]
            values = torch.addcmul(values, first, planes[1][self.width :], value=-1)
            zero = values.abs_() < size
            hits = torch.nonzero(zero.sum(0, dtype=torch.uint8) >= self.needed).flatten()
            subsets.append(torch.cat([picks[:, hits].T, row.expand(len(hits), 1)], 1))
            passed.append(zero[:, hits].T)
            kernels.append((second[hits] * basis[0][:, hits] - first[hits] * basis[1][:, hits]).T)
        self._sift(torch.cat(subsets), torch.cat(passed), torch.cat(kernels), order, goal, deadline)
        self.rounds += 1
        return int(basis.shape[2]) * self.width

    def _sift(
        self,
        picks: Tensor,
        passed: Tensor,
        kernels: Tensor,
        order: Tensor,
        goal: int,
        deadline: float,
    ) -> None:
        """Look at the hits of a round, those with the most zeros first.

        Every other round leaves out what lies in the span of the directions found: a sample that
        is still missing is no mixture of the others.
        """
        checks = order[-self.checks :]
        votes = passed.sum(1) + torch.rand(len(passed), generator=self.generator).to(passed.device)
        best = votes.argsort(descending=True)[:SIFTED]
        picks, passed = picks[best], passed[best]
        kernels = torch.nn.functional.normalize(kernels[best])
        before, asked = -1, 0
        for _ in range(HITS):
            new = ~self.directions.contains(picks, asked)
            asked = len(self.directions.kept)
            if self.rounds % 2 == 0 and self.count != before:
                before = self.count
                known = self._known()
                new &= (kernels - kernels @ known @ known.T).norm(dim=1) > NEW
            picks, passed, kernels = picks[new], passed[new], kernels[new]
            if not len(picks) or self.count >= goal or time.perf_counter() > deadline:
                break
            self._look(torch.cat([picks[0], checks[passed[0]]]), order)
            picks, passed, kernels = picks[1:], passed[1:], kernels[1:]

    def _known(self) -> Tensor:
        """Orthonormal basis [B, F] of the sparsest directions found, F < B."""
        kept = torch.nonzero(self.directions.kept).flatten()
        zeros = self.directions.zeros[kept].sum(1)
        best = kept[zeros.argsort(descending=True, stable=True)[: self.layer.rows.shape[1] - 1]]
        white = torch.nn.functional.normalize(self.directions.vectors[best] * self.layer.sigma)
        basis: Tensor = torch.linalg.qr(white.T)[0].float()
        return basis

    def _order(self) -> Tensor:
        """Rows of this round, for the levels of the tree and for the checks, weighted at random."""
        uniform = torch.rand(self.lean.shape[1], generator=self.generator, dtype=torch.float64)
        uniform = uniform.to(self.lean.device)
        keys = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))  # Gumbel: top-k sampling
        if self.guided:
            strength, centre = PREFERENCES[(self.rounds // 2) % len(PREFERENCES)]
            keys -= strength * self.lean[centre]
        rank = self.layer.white.shape[1]
        top = keys.argsort(descending=True)[: (rank - 1) * self.width + self.checks]
        return top[torch.randperm(len(top), generator=self.generator).to(top.device)]

    def _bases(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Planes [2, B, N] orthogonal to B−2 rows, one a slice, and the rows [B−2, N].

        Each level takes one row u away from a kernel basis N.  The last levels branch, two
        different rows a node, so that the subsets share the eliminations above them.
        """
        levels, width = slices.shape
        shared = min(SHARED, levels) if width > 1 else 0
        nodes = max(1, min(LEAVES, 1 << (levels + 4)) >> shared)
        place = slices.device
        basis = torch.eye(levels + 2, device=place)[:, :, None].expand(-1, -1, nodes)
        picks = torch.empty(0, nodes, dtype=torch.long, device=place)
        for level in range(levels):
            choice = torch.randint(width, (nodes,), generator=self.generator).to(place)
            chosen = slices[level, choice]
            if levels - level <= shared:
                other = torch.randint(1, width, (nodes,), generator=self.generator).to(place)
                chosen = torch.cat([chosen, slices[level, (choice + other) % width]])
                picks = picks.repeat(1, 2)
            picks = torch.cat([picks, chosen[None]])
            smaller = torch.empty(levels + 1 - level, levels + 2, len(chosen), device=place)
            for start in range(0, len(chosen), nodes):
                part = slice(start, start + nodes)
                _without(basis, self.columns[:, chosen[part]], smaller[:, :, part])
            basis, nodes = smaller, len(chosen)
        return basis, picks

    def _look(self, rows: Tensor, more: Tensor) -> None:
        """Judge the kernel of these rows, and every direction that is an exchange of a row away.

        Rows whose kernel has more than two dimensions are completed from ``more``.
        """
        self.directions = self.directions.with_one(None, self._mask(rows), inf, False)
        before = self.count
        waiting: list[tuple[int, int, Tensor]] = []
        new = self._planes(rows, more)
        for _ in range(STEPS):
            for zeros in new:
                key = zeros.numpy().tobytes()
                if key not in self.seen:
                    self.seen.add(key)
                    heappush(waiting, (-int(zeros.sum()), len(self.seen), zeros))
            if not waiting or self.count > before:
                break
            new = self._judge(heappop(waiting)[2])

    def _mask(self, rows: Tensor) -> Tensor:
        zeros = self.layer.rows.new_zeros(len(self.layer.rows), dtype=torch.bool)
        zeros[rows] = True
        return zeros

    def _planes(self, rows: Tensor, more: Tensor) -> list[Tensor]:
        """Zeros of a kernel of one dimension, or of the best directions in one of two."""
        table = self.layer.rows
        values, vh = _right(table[rows])
        null = vh[int((values > 100 * self.layer.noise).sum()) :]
        if len(null) <= 1:
            return [self._mask(rows)] if len(null) else []
        for row in more:
            if len(null) == 2:
                break
            part = null @ table[row]
            if float(part.norm()) > 100 * self.layer.noise:
                null = torch.linalg.svd(part[None], full_matrices=True)[2][1:] @ null
        return self._plane(null) if len(null) == 2 else []

    def _plane(self, plane: Tensor) -> list[Tensor]:
        """Zeros of the directions in a plane [2, B] on which two rows or more agree."""
        first, second = (self.layer.rows @ plane.T).unbind(1)
        size = (first * first + second * second).sqrt()
        noise = 100 * self.layer.noise
        common = size <= noise
        agree = (first[:, None] * second - second[:, None] * first).abs() <= noise * size
        agree &= ~common[:, None] & ~common
        votes = agree.sum(0)
        best = []
        while int(votes.max()) >= 2:
            members = agree[:, int(votes.argmax())]
            best.append(members | common)
            votes = votes.masked_fill(members, 0)
        return best

    def _judge(self, zeros: Tensor) -> list[Tensor]:
        """Refine a direction over all its zeros and keep it unless it is a mixture of two.

        A mixture of d_b and d_c vanishes where both samples are off and at one unit more: without
        that unit the kernel is the plane of d_b and d_c, each of which has several more zeros.
        """
        table, noise, rank = self.layer.rows, self.layer.noise, len(self.layer.weights)
        for _ in range(8):
            values, vh = _right(table[zeros])
            if len(values) < rank - 1 or float(values[rank - 2]) <= 100 * noise:
                return []
            gap = float(values[rank - 2])
            now = (table @ vh[-1]).abs() <= noise * (1 + 2 / gap)
            if torch.equal(now, zeros):
                break
            zeros = now
        if bool((self.directions.kept & (self.directions.zeros == zeros).all(1)).any()):
            return []
        error = noise * rank**0.5 / gap
        near: list[Tensor] = []
        mixture = False
        leverage = (table[zeros] @ vh[: rank - 1].T / values[: rank - 1]).square().sum(1)
        needed = torch.nonzero(leverage > 1 - 1e-9).flatten()
        for place in needed[:EXCHANGES].tolist():
            rest = torch.nonzero(zeros).flatten()
            rest = torch.cat([rest[:place], rest[place + 1 :]])
            others = self._planes(rest, rest[:0])
            mixture = mixture or len(others) >= 2
            near += others
        mixture = mixture or self._mixed(zeros, needed)
        good = not mixture and error < 0.1 and int(zeros.sum()) >= rank - 1 + self.needed
        self.directions = self.directions.with_one(vh[-1], zeros, error, good)
        return near

    def _mixed(self, zeros: Tensor, needed: Tensor) -> bool:
        """True if the kernel without the rows that only it needs is spanned by sparser ones."""
        common = zeros.clone()
        common[torch.nonzero(zeros).flatten()[needed]] = False
        sparser = self.directions.kept & (self.directions.zeros.sum(1) > zeros.sum())
        return int((sparser & (self.directions.zeros | ~common).all(1)).sum()) >= len(needed) + 1


def _right(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and all right singular vectors, as rows."""
    rows, columns = matrix.shape
    _, values, vh = torch.linalg.svd(matrix, full_matrices=rows < columns)
    return values, vh


def _without(basis: Tensor, rows: Tensor, into: Tensor) -> None:
    """Part of the bases [q, B, N] orthogonal to one row [B, N] each, written to [q − 1, B, N].

    The reflection that sends r = uᵀN to the last axis leaves it in the other columns.
    """
    v = (basis * rows).sum(1)
    norm = (v * v).sum(0).sqrt_().clamp_min_(1e-15)
    norm = torch.where(v[-1] < 0, -norm, norm)
    half = norm * (norm + v[-1])  # ‖v‖²/2 after the next line
    v[-1] += norm
    image = (basis * v[:, None]).sum(0)
    torch.addcmul(basis[:-1], (v[:-1] / half)[:, None], image, value=-1.0, out=into)
