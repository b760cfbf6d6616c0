"""From a recursion that ended early to a batch that a prior completes, or to one that is exact."""

from __future__ import annotations

import time
from dataclasses import replace
from math import inf, isfinite, prod

import torch
from torch import Tensor

from rgap.completion.complete import MISSED, beginning, blank_words, complete, grey, inside, met
from rgap.completion.features import Suggestion, coarse
from rgap.completion.max_pool import PooledStage, find_winners
from rgap.completion.value_uniqueness import paired
from rgap.completion.windows import confused_of_chain
from rgap.constraints.known_input import Whole
from rgap.halt import Halt
from rgap.head.target import read_target
from rgap.inversion import certificate, outcomes
from rgap.inversion.answer import Run, answers_of
from rgap.inversion.batch_rows import rows_of
from rgap.inversion.elsewhere import elsewhere
from rgap.inversion.problem import Problem
from rgap.inversion.replay import replayed
from rgap.inversion.top import head_cotangent, head_features
from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.module_update import ClientLoss, KnownFeatures, ModuleUpdate, watchable
from rgap.jacobian.smoothing import rounded
from rgap.limits import SURPLUS, SURPLUS_SHARE
from rgap.machine.allowance import Until, freely
from rgap.matching.checkpoint import Progress as SearchProgress
from rgap.matching.search import match
from rgap.network.activations import Activation
from rgap.network.chain import Chain
from rgap.network.reshape import Op
from rgap.precision import Estimate
from rgap.progress import Progress
from rgap.recovery import Candidate, Recovery, Route, Status
from rgap.recursion.reached import Descent
from rgap.solvers.gauss_newton import Minimum, Step
from rgap.update.update import view

SPARE = 3.0  # equations, in multiples of the unknowns, that a search for winners takes
SEARCHING = 0.2  # share of the time that winners of max-pools are searched for
FACTORING = 0.25  # share of what is left of a limit for the basis of what a layer says of its input
COMPLETING = 0.1  # share of the rest for a completion over kinks, where all of a layer is known
MATCHING = 0.3  # share of the time for Gauss–Newton on the whole update, where there are kinks
SUGGESTED = "the prior, known features and gradients one by one"
NEAR = 12  # steps of a completion that a polish follows
ROUGH = 1e-2  # error, in widths of the range, that a completion is assumed to have before a polish
EDGE = 0.25  # share of entries at the edge of the value range that is worth a word


