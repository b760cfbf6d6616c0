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
from rgap.limits import BACK, FITS, PROBES, SURPLUS, SURPLUS_SHARE
from rgap.network.affine import Affine
from rgap.network.flow import Flow
from rgap.precision import Estimate
from rgap.progress import Watch, silent
from rgap.recursion.graph import GraphDescent
from rgap.recursion.readers import Reader
from rgap.solvers.conjugate import cgls, times

__all__ = ["Preimage", "preimage"]

ROUNDS, STEPS, HISTORY = 60, 20, 30  # of L-BFGS, from every start
CLOSE, NEAR = 2e-6, 10.0  # relative misfit from which Gauss–Newton goes on; times that, if stuck
STALLED, GIVEN = 0.98, 8  # factor on the misfit of a round that ends a start, from which round
STARTS = 3
HEARD = 10.0  # weight of a gradient beside the values of one sample
HANDED_OVER = 1e-3, 3e-5, 0.0  # relative misfits at which Gauss–Newton is tried; 0: as CLOSE says
LAST = 8  # steps of Gauss–Newton
FIRST = 1e-2  # accuracy of the first, which ends among the same kinks
MEMBERS = 4  # errors that are carried to the data
PRODUCTS, ACCURACY = 400, 3e-5  # of conjugate gradients
COPIES = (
    24.0  # bytes a value on the way: float32, with its cotangent, its slope and what is made of it
)


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
    gradients: Mapping[str, Tensor],
    start: Callable[[int], Tensor],
    watch: Watch = silent,
    deadline: float = inf,
    room: float = inf,
) -> Preimage | str:
    """The data that give the known values nearest to them, with errors, or why there are none.

    Args:
        flow: the network.
        told: what gradients determine of its values, and the layers that say more of others.
        gradients: by parameter name, float64.
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
    name, rough = flow.nodes[lowest[0]].name, full.to(torch.float32)
    below = f"the data below '{name}'"
    if 0 in known:
        made = _all_settled(full, rough, known[0].value, watch, below)
    else:
        search = _Search(rough, told.readers, gradients)
        for goal in HANDED_OVER:
            watch(below)
            found = search.run(start, deadline, goal)
            if isinstance(found, str):
                return found
            made = _all_settled(full, rough, found, watch, below)
            if not isinstance(made, str) or time.perf_counter() > deadline:
                break
    if isinstance(made, str):
        return made
    data, misfit = made
    return Preimage(data, misfit, unknowns, on)


def _all_settled(
    full: Frontier, rough: Frontier, found: Tensor, watch: Watch, below: str
) -> tuple[Estimate, Tensor] | str:
    """The data with their errors, and the misfit of every sample; or of which there are none."""
    rows, misfits = list[Estimate](), list[float]()
    for row in range(len(found)):
        watch(f"{below}, sample {row + 1} of {len(found)}")
        settled = _settled(full, rough, row, found[row : row + 1])
        if isinstance(settled, str):
            return f"sample {row}: {settled}"
        rows.append(settled[0])
        misfits.append(settled[1])
    value = torch.cat([row.value for row in rows])
    data = Estimate(value, torch.cat([row.error for row in rows], 1))
    return data, value.new_tensor(misfits)


class _Search:
    """L-BFGS in float32 on the known values, and on the gradients of layers further down.

    A layer whose cotangent is known but whose input its gradient does not determine still says
    ``Σ_b k_b x_bᵀ = G``: linear in a value nearer to the data, and what keeps the search from
    ending beside the answer.
    """

    def __init__(
        self,
        function: Frontier,
        readers: Mapping[int, Sequence[Reader]],
        gradients: Mapping[str, Tensor],
    ) -> None:
        self.function = function
        self.answer: Tensor | None = None
        self.wanted = [function.known[place].value.float() for place in function.edge]
        self.scales = self.weights()
        self.heard = list[tuple[int, Affine, Tensor, Tensor, float]]()
        for place, those in readers.items():
            for reader in those if place in {0, *function.needed} else ():
                sent = reader.affine.sent(gradients).float()
                size = float(sent.square().sum())
                if size > 0:
                    affine = reader.affine.to(torch.float32)
                    self.heard.append((place, affine, reader.k.value.float(), sent, HEARD / size))

    def weights(self) -> list[Tensor]:
        """Of the squares of each known value, one a sample [B]: its misfit is 1 at f = 0.

        By the errors, but none counts as better known than to CLOSE.
        """
        known = [self.function.known[place] for place in self.function.edge]
        own = [self.square(place) for place in self.function.edge]
        parts = [k.value.square().flatten(1).sum(1) / o for k, o in zip(known, own, strict=True)]
        whole = torch.stack(parts).sum(0).clamp_min(1e-300)
        return [(1.0 / (o * whole)).float() for o in own]

    def square(self, place: int) -> Tensor:
        """Mean square error of a known value of every sample, [B]."""
        k = self.function.known[place]
        finest = CLOSE**2 * k.value.square().flatten(1).mean(1)
        square = k.error.square().mean(0).flatten(1).mean(1) + self.function.own(place) ** 2
        return torch.maximum(square, finest).clamp_min(1e-60)

    def close(self) -> Tensor:
        """Misfit of every sample that the weights explain: one unit an entry, [B]."""
        total = torch.zeros_like(self.scales[0])
        for place, w in zip(self.function.edge, self.scales, strict=True):
            total += w * self.square(place) * self.function.known[place].value[0].numel()
        return total

    def misfits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of every sample, [B], 1 where nothing is explained; and of the gradients, in all."""
        values = self.function.values(x)
        own = x.new_zeros(len(x))
        for place, v, w in zip(self.function.edge, self.wanted, self.scales, strict=True):
            own = own + w * (values[place] - v).square().flatten(1).sum(1)
        shared = x.new_zeros(())
        for place, affine, k, sent, weight in self.heard:
            inside = values[place].reshape(len(x), *affine.in_shape)
            shared = shared + weight * (affine.weight_gradient(inside, k) - sent).square().sum()
        return own, shared

    def run(
        self, start: Callable[[int], Tensor], deadline: float, goal: float = 0.0
    ) -> Tensor | str:
        """The batch [B, *in_shape], float64, or how near the nearest one came.

        Goes on from where the last run ended.

        Args:
            start: the batch to begin with, by the number of the trial.
            deadline: after which no further round is begun.
            goal: relative misfit of every sample that will do.
        """
        close = self.close().clamp_min(goal**2)
        best = self.wanted[0].new_full((len(self.wanted[0]),), inf)
        if self.answer is None:
            self.answer = start(0).to(self.wanted[0])
        answer = self.answer
        for trial in range(STARTS):
            x, open_ = answer.clone(), best > NEAR**2 * close
            if trial:
                x[open_] = start(trial).to(answer)[open_]
            x, own = self.descended(x, close, deadline)
            better = own < best
            answer[better], best[better] = x[better], own[better]
            if bool((best <= NEAR**2 * close).all()):
                return answer.double()
            if time.perf_counter() > deadline:
                break
        worst = int((best / close).argmax())
        return (
            f"sample {worst}: no data give the known values nearer than "
            f"{float(best[worst]) ** 0.5:.1e} of their size, where "
            f"{float(close[worst]) ** 0.5:.1e} is explained"
        )

    def descended(self, x: Tensor, close: Tensor, deadline: float) -> tuple[Tensor, Tensor]:
        """Where one start leads, and the misfit of every sample there."""
        x = x.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [x], max_iter=STEPS, history_size=HISTORY, line_search_fn="strong_wolfe",
            tolerance_grad=0.0, tolerance_change=0.0,
        )  # fmt: skip

        def closure() -> Tensor:
            optimiser.zero_grad()
            own, shared = self.misfits(x)
            value = own.sum() + shared
            value.backward()  # type: ignore[no-untyped-call]
            return value

        last = inf
        for number in range(ROUNDS):
            optimiser.step(closure)  # type: ignore[no-untyped-call]
            with torch.no_grad():
                own, shared = self.misfits(x)
            now = float(own.sum() + shared) ** 0.5
            stuck = number >= GIVEN and now > STALLED * last
            if bool((own <= close).all()) or stuck or time.perf_counter() > deadline:
                break
            last = now
        return x.detach(), own


def _settled(full: Frontier, rough: Frontier, row: int, x: Tensor) -> tuple[Estimate, float] | str:
    """Gauss–Newton in units of the errors, and the errors of where it ends.

    Products with the Jacobian are of float32, what is left of the equations of float64: iterative
    refinement.
    """
    sigma = full.sigma(row)

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
    misfit, step = inf, torch.zeros_like(x)
    for number in range(LAST + 1):
        gap = target - stacked(full(x + step))
        now = float(gap.square().mean().sqrt())
        if not now < misfit:
            break
        x, misfit = x + step, now
        if number == LAST or (number and misfit <= 1.0):  # one standard error an entry
            break
        step = _solved(Tangent(rough, sigma, x.float()), gap, ACCURACY if number else FIRST)
    if not misfit <= FITS:
        return (
            f"the data nearest to the known values miss them by {misfit:.1e} standard errors: the "
            "weights or the running statistics below them are others than the client's"
        )
    drawn = torch.randn((PROBES, *x.shape[1:]), generator=generator).to(x)
    tangent = Tangent(rough, sigma, x.float())
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
