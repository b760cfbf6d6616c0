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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, prod

import torch
from torch import Tensor

from rgap.completion.joint_search import JointSearch
from rgap.completion.rearranged import rearrangements, steps_of, unmoved
from rgap.completion.value_search import STARTS, Search
from rgap.completion.value_settling import MEMBERS, Row, Settled, Settling, gathered
from rgap.completion.value_uniqueness import agreed, folded, mirrored, paired
from rgap.completion.windows import confused_of_graph
from rgap.jacobian.frontier import Frontier, frontier
from rgap.limits import FITS, PROBES, SAFETY, SURPLUS, SURPLUS_SHARE
from rgap.machine.clock import ENDLESS, LONGER, Clock
from rgap.network.affine import Affine
from rgap.network.flow import Flow
from rgap.precision import Estimate
from rgap.progress import Watch, silent
from rgap.recursion.graph import GraphDescent

__all__ = ["Astray", "Preimage", "preimage"]

HANDED_OVER = 1e-3, 3e-5, 0.0  # relative misfits at which Gauss–Newton is tried; 0: as errors say
PASSES, VAIN = 60, 1  # of all samples together, and in a row that find no more
NEARER = 0.7  # of the lowest misfit, below which a pass that found no sample led nearer
BORNE = 2  # samples by which those that are not found outnumber the others while more are tried
OTHERS = 3  # rearranged pictures of a sample that Gauss–Newton begins at
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


@dataclass(frozen=True)
class Astray:
    """Why no data are certified, and the nearest that were found.

    Attributes:
        reason: in words.
        nearest: by the number of a sample, where its search ended, [*in_shape], float64.
        found: those that are determined each by itself, as they are.
    """

    reason: str
    nearest: Mapping[int, Tensor] = field(default_factory=dict)
    found: Mapping[int, Row] = field(default_factory=dict)


def preimage(
    flow: Flow,
    told: GraphDescent,
    start: Callable[[int], Tensor],
    watch: Watch = silent,
    clock: Clock = ENDLESS,
    room: float = inf,
    gradients: Mapping[str, Tensor] | None = None,
    near: Mapping[int, Row | Tensor] | None = None,
) -> Preimage | Astray:
    """The data that give the known values nearest to them, with errors, or why there are none.

    Args:
        flow: the network.
        told: what gradients determine of its values.
        start: the batch to begin with, [B, *in_shape], by the number of the trial.
        watch: told how far it is.
        clock: when it ends.
        room: bytes for all values of the network on the way, and their cotangents.
        gradients: the update, by parameter name: what layers below the known values say of the data
            where these alone lead nowhere.
        near: every sample by its number, as it was found, or data [*in_shape] to begin Gauss–Newton
            at, instead of a search.
    """
    begun = {row: x if isinstance(x, Tensor) else x[0].value[0] for row, x in (near or {}).items()}
    if clock.over:
        return Astray(f"the time was up before they were looked for; {LONGER}", begun)
    known = told.values
    lowest = frontier(flow, known)
    if not lowest:
        return Astray("a path from the data to the output meets no value that is known")
    # Values above the lowest ones are functions of them, but may be known with smaller errors.
    above = {place: value for place, value in known.items() if place not in lowest}
    edge = {*lowest, *frontier(flow, above), *({0} & known.keys())}
    full = Frontier(flow, sorted(edge), known, told.unit)
    samples, unknowns = len(known[lowest[0]].value), prod(flow.in_shape)
    if full.undifferentiated:
        words = f"{full.undifferentiated} stands between the data and the known values"
        return Astray(words)
    on = min(full.on(row, lowest) for row in range(samples))
    surplus = max(SURPLUS, int(SURPLUS_SHARE * unknowns))
    if 0 not in known and on < unknowns + surplus:
        return Astray(
            f"{on} known values that are not zero, for {unknowns} unknowns of a sample: at least "
            f"{unknowns + surplus} are asked for, that no second batch has them too"
        )
    need = COPIES * full.numbers * max(samples, MEMBERS + PROBES)
    if need > room:
        words = f"their search takes {need / 1e9:.1f} GB, there is room for {room / 1e9:.1f}"
        return Astray(words)
    below = f"the data below '{flow.nodes[lowest[0]].name}'"
    settling = Settling(full, clock)
    if 0 in known:
        made = _settled(settling, dict(enumerate(known[0].value)))
    else:
        doubted = folded(full, unknowns, unknowns + surplus)
        if isinstance(doubted, str):
            return Astray(doubted)
        if confused := confused_of_graph(full, unknowns + surplus):
            return Astray(f"{confused}, others than the data give the same")
        links = (node.link for _, node in full.between())
        if alike := paired(link for link in links if isinstance(link, Affine)):
            return Astray(alike)
        nearest = Frontier(flow, lowest, known, told.unit).to(torch.float32)
        joint = JointSearch.of(nearest, told, gradients or {}, clock)
        if near is not None and not doubted:
            made = _settled(settling, near)
            if isinstance(made, str):
                return Astray(made, begun)
        else:
            search = Search(nearest, start, watch, below, clock)
            ends = _looked_for(settling, search, joint)
            made = gathered(ends, samples)
            if isinstance(made, str):
                found = {} if doubted else _found(ends)
                return Astray(made, search.nearest, found)
        if doubted and not isinstance(made, str):
            again = Search(nearest, lambda n: start(n + 1), watch, f"again {below}", clock)
            made = agreed(made, gathered(_looked_for(settling, again, joint), samples))
        if not isinstance(made, str):
            other = mirrored(nearest, made[0].value)
            made = other or _rearranged(Settling(full), nearest, made[0]) or made
    if isinstance(made, str):
        return Astray(made)  # not the nearest: where others are as near, none is shown
    data, misfit = made
    return Preimage(data, misfit, unknowns, on)


