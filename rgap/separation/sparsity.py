"""Sparsity route: samples of a ReLU fully connected layer from the zeros of their cotangents.

``G = Kᵀ X`` has rank B, so with ``G = U S Vᵀ`` every cotangent is ``k_b = G V d_b`` for one
direction d_b, and ``D = [d_1 … d_B]`` gives ``X = D⁻¹ Vᵀ``.  ReLU makes k_b zero wherever the unit
is off (``z_bj ≤ 0``): any B−1 independent rows of ``G V`` at units that are off in sample b have
d_b as their kernel.  Such rows are looked for at random (Dimitrov et al. 2024, "SPEAR", take them
uniformly, one kernel a subset, and need about 2^{B−1} subsets).  Here the eliminations of a tree of
subsets are shared, and rows are drawn with a preference for units that are off in the mean picture
and in the samples found so far.

The scales of the directions follow from the bias gradient (``∂b = G V w`` and ``D 1 = w``), and the
forward pass certifies the result: the units with ``k_bj = 0`` must be those with ``z_bj ≤ 0``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf, nan

import torch
from torch import Tensor

__all__ = ["SparseSeparation", "sparse_separation"]

NOISE = 16.0  # error of an entry of G over unit·(size of its row): sums of B terms, safely
CHECKS = 16  # rows that a kernel is tried on before all rows are
HITS = 16  # kernels of one round that are looked at closely
LEAVES = 1 << 15  # kernels of one round
SHARED = 10  # levels of the tree at which subsets branch
SLICE = 4  # rows that each level of the tree chooses from
# How strongly units are preferred that are off in the mean picture (0) or in the weighted mean of
# least norm, which is close to the darkest picture (1), by pairs of rounds.
PREFERENCES = ((4.0, 0), (2.0, 1), (1.0, 0), (0.0, 0), (4.0, 1), (2.0, 0))
UNDECIDED = 0.05  # largest share of pre-activations too close to zero to know their sign
EXCHANGES = 8  # rows of a direction that are tried without
STEPS = 8  # exchanges of rows from one kernel, those to the most zeros first
NEW = 1e-3  # share of a kernel outside the span of the directions found
SIFTED = 4096  # kernels of one round that are compared with those seen
LOOSE = 1e-4  # zero of a kernel in single precision


@dataclass(frozen=True, eq=False)
class SparseSeparation:
    """Outcome of the sparsity route.

    Attributes:
        inputs: X, [B, n], up to order; None unless every sign is explained.
        cotangents: K = ∂L/∂Z, [B, m], in the same order; None with ``inputs``.
        agreement: λ, the fraction of (sample, unit) pairs for which k = 0 fits z ≤ 0; 0 if fewer
            than B directions were found.
        trials: subsets of B−1 rows whose kernel was formed.
        seconds: wall time.
        reason: one sentence: what certifies the answer, or what is missing.
        directions: sparse directions found.
        error: predicted largest relative error ‖δx_b‖/‖x_b‖ (nan without an answer).
    """

    inputs: Tensor | None
    cotangents: Tensor | None
    agreement: float
    trials: int
    seconds: float
    reason: str
    directions: int = 0
    error: float = nan


@dataclass
class _Layer:
    """The layer in coordinates of its gradient's row space; rows of G V scaled to equal errors."""

    rows: Tensor  # R [live, B]: rows of G V over their sizes, errors of an entry ~ noise
    white: Tensor  # rows of U of unit length, [live, B], single precision: well-conditioned kernels
    live: Tensor  # units with a gradient, [live]
    mixed: Tensor  # L = G V, [m, B]
    sizes: Tensor  # of the rows of G, [m]
    basis: Tensor  # V [n, B]
    sigma: Tensor  # singular values [B]
    weights: Tensor  # w [B]: ∂b = L w
    forward: Tensor  # M = W V [m, B]
    bias: Tensor  # b [m]
    centres: Tensor  # z of the live units in two weighted means of the batch, [2, live]
    loose: float  # largest entry of a kernel on a row of ``white`` that counts as zero
    noise: float  # largest error of an entry of R
    scale: float  # what G and ∂b were divided by