def filled(
    problem: Problem,
    run: Run,
    show: Progress,
    below: KnownFeatures | None = None,
    near: KnownFeatures | None = None,
) -> Recovery:
    """Complete the batch below the stage at which the recursion ended.

    Where all equations together determine the data, though no stage alone does, the answer is
    polished on the whole update and certified like any other.  ``COMPLETED`` says that what the
    update determines is met; where no such batch was found the status is what it would be without
    a completion, and the nearest batch is the only one of ``candidates``.

    Args:
        problem: with its filling.
        run: a descent that ended early.
        show: told how far it is.
        below: features below that stage that are known all the same.
        near: features below these that a search ended at, not quite right.
    """
    filling, chain = problem.filling, problem.chain
    assert filling is not None
    if problem.left == inf:  # no limit for the equations, and the whole of its own for this
        filling = replace(filling, began=time.perf_counter())
        problem = replace(problem, filling=filling)
    halt, descent = run.descent.require_halt(), run.descent
    if below is None:
        descent = _unpooled(problem, descent, SEARCHING * filling.left, show)
        run = run._replace(descent=descent)
        if descent.data is not None:
            return _passed(problem, run, halt)
        halt = descent.require_halt()
    name = chain.stages[descent.reached.index].name if below is None else below.layer
    show.stage(f"completion below {name}")
    known = below or _inside(problem, descent)
    if not watchable(problem.model, name):
        why = f"no completion: '{name}' is no module of the model, its input cannot be watched"
        return _without(problem, descent, f"{halt.reason}; {why}")
    shape = (problem.batch, *chain.input_shape)
    update = ModuleUpdate(problem.model, problem.sent, known, shape, precision=problem.precision)
    unknowns = prod(shape)
    surplus = update.equations - unknowns
    frozen = (s.affine for s in chain.stages if not problem.precision.sent(s.affine.weight_name))
    confused = confused_of_chain(chain) or paired(frozen)
    enough = surplus >= max(SURPLUS, SURPLUS_SHARE * unknowns)
    sure = enough and _followed(chain) and not confused
    minimum = _completion(problem, update, known, sure, show)
    if not isfinite(minimum.misfit):
        return _without(problem, descent, f"{halt.reason}; no completion: {minimum.ended}")
    rough = problem.precision.normal(torch.full_like(minimum.value, ROUGH * problem.width))
    whole = replace(descent, data=Estimate(minimum.value, rough), halt=None, completed=True)
    reached = run._replace(descent=whole)
    if sure:
        show.stage("polish on the whole update")
        recovery = certificate.certify(problem, answers_of(problem, reached))
        if recovery.status in (Status.EXACT, Status.AMBIGUOUS):
            show.stage("the same entries in other places")
            return elsewhere(problem, reached, recovery)
    inputs, labels = _samples(problem, reached, minimum.value)
    nearest = _sending(problem, inputs, labels)
    # A tensor that was sent as zero has no norm to be measured by: it counts in the whole.
    misfit = max(minimum.misfit, nearest.residual**2)
    blank = grey(problem.batch, chain.input_shape, problem.value_range, 0).to(minimum.value)
    reproduced = met(update, misfit, nearest.residual, problem.precision, blank)
    reason = _words(filling.name, halt.reason, -surplus, unknowns, minimum, misfit, reproduced)
    if enough and confused:
        reason += f"; {confused}, others than the data send the same"
    if reproduced:
        return outcomes.completed(problem, descent, nearest, reason)
    source, edges = "that one", _edges(problem, minimum.value)
    if update.sharpness and isinstance(known.known, Whole):
        wanted = _wanted(problem, filling.left)
        drawn = coarse(problem.model, problem.sent, known, wanted, near)
        other = _sending(problem, _samples(problem, reached, drawn)[0], labels)
        if other.residual < nearest.residual:
            nearest, source, edges = other, f"one from {SUGGESTED}", ""
    reason += blank_words(update, problem.precision, blank)
    reason += f"; in candidates is {source}: its own update is off by {nearest.residual:.1e}{edges}"
    return replace(_without(problem, descent, reason), candidates=(nearest,))


def _inside(problem: Problem, descent: Descent) -> KnownFeatures:
    """What the recursion knows of the lowest stage that it reached."""
    place, left = str(problem.gradients.device), problem.left
    ahead = freely if left == inf else Until(time.perf_counter(), left, FACTORING, place)
    own, budget = problem.precision, problem.budget
    return inside(problem.chain, descent.reached, problem.gradients, own, budget, ahead)


def _completion(
    problem: Problem, update: ModuleUpdate, known: KnownFeatures, sure: bool, show: Progress
) -> Minimum:
    """From grey noise to what meets the update; where a polish takes over, only near to it."""
    filling, made = problem.filling, 0
    assert filling is not None

    def watch(step: Step, _: Tensor) -> None:
        nonlocal made
        made += 1
        said = f"misfit {step.misfit:.1e}"
        show.stage(f"completion below {known.layer}", made, series="complete", how=said)

    bounds, precision = problem.value_range, problem.precision
    start = grey(problem.batch, problem.chain.input_shape, bounds, precision.seed)
    share = COMPLETING if update.sharpness and isinstance(known.known, Whole) else 1.0
    schedule = replace(filling.schedule, seconds=share * filling.left)
    if sure:
        schedule = replace(schedule, steps=min(schedule.steps, NEAR))
    start = start.to(known.cotangent)
    given = None if filling.start is None else beginning(update, filling.start.to(start))
    minimum = complete(
        update, start if given is None else given, filling.prior, schedule, bounds, precision,
        watch=watch, blank=start,
    )  # fmt: skip
    if given is None or not (own := update.misfit(given)) < minimum.misfit:
        return minimum
    return replace(minimum, value=given, misfit=own, ended="the start is nearer than any step")


