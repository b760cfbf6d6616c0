"""Below a call that ends a chain because branches meet: what wide layers give away all the same.

From the cotangent at the head down the graph of calls (:mod:`rgap.recursion.graph`), then from the
lowest values that are known to the data (:mod:`rgap.completion.preimage`), then back up: the target
is read at the head, and nothing is certified that does not give the update again.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rgap.completion.complete import FAINT, grey
from rgap.completion.preimage import Astray, Preimage, preimage
from rgap.completion.value_settling import Row
from rgap.constraints.known_input import Whole
from rgap.halt import HaltKind
from rgap.inversion import outcomes
from rgap.inversion.answer import Run, cast_of
from rgap.inversion.problem import Problem
from rgap.inversion.remainder import nearest, without_found
from rgap.inversion.symptoms import warnings
from rgap.inversion.top import head_cotangent
from rgap.inversion.weighed import named, weighed_at
from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.frontier import rounded
from rgap.jacobian.module_update import KnownFeatures
from rgap.limits import FITS, PASSES, REFUTED, SAFETY, USEFUL
from rgap.network.affine import Affine
from rgap.network.flow import Flow, flow_of
from rgap.precision import Estimate, carried
from rgap.progress import Progress
from rgap.recovery import Candidate, LayerReport, Recovery, Route, Status
from rgap.recursion.agreement import disagreement_of_values
from rgap.recursion.balance import disagreement_of_gradients
from rgap.recursion.graph import GraphDescent, descend_graph
from rgap.recursion.outputs import cotangents_at_output
from rgap.recursion.reached import Descent
from rgap.update.targets import CROSS_ENTROPY

__all__ = ["Branched", "below_branches", "by_gradients", "without_head"]

MEMBERS = 12  # of the ensemble that walks: each averages over all entries of a value
SPREAD = 0.25  # of a start of the search, in widths of the range


@dataclass(frozen=True)
class Branched:
    """What a network whose branches meet gives away below the place where its chain ends.

    Attributes:
        features: inputs of layers [B, *in_shape] that their own gradients determine, from the
            lowest layer up.
        recovery: ``EXACT`` where the data follow, else None.
        nearest: data that were found, send nearly the update and are not certified; or None.
        note: why they do not, or "".
        contradicted: True if the values of layers do not belong to one run of the network, so that
            none of them is certified, those that were read above included.
        refuted: name of a layer whose gradient is not that of the cotangents above it, beyond what
            errors explain: no batch sends this update; or "".
        lowest: the lowest input of a layer that is known whole, and through which every path from
            the data leads; None where there is none.
        near: such an input below it that a search ended at, not quite right, without a cotangent.
    """

    features: dict[str, Estimate] = field(default_factory=dict)
    recovery: Recovery | None = None
    nearest: Candidate | None = None
    note: str = ""
    contradicted: bool = False
    refuted: str = ""
    lowest: KnownFeatures | None = None
    near: KnownFeatures | None = None


def below_branches(
    problem: Problem, run: Run, certified: Container[str], show: Progress
) -> Branched | None:
    """None where the network is a chain, or no graph of calls that the walk knows.

    Args:
        problem: the update.
        run: that began at a fully connected layer and ended at a barrier, or before it.
        certified: names of the layers whose input it determined, of one sample.
        show: told which value is solved.
    """
    begun = _start(problem, run, certified)
    if begun is None:
        return None
    held = [stage.affine for stage in problem.chain.stages]
    flow = flow_of(problem.model, problem.chain.input_shape, held)
    if isinstance(flow, str):
        return None
    index, known, read = begun
    cut = _up_to(flow, problem.chain.stages[index].affine.name)
    if cut is None or not bool(known.known.all()):
        return None
    # A layer with one place is read as a matrix in the chain, as itself in the graph.
    few = Estimate(known.value, known.error[:MEMBERS]).shaped(cut.nodes[-1].shape)
    values = dict[int, Estimate]()
    if read is not None:
        [below] = cut.nodes[-1].sources
        few_read = Estimate(read.value, read.error[: len(few.error)])
        values[below] = few_read.shaped(cut.nodes[below].shape)
    return _descended(problem, flow, cut, few, values, run.descent, show)


def without_head(problem: Problem, show: Progress) -> Branched | str:
    """A batch that the head does not tell apart: by the masks above the highest convolution.

    Args:
        problem: the update, of a batch of stated size.
        show: told which value is solved.

    Returns:
        What follows from the cotangents at the output, or why these do not.
    """
    chain = problem.chain
    if problem.stated is None or not chain.stages or len(chain.output_shape) != 1:
        return "the batch size is not stated, or the output is no vector"
    flow = flow_of(problem.model, chain.input_shape, [stage.affine for stage in chain.stages])
    cut = None if isinstance(flow, str) else _up_to(flow, chain.stages[-1].affine.name)
    if isinstance(flow, str) or cut is None or len(cut.nodes[-1].shape) != 1:
        return "no graph of calls that is read leads to a fully connected last layer"
    show.stage("telling samples apart by shifts")
    own = replace(problem.precision, samples=MEMBERS)
    known = cotangents_at_output(cut, problem.gradients, own, problem.room)
    if isinstance(known, str):
        return known
    if _unbalanced(problem, known):
        return "cotangents of a softmax that do not sum to 0"
    if len(known.value) != problem.stated:
        return (
            f"shifts tell {len(known.value)} samples apart, batch_size={problem.stated}: copies, "
            "or another batch size"
        )
    return _descended(problem, flow, cut, known, {}, None, show)


def _unbalanced(problem: Problem, known: Estimate) -> bool:
    """True where cotangents of a cross-entropy at the logits do not sum to 0 in each sample."""
    chain, loss = problem.chain, problem.update.loss
    if loss.name != CROSS_ENTROPY or loss.own or chain.stages[-1].tail:
        return False
    sums, error = known.value.sum(1), known.error.sum(2)
    return float((sums.square() / error.square().mean(0)).mean().sqrt()) > FITS


def _up_to(flow: Flow, name: str) -> Flow | None:
    """The network up to one layer, or None if it is not called once."""
    tops = [place for place, node in enumerate(flow.nodes) if _is(node.link, name)]
    return Flow(flow.nodes[: tops[0] + 1], flow.name) if len(tops) == 1 else None


def _descended(
    problem: Problem,
    flow: Flow,
    cut: Flow,
    few: Estimate,
    values: dict[int, Estimate],
    descent: Descent | None,
    show: Progress,
) -> Branched:
    """Down from the cotangents at the end of ``cut``, and to the data if they follow."""

    def watch(name: str) -> None:
        show.stage(f"what '{name}' gives")

    own = problem.precision
    own = replace(own, samples=len(few.error), seed=own.seed + 1)  # draws unlike those of `few`
    told = descend_graph(
        cut,
        problem.gradients,
        few,
        own,
        watch,
        problem.room,
        GraphDescent(values),
        problem.deadline,
    )
    lone = disagreement_of_gradients(cut, told.values, told.cotangents, problem.gradients, own)
    if lone is not None:
        note = f"no features are certified: {lone.reason}"
        refuted = lone.layer if lone.share > REFUTED else ""
        return Branched(note=note, contradicted=True, refuted=refuted)
    if apart := disagreement_of_values(cut, told.values, own.unit):
        return Branched(note=f"no features are certified: {apart}", contradicted=True)
    features, lowest, about = _features(cut, told), _lowest(cut, told), _near(cut, told)
    unread = _unread(problem, flow)
    if problem.stated != len(few.value) or unread:
        return Branched(features, note=unread, lowest=lowest, near=about)

    def start(number: int) -> Tensor:
        spread = SPREAD if number else FAINT
        seed = problem.precision.seed + number
        return grey(problem.batch, flow.in_shape, problem.value_range, seed, spread)

    def looked_for(near: Mapping[int, Row | Tensor] | None = None) -> Preimage | Astray:
        gradients, clock = problem.gradients, problem.clock
        return preimage(cut, told, start, show.stage, clock, problem.room, gradients, near)

    found = looked_for()
    if isinstance(found, Astray) and found.found:
        show.stage("what is left without the samples that were found")
        rest = without_found(problem, cut, told, found, start, own, show.stage)
        found = found if rest is None else looked_for(rest)
    near: Mapping[int, Tensor]
    if isinstance(found, Astray):
        near = found.nearest
        note = f"the data do not follow from the features: {found.reason}"
    else:
        made = _certified(problem, flow, told, found, descent)
        if not isinstance(made, str):
            return Branched(features, made)
        near = dict(enumerate(found.data.value))
        note = f"data that give the features are not certified: {made}"
    near_data = nearest(problem, cut, told, near)
    return Branched(features, None, near_data, note, lowest=lowest, near=about)


def _start(
    problem: Problem, run: Run, certified: Container[str]
) -> tuple[int, Estimate, Estimate | None] | None:
    """The stage to begin at, the cotangent [B, *out_shape] at it, and its input where certified.

    None where no cotangent is known.
    """
    chain, descent = problem.chain, run.descent
    ended = None if descent.halt is None else descent.halt.kind
    if not chain.stages or (chain.complete and ended is not HaltKind.POOL):
        return None
    last = len(chain.stages) - 1
    if isinstance(run.kappa, BatchLoss):
        if bool((run.kappa.copies > 1).any()) or not descent.cotangents:
            return None
        index = max(descent.cotangents)
        known = descent.cotangents[index]
        return (index, known, None) if _weighs_as_declared(problem, index, known) else None
    if not problem.stated == problem.batch == 1:
        return None
    reached = [i for i in descent.features if chain.stages[i].name in certified]
    reached = [i for i in reached if i in descent.cotangents]
    if reached:
        index = min(reached)
        return index, descent.cotangents[index], descent.features[index]
    bias = chain.stages[last].affine.bias_name
    if last not in descent.cotangents and not problem.precision.sent(bias):
        return None
    return last, head_cotangent(problem, descent), None


def _weighs_as_declared(problem: Problem, index: int, k: Estimate) -> bool:
    """True where ∂b is ``Σ_b k_b``: samples with factors of their own would have scaled inputs."""
    bias, precision = problem.chain.stages[index].affine.bias_name, problem.precision
    if bias is None or not precision.sent(bias):
        return False
    sent = problem.gradients[bias]
    rows = k.value.reshape(len(k.value), len(sent), -1)
    moved = k.error.reshape(len(k.error), *rows.shape).sum((1, 3))
    own = precision.update_std(bias, rows.square().sum((0, 2)), rows.sum((0, 2)))
    gap = (rows.sum((0, 2)) - sent).square() / (own.square() + moved.square().mean(0))
    return float(gap.mean().sqrt()) <= FITS


def _is(link: object, name: str) -> bool:
    return isinstance(link, Affine) and link.name == name


def _unread(problem: Problem, flow: Flow) -> str:
    """Why no target would be read at the last layer, whatever the data, or ""."""
    loss, name = problem.update.loss, problem.chain.stages[-1].affine.name
    if loss.targets != "index" or loss.own or not loss.known:
        return (
            f"the data are not looked for below the features: targets {loss.targets!r} of "
            f"{loss.name} may be any, which absorbs what a replay would test"
        )
    if sum(_is(node.link, name) for node in flow.nodes) != 1:
        return f"the data are not looked for below the features: '{name}' is used more than once"
    return ""


def _features(flow: Flow, told: GraphDescent) -> dict[str, Estimate]:
    features = {}
    for place, value in sorted(told.values.items()):
        for user in flow.users(place):
            link = flow.nodes[user].link
            if isinstance(link, Affine):
                features[link.name] = value.shaped(link.in_shape)
    return features


def _lowest(flow: Flow, told: GraphDescent) -> KnownFeatures | None:
    """The lowest known value that a layer reads and every path from the data meets, and k there."""
    known = told.values.keys() & told.cotangents.keys() - told.ends.keys()
    read = _read(flow, known)
    if read is None:
        return None
    place, affine = read
    u, k = told.values[place].shaped(affine.in_shape), told.cotangents[place]
    whole = Whole(u.value, float(u.std.square().sum()))
    blur = float(k.std.norm()) / max(float(k.value.norm()), 1e-300)
    shape = tuple(u.value.shape)
    return KnownFeatures(affine.name, shape, whole, k.value.reshape(shape), blur)


def _near(flow: Flow, told: GraphDescent) -> KnownFeatures | None:
    """The lowest such value that a search ended at, if it is below those that are known."""
    read = _read(flow, told.near.keys() - told.values.keys())
    if read is None or read[0] > min(told.values, default=0):
        return None
    place, affine = read
    u = told.near[place].reshape(-1, *affine.in_shape)
    return KnownFeatures(affine.name, tuple(u.shape), Whole(u), torch.zeros_like(u))


def _read(flow: Flow, places: Set[int]) -> tuple[int, Affine] | None:
    """The lowest of some values that every path from the data meets, and a layer that reads it."""
    for place in sorted(places & set(flow.cuts()) - {0}):
        for user in flow.users(place):
            link = flow.nodes[user].link
            if isinstance(link, Affine) and not flow.nodes[user].shared:
                return place, link
    return None


def _certified(
    problem: Problem, flow: Flow, told: GraphDescent, found: Preimage, descent: Descent | None
) -> Recovery | str:
    """The data with their targets, if the model sends the update for them; or why not."""
    data = found.data
    bound = SAFETY * float(data.std.max()) * max(1.0, float(found.misfit.max()))
    own = cast_of(problem.precision) + PASSES * SAFETY * torch.finfo(torch.float64).eps
    bound += own * float(data.value.abs().max())
    if not bound <= USEFUL * problem.width:
        return f"an entry of theirs may be off by {bound:.2g}"
    if problem.excess(data.value, bound) > problem.slack:
        low, high = float(data.value.min()), float(data.value.max())
        return f"they reach from {low:.3g} to {high:.3g}, out of their range"
    affine = problem.chain.stages[-1].affine
    [top] = [place for place, node in enumerate(flow.nodes) if _is(node.link, affine.name)]
    below = Flow(flow.nodes[: flow.nodes[top].sources[0] + 1], flow.name)
    features = carried(below.forward, data)
    place = len(below.nodes) - 1
    own = rounded(below, place, features.value, problem.precision.unit)
    drawn = problem.precision.normal(torch.full_like(features.value, own), len(features.error))
    there = Estimate(features.value, features.error + drawn)
    read = weighed_at(problem, there.shaped(affine.in_shape))
    confirmed = read if isinstance(read, str) else named(problem, data, read)
    if isinstance(confirmed, str):
        return confirmed
    lowest = flow.nodes[min(told.values)].name
    return Recovery(
        inputs=data.value[confirmed.order],
        labels=confirmed.labels,
        status=Status.EXACT,
        layers=_reports(problem, flow, told, descent),
        residual=confirmed.replay.residual,
        predicted_error=data.error.square().flatten(2).mean((0, 2)).sqrt()[confirmed.order],
        error_bound=bound,
        reason=f"gradients determine the values of the network down to '{lowest}', these the data "
        f"({found.equations} that are not zero for {found.unknowns} unknowns of a sample), the "
        f"update is reproduced, no entry is off by more than {bound:.1e}, other data were "
        f"looked for and not found{confirmed.words}",
        certified=frozenset({"inputs", "targets"}),
        scale=confirmed.scale,
        warnings=warnings(problem),
    )


def _reports(
    problem: Problem, flow: Flow, told: GraphDescent, descent: Descent | None
) -> tuple[LayerReport, ...]:
    """One a layer, in forward order: by its own gradient, or by the values above it."""
    above = {report.layer: report for report in outcomes.layer_reports(problem, descent)}
    reports = []
    for node in flow.nodes:
        link = node.link
        if not isinstance(link, Affine):
            continue
        known = told.values.get(node.sources[0])
        report = above.get(link.name)
        if report is None or report.route is Route.NOT_REACHED:
            n = problem.batch * int(link.reads.sum())
            report = LayerReport(link.name, link.kind, n)
            values = replace(report, joint_rank=n, nullity=0, route=Route.VALUES)
            report = values if known is None else by_gradients(report, known)
        reports.append(report)
    return tuple(reports)


def by_gradients(report: LayerReport, known: Estimate) -> LayerReport:
    """The report of a layer whose input its own gradient determines."""
    n, error = report.unknowns, float(known.error.square().mean().sqrt())
    return replace(
        report, gradient_rank=n, joint_rank=n, nullity=0, route=Route.GRADIENT,
        predicted_error=error,
    )  # fmt: skip
