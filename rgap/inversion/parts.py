"""What is determined of the data where not all of them are, and what a prior makes of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rgap.inversion import outcomes
from rgap.inversion.batch_rows import BatchRows
from rgap.inversion.places import described
from rgap.inversion.problem import Problem
from rgap.limits import SAFETY, USEFUL
from rgap.precision import Estimate
from rgap.recovery import Recovery, Status
from rgap.recursion.reached import Descent
from rgap.recursion.stage import StageSolution
from rgap.solvers.priors import Operator
from rgap.solvers.rank import Evidence, EvidenceKind

__all__ = ["completed", "free", "in_parts"]

STEPS, SOLVING = 30, 200  # Newton steps of a prior, and of the solve of each
SETTLED, SMALL = 1e-6, 1e-12  # a step that changes nothing, and the decrease that ends a solve


Certify = Callable[[Descent], tuple[Recovery, BatchRows | None]]


def in_parts(problem: Problem, descent: Descent, certify: Certify) -> Recovery | None:
    """The recovery of data of which only some entries are determined.

    The open entries are set to values that the equations allow, the batch is polished, read and
    certified as if it were the answer, and the open entries are struck out again.  Where the
    equations leave directions open that more than one unread entry is part of, no such values are
    known beside units that are off; then the equations of all stages are what is checked.

    Args:
        problem: the update.
        descent: that ended with ``partial``.
        certify: the certificate of a descent that reached the data, with the rows that are
            reported of a batch.

    Returns:
        ``UNDERDETERMINED`` with ``partial`` and ``determined``, or what contradicts; None if no
        entry is determined well enough.
    """
    partial = descent.partial
    if partial is None:
        return None
    sharp = SAFETY * partial.std <= USEFUL * problem.width
    determined = partial.known & sharp
    if not bool(determined.any()):
        return None
    step = descent.solutions.get(0)
    short = step is not None and step.solution.value is None
    value = partial.value
    if not short and problem.value_range is not None:  # nothing reads them: any value will do
        value = torch.where(determined, value, value.clamp(*problem.value_range))
    start = Estimate(value, torch.where(determined, partial.error, 0.0))
    whole = replace(descent, data=start, halt=None)
    if short:
        told = _told(descent, partial.std[determined], problem.width)
        whole = replace(whole, solutions={**descent.solutions, 0: told})
    recovery, reported = certify(whole)
    if recovery.inputs is None:
        if not short:
            return recovery
        if reported is not None and bool((reported.copies > 1).any()):
            return None  # no batch to bound by how far apart they may be
        return _by_equations(problem, descent, start, determined)
    rows = slice(None) if reported is None else reported.picture
    mask = determined[rows]
    bound = recovery.error_bound
    assert bound is not None
    if not bound <= USEFUL * problem.width:
        return None  # copies that may be far apart
    reason = _reason(descent, mask, bound)
    if recovery.status is Status.AMBIGUOUS:
        reason = f"{recovery.reason}; {reason}"
    status = Status.UNDERDETERMINED if recovery.status is Status.EXACT else recovery.status
    return replace(
        recovery,
        inputs=None,
        status=status,
        reason=reason,
        certified=recovery.certified - {"inputs"},
        candidates=tuple(
            replace(c, inputs=_struck(c.inputs, mask))
            for c in recovery.candidates
        ),
        layers=outcomes.layer_reports(problem, descent),
        halt=descent.halt,
        determined=mask,
        partial=_struck(recovery.inputs, mask),
    )  # fmt: skip


def free(problem: Problem, descent: Descent) -> bool:
    """True if what is open of the data is read by nothing: any value of it sends the update.

    Args:
        problem: the update.
        descent: that ended at the data or before.
    """
    step = descent.solutions.get(0)
    rectified = any(getattr(op, "one_sided", False) for op in problem.chain.stages[0].lead)
    whole = step is None or step.solution.value is not None
    return descent.partial is not None and whole and not rectified


def completed(problem: Problem, recovery: Recovery) -> Recovery:
    """Data of which some are determined, with what nothing reads chosen by the prior.

    With D the determined entries, by Newton steps on the prior's quadratic bound, each solved by
    conjugate gradients:

        min prior(x)   subject to   x_D = x̂_D.

    Args:
        problem: with its filling.
        recovery: with ``partial`` and ``determined``, [B, *input_shape].
    """
    filling = problem.filling
    assert filling is not None and recovery.partial is not None and recovery.determined is not None
    prior, free_ = filling.prior.smoothed(filling.schedule.smoothing), ~recovery.determined
    x = torch.where(free_, recovery.partial[recovery.determined].mean(), recovery.partial)
    for _ in range(STEPS):
        slope = torch.where(free_, prior.gradient(x), 0.0)
        step = _newton_step(prior.curvature(x), slope, free_)
        x = x + step
        if float(step.abs().max()) < SETTLED:
            break
    if problem.value_range is not None:
        x = torch.where(free_, x.clamp(*problem.value_range), x)
    return replace(
        recovery,
        inputs=x,
        status=Status.COMPLETED,
        reason=f"{recovery.reason}; a prior chose the values that nothing reads",
        warnings=(*recovery.warnings, outcomes.CHOSEN),
    )


def _newton_step(curvature: Operator, slope: Tensor, open_: Tensor) -> Tensor:
    """−H⁻¹g on the open entries, by conjugate gradients."""
    step, residual = torch.zeros_like(slope), -slope
    direction, energy = residual, float(residual.square().sum())
    first = energy
    for _ in range(SOLVING):
        if energy <= SMALL * first:
            break
        image = torch.where(open_, curvature(direction), 0.0)
        bend = float((direction * image).sum())
        if not bend > 0.0:
            break
        step = step + energy / bend * direction
        residual = residual - energy / bend * image
        fresh = float(residual.square().sum())
        direction, energy = residual + fresh / energy * direction, fresh
    return step


def _struck(inputs: Tensor, determined: Tensor) -> Tensor:
    return torch.where(determined, inputs, torch.nan)


def _told(descent: Descent, std: Tensor, width: float) -> StageSolution:
    """The first stage's solution with what is known of the entries that are given."""
    step = descent.solutions[0]
    stats, worst = step.solution.stats, float(std.max()) / width
    seen = Evidence(EvidenceKind.ENTRIES, worst, USEFUL / SAFETY, std.numel())
    return replace(step, solution=replace(step.solution, stats=replace(stats, joint=seen)))


