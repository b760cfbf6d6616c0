"""B > 1: the inputs of a batch at two fully connected layers, whatever stands above them."""

from __future__ import annotations

from dataclasses import replace

import torch

from rgap.halt import HaltKind
from rgap.head.target import Reading
from rgap.inversion import certificate, outcomes, verdict
from rgap.inversion.answer import Answer, cast_of, gathered, polished_from
from rgap.inversion.backing import of_replay
from rgap.inversion.batch_rows import BatchRows, batch_of, descended
from rgap.inversion.parts import in_parts
from rgap.inversion.problem import Problem
from rgap.inversion.weighed import named, weighed
from rgap.limits import FITS
from rgap.network.chain import Chain, Stage
from rgap.network.prefix import find_pairs
from rgap.progress import Progress
from rgap.recovery import Recovery, Status
from rgap.recursion.reached import Descent
from rgap.separation.batch import Separated, Unseparated
from rgap.separation.headless import separate_headless

__all__ = ["beside_targets", "from_pair"]


def from_pair(problem: Problem, chain: Chain, above: str, show: Progress) -> Recovery | None:
    """The inputs of a batch, where a pair of layers below everything else separates it.

    Args:
        problem: the update and its model.
        chain: from the data to two fully connected layers in a row.
        above: why no equation covers what stands above them, in words.
        show: told how far it is.

    Returns:
        ``UNDERDETERMINED`` with the inputs certified, alone or in parts; None where the pair does
        not separate the batch or the layers below do not follow.
    """
    own = replace(problem, chain=chain)
    separated = separate_headless(batch_of(own), show.stage)
    if isinstance(separated, Unseparated):
        return None
    own, descent = descended(own, separated, show.stage)
    if descent.refuted:
        return None

    def certified(whole: Descent) -> tuple[Recovery, BatchRows | None]:
        return _certified(own, whole, separated, above, show)[0], None

    if descent.data is not None:
        recovery, answer = _certified(own, descent, separated, above, show)
        if answer is not None and "inputs" in recovery.certified:
            recovery = _named(problem, separated.stage, recovery, answer)
    else:
        parts = in_parts(own, descent, certified)
        if parts is None:
            return None
        recovery = parts
    return replace(recovery, separation=separated.route)


def beside_targets(problem: Problem, recovery: Recovery, show: Progress) -> Recovery:
    """The inputs beside a failure of the targets: two layers tell samples apart without a loss.

    A factor, a sum for a mean, other weights of the samples or targets that no equation finds leave
    the ranges of the two gradients as they are.

    Args:
        problem: the update and its model.
        recovery: of a batch; comes back as it is unless its targets failed.
        show: told how far it is.
    """
    untold = recovery.halt is not None and recovery.halt.kind is HaltKind.UNSEPARATED
    open_targets = untold or recovery.status is Status.INCONSISTENT
    if problem.stated is None or recovery.inputs is not None or not open_targets:
        return recovery
    held = [stage.affine for stage in problem.chain.stages]
    for pair in find_pairs(problem.model, problem.chain.input_shape, problem.sent, held):
        alone = from_pair(problem, pair, recovery.reason, show)
        if alone is not None and "inputs" in alone.certified:
            if alone.status is Status.EXACT:
                return alone
            return replace(alone, status=recovery.status, halt=recovery.halt)
    return recovery


def _named(problem: Problem, stage: Stage, recovery: Recovery, answer: Answer) -> Recovery:
    """The certified inputs with targets and factors, where the last layer gives them.

    Args:
        problem: with the whole network.
        stage: the layer off whose gradient the samples were read.
        recovery: of the inputs alone.
        answer: those inputs with their errors.
    """
    data = answer.polished.data
    if len(data.value) != problem.stated:
        return recovery
    read = weighed(problem, data)
    if isinstance(read, str):
        return replace(recovery, reason=f"{recovery.reason}; {read}")
    told = named(problem, data, read)
    if isinstance(told, str):
        return replace(recovery, reason=f"{recovery.reason}; {told}")
    assert recovery.inputs is not None
    order = told.order
    scaled = of_replay(problem, stage, data.value[order], told.labels, told.scale)
    answer = replace(answer, scaled=scaled)
    status, why = verdict.verdict(problem, answer)
    if status is not Status.EXACT:
        return replace(recovery, reason=f"{recovery.reason}; {why}")
    return replace(
        recovery,
        error_bound=answer.bound,
        inputs=recovery.inputs[told.order],
        labels=told.labels,
        status=Status.EXACT,
        certified=frozenset({"inputs", "targets"}),
        scale=told.scale,
        residual=told.replay.residual,
        predicted_error=None
        if recovery.predicted_error is None
        else recovery.predicted_error[told.order],
        reason=f"every sample is determined at two layers, its target at the last one, the update "
        f"is reproduced, no entry is off by more than {answer.bound:.1e}{told.words}",
    )


def _certified(
    own: Problem, descent: Descent, separated: Separated, above: str, show: Progress
) -> tuple[Recovery, Answer | None]:
    """The verdict on the inputs, and the answer that it is on; None where they are not shown."""
    show.stage("polish on the two layers and those below")
    polished = polished_from(own, descent, separated.head)
    rows, place = len(polished.data.value), polished.data.value.device
    none = torch.zeros(rows, device=place)
    answer = Answer(
        descent, polished, Reading(none[:0], none, 0.0, 0.0),
        BatchRows(torch.arange(rows, device=place), none, torch.ones_like(none, dtype=torch.long)),
        gathered=gathered(own.chain, polished), cast=cast_of(own.precision),
    )  # fmt: skip
    outside = own.excess(answer.inputs, answer.bound) > own.slack
    if outside and polished.misfit <= FITS:  # else it is not the batch
        return outcomes.outside(own, descent, answer.inputs), None
    name = separated.stage.name
    status, why = verdict.verdict_followed(own, answer, name)
    if status is not Status.EXACT:
        return outcomes.stopped(own, status, why, descent), None
    said = (
        f"'{name}' and the next layer tell {rows} samples apart, no entry of the data is off by "
        f"more than {answer.bound:.1e}"
    )
    reason = (
        f"the inputs are certified: {said}; targets not certified: nothing below the loss names "
        f"them ({above})"
    )
    recovery = certificate.inputs_only(own, answer, reason)
    if own.stated is not None:
        return recovery, answer
    reason = (
        f"{said}; how often each of them occurs is open: state batch_size to have them certified "
        f"({above})"
    )
    return certificate.as_candidate(recovery, reason), None
