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
from math import inf

import torch
from torch import Tensor

from rgap.limits import CLEAR, FITS
from rgap.network.flow import Flow
from rgap.precision import Estimate
from rgap.progress import Watch, silent
from rgap.solvers.conjugate import cgls, times

__all__ = ["Preimage", "frontier", "preimage"]

ROUNDS, STEPS, HISTORY = 60, 20, 30  # of L-BFGS, from every start
CLOSE, NEAR = 2e-6, 10.0  # relative misfit from which Gauss–Newton goes on in float64, or errors
STALLED = 0.98  # factor on the misfit in a round above which a start is given up, from GIVEN rounds
GIVEN = 8
STARTS = 4
LAST = 6  # steps of Gauss–Newton
MEMBERS, PROBES = 4, 4  # errors that are carried to the data, and random x that have to come back
PRODUCTS, ACCURACY = 400, 1e-4
BACK = 1e-3  # of a random x: share that may be lost.  A null direction holds more of one of PROBES
# normal vectors of n < 10^5 entries but with chance (BACK √n)^PROBES = 10^-2
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

    def __call__(self, x: Tensor) -> list[Tensor]:
        values: dict[int, Tensor] = {0: x}
        for place in self.needed:
            node = self.flow.nodes[place]
            values[place] = node.forward([values[source] for source in node.sources])
        return [values[place] for place in self.edge]

    def to(self, dtype: torch.dtype) -> _Map:
        """The same in other arithmetic."""
        nodes = [
            node if node.link is None else replace(node, link=node.link.to(dtype))
            for node in self.flow.nodes
        ]
        return _Map(Flow(tuple(nodes), self.flow.name), self.edge, self.known)

    def sigma(self, row: int) -> list[Tensor]:
        """Standard errors of the known values of a sample, [*shape]; none below that of its map."""
        sigma = []
        for place in self.edge:
            known = self.known[place]
            own = OWN * torch.finfo(known.value.dtype).eps * float(known.value.abs().max())
            std = known.std[row]
            sigma.append(torch.maximum(std, std.square().mean().sqrt()).clamp_min(max(own, 1e-300)))
        return sigma


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
    known: Mapping[int, Estimate],
    start: Callable[[int], Tensor],
    watch: Watch = silent,
    deadline: float = inf,
) -> Preimage | str:
    """The data that give the known values nearest to them, with errors, or why there are none.

    Args:
        flow: the network.
        known: values [B, *shape] by place.
        start: the data to begin with, [*in_shape], by the number of the trial.
        watch: told how far it is.
        deadline: of ``time.perf_counter``, after which no further round is begun.
    """
    edge = frontier(flow, known)
    if not edge:
        return "a path from the data to the output meets no value that is known"
    above = {place: value for place, value in known.items() if place not in edge}
    edge = sorted({*edge, *frontier(flow, above)})  # the lowest are known with the largest errors
    full = _Map(flow, edge, known)
    rough = full.to(torch.float32)
    rows, samples = list[Estimate](), len(known[edge[0]].value)
    misfits = list[float]()
    for row in range(samples):
        watch(f"the data below '{flow.nodes[edge[0]].name}', sample {row + 1} of {samples}")
        found = _approached(rough, row, start, deadline)
        if isinstance(found, str):
            return f"sample {row}: {found}"
        settled = _settled(full, rough, row, found)
        if isinstance(settled, str):
            return f"sample {row}: {settled}"
        rows.append(settled[0])
        misfits.append(settled[1])
    data = Estimate(
        torch.cat([row.value for row in rows]), torch.cat([row.error for row in rows], 1)
    )
    on = min(
        sum(
            int((known[place].value[row].abs() > CLEAR * s).sum())
            for place, s in zip(edge, full.sigma(row), strict=True)
        )
        for row in range(samples)
    )
    return Preimage(data, torch.tensor(misfits), data.value[0].numel(), on)


