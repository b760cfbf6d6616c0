"""Recoveries that are no certificate: where the equations end, contradict, or are filled in.

A recovery that failed says first what a check finds wrong with the update, and of every layer what
the recursion did there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rgap.constraints.nullspace import null_directions
from rgap.constraints.ranks import weight_row_spaces
from rgap.diagnosis.finding import Kind
from rgap.diagnosis.ranking import check
from rgap.halt import Halt, HaltKind
from rgap.inversion.problem import Problem
from rgap.inversion.symptoms import compressed, warnings
from rgap.network.chain import Stage
from rgap.network.isolation import backward_hooks
from rgap.recovery import Candidate, LayerReport, Recovery, Route, Status
from rgap.recursion.reached import Descent
from rgap.update.update import view

# The cotangents of all targets of a head with two classes are parallel: any factor fits a mixture.
PARALLEL = 2
OPEN = (Kind.WEIGHTS, Kind.UNDECIDED)  # findings too weak to explain a batch not told apart
LIMIT = 10.0  # seconds after which no further trial of the check begins
REFUTES = frozenset(
    (
        Kind.SIGN,
        Kind.REDUCTION,
        Kind.ACCUMULATION,
        Kind.CLIPPING,
        Kind.SCALE,
        Kind.LOSS,
        Kind.MODE,
        Kind.STEPS,
        Kind.DECAY,
        Kind.BATCH_SIZE,
    )
)
"""Findings that contradict what was declared: no smaller batch would help."""
CHOSEN = (
    "a prior chose what the equations leave open: details of these pictures may be its own and not "
    "the client's; rgap.analysis.made_up says of every pixel how much is open"
)


def stopped(
    problem: Problem, status: Status, reason: str, descent: Descent | None, halt: Halt | None = None
) -> Recovery:
    """A recovery without inputs; of a compressed update the reason begins with the compression.

    Args:
        problem: that was solved.
        status: why there are no inputs.
        reason: the same in words.
        descent: as far as the recursion went, or None.
        halt: what ended it; by default what ended the descent.
    """
    if halt is None and descent is not None:
        halt = descent.halt
    looks = compressed(problem)
    if looks is not None:
        told = f"the update itself looks compressed, which no equation here models: {looks}"
        reason = f"{told}; {reason}"
    return Recovery(
        inputs=None,
        labels=problem.labels,
        status=status,
        layers=layer_reports(problem, descent),
        residual=None,
        predicted_error=None,
        error_bound=None,
        reason=reason,
        warnings=warnings(problem),
        halt=halt,
    )


def no_equations(problem: Problem) -> Recovery:
    """UNSUPPORTED: nothing is known of the loss, and no layer does without it."""
    return stopped(
        problem,
        Status.UNSUPPORTED,
        f"no equation covers the loss {problem.update.loss.name} with these options, and no fully "
        "connected layer with a bias that the data reach by a chain gives its input without it",
        None,
    )


def over_positions(problem: Problem) -> Recovery:
    """UNSUPPORTED: a target at every position of a map, with nothing that tells them apart."""
    chain = problem.chain
    last, shape = chain.stages[-1], list(chain.output_shape)
    if last.affine.geometry is not None:
        words = (
            f"the last layer '{last.name}' is a {last.affine.kind}, and the gradient of its "
            "kernel adds κ uᵀ up over all positions: the head equations need a fully connected "
            "layer, or one with a bias further down that gives its input; rgap.match searches for "
            "such data, and rgap.analysis.audit still measures every layer"
        )
    else:
        words = (
            f"the outputs are [B, {', '.join(map(str, shape))}] with a target at every position, "
            f"which is read for one sample and from a bias gradient: write batch_size=1 for an "
            "update of one sample; rgap.match searches for the others"
        )
    return stopped(problem, Status.UNSUPPORTED, words, None, Halt(HaltKind.HEAD, last.name, words))


def not_of_rank_one(problem: Problem, stage: Stage, words: str) -> Recovery:
    """INCONSISTENT: the gradient of one sample at a fully connected layer is k xᵀ, this one is not.

    Args:
        problem: of the chain that the recovery speaks of.
        stage: the layer.
        words: by how much.
    """
    return stopped(
        problem,
        Status.INCONSISTENT,
        f"the gradient of '{stage.name}' is not of rank one (relative {words}): it mixes several "
        "samples, does not come with this bias gradient, or has noise that was not stated",
        None,
        Halt.contradiction(stage.name),
    )


def contradiction(problem: Problem, descent: Descent) -> Recovery:
    """INCONSISTENT, naming the layer whose equations do not fit, where their errors allow that.

    Args:
        problem: the update.
        descent: of which some stage's equations contradict each other.
    """
    index, misfit = descent.worst
    stage = problem.chain.stages[index]
    relative = descent.solutions[index].solution.stats.residual
    return stopped(
        problem,
        Status.UNDERDETERMINED if descent.doubt else Status.INCONSISTENT,
        f"the gradient of '{stage.name}' contradicts the layers above it: residual "
        f"{misfit:.2g} standard errors (of its gradient constraints alone {relative:.1e} of the "
        "gradient); "
        f"{descent.doubt or 'is the update from another model, loss or precision?'}",
        descent,
        Halt.contradiction(stage.name),
    )


def outside(problem: Problem, descent: Descent, inputs: Tensor) -> Recovery:
    """INCONSISTENT: the update determines values that the stated range does not hold.

    Args:
        problem: with the range, and the chain from the data.
        descent: that reached them.
        inputs: as they are determined.
    """
    low, high = problem.value_range or (0.0, 1.0)
    return stopped(
        problem,
        Status.INCONSISTENT,
        f"the value_range [{low:g}, {high:g}] contradicts the update, which determines values in "
        f"[{float(inputs.min()):.3g}, {float(inputs.max()):.3g}]; write the range of the data as "
        "the network sees them",
        descent,
        Halt.contradiction(problem.chain.stages[0].name),
    )


def completed(problem: Problem, descent: Descent, batch: Candidate, reason: str) -> Recovery:
    """A batch of which a prior chose a part: no error is predicted, and none is bounded.

    Args:
        problem: with its filling.
        descent: as far as the equations went.
        batch: the whole of it, with its targets.
        reason: what the prior chose, in words.
    """
    recovery = stopped(problem, Status.COMPLETED, reason, descent)
    return replace(
        recovery,
        inputs=batch.inputs,
        labels=batch.labels,
        residual=batch.residual,
        warnings=(*recovery.warnings, CHOSEN),
    )


def explained(problem: Problem, recovery: Recovery) -> Recovery:
    """The recovery with the best finding at the front of its reason, and hooks named at its end.

    Args:
        problem: the update and its model.
        recovery: that failed, or did not; one that did not comes back as it is.
    """
    told = _found(problem, recovery)
    unsent = told.status is Status.UNDERDETERMINED and "inputs" in told.certified
    hooks = backward_hooks(problem.model)
    if not hooks or not (unsent or told.status is Status.INCONSISTENT):
        return told
    where = ", ".join(map(repr, hooks))
    words = f"backward hooks run on {where}: what they change in a gradient no equation knows"
    return replace(told, reason=f"{told.reason}; {words}")


def _found(problem: Problem, recovery: Recovery) -> Recovery:
    """The recovery with what a check finds.

    Where the equations contradict the update, and where a batch was not told apart: a sum that is
    declared as a mean looks like a batch without a solution.  Not where a limit of time is over.

    Args:
        problem: the update and its model, on which the trials of a check run.
        recovery: that failed, or did not; one that did not comes back as it is.
    """
    contradicted = recovery.status is Status.INCONSISTENT
    apart = recovery.status is Status.UNDERDETERMINED and (problem.stated or 1) > 1
    untold = recovery.halt is not None and recovery.halt.kind is HaltKind.UNSEPARATED
    if not contradicted and not (apart and (recovery.inputs is None or untold)):
        return recovery
    if problem.left == 0.0:
        return recovery
    outputs = problem.chain.output_shape
    if not contradicted and (not outputs or outputs[-1] <= PARALLEL):
        return recovery
    tried = check(
        problem.model,
        view(problem.update, loss=problem.declared),
        batch_size=problem.stated,
        labels=problem.labels,
        noise=problem.precision.noise,
        seed=problem.precision.seed,
        time_limit=min(LIMIT, problem.left),
    )
    best = tried.best
    if best is None and contradicted:
        reason = f"{recovery.reason}; no trial of a check explains it"
        if "inputs" in recovery.certified and Kind.LOSS in tried.untested:  # without any loss
            causes = sorted(tried.untested, key=lambda kind: kind is not Kind.LOSS)
            reason += f", and none could test: {', '.join(causes)}"
        return replace(recovery, reason=reason)
    if best is None or best.kind is Kind.COMPRESSION or (best.kind in OPEN and apart):
        return recovery
    told = replace(recovery, reason=f"{best.sentence}; {recovery.reason}")
    if best.kind not in REFUTES:
        return told
    return replace(told, status=Status.INCONSISTENT, features={}, features_error={})


def layer_reports(problem: Problem, descent: Descent | None) -> tuple[LayerReport, ...]:
    """What the recursion did at every stage, or that it did not reach it, in forward order."""
    return tuple(_report(problem, descent, stage) for stage in problem.chain.stages)


def _report(problem: Problem, descent: Descent | None, stage: Stage) -> LayerReport:
    affine, batch = stage.affine, problem.batch
    read = int(affine.reads.sum())
    unread = batch * (affine.reads.numel() - read)
    step = None if descent is None else descent.solutions.get(stage.index)
    halt = None if descent is None else descent.halt
    note = halt.reason if halt is not None and halt.stage == stage.name else ""

    def weight_rank() -> int:
        active = affine.weight.new_ones(batch, *affine.out_shape, dtype=torch.bool)
        spaces = weight_row_spaces(affine, active if step is None else step.active)
        return sum(space.rank.rank for space in spaces)

    def null_space(count: int) -> Tensor:
        joint = None if step is None else step.solution.stats.joint
        nullity = count if joint is None else joint.nullity + unread
        if step is None or nullity == 0:
            return affine.weight.new_empty(0, batch, *affine.in_shape)
        return null_directions(affine, step.cotangent, step.active, nullity, count)

    report = LayerReport(
        stage.name, affine.kind, batch * read, note=note, unread=unread, _weight_rank=weight_rank
    )
    if descent is None or (step is None and stage.index not in descent.cotangents):
        return report
    known = descent.features.get(stage.index)
    predicted = None if known is None else float(known.error.square().mean().sqrt())
    if step is None:  # where the recursion started: all of u was read off the gradient
        route = Route.HEAD_EQUATIONS if affine.bias_name is None else Route.BIAS_ATTACK
        return report.read_off(route, null_space, predicted)
    return report.solved(step.solution.stats, step.seconds, null_space, predicted)