@dataclass(frozen=True)
class _Found:
    """Directions and their zeros, those refused too: their kernels are not looked at again."""

    directions: Tensor  # [F, B], unit length
    zeros: Tensor  # [F, live], boolean
    errors: Tensor  # relative error of each direction, [F]
    kept: Tensor  # [F], boolean

    def contains(self, picks: Tensor) -> Tensor:
        """True where all rows of a subset [H, B − 1] are zeros of one direction, [H]."""
        if not len(self.zeros):
            return torch.zeros(len(picks), dtype=torch.bool)
        return self.zeros[:, picks].all(2).any(0)

    def with_one(self, direction: Tensor | None, zeros: Tensor, error: float, kept: bool) -> _Found:
        """One direction more, or rows that are done with."""
        if direction is None:
            direction = self.directions.new_zeros(self.directions.shape[1])
        return _Found(
            torch.cat([self.directions, direction[None]]),
            torch.cat([self.zeros, zeros[None]]),
            torch.cat([self.errors, self.errors.new_tensor([error])]),
            torch.cat([self.kept, self.kept.new_tensor([kept])]),
        )


@dataclass(frozen=True)
class _Answer:
    """Samples from B directions, and what the forward pass says of them."""

    inputs: Tensor
    cotangents: Tensor
    agreement: float
    undecided: float
    error: float

    @property
    def certified(self) -> bool:
        """Every sign is explained, and few were too close to zero to ask."""
        return self.agreement == 1.0 and self.undecided <= UNDECIDED


def sparse_separation(
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rank: int,
    *,
    unit: float = 2**-53,
    trials: int = 1 << 27,
    seconds: float | None = None,
    seed: int = 0,
    guided: bool = True,
    watch: Callable[[str], None] | None = None,
) -> SparseSeparation:
    """Split the mixture ``G = Kᵀ X`` of a fully connected layer before ReLU into samples.

    A picture that occurs several times counts once, with the sum of its cotangents.

    Args:
        weight_gradient: G = ∂L/∂W, [m, n].
        bias_gradient: ∂b = ∂L/∂b, [m].
        weight: W, [m, n].
        bias: b, [m].
        rank: B, the number of different samples, which is the rank of G.
        unit: unit roundoff of the client's arithmetic; an entry of G counts as known up to
            16·unit times the size of its row.
        trials: subsets of B−1 rows to try at most.
        seconds: time limit, None for none.
        seed: of the private generator; the global random state is not touched.
        guided: prefer rows of units that are off in the mean picture; False draws uniformly.
        watch: called with a line on the progress.

    Returns:
        X and K if λ is 1 up to entries too close to zero to decide, otherwise the reason.

    Raises:
        ValueError: shapes that do not fit, a rank below 1, NaN or infinity.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> W = torch.randn(30, 12, generator=g, dtype=torch.float64)
        >>> b, X = torch.zeros(30, dtype=torch.float64), torch.randn(3, 12, generator=g).double()
        >>> K = torch.randn(3, 30, generator=g) * (X @ W.T > 0)  # ReLU: zero where z ≤ 0
        >>> result = sparse_separation(K.T @ X, K.sum(0), W, b, 3)
        >>> result.agreement, bool(torch.cdist(result.inputs, X).amin(0).max() < 1e-9)
        (1.0, True)
    """
    start = time.perf_counter()
    _check(weight_gradient, bias_gradient, weight, bias, rank)

    def refused(
        reason: str, agreement: float = 0.0, tried: int = 0, found: int = 0
    ) -> SparseSeparation:
        spent = time.perf_counter() - start
        return SparseSeparation(None, None, agreement, tried, spent, reason, found)

    if bias_gradient is None or bias is None:
        return refused(
            "the layer has no bias gradient: the zeros give each sample only up to its scale"
        )
    layer = _layer(weight_gradient, bias_gradient, weight, bias, rank, unit)
    if isinstance(layer, str):
        return refused(layer)
    search = _Search(layer, seed, guided)
    tried, best, done = 0, 0.0, -1
    deadline = inf if seconds is None else start + seconds
    while True:
        if search.count != done and search.count >= rank:
            done = search.count
            answer = _assemble(layer, search.found)
            best = max(best, answer.agreement)
            if answer.certified:
                return SparseSeparation(
                    answer.inputs,
                    answer.cotangents,
                    answer.agreement,
                    tried,
                    time.perf_counter() - start,
                    f"the signs of all {answer.cotangents.numel()} pre-activations fit",
                    done,
                    answer.error,
                )
        if rank == 1:
            return refused(f"the zeros of k fit only {best:.1%} of the signs of z", best, 0, 1)
        spent = time.perf_counter() - start
        limit = tried >= trials
        if limit or (seconds is not None and spent > seconds):
            what = f"{trials} subsets" if limit else f"{seconds:g} s"
            return refused(
                f"{search.count} sparse directions of {rank} after {tried} subsets of {rank - 1} "
                f"rows and {spent:.1f} s (limit: {what}), signs explained: {best:.1%}",
                best,
                tried,
                search.count,
            )
        tried += search.round(max(rank, done + 1), deadline)
        if watch is not None:
            watch(f"sparse directions: {search.count} of {rank}, {tried} subsets")