def _passed(problem: Problem, run: Run, halt: Halt) -> Recovery:
    """The winners of every max-pool were found, and the stages determine the data."""
    inputs, labels = _samples(problem, run, run.descent.require_data().value)
    batch = _sending(problem, inputs, labels)
    recovery = outcomes.completed(
        problem,
        run.descent,
        batch,
        f"{halt.reason}; the winners of every max-pool were found by the equations of the layer "
        "below it, and with them every stage is determined",
    )
    if batch.residual**2 <= MISSED:
        return recovery
    halted = replace(run.descent, data=None, halt=halt)
    return replace(_without(problem, halted, halt.reason), candidates=(batch,))


def _unpooled(problem: Problem, descent: Descent, seconds: float, show: Progress) -> Descent:
    """The descent through max-pools whose winners the layers below give away, as far as it goes.

    A pool counts as passed where the equations of the stage below it determine that stage and do
    not contradict each other, as with wrong winners they do.
    """
    deadline = time.perf_counter() + seconds

    def unpool(index: int, op: Op, u: Estimate, cot: Estimate) -> tuple[Estimate, Estimate] | None:
        if index != descent.reached.index:  # one at a time: what was passed before is kept
            return None
        show.stage(f"winners of {op.name}")
        return find_winners(
            problem.model,
            PooledStage(problem.chain, index, op, u, cot),
            problem.sent,
            deadline - time.perf_counter(),
            seed=problem.precision.seed,
            surplus=SPARE,
        )

    while (reached := descent.reached).u is not None and descent.halt is not None:
        fresh = problem.descend(reached.index, reached.u, reached.k, show.stage, unpool)
        if reached.index - 1 not in fresh.inputs or fresh.refuted:
            break
        descent = replace(
            fresh,
            solutions={**descent.solutions, **fresh.solutions},
            inputs={**descent.inputs, **fresh.inputs},
            cotangents={**descent.cotangents, **fresh.cotangents},
        )
    return descent


def _wanted(problem: Problem, seconds: float) -> Suggestion:
    """The batch that is suggested where none that meets the update was found."""
    shape, filling = (problem.batch, *problem.chain.input_shape), problem.filling
    assert filling is not None
    seed = problem.precision.seed
    return Suggestion(shape, filling.prior, problem.value_range, seconds, seed)


def searched(problem: Problem, recovery: Recovery, show: Progress) -> Recovery:
    """Match the whole update where a completion was asked for and no closed form began.

    The status of the recovery stays where the search does not meet the update either.

    Args:
        problem: with its filling.
        recovery: what the equations gave.
        show: told how far it is.
    """
    filling = problem.filling
    begun = any(report.route is not Route.NOT_REACHED for report in recovery.layers)
    held = recovery.nearest is not None or recovery.status is Status.INCONSISTENT
    if filling is None or begun or held or problem.stated is None:
        return recovery

    def watch(progress: SearchProgress) -> None:
        said = f"misfit {progress.best:.1e}"
        show.stage("matching", progress.number + 1, series="match", how=said)

    began = time.perf_counter()
    kinked = any(rounded(module) for module in problem.model.modules())
    seconds = filling.left
    try:
        matched = match(
            problem.model,
            view(problem.update, loss=problem.declared, value_range=problem.value_range),
            labels=problem.labels,
            batch_size=problem.batch,
            start=filling.start,
            prior=filling.prior,
            time_limit=MATCHING * seconds if kinked else seconds,
            noise=problem.precision.noise,
            callback=watch,
            device=problem.gradients.device,
            seed=problem.precision.seed,
        )
    except ValueError as error:  # labels, above all, that only a closed form would have found
        return replace(recovery, reason=f"{recovery.reason}; no search either: {error}")
    met = matched.status is Status.COMPLETED
    reason, candidates, residual = matched.reason, matched.candidates, matched.residual
    targets = matched.nearest_labels
    if kinked and not met and targets is not None:
        wanted = _wanted(problem, seconds + began - time.perf_counter())
        drawn = coarse(problem.model, problem.sent, ClientLoss(problem.declared, targets), wanted)
        other = _sending(problem, drawn, targets)
        if residual is None or other.residual < residual:
            candidates, residual = (other,), other.residual
            reason += f"; nearer, and in its place, is one from {SUGGESTED}: {residual:.1e}"
    return replace(
        recovery,
        inputs=matched.inputs,
        labels=matched.labels if met else recovery.labels,
        status=matched.status if met else recovery.status,
        residual=residual,
        candidates=candidates,
        reason=f"{recovery.reason}; the whole update was matched instead: {reason}",
        warnings=(*recovery.warnings, *matched.warnings),
    )


