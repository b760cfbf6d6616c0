"""Data whose features are known: what lies below the lowest values that gradients determine.

With v_p the known values nearest to the data, and f_p the network from the data to them, x solves

    f_p(x) = v_p    for every such p,

for each sample alone: many more equations than unknowns in a wide network, continuous in x, and
piecewise linear where it has rectifiers.  L-BFGS goes down from the middle of the range, and
Gauss–Newton ends it.  No unit is taken to be on or off: one that lies within its error of a kink
gives the same on both sides of it.

Sources: that the features of a network give its picture away is Mahendran and Vedaldi's (2015);
errors, full rank and refusal are ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod

import torch
from torch import Tensor

from rgap.limits import CLEAR, FITS
from rgap.network.activations import Activation
from rgap.network.affine import Affine
from rgap.network.flow import Flow, Node
from rgap.precision import Estimate
from rgap.progress import Watch, silent
from rgap.recursion.graph import GraphDescent
from rgap.recursion.readers import Reader
from rgap.solvers.conjugate import cgls, times

__all__ = ["Preimage", "frontier", "preimage"]

ROUNDS, STEPS, HISTORY = 60, 20, 30  # of L-BFGS, from every start
CLOSE, NEAR = 2e-6, 10.0  # relative misfit from which Gauss–Newton goes on; times that, if stuck
STALLED, GIVEN = 0.98, 8  # factor on the misfit of a round that ends a start, from which round
STARTS = 3
HEARD = 10.0  # weight of a gradient beside the values of one sample
LAST = 6  # steps of Gauss–Newton
MEMBERS, PROBES = 4, 3  # errors that are carried to the data, and random x that have to come back
PRODUCTS, ACCURACY = 400, 3e-5
BACK = 5e-4  # of a random x: share that may be lost.  A null direction holds more of one of PROBES
# normal vectors of n entries, but with chance (0.8 BACK √n)^PROBES: 10^-5 at n = 3072
OWN = 32.0  # rounding of float64 in units of eps of the largest value, whatever errors are stated


@dataclass(frozen=True)
class Preimage:
    """Data that give the known values.

    Attributes:
        data: x [B, *in_shape] with its errors.
        misfit: rms residual of every sample, in standard errors, [B].
        unknowns: numbers of one sample.
        equations: entries of the known values of one sample that are not zero: units that are on.
    """

    data: Estimate
    misfit: Tensor
    unknowns: int
    equations: int


def frontier(flow: Flow, known: Mapping[int, Estimate]) -> list[int]:
    """Places of known values that a path from the data meets before any other of them.

    Empty where a path to the output meets none.
    """
    reached, edge = {0}, list[int]()
    for place in range(1, len(flow.nodes)):
        if not reached & set(flow.nodes[place].sources):
            continue
        if place in known:
            edge.append(place)
        else:
            reached.add(place)
    return [] if len(flow.nodes) - 1 in reached else edge


class _Map:
    """The frontier as a function of the data, in units of its errors or of its size."""

    def __init__(self, flow: Flow, edge: list[int], known: Mapping[int, Estimate]) -> None:
        self.edge = edge
        self.flow = Flow(flow.nodes[: max(edge) + 1], flow.name)
        self.needed = _needed(self.flow, edge)
        self.known = {place: known[place] for place in edge}

    def between(self) -> list[tuple[int, Node]]:
        """The values above the data up to the frontier, in forward order."""
        return [(place, self.flow.nodes[place]) for place in self.needed]

    def values(self, x: Tensor) -> dict[int, Tensor]:
        """All of them, by place, of data [B, *in_shape]."""
        values = {0: x}
        for place, node in self.between():
            values[place] = node.forward([values[source] for source in node.sources])
        return values

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Those of the frontier."""
        values = self.values(x)
        return [values[place] for place in self.edge]

    def to(self, dtype: torch.dtype) -> _Map:
        """The same in other arithmetic."""
        nodes = [
            node if node.link is None else replace(node, link=node.link.to(dtype))
            for node in self.flow.nodes
        ]
        return _Map(Flow(tuple(nodes), self.flow.name), self.edge, self.known)

    def own(self, place: int) -> float:
        """Rounding of a value on its way up from the data, in our own arithmetic."""
        value = self.known[place].value
        return OWN * torch.finfo(value.dtype).eps * float(value.abs().max())

    def sigma(self, row: int) -> list[Tensor]:
        """Standard errors of the known values of a sample, [*shape]; none below that of its map."""
        sigma = []
        for place in self.edge:
            std = self.known[place].std[row]
            least = max(self.own(place), 1e-300)
            sigma.append(torch.maximum(std, std.square().mean().sqrt()).clamp_min(least))
        return sigma

    def on(self, row: int) -> int:
        """Known values of a sample that are not zero within their errors."""
        parts = zip(self.edge, self.sigma(row), strict=True)
        return sum(int((self.known[p].value[row].abs() > CLEAR * s).sum()) for p, s in parts)

    def weights(self) -> list[Tensor]:
        """Of the squares of each known value, one a sample [B]: its misfit is 1 at f = 0.

        By the errors, but none counts as better known than to CLOSE.
        """
        rows = list[Tensor]()
        for row in range(len(self.known[self.edge[0]].value)):
            values = [self.known[place].value[row] for place in self.edge]
            own = torch.stack(
                [
                    torch.maximum(s.square().mean(), CLOSE**2 * v.square().mean()).clamp_min(1e-60)
                    for v, s in zip(values, self.sigma(row), strict=True)
                ]
            )
            whole = sum(float(v.square().sum() / w) for v, w in zip(values, own, strict=True))
            rows.append(1.0 / (own * max(whole, 1e-300)))
        return [w.float() for w in torch.stack(rows, 1)]

    def close(self, weights: Sequence[Tensor]) -> Tensor:
        """Misfit of every sample that the weights explain: one unit an entry, [B]."""
        total = torch.zeros_like(weights[0])
        for place, w in zip(self.edge, weights, strict=True):
            known = self.known[place]
            for row in range(len(w)):
                finest = CLOSE**2 * known.value[row].square().sum()
                total[row] += w[row] * torch.maximum(
                    known.error[:, row].square().mean(0).sum(), finest
                )
        return total