def _approached(
    function: _Map, row: int, start: Callable[[int], Tensor], deadline: float
) -> Tensor | str:
    """Data [1, *in_shape] that give the known values to :data:`CLOSE`, by L-BFGS."""
    wanted = [function.known[place].value[row : row + 1].float() for place in function.edge]
    sizes = [float(v.square().sum().clamp_min(1e-30)) for v in wanted]
    errors = [float(s.square().sum()) for s in function.sigma(row)]
    close = max(CLOSE, sum(e / size for e, size in zip(errors, sizes, strict=True)) ** 0.5)

    def misfit(x: Tensor) -> Tensor:
        parts = zip(function(x), wanted, sizes, strict=True)
        return torch.stack([(f - v).square().sum() / size for f, v, size in parts]).sum()

    nearest = inf
    for trial in range(STARTS):
        x = start(trial)[None].to(wanted[0]).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [x], max_iter=STEPS, history_size=HISTORY, line_search_fn="strong_wolfe",
            tolerance_grad=0.0, tolerance_change=0.0,
        )  # fmt: skip

        def closure(x: Tensor = x, optimiser: torch.optim.LBFGS = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = misfit(x)
            value.backward()
            return value

        last = inf
        for number in range(ROUNDS):
            optimiser.step(closure)
            with torch.no_grad():
                now = float(misfit(x).sqrt())
            nearest = min(nearest, now)
            if now <= close or (now < NEAR * close and now > STALLED * last):
                return x.detach().double()
            if (number >= GIVEN and now > STALLED * last) or time.perf_counter() > deadline:
                break
            last = now
        if time.perf_counter() > deadline:
            break
    return f"no data give the known values nearer than {nearest:.1e} of their size"


def _settled(full: _Map, rough: _Map, row: int, x: Tensor) -> tuple[Estimate, float] | str:
    """Gauss–Newton in units of the errors, and the errors of where it ends.

    Products with the Jacobian are of float32, what is left of the equations of float64: iterative
    refinement.
    """
    sigma = full.sigma(row)

    def stacked(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([(v / s).flatten(1) for v, s in zip(values, sigma, strict=True)], 1)

    target = stacked([full.known[place].value[row][None] for place in full.edge])
    errors = stacked([full.known[place].error[:MEMBERS, row] for place in full.edge])
    before = inf
    for _ in range(LAST):
        gap = target - stacked(full(x))
        misfit = float(gap.square().mean().sqrt())
        if misfit > 0.5 * before and misfit <= FITS:
            break
        before = misfit
        x = x + _solved(rough, sigma, x, gap).to(x)
    if not misfit <= FITS:
        return (
            f"the data nearest to the known values miss them by {misfit:.1e} standard errors: the "
            "weights or the running statistics below them are others than the client's"
        )
    generator = torch.Generator().manual_seed(row)
    drawn = torch.randn((PROBES, *x.shape[1:]), generator=generator).to(x)
    tangent = _Tangent(rough, sigma, x, PROBES)
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

    def __init__(self, function: _Map, sigma: Sequence[Tensor], x: Tensor, count: int) -> None:
        unit = min(float(s.min()) for s in sigma)
        self.sigma = [(s[None] / unit).float() for s in sigma]
        self.unit = unit
        self.function = function
        self.x = x.float().repeat(count, *([1] * (x.ndim - 1)))
        self.back = torch.func.vjp(self.scaled, self.x)[1]

    def scaled(self, x: Tensor) -> Tensor:
        """Of data [S, *in_shape], [S, m]."""
        parts = zip(self.function(x), self.sigma, strict=True)
        return torch.cat([(f / s).flatten(1) for f, s in parts], 1)

    def push(self, v: Tensor) -> Tensor:
        """``J v``, [S, *in_shape] → [S, m]."""
        return torch.func.jvp(self.scaled, (self.x,), (v.float(),))[1].detach()

    def pull(self, r: Tensor) -> Tensor:
        """``Jᵀ r``, [S, m] → [S, *in_shape]."""
        return self.back(r, retain_graph=True)[0].detach()


def _solved(function: _Map, sigma: Sequence[Tensor], x: Tensor, rhs: Tensor) -> Tensor:
    """Least-squares solutions of ``J v = r`` at x for right-hand sides [S, m], float64."""
    size = rhs.norm(dim=1).clamp_min(1e-300)
    tangent = _Tangent(function, sigma, x, len(rhs))
    unit = (rhs / size[:, None]).float()
    found = cgls(tangent.push, tangent.pull, unit, PRODUCTS, ACCURACY)
    return times(size * tangent.unit, found.x.double())