class _Search:
    """Random trees of row subsets; collects the sparse directions that they lead to."""

    def __init__(self, layer: _Layer, seed: int, guided: bool) -> None:
        rows, rank = layer.white.shape
        self.layer, self.guided, self.rounds = layer, guided, 0
        none = torch.zeros(0, dtype=torch.bool)
        double = torch.zeros(0, rank, dtype=torch.float64)
        self.found = _Found(double, none.reshape(0, rows), double[:, 0], none)
        self.generator = torch.Generator().manual_seed(seed)
        self.checks = min(CHECKS, rows - rank + 1)
        self.needed = min(2, self.checks)
        self.width = max(1, min(SLICE, (rows - self.checks) // max(1, rank - 1)))
        self.columns = layer.white.T.contiguous()
        z = layer.centres
        self.lean = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True).clamp_min(1e-30)
        self.seen: set[bytes] = set()
        if rank == 1:
            one = torch.ones(1, dtype=torch.float64)
            self.found = self.found.with_one(one, torch.zeros(rows, dtype=torch.bool), 0.0, True)
        if rank == 2:
            self._look(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))

    @property
    def count(self) -> int:
        """Number of sparse directions found."""
        return int(self.found.kept.sum())

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
        votes = passed.sum(1) + torch.rand(len(passed), generator=self.generator)
        best = votes.argsort(descending=True)[:SIFTED]
        picks, passed = picks[best], passed[best]
        kernels = torch.nn.functional.normalize(kernels[best])
        before = -1
        for _ in range(HITS):
            new = ~self.found.contains(picks)
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
        kept = torch.nonzero(self.found.kept).flatten()
        zeros = self.found.zeros[kept].sum(1)
        best = kept[zeros.argsort(descending=True, stable=True)[: self.layer.rows.shape[1] - 1]]
        white = torch.nn.functional.normalize(self.found.directions[best] * self.layer.sigma)
        return torch.linalg.qr(white.T)[0].float()

    def _order(self) -> Tensor:
        """Rows of this round, for the levels of the tree and for the checks, weighted at random."""
        uniform = torch.rand(self.lean.shape[1], generator=self.generator, dtype=torch.float64)
        keys = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))  # Gumbel: top-k sampling
        if self.guided:
            strength, centre = PREFERENCES[(self.rounds // 2) % len(PREFERENCES)]
            keys -= strength * self.lean[centre]
        rank = self.layer.white.shape[1]
        top = keys.argsort(descending=True)[: (rank - 1) * self.width + self.checks]
        return top[torch.randperm(len(top), generator=self.generator)]

    def _bases(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Planes [2, B, N] orthogonal to B−2 rows, one a slice, and the rows [B−2, N].

        Each level takes one row u away from a kernel basis N.  The last levels branch, two
        different rows a node, so that the subsets share the eliminations above them.
        """
        levels, width = slices.shape
        shared = min(SHARED, levels) if width > 1 else 0
        nodes = max(1, min(LEAVES, 1 << (levels + 4)) >> shared)
        basis = torch.eye(levels + 2)[:, :, None].expand(-1, -1, nodes)
        picks = torch.empty(0, nodes, dtype=torch.long)
        for level in range(levels):
            choice = torch.randint(width, (nodes,), generator=self.generator)
            chosen = slices[level, choice]
            if levels - level <= shared:
                other = torch.randint(1, width, (nodes,), generator=self.generator)
                chosen = torch.cat([chosen, slices[level, (choice + other) % width]])
                picks = picks.repeat(1, 2)
            picks = torch.cat([picks, chosen[None]])
            smaller = torch.empty(levels + 1 - level, levels + 2, len(chosen))
            for part, rows in zip(smaller.split(nodes, 2), chosen.split(nodes), strict=True):
                _without(basis, self.columns[:, rows], part)
            basis, nodes = smaller, len(chosen)
        return basis, picks

    def _look(self, rows: Tensor, more: Tensor) -> None:
        """Judge the kernel of these rows, and every direction that is an exchange of a row away.

        Rows whose kernel has more than two dimensions are completed from ``more``.
        """
        self.found = self.found.with_one(None, self._mask(rows), inf, False)
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
        zeros = torch.zeros(len(self.layer.rows), dtype=torch.bool)
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
        if bool((self.found.kept & (self.found.zeros == zeros).all(1)).any()):
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
        self.found = self.found.with_one(vh[-1], zeros, error, good)
        return near

    def _mixed(self, zeros: Tensor, needed: Tensor) -> bool:
        """True if the kernel without the rows that only it needs is spanned by sparser ones."""
        common = zeros.clone()
        common[torch.nonzero(zeros).flatten()[needed]] = False
        sparser = self.found.kept & (self.found.zeros.sum(1) > zeros.sum())
        return int((sparser & (self.found.zeros | ~common).all(1)).sum()) >= len(needed) + 1


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


def _check(
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rank: int,
) -> None:
    if weight_gradient.ndim != 2 or weight.shape != weight_gradient.shape:
        raise ValueError(
            f"weight_gradient, weight: expected two matrices of one shape [m, n], got "
            f"{tuple(weight_gradient.shape)} and {tuple(weight.shape)}; write layer.weight.grad, "
            "layer.weight"
        )
    units = weight_gradient.shape[0]
    for name, vector in (("bias_gradient", bias_gradient), ("bias", bias)):
        if vector is not None and vector.shape != (units,):
            raise ValueError(
                f"{name}: expected shape ({units},), one entry a row of the weight, got "
                f"{tuple(vector.shape)}; write layer.bias{'.grad' if 'grad' in name else ''}"
            )
    largest = min(weight_gradient.shape)
    if not 1 <= rank <= largest:
        raise ValueError(
            f"rank: expected a number of samples from 1 to {largest}, the smaller side of the "
            f"gradient, got {rank}"
        )
    for tensor in (weight_gradient, bias_gradient, weight, bias):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError("expected finite tensors, got NaN or infinity in one of them")


def _layer(
    gradient: Tensor, bias_gradient: Tensor, weight: Tensor, bias: Tensor, rank: int, unit: float
) -> _Layer | str:
    """Coordinates of the search, or why there is none."""
    gradient, bias_gradient = gradient.double(), bias_gradient.double()
    weight, bias = weight.double(), bias.double()
    scale = float(gradient.abs().max())
    if not scale > 0:
        return "the gradient of the weight is zero: no sample left a trace"
    gradient, bias_gradient = gradient / scale, bias_gradient / scale
    _, sigma, vh = torch.linalg.svd(gradient, full_matrices=False)
    floor = 2 * max(unit, max(gradient.shape) ** 0.5 * 2**-53) * float(sigma[0])
    if not float(sigma[rank - 1]) > floor or bool((sigma[rank:] > 16 * floor).any()):
        ratios = ", ".join(f"{s:.1e}" for s in (sigma / sigma[0])[: rank + 2].tolist())
        return (
            f"the gradient has rank {int((sigma > floor).sum())} in the update's precision, not "
            f"{rank}: σ/σ_1 = {ratios}"
        )
    basis, sigma = vh[:rank].T, sigma[:rank]
    mixed = gradient @ basis
    sizes = gradient.norm(dim=1)
    live = torch.nonzero(sizes > 1e-100).flatten()
    if len(live) < rank + 1:
        return f"{len(live)} units have a gradient; {rank} samples need at least {rank + 1}"
    white = mixed / sigma
    weights = white.T @ bias_gradient / sigma
    misfit = float(
        (mixed @ weights - bias_gradient).norm() / bias_gradient.norm().clamp_min(1e-300)
    )
    if misfit > 1e3 * floor / float(sigma[-1]):
        return (
            f"the bias gradient is not in the range of the weight gradient (relative distance "
            f"{misfit:.1e}): they are not of one fully connected layer"
        )
    # Two points of the batch's affine hull: least squares over the rows, and the least norm.
    mean = gradient.T @ bias_gradient / bias_gradient.square().sum()
    nearest = basis @ weights / weights.square().sum()
    sizes = sizes.clamp_min(1e-3 * float(sizes[live].median()))
    # Rounding of G's entries averages out over the row, rounding of the product with V does not.
    noise = NOISE * unit / gradient.shape[1] ** 0.5 + NOISE * 2**-53
    error = 10 * unit * float(sigma[0] / sigma[-1])
    return _Layer(
        rows=mixed[live] / sizes[live, None],
        white=torch.nn.functional.normalize(white[live], dim=1).float(),
        live=live,
        mixed=mixed,
        sizes=sizes,
        basis=basis,
        sigma=sigma,
        weights=weights,
        forward=weight @ basis,
        bias=bias,
        centres=(torch.stack([mean, nearest]) @ weight.T + bias)[:, live],
        loose=min(max(LOOSE, error), 30 * LOOSE),
        noise=noise,
        scale=scale,
    )


def _assemble(layer: _Layer, found: _Found) -> _Answer:
    """The B directions that explain the signs best: the sparsest, improved by exchanges."""
    rank = len(layer.weights)
    kept = torch.nonzero(found.kept).flatten()
    order = kept[found.zeros[kept].sum(1).argsort(descending=True, stable=True)]
    chosen, spare = order[:rank].tolist(), order[rank : 4 * rank].tolist()
    best = _answer(layer, found, chosen)
    improved = True
    while improved and not best.certified:
        improved = False
        for place in range(rank):
            for new in [c for c in spare if c not in chosen]:
                trial = [*chosen[:place], new, *chosen[place + 1 :]]
                answer = _answer(layer, found, trial)
                if answer.agreement > best.agreement:
                    best, chosen, improved = answer, trial, True
        spare = [c for c in order[: 4 * rank].tolist() if c not in chosen]
    return best


def _answer(layer: _Layer, found: _Found, chosen: list[int]) -> _Answer:
    """X = D⁻¹ Vᵀ, K = (L D)ᵀ, and the share λ of signs that fit."""
    unscaled = found.directions[chosen].T  # columns
    nothing = _Answer(layer.basis, layer.basis, 0.0, 1.0, inf)
    inverse, singular = torch.linalg.inv_ex(unscaled)
    if bool(singular) or not bool(inverse.isfinite().all()):
        return nothing
    scales = inverse @ layer.weights
    if not bool((scales.abs() > 1e-12 * scales.abs().max()).all()):
        return nothing
    q = inverse / scales[:, None]  # rows of D⁻¹
    k = (layer.mixed @ unscaled * scales).T
    z = q @ layer.forward.T
    # Errors: of the directions (δq_b = −Σ_c (q_b·δd_c) q_c) and of the scales.
    shift = found.errors[chosen] * scales.abs()
    unknown = layer.noise / float(layer.sigma[-1]) * float(layer.weights.norm() * layer.sigma[0])
    scaling = inverse.norm(dim=1) * unknown / scales.abs()
    vague = q.norm(dim=1)[:, None] * (shift @ z.abs()) + scaling[:, None] * z.abs()
    z = z + layer.bias
    slack = 4 * vague + 1e-14 * (z.abs() + layer.bias.abs())
    dull = layer.noise * layer.sizes * scales.abs()[:, None]
    dull = dull + 4 * shift[:, None] * layer.mixed.norm(dim=1)
    zero = (k.abs() <= dull) | (layer.sizes <= 0)
    on, off = z > slack, z < -slack
    wrong = (off & ~zero).sum(1) + _excess(k, on, zero, dull)
    undecided = float((~on & ~off).double().mean())
    error = float((q.norm(dim=1) @ shift + scaling).max())
    agreement = 1.0 - float(wrong.sum()) / z.numel()
    if undecided > UNDECIDED:
        agreement = max(0.0, agreement - undecided)
    return _Answer(q @ layer.basis.T, k * layer.scale, agreement, undecided, error)


def _excess(k: Tensor, on: Tensor, zero: Tensor, dull: Tensor) -> Tensor:
    """Units that are on and yet have k = 0, beyond those whose k is small by chance, [B]."""
    loud = on & ~zero
    rms = (k.square() * loud).sum(1).div(loud.sum(1).clamp_min(1)).sqrt()
    chance = (dull * on).sum(1) / rms.clamp_min(1e-300)  # density of k/rms near 0: below 1/2 a side
    allowed = torch.where(chance > 1e-3, (4 * chance).ceil(), torch.zeros_like(chance))
    return ((on & zero).sum(1) - allowed).clamp_min(0)
