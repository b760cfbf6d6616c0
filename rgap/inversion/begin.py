"""Where a recursion begins: at the data, below a batch told apart, at a bias, at the head."""

from __future__ import annotations

from dataclasses import replace

from rgap.halt import Halt, HaltKind
from rgap.head.features import HeadFailure, solve_head
from rgap.head.mapped import Mapped
from rgap.inversion import outcomes
from rgap.inversion.answer import Run, families, of_labels
from rgap.inversion.batch_rows import batch_of, certified_rows, descended
from rgap.inversion.branches import Branched, without_head
from rgap.inversion.conclude import beside_branches, concluded, with_features
from rgap.inversion.factor import divided, remaining
from rgap.inversion.problem import Problem
from rgap.inversion.several import from_pair
from rgap.inversion.single import from_prefix
from rgap.inversion.top import from_bias, head_gradients
from rgap.network.activations import Activation
from rgap.network.prefix import find_pairs, find_prefix
from rgap.progress import Progress
from rgap.recovery import Recovery, Status
from rgap.separation.batch import Separated, Unseparated
from rgap.separation.route import separate, undetermined

__all__ = [
    "at_batch",
    "at_bias",
    "at_data",
    "at_head",
    "at_scaled_batch",
    "lowest_fully_connected",
    "over_positions",
]

REFINED = 3  # times that a factor on a batch is taken out of it


def at_data(problem: Problem, show: Progress) -> Recovery | None:
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
    if covered and not over_positions(problem):
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


def at_batch(problem: Problem, separated: Separated | Unseparated, show: Progress) -> Recovery:
    """B > 1: the samples were told apart at some stage; descend from there."""
    if isinstance(separated, Unseparated):
        status = Status.UNDERDETERMINED if separated.consistent else Status.INCONSISTENT
        halt = Halt(HaltKind.UNSEPARATED, "", separated.reason)
        branched = without_head(problem, show) if separated.consistent else ""
        if isinstance(branched, Branched) and branched.recovery is not None:
            return branched.recovery
        recovery = outcomes.stopped(problem, status, separated.reason, None, halt)
        if isinstance(branched, Branched):
            return beside_branches(problem, recovery, branched)
        return recovery
    if separated.others:
        return _among(problem, separated, show)
    return _told_apart(problem, separated, show)


def _among(problem: Problem, separated: Separated, show: Progress) -> Recovery:
    """Several batches satisfy the equations of one layer: the one that those below do not refute.

    Samples of one label differ to the head by the curvature of its softmax alone, so that turns of
    their differences fit it too.  What is left may not be all that fits: it refutes nothing.
    """
    batches = (separated, *separated.others)
    found = [_told_apart(problem, replace(one, others=()), show) for one in batches]
    alive = [recovery for recovery in found if not _contradicted(recovery)]
    if alive and all(_alike(alive[0], other) for other in alive[1:]):
        return alive[0]
    left = "several of them" if alive else f"none of them ({found[0].reason})"
    reason = (
        f"{len(batches)} different batches satisfy {separated.route}, and the layers below fit "
        f"{left}; samples of one label differ by the curvature of the softmax alone"
    )
    halt = Halt(HaltKind.UNSEPARATED, "", reason)
    return outcomes.stopped(problem, Status.UNDERDETERMINED, reason, None, halt)


def _contradicted(recovery: Recovery) -> bool:
    """True where layers below contradict these samples, also with an excuse: others need none."""
    halt = recovery.halt
    return recovery.status is Status.INCONSISTENT or (
        halt is not None and halt.kind is HaltKind.CONTRADICTION
    )


def _alike(one: Recovery, other: Recovery) -> bool:
    """True for two certified recoveries of the same batch, in any order."""
    if one.inputs is None or other.inputs is None or one.inputs.shape != other.inputs.shape:
        return False
    if one.status is not other.status or one.error_bound is None or other.error_bound is None:
        return False
    gaps = (one.inputs.flatten(1)[:, None] - other.inputs.flatten(1)[None]).abs().amax(2)
    return float(gaps.amin(1).max()) <= one.error_bound + other.error_bound


def _told_apart(problem: Problem, separated: Separated, show: Progress) -> Recovery:
    """From samples that are known at one stage."""
    problem, descent = descended(problem, separated, show.stage)
    recovery = concluded(problem, [Run(descent, separated.head)], show)
    if recovery.status is Status.INCONSISTENT and bool((separated.head.copies > 1).any()):
        # Copies are what the head cannot tell apart; the layers below may well see a difference.
        reason = (
            f"{separated.note}; taken as copies they contradict the layers below "
            f"({recovery.reason}): more likely they are different pictures, which the head cannot "
            "show"
        )
        recovery = replace(recovery, status=Status.UNDERDETERMINED, reason=reason)
    elif recovery.status is Status.INCONSISTENT and (
        why := separated.beside or undetermined(batch_of(problem), separated)
    ):
        reason = f"{recovery.reason}; which refutes none but these samples: {why}"
        recovery = replace(recovery, status=Status.UNDERDETERMINED, reason=reason)
    notes = (separated.note,) if separated.note else ()
    if separated.passed and recovery.inputs is None:
        reason = f"{separated.passed}; the batch was separated above: {recovery.reason}"
        recovery = replace(recovery, reason=reason)
    if recovery.inputs is None:
        recovery = with_features(recovery, certified_rows(problem, separated, descent))
    return replace(recovery, separation=separated.route, warnings=(*notes, *recovery.warnings))


def at_scaled_batch(problem: Problem, factor: float, show: Progress) -> Recovery | None:
    """A batch whose update is λ times the declared one: read as the update over λ.

    None where that contradicts it as well.
    """
    unit, moved = problem.precision.unit, list[float]()
    for _ in range(REFINED):
        own = divided(problem, factor)
        separated = separate(batch_of(own), show.stage)
        if isinstance(separated, Unseparated):
            return None
        left = remaining(own, separated)
        factor *= left
        moved.append(abs(left - 1.0))
        if moved[-1] <= unit:
            break
    # A step of Gauss-Newton after one below √u moves λ by rounding alone: so far it stays open.
    spread = max(m for m in moved if m * m <= unit or m == moved[-1])
    recovery = at_batch(divided(problem, factor, spread), separated, show)
    if recovery.status is Status.INCONSISTENT:
        return None
    said = f"{recovery.reason}; the update is {factor:.6g} times that of the declared loss"
    known = factor if recovery.inputs is not None else None
    return replace(recovery, scale=known, reason=said)


def at_bias(problem: Problem, index: int, show: Progress) -> Recovery:
    """B = 1: the bias attack at the lowest fully connected stage starts the recursion there."""
    stage = problem.chain.stages[index]
    show.stage(f"bias attack at {stage.name}")
    x, k, mixed = from_bias(problem, stage)
    if mixed:
        return outcomes.not_of_rank_one(problem, stage, mixed)
    descent = problem.descend(index, x, k, show.stage)
    return concluded(problem, [Run(descent, None)], show)


def at_head(problem: Problem, show: Progress) -> Recovery:
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
    return concluded(problem, runs, show)


def over_positions(problem: Problem) -> bool:
    """True for outputs [B, C, *positions] but those of one sample that a bias gradient reads."""
    chain = problem.chain
    if not chain.complete or len(chain.output_shape) < 2:
        return False
    read = isinstance(problem.update.loss, Mapped) and problem.stated in (None, 1)
    return not read or lowest_fully_connected(problem) is None


def lowest_fully_connected(problem: Problem) -> int | None:
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
