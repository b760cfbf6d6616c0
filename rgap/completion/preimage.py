"""Data whose features are known: what lies below the lowest values that gradients determine.

With v_p the known values nearest to the data, and f_p the network from the data to them, x solves

    f_p(x) = v_p    for every such p,

for each sample alone: many more equations than unknowns in a wide network, continuous in x, and
piecewise linear where it has rectifiers.  L-BFGS goes down from the middle of the range, and
Gauss–Newton ends it.  No unit is taken to be on or off: one that lies within its error of a kink
gives the same on both sides of it.

Source: pictures from the features of a network are Mahendran and Vedaldi's (2015); errors, full
rank and refusal are ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor

from rgap.jacobian.frontier import Frontier, Tangent, frontier
from rgap.limits import BACK, CLEAR, FITS, PROBES, SAFETY, SURPLUS, SURPLUS_SHARE
from rgap.network.activations import Activation, Identity, ReLU
from rgap.network.flow import Flow
from rgap.precision import Estimate
from rgap.progress import Watch, silent
from rgap.recursion.graph import GraphDescent
from rgap.solvers.conjugate import cgls, times

__all__ = ["Preimage", "preimage"]

ROUNDS, STEPS, HISTORY = 60, 20, 30  # of L-BFGS, from every start
CLOSE, NEAR = 2e-6, 10.0  # relative misfit from which Gauss–Newton goes on; times that, if stuck
STALLED, GIVEN = 0.98, 8  # factor on the misfit of a round that ends a start, from which round
STARTS = 3
BLUNT, BLUNT_ROUNDS = (2.0, 10.0), 3  # sharpness of kinks at first, and rounds with each
HANDED_OVER = 1e-3, 3e-5, 0.0  # relative misfits at which Gauss–Newton is tried; 0: as CLOSE says
LAST = 8  # steps of Gauss–Newton
FIRST = 1e-2  # accuracy of the first, which ends among the same kinks
MEMBERS = 4  # errors that are carried to the data
ALIKE = 1e-3  # relative change of known values up to which a mirror image gives the same
PRODUCTS, ACCURACY = 400, 3e-5  # of conjugate gradients
COPIES = (
    24.0  # bytes a value on the way: float32, with its cotangent, its slope and what is made of it
)

Settled = tuple[Estimate, Tensor]  # data, and the misfit of every sample in standard errors


@dataclass(frozen=True)
class Preimage:
    """Data that give the known values.

    Attributes:
        data: x [B, *in_shape] with its errors.
        misfit: rms residual of every sample, in standard errors, [B].
        unknowns: numbers of one sample.
        equations: entries of the lowest known values of one sample that are not zero.
    """

    data: Estimate
    misfit: Tensor
    unknowns: int
    equations: int


def preimage(
    flow: Flow,
    told: GraphDescent,
    start: Callable[[int], Tensor],
    watch: Watch = silent,
    deadline: float = inf,
    room: float = inf,
) -> Preimage | str:
    """The data that give the known values nearest to them, with errors, or why there are none.

    Args:
        flow: the network.
        told: what gradients determine of its values.
        start: the batch to begin with, [B, *in_shape], by the number of the trial.
        watch: told how far it is.
        deadline: of ``time.perf_counter``, after which no further round is begun.
        room: bytes for all values of the network on the way, and their cotangents.
    """
    known = told.values
    lowest = frontier(flow, known)
    if not lowest:
        return "a path from the data to the output meets no value that is known"
    # Values above the lowest ones are functions of them, but may be known with smaller errors.
    above = {place: value for place, value in known.items() if place not in lowest}
    edge = {*lowest, *frontier(flow, above), *({0} & known.keys())}
    full = Frontier(flow, sorted(edge), known, told.unit)
    samples, unknowns = len(known[lowest[0]].value), prod(flow.in_shape)
    if full.undifferentiated:
        return f"{full.undifferentiated} stands between the data and the known values"
    on = min(full.on(row, lowest) for row in range(samples))
    surplus = max(SURPLUS, int(SURPLUS_SHARE * unknowns))
    if 0 not in known and on < unknowns + surplus:
        return (
            f"{on} known values that are not zero, for {unknowns} unknowns of a sample: {surplus} "
            "more are asked for, that no second batch has them too"
        )
    need = COPIES * full.numbers * max(samples, MEMBERS + PROBES)
    if need > room:
        return f"their search takes {need / 1e9:.1f} GB, there is room for {room / 1e9:.1f}"
    below = f"the data below '{flow.nodes[lowest[0]].name}'"
    if 0 in known:
        made = _Settling(full, watch, below)(known[0].value)
    else:
        folded = _folded(full, unknowns, unknowns + surplus)
        if isinstance(folded, str):
            return folded
        nearest = Frontier(flow, lowest, known, told.unit).to(torch.float32)
        made = _looked_for(full, _Search(nearest, start, watch, below, deadline))
        if folded and not isinstance(made, str):
            again = _Search(nearest, lambda n: start(n + 1), watch, f"again {below}", deadline)
            made = _agreed(made, _looked_for(full, again))
        if not isinstance(made, str) and (mirrored := _mirrored(nearest, made[0].value[:1])):
            return mirrored
    if isinstance(made, str):
        return made
    data, misfit = made
    return Preimage(data, misfit, unknowns, on)


def _folded(function: Frontier, unknowns: int, asked: int) -> bool | str:
    """Whether other data may give the same values, by a step that maps two inputs to one output.

    Such a step on as many numbers as there are unknowns is ``|x|``: each entry has its mirror. On
    the data's image among more numbers than that, another image has to have the mirrored entries
    by chance.  ``x − 2 tanh x`` and ``|x| = 2 relu(x) − x`` are as bad with monotone functions, on
    branches that meet.

    Args:
        function: the known values.
        unknowns: numbers of a sample.
        asked: numbers that a step has to take in.

    Returns:
        True if they are to be looked for twice; why they are not unique; or False.
    """
    flow, doubted = function.flow, False
    cuts = set(flow.cuts())
    for place, node in function.between():
        link = node.link
        if not isinstance(link, Activation) or isinstance(link, Identity):
            continue
        few, [source] = prod(node.shape) < asked, node.sources
        if link.barrier is not None and few:
            return (
                f"'{node.name}' ({link.kind}) may give one output for two inputs, and takes in "
                f"{prod(node.shape)} numbers for {unknowns} unknowns: other data give the same"
            )
        alone = source in cuts and flow.users(source) == [place]
        doubted |= link.barrier is not None or (few and not alone)
    return doubted


def _mirrored(function: Frontier, x: Tensor) -> str:
    """Why a mirror image of the data, of all or of parts, gives the same known values; or "".

    A step that is even, be it one activation or several branches that meet, gives for −z what it
    gives for z: where z is linear in x, or odd, −x sends the same update.

    Args:
        function: the known values, float32.
        x: a sample that gives them, [1, *in_shape].
    """
    values = function.values(x.float())
    generator = torch.Generator().manual_seed(0)
    for place in (0, *(place for place, _ in function.between() if place not in function.edge)):
        signs = torch.randint(0, 2, values[place].shape, generator=generator) * 2.0 - 1.0
        given, moved = {**values, place: values[place] * signs.to(values[place])}, {place}
        if torch.equal(given[place], values[place]):
            continue
        for above, node in function.between():
            if above > place and moved & set(node.sources):
                given[above] = node.forward([given[source] for source in node.sources])
                moved.add(above)
        if all(torch.allclose(given[at], values[at], rtol=ALIKE, atol=0) for at in function.edge):
            return (
                f"what '{function.flow.nodes[place].name}' gives has a mirror image that gives the "
                "same: others may be the data's"
            )
    return ""


def _agreed(made: Settled, again: Settled | str) -> Settled | str:
    """The data, if a second search ends at them too."""
    if isinstance(again, str):
        return (
            f"a second search does not find the data again, which may not be the only ones: {again}"
        )
    apart = (made[0].value - again[0].value).abs().flatten(1).amax(1)
    allowed = SAFETY * float(torch.maximum(made[0].std.max(), again[0].std.max()))
    row = int(apart.argmax())
    if float(apart[row]) > allowed:
        return (
            f"two batches give the known values: sample {row} of one is off that of the other by "
            f"{float(apart[row]):.2g} in an entry"
        )
    return made


def _looked_for(full: Frontier, search: _Search) -> Settled | str:
    """The data with their errors and misfits, from the starts that a search is given."""
    settling = _Settling(full, search.watch, search.below)
    made: Settled | str = ""
    for goal in HANDED_OVER:
        found = search.run(goal)
        if isinstance(found, str):
            return found
        made = settling(found)
        if not isinstance(made, str) or search.late:
            break
    return made


class _Search:
    """L-BFGS in float32, sample by sample, on the known values.

    The network's kinks are rounded off at first: with them as they are the descent ends at other
    data.  What a rectifier is known to let through is asked of its input, which has a slope on both
    sides of 0.

    Args:
        function: the known values nearest to the data, float32.
        start: the batch to begin with, by the number of the trial.
        watch: told which sample is looked for.
        below: what is, in words.
        deadline: of ``time.perf_counter``, after which no further round is begun.
    """

    def __init__(
        self,
        function: Frontier,
        start: Callable[[int], Tensor],
        watch: Watch,
        below: str,
        deadline: float,
    ) -> None:
        self.function, self.start = function, start
        self.watch, self.below, self.deadline = watch, below, deadline
        self.answer: Tensor | None = None
        self.wanted = [function.known[place].value.float() for place in function.edge]
        self.squares = [self.square(place) for place in function.edge]
        known = zip(self.wanted, self.squares, strict=True)
        whole = sum((v.square().flatten(1).sum(1) / s for v, s in known), start=torch.zeros(()))
        self.scales = [(1.0 / (s * whole.clamp_min(1e-300))).float() for s in self.squares]
        sigmas = zip(*(function.sigma(row) for row in range(len(whole))), strict=True)
        on = zip(function.edge, sigmas, strict=True)
        self.on = [function.known[place].value > CLEAR * torch.stack(s) for place, s in on]

    def square(self, place: int) -> Tensor:
        """Mean square error of a known value of every sample, [B]; none is better than CLOSE."""
        k = self.function.known[place]
        finest = CLOSE**2 * k.value.square().flatten(1).mean(1)
        square = k.error.square().mean(0).flatten(1).mean(1) + self.function.own(place) ** 2
        return torch.maximum(square, finest).clamp_min(1e-60)

    def close(self) -> Tensor:
        """Misfit of every sample that the errors explain: one unit an entry, [B]."""
        parts = zip(self.wanted, self.squares, self.scales, strict=True)
        return torch.stack([w * s * v[0].numel() for v, s, w in parts]).sum(0).float()

    def misfit(self, row: int, x: Tensor, sharp: Mapping[int, float] | None) -> Tensor:
        """Of a sample; 1 where f(x) is 0."""
        values, total = self.function.values(x, sharp), x.new_zeros(())
        known = zip(self.function.edge, self.wanted, self.scales, self.on, strict=True)
        for place, v, w, on in known:
            node, given = self.function.flow.nodes[place], values[place]
            if sharp is None and isinstance(node.link, ReLU):
                given = torch.where(on[row], values[node.sources[0]], given)
            total = total + w[row] * (given - v[row]).square().sum()
        return total

    @property
    def late(self) -> bool:
        """True if the time is up."""
        return time.perf_counter() > self.deadline

    def run(self, goal: float) -> Tensor | str:
        """The batch [B, *in_shape], float64, or how near the nearest one came.

        Goes on from where the last run ended.

        Args:
            goal: relative misfit of every sample that will do; errors may allow more.
        """
        close = self.close().clamp_min(goal**2)
        begun = self.answer is not None
        answer = self.start(0).to(self.wanted[0]) if self.answer is None else self.answer
        self.answer = answer
        for row in range(len(answer)):
            self.watch(f"{self.below}, sample {row + 1} of {len(answer)}")
            best = inf
            for trial in range(STARTS):
                x = answer[row : row + 1].clone()
                if trial or not begun:
                    x = self.start(trial)[row : row + 1].to(answer)
                    for beta in BLUNT:
                        sharp = self.function.sharpness(x, beta)
                        x, _ = self.descended(row, x, sharp, BLUNT_ROUNDS, 0.0)
                x, own = self.descended(row, x, None, ROUNDS, float(close[row]))
                if own < best:
                    answer[row], best = x[0], own
                if best <= NEAR**2 * float(close[row]) or self.late:
                    break
            if not best <= NEAR**2 * float(close[row]):
                return (
                    f"sample {row}: no data give the known values nearer than {best**0.5:.1e} of "
                    f"their size, where {float(close[row]) ** 0.5:.1e} is explained"
                )
        return answer.double()

    def descended(
        self,
        row: int,
        x: Tensor,
        sharp: Mapping[int, float] | None,
        rounds: int,
        close: float,
    ) -> tuple[Tensor, float]:
        """Where one start leads, and the misfit there."""
        x = x.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [x], max_iter=STEPS, history_size=HISTORY, line_search_fn="strong_wolfe",
            tolerance_grad=0.0, tolerance_change=0.0,
        )  # fmt: skip

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = self.misfit(row, x, sharp)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        now = last = inf
        for number in range(rounds):
            optimiser.step(closure)  # type: ignore[no-untyped-call]
            with torch.no_grad():
                now = float(self.misfit(row, x, sharp))
            stuck = number >= GIVEN and now**0.5 > STALLED * last**0.5
            if now <= close or stuck or self.late:
                break
            last = now
        return x.detach(), now


class _Settling:
    """Gauss–Newton in units of the errors, and the errors of where it ends.

    Products with the Jacobian are of float32, what is left of the equations of float64: iterative
    refinement.

    Args:
        function: the known values.
        watch: told which sample is settled.
        below: what is, in words.
    """

    def __init__(self, function: Frontier, watch: Watch, below: str) -> None:
        self.function, self.rough = function, function.to(torch.float32)
        self.watch, self.below = watch, below

    def __call__(self, found: Tensor) -> Settled | str:
        """The data with their errors, and the misfit of every sample; or of which there are none.

        Args:
            found: data near them, [B, *in_shape], float64.
        """
        rows, misfits = list[Estimate](), list[float]()
        for row in range(len(found)):
            self.watch(f"{self.below}, sample {row + 1} of {len(found)}")
            settled = self.settled(row, found[row : row + 1])
            if isinstance(settled, str):
                return f"sample {row}: {settled}"
            rows.append(settled[0])
            misfits.append(settled[1])
        value = torch.cat([row.value for row in rows])
        data = Estimate(value, torch.cat([row.error for row in rows], 1))
        return data, value.new_tensor(misfits)

    def settled(self, row: int, x: Tensor) -> tuple[Estimate, float] | str:
        """One sample, from data near it."""
        full, sigma = self.function, self.function.sigma(row)

        def stacked(values: Sequence[Tensor]) -> Tensor:
            return torch.cat([(v / s).flatten(1) for v, s in zip(values, sigma, strict=True)], 1)

        target = stacked([full.known[place].value[row][None] for place in full.edge])
        generator = torch.Generator().manual_seed(row)
        errors = stacked(
            [
                full.known[place].error[:MEMBERS, row]
                + full.own(place) * torch.randn((MEMBERS, *s.shape), generator=generator).to(s)
                for place, s in zip(full.edge, sigma, strict=True)
            ]
        )
        misfit, step, met = inf, torch.zeros_like(x), False
        for number in range(LAST + 1):
            gap = target - stacked(full(x + step))
            now = float(gap.square().mean().sqrt())
            if not now < misfit:
                break
            x, misfit = x + step, now
            if met or number == LAST:
                break
            # Within one standard error an entry, data may still be off by many of their own: a
            # misfit of 1 is that of the errors in all entries, theirs that in as many as unknowns.
            met = number > 0 and misfit <= 1.0
            tangent = Tangent(self.rough, sigma, x.float())
            step = _solved(tangent, gap, ACCURACY if number else FIRST)
        if not misfit <= FITS:
            return (
                f"the data nearest to the known values miss them by {misfit:.1e} standard errors: "
                "the weights or the running statistics below them are others than the client's"
            )
        drawn = torch.randn((PROBES, *x.shape[1:]), generator=generator).to(x)
        tangent = Tangent(self.rough, sigma, x.float())
        images = tangent.push(drawn.float()).to(x) / tangent.unit
        moved = _solved(tangent, torch.cat([errors, images]), ACCURACY)
        lost = (moved[MEMBERS:] - drawn).flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
        if not bool((lost <= BACK).all()):
            return (
                "the known values leave directions of the data open: of a random one "
                f"{float(lost.max()):.1e} is lost"
            )
        return Estimate(x, moved[:MEMBERS, None]), misfit


def _solved(tangent: Tangent, rhs: Tensor, accuracy: float) -> Tensor:
    """Least-squares solutions of ``J v = r`` for right-hand sides [S, m], float64."""
    size = rhs.norm(dim=1).clamp_min(1e-300)
    unit = (rhs / size[:, None]).float()
    found = cgls(tangent.push, tangent.pull, unit, PRODUCTS, accuracy)
    return times(size * tangent.unit, found.x.double())
