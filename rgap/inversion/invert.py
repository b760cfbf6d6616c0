"""The one way through the house: update → head → recursion → polish → certificate → Recovery."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.completion.complete import PriorSchedule
from rgap.halt import Halt, HaltKind
from rgap.head.features import HeadFailure, solve_head
from rgap.head.mapped import Mapped
from rgap.inversion import certificate, outcomes, parts
from rgap.inversion.answer import Run, answers_of, families, head_gradients, of_labels
from rgap.inversion.batch_rows import BatchRows, batch_of, descended
from rgap.inversion.batch_size import counted
from rgap.inversion.factor import divided, remaining
from rgap.inversion.fallback import filled, searched
from rgap.inversion.problem import Problem, prepare
from rgap.inversion.several import beside_targets, from_pair
from rgap.inversion.single import certified_features, from_bias, from_prefix
from rgap.network.activations import Activation
from rgap.network.prefix import find_pairs, find_prefix
from rgap.precision import Estimate
from rgap.progress import Progress, Shown
from rgap.recovery import Recovery, Route, Status
from rgap.recursion.reached import Descent
from rgap.separation.batch import Separated, Unseparated
from rgap.separation.route import mixed, separate
from rgap.solvers.priors import Prior
from rgap.update.preflight import ClientView
from rgap.update.update import Update

log = logging.getLogger(__name__)

REFINED = 3  # times that a factor on a batch is taken out of it


@dataclass(frozen=True)
class Head:
    """Known features of the last layer, for studies that start below the head.

    Attributes:
        features: input of the last affine map, [B, n].
        cotangents: k at its output, [B, m].
    """

    features: Tensor
    cotangents: Tensor


def invert(
    model: nn.Module,
    update: Update,
    *,
    labels: Tensor | None = None,
    batch_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    head: Head | None = None,
    complete: bool = False,
    prior: Prior | str | None = None,
    value_range: tuple[float, float] | None = None,
    noise: float = 0.0,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Shown = False,
    memory_budget: float | None = None,
    time_limit: float = 60.0,
) -> Recovery:
    """Recover from an update what its equations determine, and certify it.

    The head gives features and label of a single sample (B = 1); the samples of a batch are told
    apart below two fully connected layers or at a softmax head, whatever their labels.  The
    recursion solves one linear system a stage down to the data, Gauss–Newton on the whole update
    polishes, a replay through the model certifies.  The model is left as it was found.

    Args:
        model: the network that the update was computed on, in eval mode.
        update: what the client sent.
        labels: the labels if they are known, [B]; found from the update otherwise.
        batch_size: overrides ``update.batch_size``; where neither says it, it is found.
        input_shape: shape of one sample, where the update does not state it, or states another;
            not needed where the layers fix it (a fully connected first layer, a convolution below
            a fully connected one that only one square size fits).
        head: known head features, to study the recursion of a batch below the head.
        complete: go on where the recursion ends: what the equations leave open below is chosen
            by the prior (``COMPLETED``), or found to be determined by all of them together.  Where
            no closed form begins, the whole update is matched (:func:`rgap.match`).
        prior: of a completion, or its name in :data:`rgap.priors.PRIORS`; by default "natural":
            that of pictures, for inputs without neighbours the distance from the middle.
        value_range: range of the data.  Candidates that leave it by more than their error are
            refuted; the range that the update declares, the default, refutes only those that
            leave it by more than its full width.
        noise: standard deviation of noise added to every entry of the update.
        device: where to compute; default the CPU.
        seed: of the sampled errors; the global random state is not touched.
        progress: True for a line on a terminal, or a function that is told; see
            :mod:`rgap.progress`.
        memory_budget: bytes to take on top of model and update; by default half of what the
            machine has free.  A layer whose equations need more is solved without forming any
            matrix, by LSMR (by default from 4 GB on, beyond which that is faster); what fits no
            budget is refused before it is allocated.
        time_limit: seconds of the whole call after which a completion begins no further step; the
            polish of an answer that all equations determine comes on top.

    Returns:
        A :class:`Recovery`; its ``status`` and ``reason`` say how far the update determines the
        batch, and ``explain()`` says it layer by layer.  The order of a batch is not in its
        gradient: rows come by label, or in the order of stated labels.

    Raises:
        ValueError: the update does not belong to a model of this shape, the input shape is
            unknown, labels are out of range, the model is in train mode, or the budget is too
            small (:class:`rgap.memory.OutOfMemory`, which says for what).

    >>> import rgap, torch
    >>> model = rgap.models.lenet(seed=0)
    >>> picture = rgap.photos.load(count=1, dtype=torch.float32)
    >>> update = rgap.capture(model, picture, torch.tensor([3]))
    >>> recovery = rgap.invert(model, update)
    >>> recovery.status.name, recovery.labels.tolist()
    ('EXACT', [3])
    """
    began = time.perf_counter()
    validation.seconds("time_limit", time_limit)
    if head is not None and not isinstance(head, Head):
        raise TypeError(
            f"head: expected a Head, got {head!r}; write "
            "rgap.Head(features, cotangents), or head=None to have it read off the update"
        )
    client = ClientView.of(
        model, update, batch_size=batch_size, labels=labels, input_shape=input_shape, noise=noise,
        device=device, ready=False,
    )  # fmt: skip
    problem = prepare(client, value_range, validation.seed(seed), memory_budget)
    if complete:
        filling = PriorSchedule.of(
            prior, time_limit, problem.chain.input_shape, problem.value_range, began
        )
        problem = replace(problem, filling=filling)
    with Progress(progress) as show:
        recovery = _run(problem, head, show)
        recovery = counted(problem, recovery) if head is None else recovery
        recovery = searched(problem, recovery, show)
        recovery = outcomes.explained(problem, recovery) if head is None else recovery
    return replace(recovery, seconds=time.perf_counter() - began)


def _run(problem: Problem, head: Head | None, show: Progress) -> Recovery:
    chain = problem.chain
    if head is None and (early := _from_data(problem, show)) is not None:
        return early
    if problem.unready:
        raise ValueError(problem.unready)
    if not chain.stages:
        assert chain.barrier is not None
        words = chain.barrier.words
        halt = Halt(HaltKind.BARRIER, chain.barrier.node, words)
        return outcomes.stopped(problem, Status.UNSUPPORTED, words, None, halt)
    if head is not None:
        show.stage("recursion from the given head")
        top = chain.stages[-1].affine
        x = _given("features", head.features, top.in_shape, problem)
        kappa = _given("cotangents", head.cotangents, top.out_shape, problem)
        descent = problem.descend(len(chain.stages) - 1, x, kappa, show.stage)
        recovery = _conclude(problem, [Run(descent, kappa)], show)
        *below, last = recovery.layers
        return replace(recovery, layers=(*below, replace(last, route=Route.GIVEN)))
    lowest = _lowest_fully_connected(problem)
    if _over_positions(problem):
        return outcomes.over_positions(problem)
    if problem.stated != 1 and not isinstance(problem.update.loss, Mapped):
        separated = separate(batch_of(problem), show.stage)
        # One sample of a batch of unknown size has routes of its own where this one has none.
        single = problem.stated is None and not mixed(batch_of(problem))
        if not (single and isinstance(separated, Unseparated)):
            recovery = _from_batch(problem, separated, show)
            if isinstance(separated, Unseparated) and separated.factor is not None:
                recovery = _divided(problem, separated.factor, show) or recovery
            return beside_targets(problem, recovery, show)
    if not problem.update.loss.equations:
        return outcomes.no_equations(problem)
    if lowest is not None:
        return _from_bias(problem, lowest, show)
    return _from_head(problem, show)


def _from_data(problem: Problem, show: Progress) -> Recovery | None:
    """Where the network is no chain, or its loss unknown: what the chain at the data determines.

    None where the equations of the whole network apply, or no such chain is there.
    """
    chain, loss = problem.chain, problem.update.loss
    followed = all(
        op.affine or isinstance(op, Activation)
        for stage in chain.stages
        for op in (*stage.lead, *stage.tail)
    )
    covered = chain.complete and loss.equations and followed
    covered = covered and chain.stages[-1].affine.geometry is None
    if covered and not _over_positions(problem):
        return None
    show.stage("reading the network from the data up")
    above = "above it no equation of the loss is needed"
    if chain.barrier is not None:
        barrier = chain.barrier
        above = f"above it: '{barrier.node}' ({barrier.kind}): {barrier.reason}"
    held = [stage.affine for stage in chain.stages]
    if problem.stated in (None, 1):
        prefix = find_prefix(problem.model, chain.input_shape, problem.sent, held)
        recovery = None if prefix is None else from_prefix(problem, prefix, above, show)
        if recovery is not None or problem.stated == 1:
            return recovery
    for pair in find_pairs(problem.model, chain.input_shape, problem.sent, held):
        recovery = from_pair(problem, pair, above, show)
        if recovery is not None:
            return recovery
    return None


def _divided(problem: Problem, factor: float, show: Progress) -> Recovery | None:
    """A batch whose update is λ times the declared one: read as the update over λ.

    None where that contradicts it as well.
    """
    for _ in range(REFINED):
        own = divided(problem, factor)
        separated = separate(batch_of(own), show.stage)
        if isinstance(separated, Unseparated):
            return None
        left = remaining(own, separated)
        factor *= left
        if abs(left - 1.0) <= problem.precision.unit:
            break
    recovery = _from_batch(divided(problem, factor), separated, show)
    if recovery.status is Status.INCONSISTENT:
        return None
    said = f"{recovery.reason}; the update is {factor:.6g} times that of the declared loss"
    known = factor if recovery.inputs is not None else None
    return replace(recovery, scale=known, reason=said)


def _from_batch(problem: Problem, separated: Separated | Unseparated, show: Progress) -> Recovery:
    """B > 1: the samples were told apart at some stage; descend from there."""
    if isinstance(separated, Unseparated):
        status = Status.UNDERDETERMINED if separated.consistent else Status.INCONSISTENT
        halt = Halt(HaltKind.UNSEPARATED, "", separated.reason)
        return outcomes.stopped(problem, status, separated.reason, None, halt)
    problem, descent = descended(problem, separated, show.stage)
    recovery = _conclude(problem, [Run(descent, separated.head)], show)
    if recovery.status is Status.INCONSISTENT and bool((separated.head.copies > 1).any()):
        # Copies are what the head cannot tell apart; the layers below may well see a difference.
        reason = (
            f"{separated.note}; taken as copies they contradict the layers below "
            f"({recovery.reason}): more likely they are different pictures, which the head cannot "
            "show"
        )
        recovery = replace(recovery, status=Status.UNDERDETERMINED, reason=reason)
    notes = (separated.note,) if separated.note else ()
    if separated.passed and recovery.inputs is None:
        reason = f"{separated.passed}; the batch was separated above: {recovery.reason}"
        recovery = replace(recovery, reason=reason)
    return replace(recovery, separation=separated.route, warnings=(*notes, *recovery.warnings))


def _from_bias(problem: Problem, index: int, show: Progress) -> Recovery:
    """B = 1: the bias attack at the lowest fully connected stage starts the recursion there."""
    stage = problem.chain.stages[index]
    show.stage(f"bias attack at {stage.name}")
    x, k, mixed = from_bias(problem, stage)
    if mixed:
        return outcomes.not_of_rank_one(problem, stage, mixed)
    descent = problem.descend(index, x, k, show.stage)
    return _conclude(problem, [Run(descent, None)], show)


def _from_head(problem: Problem, show: Progress) -> Recovery:
    """B = 1, no fully connected stage with a bias: the loss fixes the scale of the features."""
    chain = problem.chain
    index = len(chain.stages) - 1
    stage = chain.stages[index]
    if stage.affine.geometry is not None:
        return outcomes.over_positions(problem)
    if not problem.precision.sent(stage.affine.weight_name):
        return outcomes.stopped(
            problem,
            Status.UNDERDETERMINED,
            f"the gradient of the last layer '{stage.name}' was not sent (frozen on the client): "
            "nothing says where the recursion could begin; ask the client to train that layer too",
            None,
        )
    show.stage(f"head equations at {stage.name}")
    weight, bias = head_gradients(stage, problem)
    roots = solve_head(stage, weight, bias, problem.update.loss, problem.precision)
    if isinstance(roots, HeadFailure):
        status = Status.UNDERDETERMINED if roots.consistent else Status.INCONSISTENT
        kind = HaltKind.HEAD if roots.consistent else HaltKind.CONTRADICTION
        halt = Halt(kind, stage.name, roots.reason)
        return outcomes.stopped(problem, status, roots.reason, None, halt)
    runs: list[Run] = []
    for family in families(of_labels(roots, problem.labels), chain):
        first = family[0]
        descent = problem.descend(index, first.features, first.cotangent, show.stage)
        runs.append(Run(descent, first.cotangent, family))
    return _conclude(problem, runs, show)


def _conclude(problem: Problem, runs: list[Run], show: Progress) -> Recovery:
    """Refute candidates, polish what is left, certify."""
    if not runs:
        words = "the stated labels contradict the head's gradient"
        halt = Halt(HaltKind.CONTRADICTION, problem.chain.stages[-1].name, words)
        return outcomes.stopped(problem, Status.INCONSISTENT, words, None, halt)
    alive = [run for run in runs if not run.descent.refuted]
    if not alive:
        descents = (run.descent for run in runs)
        return outcomes.contradiction(problem, min(descents, key=lambda d: d.worst[1]))
    reached = [run for run in alive if run.descent.data is not None]
    if not reached:
        return _ended_early(problem, alive, show)
    show.stage("polish on the whole update")
    answers = [answer for run in reached for answer in answers_of(problem, run)]
    recovery = certificate.certify(problem, answers)
    unsettled = [run.descent.require_halt() for run in alive if run.descent.data is None]
    if recovery.status is Status.EXACT and unsettled:
        return outcomes.stopped(
            problem,
            Status.UNDERDETERMINED,
            f"one answer reproduces the update, but another root at the head is not refuted: its "
            f"recursion stops at '{unsettled[0].stage}' ({unsettled[0].reason})",
            reached[0].descent,
            unsettled[0],
        )
    return recovery


def _ended_early(problem: Problem, runs: Sequence[Run], show: Progress) -> Recovery:
    """No recursion reached the data: what is determined of them, or what a prior completes."""
    run, alone = runs[0], len(runs) == 1
    descent = run.descent
    halt = descent.require_halt()
    if alone and (problem.filling is None or parts.free(problem, descent)):

        def certify(whole: Descent) -> tuple[Recovery, BatchRows | None]:
            [answer] = answers_of(problem, Run(whole, run.kappa))
            return certificate.certify(problem, [answer]), answer.rows

        partly = parts.in_parts(problem, descent, certify)
        if partly is not None and problem.filling is None:
            return partly
        if partly is not None and partly.labels is not None and partly.partial is not None:
            return parts.completed(problem, partly)
    if problem.filling is not None and alone:
        return filled(problem, run, show)
    reason = halt.reason
    if problem.filling is not None:
        reason += f"; no completion: {len(runs)} roots at the head are open, each needs its own"
    status = Status.UNDERDETERMINED if halt.supported else Status.UNSUPPORTED
    recovery = outcomes.stopped(problem, status, reason, descent)
    single = alone and problem.batch == 1 and not run.family
    return _with_features(problem, recovery, descent) if single else recovery


def _with_features(problem: Problem, recovery: Recovery, descent: Descent) -> Recovery:
    """What the bias attack and the recursion certified above the place where it ended."""
    features, doubt = certified_features(problem, descent)
    notes = (f"no features are certified: {doubt}",) if doubt else ()
    return replace(recovery, features=features, warnings=(*recovery.warnings, *notes))


def _given(name: str, value: Tensor, shape: tuple[int, ...], problem: Problem) -> Estimate:
    """A given value, known to the precision of the client's arithmetic."""
    if value.ndim < 2 or len(value) != problem.batch or value[0].numel() != prod(shape):
        raise ValueError(
            f"expected head.{name} of shape {[problem.batch, *shape]}, got {list(value.shape)}; "
            f"write rgap.Head(features, cotangents) with the input of the last layer and the "
            "cotangent at its output, one row per sample"
        )
    value = value.detach().to(problem.chain.stages[-1].affine.weight).reshape(-1, *shape)
    return Estimate(value, problem.precision.rounding(value))


def _over_positions(problem: Problem) -> bool:
    """True for outputs [B, C, *positions] but those of one sample that a bias gradient reads."""
    chain = problem.chain
    if not chain.complete or len(chain.output_shape) < 2:
        return False
    read = isinstance(problem.update.loss, Mapped) and problem.stated in (None, 1)
    return not read or _lowest_fully_connected(problem) is None


def _lowest_fully_connected(problem: Problem) -> int | None:
    """Index of the lowest fully connected stage whose bias gradient carries its input."""
    for stage in problem.chain.stages:
        name, sent = stage.affine.bias_name, problem.precision.sent
        if (
            stage.affine.geometry is None
            and name is not None
            and sent(name)
            and sent(stage.affine.weight_name)
            and bool((problem.gradients[name] != 0).any())
        ):
            return stage.index
    return None
