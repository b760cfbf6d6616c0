"""Collect the samples of a mixture one after the other, without ever subtracting one.

Levenberg–Marquardt from many starts ends at some samples.  Each found one, once its target is
known, has a dual d with ``d·q = 1`` on itself and 0 on all others: the samples that are left lie in
the affine subspace ``w·q = 1, d·q = 0``, of one dimension less.  What subtracting k xᵀ does to the
row space of G this does to the unknowns, but each root is polished on the original equations, so
that errors do not add up.  The rank of G says how many there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from rgap.separation.identify import Identity
from rgap.separation.subspace import Consistency, Restricted, on_line, open_directions, restricted
from rgap.solvers.least_squares import levenberg_marquardt

STARTS = 16
IDLE = 4  # rounds without a new sample, each with twice the starts, until it gives up
GROWTH = 2 ** (IDLE - 1)  # factor on the starts in the last of them
PATIENT = 2  # of these rounds before targets are judged with leniency
SOLVED = 1e-24  # relative cost at which a start needs no further step
ROOT = 1e-3  # relative cost above which a point is no root at any precision
LIKELY = 1e4  # times the cost that rounding explains, at which it still counts as a root
PATIENCE = 4  # iterations in which no start of a round settles before the round ends
POLISHING = 25  # steps at most on the original equations
AT_REST = 0.1  # share of a root that a full Gauss–Newton step may still move it
ROUNDED = 1e-26  # relative cost of a root in float64
CROWDED = 0.5  # share of different ends among the good ones below which starts reach further
REACH = 4.0  # times as far
FURTHEST = 1e3  # times the first starts
APART = 0.5  # d·q of a sample that is the dual's own; all others have 0

Identify = Callable[[Tensor, Consistency], list[Identity]]


@dataclass(frozen=True)
class Collected:
    """The samples found.

    Attributes:
        roots: rows q, [F, R].
        identities: target and dual of each.
        starts: Levenberg–Marquardt runs in all.
        rejected: the smallest share of k outside the range among roots without a target.
        stray: roots without a target whose own equations leave a direction open.
        refused: targets of other roots that are samples, but not of the batch that was stated.
        turned: rows q of these, [n, R]; None where there are none.
    """

    roots: Tensor
    identities: list[Identity]
    starts: int
    rejected: float
    stray: tuple[Tensor, ...] = ()
    refused: tuple[Identity, ...] = ()
    turned: Tensor | None = None

    @property
    def complete(self) -> bool:
        """True if there is one root for every dimension of the mixture."""
        return len(self.roots) == self.roots.shape[1]

    def tally(self, where: str) -> str:
        """How many samples of ``where`` came of how many starts, in words."""
        count, rank = self.roots.shape
        return f"{count} of the {rank} samples {where} found in {self.starts} starts"


@dataclass(frozen=True)
class Starts:
    """Where a search begins, and when it gives up.

    Attributes:
        seed: of the random starts.
        count: starts at once; twice as many after a round without a new sample.
        first: equations and rows q [S, R] of a first round that is better than a random one.
        reach: how far out the first random starts are, at least 1.
        rounds: without a new sample until it gives up.
        deadline: of ``time.perf_counter``, after which it begins no further round.
    """

    seed: int = 0
    count: int = STARTS
    first: tuple[Consistency, Tensor] | None = None
    reach: float = 1.0
    rounds: int = IDLE
    deadline: float = inf


def collect(
    consistency: Consistency,
    identify: Identify,
    admissible: Callable[[Identity, bool], bool],
    starts: Starts | None = None,
    watch: Callable[[str], None] | None = None,
) -> Collected:
    """All roots of ``(I − PPᵀ) f(q) = 0, w·q = 1`` that are samples.

    Args:
        consistency: f, P and the mixture.
        identify: targets of a few roots.
        admissible: False for a target that cannot belong to a sample; the flag asks for leniency,
            where rounds without success have passed.
        starts: of the search; None for 16 at random.
        watch: told of the progress.
    """
    starts = Starts() if starts is None else starts
    rank = consistency.samples.rank
    generator = torch.Generator().manual_seed(starts.seed)
    held = _Held(consistency, admissible)
    tried, idle, first, reach = 0, 0, starts.first, starts.reach
    while len(held.roots) < rank and idle < starts.rounds:
        if tried and time.perf_counter() > starts.deadline:
            break
        if first is not None:
            begun, q = first
            left = restricted(begun, held.duals)
            start, first = left.coordinates(q), None
        else:
            count = starts.count * 2**idle
            begun = consistency.begin(count, idle, generator)
            # Every other round without success looks everywhere: duals of rough roots mislead.
            left = restricted(begun, held.duals if idle % 2 == 0 else held.duals[:0])
            if left.directions.shape[1] == 0:  # nothing is free but the kind of equations
                each = _firsts(begun.kinds(count))
                count, begun = len(each), begun.at(each)
                left = restricted(begun, held.duals)
            start = fresh_starts(left, held.roots, held.duals, count, generator, reach)
        tried += len(start)
        good, ends, near = _ends(left, start, begun.kinds(len(start)))
        # Starts that lie close together end at the few samples next to them.
        if len(good) < CROWDED * near:
            reach = min(REACH * reach, FURTHEST)
        elif near < CROWDED * len(start):
            reach = max(reach / REACH, 1.0)
        before = len(held.roots)
        if len(good):
            whole = restricted(begun.at(good))
            fresh, fits, still = _polished(whole, ends)
            named = identify(fresh[fits], begun.at(good[fits]))
            held.take(fresh[fits], named, still, idle >= PATIENT)
        idle = 0 if len(held.roots) > before else idle + 1
        if watch is not None:
            watch(f"separating samples: {len(held.roots)} of {rank}")
    return Collected(
        held.roots,
        held.identities,
        tried,
        held.rejected,
        tuple(held.stray),
        tuple(held.refused),
        torch.stack(held.turned) if held.turned else None,
    )


class _Held:
    """The samples found so far, each with its dual, and what was no sample; see Collected."""

    def __init__(
        self, consistency: Consistency, admissible: Callable[[Identity, bool], bool]
    ) -> None:
        self.consistency, self.admissible = consistency, admissible
        samples = consistency.samples
        self.roots = self.duals = samples.weights.new_zeros(0, samples.rank)
        self.identities: list[Identity] = []
        self.refused: list[Identity] = []
        self.turned: list[Tensor] = []
        self.stray: list[Tensor] = []
        self.rejected = 1.0

    def take(
        self, roots: Tensor, identities: list[Identity], still: list[bool], lenient: bool
    ) -> None:
        """Keep the roots that are samples and new.

        Args:
            roots: rows q, [S, R].
            identities: the target of each.
            still: whether a full Gauss–Newton step moves it no more.
            lenient: judge targets with leniency.
        """
        before = len(self.roots)
        for q, identity, at_rest in zip(roots, identities, still, strict=True):
            if not self._new(q, identity):
                continue
            if not (at_rest or open_directions(self.consistency, q)):
                continue
            if not bool(identity.dual.isfinite().all()):
                continue  # no cotangent gives it any weight
            # On a line of solutions some κ fits everywhere: only class indices end it.
            between = identity.label is None and on_line(self.consistency, q)
            if between or not self.admissible(identity, lenient):
                self.rejected = min(self.rejected, identity.outside)
                if between or open_directions(self.consistency, q):
                    self.stray.append(q)
                elif identity.accepted:
                    self.refused.append(identity)
                    self.turned.append(q)
                continue
            self.roots = torch.cat([self.roots, q[None]])
            self.duals = torch.cat([self.duals, identity.dual[None]])
            self.identities.append(identity)
            if len(self.roots) == self.roots.shape[1]:
                break
        if len(self.roots) > before:
            self.duals = _orthogonal(self.duals, self.roots)

    def _new(self, q: Tensor, identity: Identity) -> bool:
        """False for a root that is held already, with this target."""
        alike = [held.label == identity.label for held in self.identities]
        same = torch.tensor(alike, dtype=torch.bool, device=q.device)
        return not bool(((self.duals @ q > APART) & same).any())


def _ends(left: Restricted, start: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where Levenberg–Marquardt ends.

    Args:
        left: the equations without what was found.
        start: points t, [S, n].
        kinds: a number for the equations of each, [S].

    Returns:
        Which starts end near a root, one for every root [G], the rows q of their ends [G, R], and
        how many end near one at all.
    """
    ends = levenberg_marquardt(
        left, start, tolerance=rounding_cost(left), enough=0.7, patience=PATIENCE
    )
    forced = left.directions.shape[1] == 0  # nothing is free: polish what is left
    good = ends.cost.argsort()[: len(start) if forced else int((ends.cost < ROOT).sum())]
    kept = good[_distinct(left.rows(ends.value[good]), kinds[good])]
    return kept, left.rows(ends.value[kept]), len(good)


