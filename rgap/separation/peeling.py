"""Collect the samples of a mixture one after the other, without ever subtracting one.

Levenberg–Marquardt from many starts ends at some samples.  Each found one, once its target is
known, has a dual d with ``d·q = 1`` on itself and 0 on all others: the samples that are left lie in
the affine subspace ``w·q = 1, d·q = 0``, of one dimension less.  What subtracting k xᵀ does to the
row space of G this does to the unknowns, but each root is polished on the original equations, so
that errors do not add up.  The rank of G says how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    """

    roots: Tensor
    identities: list[Identity]
    starts: int
    rejected: float
    stray: tuple[Tensor, ...] = ()
    refused: tuple[Identity, ...] = ()

    @property
    def complete(self) -> bool:
        """True if there is one root for every dimension of the mixture."""
        return len(self.roots) == self.roots.shape[1]


def collect(
    consistency: Consistency,
    identify: Identify,
    admissible: Callable[[Identity, bool], bool],
    seed: int = 0,
    starts: int = STARTS,
    watch: Callable[[str], None] | None = None,
    first: tuple[Consistency, Tensor] | None = None,
    reach: float = 1.0,
    rounds: int = IDLE,
) -> Collected:
    """All roots of ``(I − PPᵀ) f(q) = 0, w·q = 1`` that are samples.

    Args:
        consistency: f, P and the mixture.
        identify: targets of a few roots.
        admissible: False for a target that cannot belong to a sample; the flag asks for leniency,
            where rounds without success have passed.
        seed: of the starts.
        starts: at once; twice as many after a round without a new sample.
        watch: told of the progress.
        first: equations and rows q of a first round that is better than a random one.
        reach: how far out the first random starts are, at least 1.
        rounds: without a new sample until it gives up.
    """
    samples = consistency.samples
    w, rank = samples.weights, samples.rank
    generator = torch.Generator().manual_seed(seed)
    roots = w.new_zeros(0, rank)
    duals = w.new_zeros(0, rank)
    identities: list[Identity] = []
    refused: list[Identity] = []
    stray: list[Tensor] = []
    tried, idle, rejected = 0, 0, 1.0
    while len(roots) < rank and idle < rounds:
        if first is not None:
            begun, q = first
            count, first = len(q), None
            left = restricted(begun, w, duals)
            start = left.coordinates(q)
        else:
            count = starts * 2**idle
            begun = consistency.begin(count, idle, generator)
            # Every other round without success looks everywhere: duals of rough roots mislead.
            left = restricted(begun, w, duals if idle % 2 == 0 else duals[:0])
            if left.directions.shape[1] == 0:  # nothing is free but the kind of equations
                each = _firsts(begun.kinds(count))
                count, begun = len(each), begun.at(each)
                left = restricted(begun, w, duals)
            start = fresh_starts(left, roots, duals, count, generator, reach)
        tried += count
        ends = levenberg_marquardt(
            left, start, tolerance=rounding_cost(left), enough=0.7, patience=PATIENCE
        )
        forced = left.directions.shape[1] == 0  # nothing is free: polish what is left
        good = ends.cost.argsort()[: count if forced else int((ends.cost < ROOT).sum())]
        near = len(good)
        good = good[_distinct(left.rows(ends.value[good]), begun.kinds(count)[good])]
        # Starts that lie close together end at the few samples next to them.
        if len(good) < CROWDED * near:
            reach = min(REACH * reach, FURTHEST)
        elif near < CROWDED * count:
            reach = max(reach / REACH, 1.0)
        before = len(roots)
        if len(good):
            whole = restricted(begun.at(good), w, w.new_zeros(0, rank))
            fresh, fits, still = _polished(whole, left.rows(ends.value[good]))
            found = identify(fresh[fits], begun.at(good[fits]))
            for q, identity, at_rest in zip(fresh[fits], found, still, strict=True):
                alike = [i.label == identity.label for i in identities]
                same = torch.tensor(alike, device=q.device)
                if len(duals) and bool(((duals @ q > APART) & same).any()):
                    continue
                if not (at_rest or open_directions(consistency, q)):
                    continue
                if not bool(identity.dual.isfinite().all()):
                    continue  # no cotangent gives it any weight
                # On a line of solutions some κ fits everywhere: only class indices end it.
                between = identity.label is None and on_line(consistency, q)
                if between or not admissible(identity, idle >= PATIENT):
                    rejected = min(rejected, identity.outside)
                    if between or open_directions(consistency, q):
                        stray.append(q)
                    elif identity.accepted:
                        refused.append(identity)
                    continue
                roots = torch.cat([roots, q[None]])
                duals = torch.cat([duals, identity.dual[None]])
                identities.append(identity)
                if len(roots) == rank:
                    break
        if len(roots) > before:
            duals = _orthogonal(duals, roots)
        idle = 0 if len(roots) > before else idle + 1
        if watch is not None:
            watch(f"separating samples: {len(roots)} of {rank}")
    return Collected(roots, identities, tried, rejected, tuple(stray), tuple(refused))


def rounding_cost(left: Restricted) -> float:
    """The cost below which a start is at a root as nearly as the client's rounding tells."""
    w = left.consistency.samples.weights
    alone = left.consistency.at(torch.zeros(1, dtype=torch.long, device=w.device))
    f = alone.value((w / (w @ w))[None])
    return max(SOLVED, float(alone.tolerance(f)[0]))


def _orthogonal(duals: Tensor, roots: Tensor) -> Tensor:
    """The nearest duals that are 1 on their own root and 0 on the others that were found."""
    gap = torch.eye(len(roots), dtype=roots.dtype, device=roots.device) - duals @ roots.T
    found: Tensor = duals + torch.linalg.lstsq(roots, gap.T, driver="gelsd").solution.T
    return found


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
    kept: list[int] = []
    for i, row in enumerate(q):
        near = 1e-3 * float(row.norm())
        if all(kinds[i] != kinds[j] or float((row - q[j]).norm()) > near for j in kept):
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