def _by_equations(
    problem: Problem, descent: Descent, start: Estimate, determined: Tensor
) -> Recovery | None:
    """The entries that the equations of all stages fix, where no batch is there to replay."""
    misfit = max((step.misfit for step in descent.solutions.values()), default=0.0)
    bound = SAFETY * float(start.std.max()) * max(1.0, misfit)
    if not bound <= USEFUL * problem.width:
        return None
    values = start.value[determined]
    if problem.excess(values, bound) > problem.slack:
        return outcomes.outside(problem, descent, values)
    stopped = outcomes.stopped(
        problem,
        Status.UNDERDETERMINED,
        _reason(descent, determined, bound)
        + "; the equations of every stage are met at the rounding; which units the open values "
        "switch on is not known, so there is no batch to replay and the targets are not certified",
        descent,
    )
    predicted = start.error.square().flatten(2).mean((0, 2)).sqrt()
    return replace(
        stopped,
        predicted_error=predicted,
        error_bound=bound,
        determined=determined,
        partial=_struck(start.value, determined),
    )


def _reason(descent: Descent, determined: Tensor, bound: float) -> str:
    count, total = int(determined.sum()), determined.numel()
    return (
        f"{count} of {total} values are determined, none of them off by more than {bound:.1e}; "
        f"open: {described(~determined)} ({descent.require_halt().reason})"
    )