def rounding_cost(left: Restricted) -> float:
    """The cost below which a start is at a root as nearly as the client's rounding tells."""
    w = left.consistency.samples.weights
    alone = left.consistency.at(torch.zeros(1, dtype=torch.long, device=w.device))
    f = alone.value((w / (w @ w))[None])
    return max(SOLVED, float(alone.tolerance(f)[0]))


def _orthogonal(duals: Tensor, roots: Tensor) -> Tensor:
    """The nearest duals that are 1 on their own root and 0 on the others that were found."""
    gap = torch.eye(len(roots), dtype=roots.dtype, device=roots.device) - duals @ roots.T
    nearest: Tensor = duals + torch.linalg.lstsq(roots, gap.T, driver="gelsd").solution.T
    return nearest


def fresh_starts(
    left: Restricted,
    roots: Tensor,
    duals: Tensor,
    count: int,
    generator: torch.Generator,
    reach: float,
) -> Tensor:
    """Half of the starts at random, half at rows of G without what was found: affine mixtures.

    With a ``reach`` above 1 both are further out, up to that factor.
    """
    samples = left.consistency.samples
    unknowns = left.directions.shape[1]
    if unknowns == 0:
        return left.origin.new_zeros(count, 0)
    spread = left.origin.norm() / max(unknowns, 1) ** 0.5
    t: Tensor = torch.randn(count, unknowns, generator=generator, dtype=torch.float64).to(spread)
    t *= spread
    t *= 10.0 ** (2.0 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1.0).to(t)
    bias = samples.bias_gradient
    assert bias is not None
    heavy = bias.abs() > 1e-3 * bias.abs().max()
    rows = (samples.left * samples.values)[heavy] / bias[heavy, None]
    half = count // 2
    further = reach ** torch.rand(count, 1, generator=generator, dtype=torch.float64).to(t)
    t *= further
    pick = torch.randint(0, len(rows), (half,), generator=generator).to(rows.device)
    q = rows[pick]
    if len(duals):
        q = q - (q @ duals.T) @ roots
    q = q / (q @ samples.weights)[:, None]
    chosen = left.coordinates(q)
    if reach > 1.0:
        middle = chosen.nanmedian(0).values
        chosen = middle + further[:half] ** 2 * (chosen - middle)
    usable = chosen.isfinite().all(1) & (chosen.norm(dim=1) < 1e3 * left.origin.norm())
    t[:half][usable] = chosen[usable]
    return t


