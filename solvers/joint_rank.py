"""Rank of a Kronecker block and a sample-wise block together, from the angle between row spaces.

rank [I_C ⊗ K; I_B ⊗ W] = rank(I_C ⊗ K) + rank(I_B ⊗ W) − dim(row space ∩ row space), and the
intersection is the set of principal vectors at angle zero.  Only the small matrix T of inner
products between the two orthonormal bases is formed, never the stacked system.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, pi, sqrt

import torch
from torch import Tensor

from rgap.solvers.kronecker import Kronecker
from rgap.solvers.limits import (
    BEYOND,
    INDEPENDENT,
    INHERITED,
    LEAST_SINE,
    PROBES,
    PROJECTED,
    SUSPECT,
)
from rgap.solvers.positive import STRIP, backsolve, cholesky_in_place, extremes, transposed_product
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.solvers.spaces import RowSpaces, group_bases
from rgap.solvers.subspace import SMALL, full_column_rank, top_eigenpairs
from rgap.solvers.svd import singular_values
from rgap.solvers.tall import tall_qr


class JointRows:
    """Both blocks together: their rank, and random directions that both leave open.

    Args:
        gradient: the Kronecker block, K [groups, rows, B·N].
        sample_rows: orthonormal rows of W, one [rank W_b, C, N] for each of the B samples.
        rcond: relative cutoff on singular values and on the sine of an angle.
        noise: relative error of the entries of K.
        shared: gives tables [m, C, B·N] that may lie in both row spaces.  What they span is
            measured; a factorisation is then enough to show that nothing else is shared.  Asked
            only where that is cheaper.

    Attributes:
        rank: the joint :class:`Rank`; ``smallest`` is the smallest sine above the cutoff (σ in
            units where both blocks have orthonormal rows) and ``gap`` the ratio of sines there.
        spaces: the orthonormal rows of both.
        common: dimension of what they share.
    """

    def __init__(
        self,
        gradient: Kronecker,
        sample_rows: Sequence[Tensor],
        rcond: float | None = None,
        noise: float = 0.0,
        shared: Callable[[], Tensor] | None = None,
    ) -> None:
        _, rows, size = gradient.matrix.shape
        total = gradient.channels * size
        tolerance = resolve_rcond(rcond, (rows, size), noise=noise)
        # Angles inherit the error of both bases, amplified by the smallest singular value kept.
        self._cutoff = max(tolerance * INHERITED, LEAST_SINE)
        self._gradient, self._noise, self._rcond = gradient, noise, rcond
        self._common: Tensor | None = None  # the shared directions, in the smaller space
        self._rest: Tensor | None = None  # 1 − cos² there, the shared directions set to 1
        bases = group_bases(gradient, rcond, noise)
        self.spaces = RowSpaces(bases, sample_rows, gradient.channels)
        if total in self.spaces.ranks:  # one block fixes everything: the other is in its space
            self.common = min(self.spaces.ranks)
            self.rank = Rank.full(total, cutoff=self._cutoff)
            return
        sines = self._sines(shared)
        self.common = int((sines <= self._cutoff).sum())
        kept = sines[sines > self._cutoff]
        smallest = float(kept.min()) if kept.numel() else 1.0
        dropped = float(sines[sines <= self._cutoff].max()) if self.common else 0.0
        gap = smallest / dropped if dropped > 0 else inf
        rank = sum(self.spaces.ranks) - self.common
        self.rank = Rank.agreed(rank, total, cutoff=self._cutoff, gap=gap, smallest=smallest)

    def open_directions(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Random tables [count, C, B·N] with K x = 0 and W x = 0, of length one or less.

        A normal sample is projected on what both blocks leave open: out of the larger space by its
        basis, out of the smaller one by the factor of the Gram matrix of what is left of its rows.

        Returns:
            The directions; None where the angles are too small for that.
        """
        if self._common is None:
            return None
        rest = self._complement(self._common) if self._rest is None else self._rest.clone()
        lower = cholesky_in_place(rest)
        if lower is None:
            return None
        spaces = self.spaces
        to_large, from_large = spaces.to_gradient, spaces.from_gradient
        to_small, from_small = spaces.to_weight, spaces.from_weight
        if not self._swapped:
            to_large, from_large, to_small, from_small = to_small, from_small, to_large, from_large
        shape = (count, spaces.channels, len(spaces.weight) * spaces.positions)
        x: Tensor = torch.randn(shape, generator=generator, dtype=lower.dtype).to(lower)
        x = x - from_large(to_large(x))
        x = x / x.flatten(1).norm(dim=1)[:, None, None]
        signs = torch.randint(0, 2, (4, count), generator=generator).to(x) * 2.0 - 1.0
        most = PROJECTED * torch.finfo(x.dtype).eps * count**0.5
        for _ in range(4):
            step = from_small(backsolve(lower, to_small(x).T).T)
            x = x - step
            x = x - from_large(to_large(x))
            # Random sums of all directions: what one of them still holds shows in every sum.
            sums = torch.tensordot(signs, x, 1)
            if float(to_small(sums).norm(dim=1).max()) < most:
                return x
        return None

    @property
    def _swapped(self) -> bool:
        """The weight rows are the smaller space."""
        rows, columns = self.spaces.ranks
        return rows > columns

    def _complement(self, common: Tensor) -> Tensor:
        """1 − cos² on the smaller space, with 1 along the shared directions: its upper half."""
        matrix = self.spaces.squares(self._swapped).neg_()
        matrix.diagonal().add_(1.0)
        for start in range(0, len(matrix), STRIP):
            strip = matrix[start : start + STRIP, start:]
            strip.addmm_(common[start : start + STRIP], common[start:].T)
        return matrix

    def _sines(self, shared: Callable[[], Tensor] | None) -> Tensor:
        """Sines of the principal angles, the small ones accurately; of the large ones, the least.

        Where ``shared`` explains every angle that is 0, only that and the next sine are given.
        """
        size = min(self.spaces.ranks)
        if size == 0:
            like = self.spaces.weight[0] if self.spaces.weight else self.spaces.gradient[0]
            self._common = like.new_zeros(0, 0)
            return like.new_ones(0)
        if shared is not None and size > SMALL:
            known = self._beyond(shared())
            if known is not None:
                return known
        squares = self.spaces.squares(self._swapped)
        values, vectors = top_eigenpairs(squares, 1.0 - SUSPECT**2)
        sines = (1.0 - values).clamp_min(0.0).sqrt()
        suspect = sines < SUSPECT
        # sin² = 1 − cos² has lost half the digits here: measure the distance between the spaces.
        chosen = vectors[:, suspect]
        if not bool(suspect.any()):
            self._common = chosen
            return sines
        exact, own = self._distance(chosen)
        self._common = own[:, exact <= self._cutoff]
        return torch.cat([sines[~suspect], exact])

    def _beyond(self, shared: Tensor) -> Tensor | None:
        """Sines of what is known to be shared and the least of all others; None if not clear.

        That no other is below s, at least ``SUSPECT`` and the cutoff, is shown by a Cholesky
        factor of (1 − s²)I − cos², the shared directions taken out; or by a part of the batch.
        """
        scales = shared.flatten(1).norm(dim=1).clamp_min(1e-300).reciprocal()
        shared, scales = self._plausible(shared, scales)
        if not len(shared):
            return None
        far = self._distance_of_sums(shared, scales)
        if far > self._cutoff:  # not all of them are in both spaces
            into = (self.spaces.to_weight(shared), self.spaces.to_gradient(shared))
            inside = torch.minimum(into[0].norm(dim=1), into[1].norm(dim=1)) * scales
            both = inside > 1.0 - SUSPECT
            if not bool(both.any()):
                return None
            own = (into[0] if self._swapped else into[1])[both] * scales[both, None]
        else:
            to_small = self.spaces.to_weight if self._swapped else self.spaces.to_gradient
            own = to_small(shared) * scales[:, None]
        chosen, shortest = _span(own.T)
        if far < self._cutoff * shortest:
            exact = chosen.new_full((chosen.shape[1],), far / shortest)
        else:
            exact, chosen = self._distance(chosen)
        if float(exact.max()) > self._cutoff:
            return None
        part = self._part(shared)
        if part is not None and part.common == len(exact):
            self._common = chosen
            return torch.cat([exact, exact.new_tensor([part.rank.smallest])])
        rest, least = self._complement(chosen), max(SUSPECT, self._cutoff)
        shifted = rest.clone()
        shifted.diagonal().sub_(least**2)
        lower = cholesky_in_place(shifted)
        if lower is None:
            return None
        self._common, self._rest = chosen, rest
        ends = extremes(
            lambda x: transposed_product(lower.T, lower.T @ x),
            lambda x: backsolve(lower, x),
            len(lower),
            lower,
        )
        return torch.cat([exact, exact.new_tensor([(ends[1] + least**2) ** 0.5])])

    def _plausible(self, shared: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Those whose share of the first sample is in its weight rows, as far as they may be off.

        ‖x‖² − ‖P x‖² is a sum over samples: where one alone is above the limit, all are.
        """
        first = self.spaces.weight[0].flatten(1)
        own = shared[:, :, : self.spaces.positions].flatten(1)
        lost = own.square().sum(1) - (own @ first.T).square().sum(1)
        kept = lost * scales.square() <= 2.0 * SUSPECT
        return (shared, scales) if bool(kept.all()) else (shared[kept], scales[kept])

    def _distance_of_sums(self, shared: Tensor, scales: Tensor) -> float:
        """A bound on ‖A‖₂, A the distances of all tables (of length one) to either space.

        ‖A‖ ≤ α √(2/π) max ‖A g‖ over r normal vectors g, but for a chance of α^-r: one in 10^10.

        Source: Halko, Martinsson and Tropp (2011), lemma 4.1.
        """
        spaces, generator = self.spaces, torch.Generator().manual_seed(0)
        normal = torch.randn(PROBES, len(shared), generator=generator, dtype=torch.float64)
        x = torch.tensordot(normal.to(shared) * scales, shared, 1)
        apart = (
            x - spaces.from_gradient(spaces.to_gradient(x)),
            x - spaces.from_weight(spaces.to_weight(x)),
        )
        far = max(float(y.flatten(1).norm(dim=1).max()) for y in apart)
        return BEYOND * sqrt(2.0 / pi) * far

    def _part(self, shared: Tensor) -> JointRows | None:
        """The first samples alone, where they may decide; None where all are needed.

        rank [K; W] − rank W is the rank of K on the null space of W: it grows with every sample,
        and is at most rank K minus what is shared.  Where a few samples reach that, all do.
        """
        spaces, matrix = self.spaces, self._gradient.matrix
        rank, channels = spaces.ranks[0], spaces.channels
        free = channels * spaces.positions - max(len(q) for q in spaces.weight)
        least, most = -(-rank // max(free, 1)), len(spaces.weight) // 2

        def first(count: int) -> Kronecker:
            return Kronecker(matrix[:, :, : count * spaces.positions], channels)

        counts = (
            count
            for count in range(least, most + 1)
            if first(count).rank(self._rcond, self._noise).rank == rank
        )
        count = next(counts, None)
        if count is None:
            return None
        own, known = first(count), shared[:, :, : count * spaces.positions]
        weight = spaces.weight[:count]
        made = JointRows(own, weight, self._rcond, self._noise, lambda: known)
        return made if made.rank.clear else None

    def _distance(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Sines of directions of the smaller space [dim, m] to the other, and the directions.

        They are the singular values of (the directions) − (their projection on the other space).
        """
        spaces = self.spaces
        if self._swapped:
            table = spaces.from_weight(chosen.T)
            apart = table - spaces.from_gradient(spaces.to_gradient(table))
        else:
            table = spaces.from_gradient(chosen.T)
            apart = table - spaces.from_weight(spaces.to_weight(table))
        rows = apart.flatten(1)
        all_of_them = rows.norm()
        if float(all_of_them) <= self._cutoff:  # a bound on every sine, without a decomposition
            return all_of_them.expand(len(rows)), chosen
        # R of the QR first: of a thousand columns it is the cheaper half of the decomposition.
        upper = torch.linalg.qr(rows.T, mode="r").R
        _, values, vh = torch.linalg.svd(upper)
        return values, chosen @ vh.T


def _span(columns: Tensor) -> tuple[Tensor, float]:
    """Orthonormal basis of what the columns of a matrix [m, n] span, to ``INDEPENDENT``; its σ."""
    if len(columns) >= columns.shape[1]:
        basis, upper = tall_qr(columns)
        values = singular_values(upper)
        if float(values.min()) > INDEPENDENT * float(values.max()):
            return basis, float(values.min())
    u, values, _ = torch.linalg.svd(columns, full_matrices=False)
    kept = values > INDEPENDENT * values[0]
    return u[:, kept], float(values[kept].min())


def rank_on_open(
    gradient: Kronecker,
    sample_rows: Sequence[Tensor],
    rcond: float | None = None,
    noise: float = 0.0,
) -> Rank | None:
    """Rank of [I_C ⊗ K; I_B ⊗ W] as rank K + rank(W N), N what K leaves open; arguments as above.

    The singular values of W N, W of orthonormal rows, are the sines of the angles between the rows
    of W and those of K, without cancellation.

    Returns:
        The rank; None where K leaves more open than either block has rows, and the angles between
        the row spaces are the smaller problem.
    """
    groups, rows, size = gradient.matrix.shape
    own = gradient.rank(rcond, noise)
    weight = sum(len(q) for q in sample_rows)
    total = gradient.channels * size
    if total - own.rank > min(weight, own.rank):
        return None
    tolerance = resolve_rcond(rcond, (rows, size), noise=noise)
    per_group = gradient.channels // groups
    columns = []
    for g, matrix in enumerate(gradient.matrix):
        _, values, vh = torch.linalg.svd(matrix, full_matrices=True)
        free = vh[numerical_rank(values, size, tolerance).rank :]
        parts = free.reshape(len(free), len(sample_rows), size // len(sample_rows))
        blocks = [
            torch.einsum("rcn,fn->rcf", q[:, g * per_group : (g + 1) * per_group], parts[:, b])
            for b, q in enumerate(sample_rows)
        ]
        columns.append(torch.cat(blocks).flatten(1))
    sines = torch.cat(columns, 1)
    cutoff = max(tolerance * INHERITED, LEAST_SINE)
    ends = full_column_rank(sines.T @ sines) if sines.shape[1] else (1.0, 1.0)
    if ends is not None and ends[1] > cutoff:  # full, and not of rounding errors alone
        return Rank.full(total, (1.0, min(ends[1], 1.0)), cutoff)
    every = singular_values(sines)
    kept = every[every > cutoff]
    smallest = float(kept.min()) if kept.numel() else 1.0
    dropped = float(every[every <= cutoff].amax()) if kept.numel() < every.numel() else 0.0
    rank = own.rank + kept.numel()
    gap = smallest / dropped if dropped > 0 else inf
    return Rank.agreed(rank, total, cutoff=cutoff, gap=gap, smallest=smallest)