def _needed(flow: Flow, edge: list[int]) -> list[int]:
    """Places between the data and the frontier, in forward order."""
    needed, held = set(edge), set(edge)
    for place in reversed(range(1, len(flow.nodes))):
        if place in needed:
            needed |= set(flow.nodes[place].sources)
    held -= {0}
    return sorted(needed - {0})


def preimage(
    flow: Flow,
    told: GraphDescent,
    gradients: Mapping[str, Tensor],
    start: Callable[[int], Tensor],
    watch: Watch = silent,
    deadline: float = inf,
) -> Preimage | str:
    """The data that give the known values nearest to them, with errors, or why there are none.

    Args:
        flow: the network.
        told: what gradients determine of its values, and the layers that say more of others.
        gradients: by parameter name, float64.
        start: the batch to begin with, [B, *in_shape], by the number of the trial.
        watch: told how far it is.
        deadline: of ``time.perf_counter``, after which no further round is begun.
    """
    known = told.values
    edge = frontier(flow, known)
    if not edge:
        return "a path from the data to the output meets no value that is known"
    above = {place: value for place, value in known.items() if place not in edge}
    edge = sorted({*edge, *frontier(flow, above)})  # the lowest are known with the largest errors
    full = _Map(flow, edge, known)
    samples, unknowns = len(known[edge[0]].value), prod(flow.in_shape)
    on = min(full.on(row) for row in range(samples))
    if on < unknowns:
        return f"{on} known values that are not zero, for {unknowns} unknowns of a sample"
    watch(f"the data below '{flow.nodes[edge[0]].name}'")
    search = _Search(full.to(torch.float32), told.readers, gradients)
    found = search.run(start, deadline)
    if isinstance(found, str):
        return found
    rows, misfits = list[Estimate](), list[float]()
    for row in range(samples):
        watch(f"the data below '{flow.nodes[edge[0]].name}', sample {row + 1} of {samples}")
        settled = _settled(full, search.function, row, found[row : row + 1])
        if isinstance(settled, str):
            return f"sample {row}: {settled}"
        rows.append(settled[0])
        misfits.append(settled[1])
    value = torch.cat([row.value for row in rows])
    data = Estimate(value, torch.cat([row.error for row in rows], 1))
    return Preimage(data, value.new_tensor(misfits), unknowns, on)


