"""How a recursion ends: refuted, certified, or short of the data with what is determined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from rgap.completion.complete import MISSED
from rgap.halt import Halt, HaltKind
from rgap.inversion import certificate, outcomes, parts
from rgap.inversion.answer import Run, answers_of
from rgap.inversion.batch_rows import BatchRows
from rgap.inversion.branches import Branched, below_branches, by_gradients
from rgap.inversion.fallback import filled
from rgap.inversion.problem import Problem
from rgap.inversion.single import certified_features
from rgap.precision import Estimate
from rgap.progress import Progress
from rgap.recovery import Recovery, Route, Status
from rgap.recursion.reached import Descent

__all__ = ["beside_branches", "concluded", "with_features"]


def concluded(problem: Problem, runs: list[Run], show: Progress) -> Recovery:
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
    certified, doubt = dict[str, Estimate](), ""
    if alone and not run.family and problem.stated == problem.batch == 1:
        certified, doubt = certified_features(problem, descent)
    branched = None
    if alone and not run.family and not doubt:
        branched = below_branches(problem, run, certified, show)
    if branched is not None and branched.recovery is not None:
        return branched.recovery
    if alone and (problem.filling is None or parts.free(problem, descent)):

        def certify(whole: Descent) -> tuple[Recovery, BatchRows | None]:
            [answer] = answers_of(problem, Run(whole, run.kappa))
            return certificate.certify(problem, [answer]), answer.rows

        partly = parts.in_parts(problem, descent, certify)
        if partly is not None and problem.filling is None:
            return partly
        if partly is not None and partly.labels is not None and partly.partial is not None:
            return parts.completed(problem, partly)
    settled = branched is not None and (branched.nearest is not None or branched.refuted)
    if problem.filling is not None and alone and not settled:
        told = Branched() if branched is None or branched.contradicted else branched
        recovery = filled(problem, run, show, told.lowest, told.near)
        if recovery.certified or run.family or problem.stated is None:
            return recovery
        return _kept(recovery, certified, branched)
    reason = halt.reason
    if problem.filling is not None and not alone:
        reason += f"; no completion: {len(runs)} roots at the head are open, each needs its own"
    status = Status.UNDERDETERMINED if halt.supported else Status.UNSUPPORTED
    recovery = outcomes.stopped(problem, status, reason, descent)
    if not alone or run.family:
        return recovery
    return _with_features(problem, recovery, certified, doubt, branched)


def _with_features(
    problem: Problem,
    recovery: Recovery,
    features: dict[str, Estimate],
    doubt: str,
    branched: Branched | None,
) -> Recovery:
    """What the bias attack and the recursion certified above the place where it ended.

    Below a barrier where branches meet, what wide layers say of their own inputs; of several
    samples these alone.  Of a batch whose size nobody states, nothing.
    """
    if problem.stated is None:
        doubt = "the batch size is not stated, and a mixture may look like one sample; write it"
    notes = (f"no features are certified: {doubt}",) if doubt else ()
    recovery = replace(recovery, warnings=(*recovery.warnings, *notes))
    if branched is None:
        return with_features(recovery, features)
    branched = replace(branched, features={}) if doubt else branched
    return beside_branches(problem, recovery, branched, {} if branched.contradicted else features)


def beside_branches(
    problem: Problem,
    recovery: Recovery,
    branched: Branched,
    certified: Mapping[str, Estimate] = MappingProxyType({}),
) -> Recovery:
    """The recovery with what wide layers say of their own inputs, and those certified above.

    Data that were found below them and are not certified are its candidate; where a completion is
    asked for and they send the update to one per cent, its answer.
    """
    recovery = _reported(recovery, branched.features)
    if branched.note:
        recovery = replace(recovery, reason=f"{recovery.reason}; below it, {branched.note}")
    if branched.refuted:
        halt = Halt.contradiction(branched.refuted)
        reason = f"{branched.note}; {recovery.reason}"
        return replace(recovery, status=Status.INCONSISTENT, halt=halt, reason=reason)
    near = branched.nearest
    if near is not None:
        where = "in candidates"
        if problem.filling is not None and near.residual**2 <= MISSED:
            where = "in inputs"
            recovery = replace(
                recovery,
                status=Status.COMPLETED,
                inputs=near.inputs,
                labels=near.labels,
                residual=near.residual,
                warnings=(*recovery.warnings, outcomes.CHOSEN),
            )
        else:
            recovery = replace(recovery, candidates=(near,))
        words = (
            f"the nearest data, {where}, send an update that is off by {near.residual:.1e} of it"
        )
        recovery = replace(recovery, reason=f"{recovery.reason}; {words}")
    return with_features(recovery, {**branched.features, **certified})


def _kept(
    recovery: Recovery, certified: Mapping[str, Estimate], branched: Branched | None
) -> Recovery:
    """A completion with what was determined above and below the place where it began."""
    if branched is None:
        return with_features(recovery, certified)
    if branched.contradicted:
        return recovery
    told = _reported(recovery, branched.features)
    return with_features(told, {**branched.features, **certified})


def _reported(recovery: Recovery, own: Mapping[str, Estimate]) -> Recovery:
    """With the reports of layers whose inputs their own gradients determine."""
    layers = [
        by_gradients(report, own[report.layer])
        if report.route is Route.NOT_REACHED and report.layer in own
        else report
        for report in recovery.layers
    ]
    return replace(recovery, layers=tuple(layers))


def with_features(recovery: Recovery, features: Mapping[str, Estimate]) -> Recovery:
    """The recovery with certified inputs of layers, from the lowest one up, above those it has."""
    more = {name: known for name, known in features.items() if name not in recovery.features}
    errors = {name: float(known.error.square().mean().sqrt()) for name, known in more.items()}
    return replace(
        recovery,
        features={**recovery.features, **{name: known.value for name, known in more.items()}},
        features_error={**recovery.features_error, **errors},
    )