def _sending(problem: Problem, inputs: Tensor, labels: Tensor) -> Candidate:
    """A batch with how far its update is from the one that was sent."""
    return Candidate(inputs, labels, replayed(problem, inputs, labels)[0])


def _without(problem: Problem, descent: Descent, reason: str) -> Recovery:
    """The outcome where a completion gave nothing that could be returned."""
    supported = descent.require_halt().supported
    status = Status.UNDERDETERMINED if supported else Status.UNSUPPORTED
    return outcomes.stopped(problem, status, reason, descent)


def _samples(problem: Problem, run: Run, value: Tensor) -> tuple[Tensor, Tensor]:
    """Every sample with its label: copies counted by the loss of a batch, or one by one.

    Without stated labels the target is that whose cotangent is nearest to the head's.
    """
    descent, kappa = run.descent, run.kappa
    if isinstance(kappa, BatchLoss):
        return rows_of(kappa, problem.labels).expanded(value)
    if problem.labels is not None:
        return value, problem.labels
    known = head_cotangent(problem, descent) if kappa is None else kappa
    features = head_features(problem.chain, descent)
    stage = problem.chain.stages[-1]
    reading = read_target(stage, features, known, problem.update.loss, problem.precision)
    return value, reading.labels


def _followed(chain: Chain) -> bool:
    """True if every step of the network has a derivative that a polish can follow."""
    ops = [op for stage in chain.stages for op in (*stage.lead, *stage.tail)]
    return chain.complete and all(op.affine or isinstance(op, Activation) for op in ops)


def _edges(problem: Problem, value: Tensor) -> str:
    """A word on a value range that holds much of an answer that does not fit."""
    if problem.value_range is None:
        return ""
    low, high = problem.value_range
    share = float(((value <= low) | (value >= high)).double().mean())
    if share < EDGE:
        return ""
    return (
        f"; {share:.0%} of its entries are at the edge of [{low:g}, {high:g}]: is value_range so?"
    )


def _words(
    prior: str,
    why: str,
    missing: int,
    unknowns: int,
    minimum: Minimum,
    misfit: float,
    reproduced: bool,
) -> str:
    """Why there is a completion, and how near it came."""
    open_ = (
        f"at least {missing} of {unknowns} unknowns were chosen by {prior}"
        if missing > 0
        else f"what they leave open, or leave too badly conditioned, was chosen by {prior}"
    )
    size, how = f"{misfit**0.5:.1e}", f"{len(minimum.steps)} steps: {minimum.ended}"
    if not reproduced:
        return (
            f"{why}; a completion was tried and did not find a batch that reproduces the update: "
            f"the nearest of Gauss–Newton has the normalised residual {size} ({how})"
        )
    return (
        f"{why}; with the layers below {open_}, and the answer reproduces the update to a "
        f"normalised residual of {size} ({how})"
    )
