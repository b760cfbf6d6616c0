"""A recovery that failed says first what a check finds wrong with the update."""

from __future__ import annotations

from dataclasses import replace

from rgap.diagnosis.finding import Kind
from rgap.diagnosis.ranking import check
from rgap.halt import HaltKind
from rgap.inversion.problem import Problem
from rgap.recovery import Recovery, Status
from rgap.update.update import view

# The cotangents of all targets of a head with two classes are parallel: any factor fits a mixture.
PARALLEL = 2
LIMIT = 10.0  # seconds after which no further trial begins
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


def explained(problem: Problem, recovery: Recovery) -> Recovery:
    """The recovery with the best finding at the front of its reason.

    Where the equations contradict the update, and where a batch was not told apart: a sum that is
    declared as a mean looks like a batch without a solution.
    """
    contradicted = recovery.status is Status.INCONSISTENT
    apart = recovery.status is Status.UNDERDETERMINED and (problem.stated or 1) > 1
    untold = recovery.halt is not None and recovery.halt.kind is HaltKind.UNSEPARATED
    if not contradicted and not (apart and (recovery.inputs is None or untold)):
        return recovery
    outputs = problem.chain.output_shape
    if not contradicted and (not outputs or outputs[-1] <= PARALLEL):
        return recovery
    best = check(
        problem.model,
        view(problem.update, loss=problem.declared),
        batch_size=problem.stated,
        labels=problem.labels,
        noise=problem.precision.noise,
        seed=problem.precision.seed,
        time_limit=LIMIT,
    ).best
    if best is None or best.kind is Kind.COMPRESSION or (best.kind is Kind.WEIGHTS and apart):
        return recovery
    status = Status.INCONSISTENT if best.kind in REFUTES else recovery.status
    return replace(recovery, status=status, reason=f"{best.sentence}; {recovery.reason}")