def _firsts(kinds: Tensor) -> Tensor:
    """Index of the first start of every kind."""
    numbers = kinds.tolist()
    first = [numbers.index(kind) for kind in sorted(set(numbers))]
    return torch.tensor(first, device=kinds.device)


def _distinct(q: Tensor, kinds: Tensor) -> Tensor:
    """Indices of one root of every cluster, the first; roots of different equations stay."""
    gaps = torch.cdist(q, q, compute_mode="donot_use_mm_for_euclid_dist")
    near = gaps <= 1e-3 * q.norm(dim=1, keepdim=True)
    same = (near & (kinds[:, None] == kinds)).tolist()
    kept: list[int] = []
    for i, row in enumerate(same):
        if not any(row[j] for j in kept):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long, device=q.device)


def _polished(whole: Restricted, q: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
    """Roots of the original equations next to q.

    Returns:
        The points [S, R], the indices of those that miss by no more than rounding, and for each of
        these whether a full Gauss–Newton step moves it no more: a valley may come as near.
    """
    ends = levenberg_marquardt(whole, whole.coordinates(q), max_iterations=POLISHING)
    whole = replace(whole, consistency=whole.consistency.thorough())
    moved = whole.rows(whole.refined(ends.value))
    near = (moved - q).norm(dim=1) < 0.1 * q.norm(dim=1)
    moved = torch.where(near[:, None], moved, q)
    t = whole.coordinates(moved)
    cost = whole.cost(t)
    limit = LIKELY * whole.consistency.tolerance(whole.consistency.value(moved))
    fits = (cost <= limit).nonzero().flatten()
    # Nothing but its own rounding is left of a cost that small.
    doubtful = (cost > ROUNDED).nonzero().flatten()
    step = torch.zeros_like(t)
    step[doubtful] = whole.some(doubtful).steps(t[doubtful])
    still = step.norm(dim=1) < AT_REST * moved.norm(dim=1)
    return moved, fits, still[fits].tolist()
