"""From a recursion that ended early to a batch that a prior completes, or to one that is exact."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite, prod

import torch
from torch import Tensor

from rgap.completion.complete import MISSED, complete, grey, inside
from rgap.completion.features import coarse
from rgap.constraints.known_input import Whole
from rgap.halt import Halt
from rgap.head.features import HeadCandidate
from rgap.head.target import read_target
from rgap.inversion import certificate, outcomes
from rgap.inversion.answer import answers_of, head_cotangent, top_features
from rgap.inversion.batch_rows import rows_of
from rgap.inversion.passing import suggested, unpooled
from rgap.inversion.problem import Problem
from rgap.inversion.replay import replayed
from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.module_update import ClientLoss, ModuleUpdate, watchable
from rgap.jacobian.smoothing import rounded
from rgap.matching.checkpoint import Progress as SearchProgress
from rgap.matching.search import match
from rgap.network.activations import Activation
from rgap.network.chain import Chain
from rgap.precision import Estimate
from rgap.progress import Progress
from rgap.recovery import Candidate, Recovery, Route, Status
from rgap.recursion.descend import Descent
from rgap.solvers.gauss_newton import Minimum, Step
from rgap.update.update import view

SURE, SHARE = 16, 0.01  # surplus of equations, also relative, from which a solution is the only one
SEARCHING = 0.6  # share of the time that winners of max-pools are searched for
COMPLETING = 0.2  # share of the rest for a completion over kinks, where all of a layer is known
MATCHING = 0.5  # share of the time for Gauss–Newton on the whole update, where there are kinks
SUGGESTED = "the prior, known features and directions of gradients, where Gauss–Newton is trapped"
NEAR = 12  # steps of a completion that a polish follows
ROUGH = 1e-2  # error, in widths of the range, that a completion is assumed to have before a polish
EDGE = 0.25  # share of entries at the edge of the value range that is worth a word


def filled(
    problem: Problem,
    descent: Descent,
    kappa: Estimate | BatchLoss | None,
    family: Sequence[HeadCandidate],
    show: Progress,
) -> Recovery:
    """Complete the batch below the stage at which the recursion ended.

    Where all equations together determine the data, though no stage alone does, the answer is
    polished on the whole update and certified like any other.  ``COMPLETED`` says that what the
    update determines is met; where no such batch was found the status is what it would be without
    a completion, and the nearest batch is the only one of ``candidates``.

    Args:
        problem: with its filling.
        descent: that ended early.
        kappa: the head's cotangent, or the loss of a batch.
        family: roots at the head that differ from the one descended from by a scale.
        show: told how far it is.
    """
    filling = problem.filling
    assert filling is not None
    deadline = filling.deadline
    chain = problem.chain
    halt = descent.require_halt()
    descent, near = unpooled(problem, descent, SEARCHING * filling.left, show)
    if descent.data is not None:
        return _passed(problem, descent, kappa, halt)
    halt = descent.require_halt()
    name = chain.stages[descent.reached.index].name
    shape = (problem.batch, *chain.input_shape)
    show.stage(f"completion below {name}")
    known = inside(chain, descent.reached, problem.gradients, problem.precision, problem.budget)
    if not watchable(problem.model, name):
        why = f"no completion: '{name}' is no module of the model, its input cannot be watched"
        return _without(problem, descent, f"{halt.reason}; {why}")
    update = ModuleUpdate(problem.model, problem.sent, known, shape)

    made = 0

    def watch(step: Step, _: Tensor) -> None:
        nonlocal made
        made += 1
        show.stage(f"completion below {name}, misfit {step.misfit:.1e}", made, series="complete")

    unknowns = prod(shape)
    surplus = update.equations - unknowns
    seed = problem.precision.seed
    start = grey(problem.batch, chain.input_shape, problem.value_range, seed).to(known.cotangent)
    left = max(deadline - time.perf_counter(), 0.0)
    share = COMPLETING if update.sharpness and isinstance(known.known, Whole) else 1.0
    schedule = replace(filling.schedule, seconds=share * left)
    sure = surplus >= max(SURE, SHARE * unknowns) and _followed(chain)
    if sure:  # the polish takes over once the solution is near
        schedule = replace(schedule, steps=min(schedule.steps, NEAR))
    found = complete(
        update, start, filling.prior, schedule, problem.value_range, problem.precision, watch=watch
    )
    if not isfinite(found.misfit):
        return _without(problem, descent, f"{halt.reason}; no completion: {found.ended}")
    low, high = problem.value_range or (0.0, 1.0)
    rough = problem.precision.normal(torch.full_like(found.value, ROUGH * (high - low)))
    reached = replace(descent, data=Estimate(found.value, rough), halt=None, completed=True)
    if sure:
        show.stage("polish on the whole update")
        recovery = certificate.certify(problem, answers_of(problem, reached, kappa, family))
        if recovery.status in (Status.EXACT, Status.AMBIGUOUS):
            return recovery
    inputs, labels = _samples(problem, reached, kappa, found.value)
    reason = _words(halt.reason, -surplus, unknowns, found)
    if found.misfit > MISSED:
        reason += _edges(problem, found.value)
        left = deadline - time.perf_counter()
        drawn = suggested(problem, descent, known, near, left) if update.sharpness else None
        if drawn is not None:
            inputs, _ = _samples(problem, reached, kappa, drawn)
            reason += f"; beyond it the one in candidates comes from {SUGGESTED}"
        residual = replayed(problem, inputs, labels)[0]
        nearest = Candidate(inputs, labels, residual)
        return replace(_without(problem, descent, reason), candidates=(nearest,))
    return outcomes.completed(problem, descent, inputs, labels, reason)


def _passed(
    problem: Problem, descent: Descent, kappa: Estimate | BatchLoss | None, halt: Halt
) -> Recovery:
    """The winners of every max-pool were found, and the stages determine the data."""
    inputs, labels = _samples(problem, descent, kappa, descent.require_data().value)
    found = outcomes.completed(
        problem,
        descent,
        inputs,
        labels,
        f"{halt.reason}; the winners of every max-pool were found by the equations of the layer "
        "below it, and with them every stage is determined",
    )
    assert found.residual is not None
    if found.residual**2 <= MISSED:
        return found
    nearest = Candidate(inputs, labels, found.residual)
    halted = replace(descent, data=None, halt=halt)
    return replace(_without(problem, halted, halt.reason), candidates=(nearest,))


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
        show.stage(f"matching, misfit {progress.best:.1e}", progress.number + 1, series="match")

    began = time.perf_counter()
    kinked = any(rounded(module) for module in problem.model.modules())
    seconds = filling.left
    try:
        found = match(
            problem.model,
            view(problem.update, loss=problem.declared, value_range=problem.value_range),
            labels=problem.labels,
            batch_size=problem.batch,
            prior=filling.prior,
            time_limit=MATCHING * seconds if kinked else seconds,
            noise=problem.precision.noise,
            callback=watch,
            device=problem.gradients.device,
            seed=problem.precision.seed,
        )
    except ValueError as error:  # labels, above all, that only a closed form would have found
        return replace(recovery, reason=f"{recovery.reason}; no search either: {error}")
    met = found.status is Status.COMPLETED
    reason, candidates = found.reason, found.candidates
    targets = found.nearest_labels
    if kinked and not met and targets is not None:
        shape = (problem.batch, *problem.chain.input_shape)
        drawn = coarse(
            problem.model, problem.sent, ClientLoss(problem.declared, targets), shape,
            filling.prior, problem.value_range, seconds + began - time.perf_counter(),
            seed=problem.precision.seed,
        )  # fmt: skip
        candidates = (Candidate(drawn, targets, replayed(problem, drawn, targets)[0]),)
        reason += f"; beyond it the one in candidates comes from {SUGGESTED}"
    return replace(
        recovery,
        inputs=found.inputs,
        labels=found.labels if met else recovery.labels,
        status=found.status if met else recovery.status,
        residual=found.residual,
        candidates=candidates,
        reason=f"{recovery.reason}; the whole update was matched instead: {reason}",
        warnings=(*recovery.warnings, *found.warnings),
    )


def _without(problem: Problem, descent: Descent, reason: str) -> Recovery:
    """The outcome where a completion gave nothing that could be returned."""
    supported = descent.require_halt().supported
    status = Status.UNDERDETERMINED if supported else Status.UNSUPPORTED
    return outcomes.stopped(problem, status, reason, descent)


def _samples(
    problem: Problem, descent: Descent, kappa: Estimate | BatchLoss | None, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Every sample with its label: copies counted by the loss of a batch, or one by one."""
    if isinstance(kappa, BatchLoss):
        return rows_of(kappa, problem.labels).expanded(value)
    return value, _label(problem, descent, kappa)


def _label(problem: Problem, descent: Descent, kappa: Estimate | None) -> Tensor:
    """The target whose cotangent is nearest to the head's."""
    if problem.labels is not None:
        return problem.labels
    known = head_cotangent(problem, descent) if kappa is None else kappa
    stage = problem.chain.stages[-1]
    features = top_features(problem.chain, descent.require_data())
    return read_target(stage, features, known, problem.update.loss, problem.precision).labels


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


def _words(why: str, missing: int, unknowns: int, found: Minimum) -> str:
    open_ = (
        f"at least {missing} of {unknowns} unknowns were chosen by the prior"
        if missing > 0
        else "what they leave open, or leave too badly conditioned, was chosen by the prior"
    )
    size, how = f"{found.misfit**0.5:.1e}", f"{len(found.steps)} steps: {found.ended}"
    if found.misfit > MISSED:
        return (
            f"{why}; a completion was tried and did not find a batch that reproduces the update: "
            f"the nearest, in candidates, has the normalised residual {size} ({how})"
        )
    return (
        f"{why}; with the layers below {open_}, and the answer reproduces the update to a "
        f"normalised residual of {size} ({how})"
    )