class _Search:
    """L-BFGS in float32 on the known values, and on the gradients of layers further down.

    A layer whose cotangent is known but whose input its gradient does not determine still says
    ``Σ_b k_b x_bᵀ = G``: linear in a value nearer to the data, and what keeps the search from
    ending beside the answer.
    """

    def __init__(
        self,
        function: _Map,
        readers: Mapping[int, Sequence[Reader]],
        gradients: Mapping[str, Tensor],
    ) -> None:
        self.function = function
        self.wanted = [function.known[place].value.float() for place in function.edge]
        self.weights = function.weights()
        self.heard = list[tuple[int, Affine, Tensor, Tensor, float]]()
        for place, those in readers.items():
            for reader in those if place in {0, *function.needed} else ():
                sent = reader.affine.sent(gradients).float()
                size = float(sent.square().sum())
                if size > 0:
                    affine = reader.affine.to(torch.float32)
                    self.heard.append((place, affine, reader.k.value.float(), sent, HEARD / size))

    def misfits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of every sample, [B], 1 where nothing is explained; and of the gradients, in all."""
        values = self.function.values(x)
        own = torch.zeros(len(x))
        for place, v, w in zip(self.function.edge, self.wanted, self.weights, strict=True):
            own = own + w * (values[place] - v).square().flatten(1).sum(1)
        shared = torch.zeros(())
        for place, affine, k, sent, weight in self.heard:
            inside = values[place].reshape(len(x), *affine.in_shape)
            shared = shared + weight * (affine.weight_gradient(inside, k) - sent).square().sum()
        return own, shared

    def run(self, start: Callable[[int], Tensor], deadline: float) -> Tensor | str:
        """The batch [B, *in_shape], float64, or how near the nearest one came."""
        close = self.function.close(self.weights)
        best = torch.full((len(self.wanted[0]),), inf)
        answer = start(0).to(self.wanted[0])
        for trial in range(STARTS):
            fresh = start(trial).to(answer)
            open_ = best > NEAR**2 * close
            x = torch.where(times(open_.float(), torch.ones_like(answer)) > 0, fresh, answer)
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


def _settled(full: _Map, rough: _Map, row: int, x: Tensor) -> tuple[Estimate, float] | str:
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
        step = _solved(rough, sigma, x, gap).to(x)
    if not misfit <= FITS:
        return (
            f"the data nearest to the known values miss them by {misfit:.1e} standard errors: the "
            "weights or the running statistics below them are others than the client's"
        )
    drawn = torch.randn((PROBES, *x.shape[1:]), generator=generator).to(x)
    tangent = _Tangent(rough, sigma, x)
    moved = _solved(rough, sigma, x, torch.cat([errors, tangent.push(drawn) / tangent.unit]))
    lost = (moved[MEMBERS:] - drawn).flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
    if not bool((lost <= BACK).all()):
        return (
            "the known values leave directions of the data open: of a random one "
            f"{float(lost.max()):.1e} is lost"
        )
    return Estimate(x, moved[:MEMBERS, None].to(x)), misfit


class _Tangent:
    """The linear map that the frontier is at x, in units of its errors, for S vectors at once."""

    def __init__(self, function: _Map, sigma: Sequence[Tensor], x: Tensor) -> None:
        self.function, self.unit = function, min(float(s.min()) for s in sigma)
        self.sigma = [(s[None] / self.unit).float() for s in sigma]
        values = function.values(x.float())
        self.slopes = {
            place: node.link.derivative(values[node.sources[0]])
            for place, node in function.between()
            if isinstance(node.link, Activation)
        }

    def push(self, v: Tensor) -> Tensor:
        """``J v``, [S, *in_shape] → [S, m]."""
        moved = {0: v.float()}
        for place, node in self.function.between():
            parts = [moved[source] for source in node.sources]
            if place in self.slopes:
                moved[place] = parts[0] * self.slopes[place]
            elif node.link is None:
                moved[place] = node.forward(parts)
            else:
                moved[place] = node.link.linear(parts[0])
        edge = zip(self.function.edge, self.sigma, strict=True)
        return torch.cat([(moved[place] / s).flatten(1) for place, s in edge], 1)

    def pull(self, r: Tensor) -> Tensor:
        """``Jᵀ r``, [S, m] → [S, *in_shape]."""
        sizes = [s.numel() for s in self.sigma]
        parts = zip(self.function.edge, self.sigma, torch.split(r, sizes, 1), strict=True)
        sent = {place: part.reshape(-1, *s.shape[1:]) / s for place, s, part in parts}
        for place, node in reversed(self.function.between()):
            k = sent[place]
            if place in self.slopes:
                parts_ = [k * self.slopes[place]]
            elif node.link is None:
                shapes = [self.function.flow.nodes[source].shape[0] for source in node.sources]
                parts_ = node.spread(k, shapes)
            else:
                parts_ = [node.link.adjoint(k)]
            for source, part in zip(node.sources, parts_, strict=True):
                sent[source] = sent[source] + part if source in sent else part
        return sent[0]


def _solved(function: _Map, sigma: Sequence[Tensor], x: Tensor, rhs: Tensor) -> Tensor:
    """Least-squares solutions of ``J v = r`` at x for right-hand sides [S, m], float64."""
    size = rhs.norm(dim=1).clamp_min(1e-300)
    tangent = _Tangent(function, sigma, x)
    unit = (rhs / size[:, None]).float()
    found = cgls(tangent.push, tangent.pull, unit, PRODUCTS, ACCURACY)
    return times(size * tangent.unit, found.x.double())