def _settled(settling: Settling, near: Mapping[int, Row | Tensor]) -> Settled | str:
    """Samples as they are, and where Gauss–Newton ends from data near the others."""
    ends = {
        row: settling.settled(row, x[None]) if isinstance(x, Tensor) else x
        for row, x in near.items()
    }
    return gathered(ends, len(near))


def _found(ends: Mapping[int, Row | str]) -> dict[int, Row]:
    """Samples that are not missing."""
    return {row: end for row, end in ends.items() if not isinstance(end, str)}


def _looked_for(
    settling: Settling, search: Search, joint: JointSearch | None
) -> dict[int, Row | str]:
    """The samples with their errors and misfits, or why they are not found; not all are tried."""
    ends, samples = dict[int, Row | str](), len(search.explained)

    def one(row: int, starts: int) -> Row | str:
        made: Row | str = ""
        if search.clock.over:
            return f"the time was up before it was looked for; {LONGER}"
        for goal in HANDED_OVER:
            found = search.run(row, goal, starts)
            if isinstance(found, str):
                return found
            made = settling.settled(row, found)
            if not isinstance(made, str):
                search.answers[row] = made[0].value.float()
            if not isinstance(made, str) or search.late:
                break
        return made

    for row in range(samples):
        ends[row] = one(row, STARTS if samples == 1 else 1)
        lost = len(ends) - len(_found(ends))
        if lost > BORNE + len(_found(ends)):
            break
    if _found(ends) or not search.missed or search.late:
        return ends  # what the others send may be taken off the update
    if joint is not None:
        return _jointly(search, joint, lambda row: one(row, 1))
    return {**ends, 0: one(0, STARTS)}


def _jointly(
    search: Search, joint: JointSearch, one: Callable[[int], Row | str]
) -> dict[int, Row | str]:
    """The same from where all samples together meet values and gradients."""
    samples = range(len(search.explained))
    x, ends = search.start(0).float(), dict[int, Row | str]()
    held, begun, number, vain, best = [False for _ in samples], 0, 0, 0, inf
    for turn in range(PASSES):
        search.watch(f"{search.below}, all samples together, pass {turn + 1}")
        x, missed = joint.descended(x, held, number)
        number += 1
        if number == 1 and not search.late:
            continue  # the first pass ends with kinks that are too blunt for what follows
        for row in samples:
            if not held[row]:
                search.answers[row] = x[row : row + 1]
                search.absolute(row, HANDED_OVER[1])
                ends[row] = one(row)
                x[row] = search.answers[row][0]
        found = _found(ends)
        more = sum(held) < len(found)
        if more or missed <= NEARER * best:
            vain, best = 0, inf if more else missed
        else:
            vain += 1
        held = [row in found for row in samples]
        if all(held) or search.late or (vain and any(held)):
            break  # what those that are held send may be taken off the update
        if vain > VAIN:  # among other kinks: from elsewhere
            begun += 1
            if begun == STARTS:
                break
            x, number, vain, best = search.start(begun).float(), 0, 0, inf
    return ends


def _rearranged(settling: Settling, nearest: Frontier, data: Estimate) -> str:
    """Why data with entries in other places give the same known values; or "".

    Args:
        settling: of the known values.
        nearest: those nearest to the data, float32.
        data: that give them.
    """
    shapes = [node.shape for _, node in nearest.between()]
    steps = steps_of(tuple(data.value.shape[1:]), shapes)
    for row, (x, std) in enumerate(zip(data.value, data.std, strict=True)):
        off = 2.0 * SAFETY * float(std.max())
        sizes = [float(v.norm()) or 1.0 for v in nearest(x[None].float())]

        def values(pictures: Tensor, sizes: list[float] = sizes) -> Tensor:
            edge = zip(nearest(pictures.float()), sizes, strict=True)
            return torch.cat([(v / size).flatten(1) for v, size in edge], 1)

        for other in unmoved(values, x, rearrangements(x, steps, off))[:OTHERS]:
            ended, misfit = settling.nearest(row, other.value[None])
            apart = float((ended[0] - x).abs().max())
            if misfit <= FITS and apart > off:
                return (
                    f"sample {row} {other.words} gives the same known values, off by {apart:.2g} "
                    "in an entry: neither may be the data"
                )
    return ""
