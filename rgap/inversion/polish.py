"""Finish on the whole update: Gauss–Newton with conjugate gradients on Jacobian products.

The recursion uses each equation once, on the way down; here every gradient entry speaks at the
same time, weighed by its error.  Where the recursion's own error is already small a few steps
remove what they can; where it is not, the solve goes to the end and noise samples solved along
with it give the error of the answer (the Cramér–Rao bound, by Monte Carlo) without forming the
Jacobian.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from torch import Tensor

from rgap import memory
from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.eliminated import Eliminated
from rgap.jacobian.layer import ParameterRows
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.normal import Inverse, Normal
from rgap.jacobian.weights import objective, residuals, row_misfits, row_weights, update_noise
from rgap.limits import FITS
from rgap.network.chain import Chain
from rgap.precision import Estimate, Precision

log = logging.getLogger(__name__)

STEPS = 4  # Gauss–Newton steps at most
BRIEF, FULL = 12, 300  # CG iterations of a step: while the recursion is accurate, and where not
SHARES = (1.0, 0.5, 0.25)  # of a Gauss–Newton step, tried in turn
HELD = 32.0  # bytes a number: weights, residual, noise and its product in float64
SAMPLES = 4  # noise samples of the full solve; each averages over all pixels
MEMBERS = 8  # of the ensemble that a settled start is measured with
HARD = 2e-5  # predicted rms error, in widths of the value range, from which the full solve pays


@dataclass(frozen=True)
class Polished:
    """The polished batch, its sampled error, and how the solve went.

    Attributes:
        data: x [B, *input_shape] with its ensemble.
        misfit: largest weighted rms residual of any parameter; about 1 when consistent.
        misfits: weighted rms residual by parameter.
        iterations: CG iterations used in all.
        full: True if the solve on the whole update converged and the errors are its own;
            otherwise they are the recursion's, which the polish can only have lowered.
        worst: standard error of the direction that the whole update fixes least; infinite where
            its normal matrix was not needed, or not formed.
        head: the loss of a batch; where its targets may be any real numbers and the cotangents
            were eliminated, with the targets that these say.
        eliminated: they were.
    """

    data: Estimate
    misfit: float
    misfits: dict[str, float]
    iterations: int
    full: bool
    worst: float = inf
    head: BatchLoss | None = None
    eliminated: bool = False


def polish(
    chain: Chain,
    gradients: Mapping[str, Tensor],
    start: Estimate,
    kappa: Estimate | BatchLoss,
    precision: Precision,
    precondition: Inverse | None,
    width: float = 1.0,
    settled: bool = False,
    room: float = inf,
) -> Polished:
    """Minimise ``Σ ‖(g(x) − g)/σ‖²`` from a start that is already close.

    Args:
        chain: complete chain.
        gradients: the update, float64, by parameter name.
        start: x from the recursion with its errors, [B, *input_shape].
        kappa: head cotangent with its errors; for a batch the loss that gives it.
        precision: of the update.
        precondition: approximate inverse of the normal matrix on [S, B, *input_shape]; None
            where the data came straight from a bias attack, which leaves nothing to polish.
        width: of the value range, the unit of ``HARD``.
        settled: the start was polished on the whole update already; its misfit is measured in
            units that its own error is part of.
        room: bytes for everything together; fewer errors are solved for where they do not fit.

    Raises:
        OutOfMemory: the update does not fit beside its weights and its residual.
    """
    head = kappa if isinstance(kappa, BatchLoss) else None
    if isinstance(kappa, BatchLoss):
        point = Linearisation(chain, start.value, kappa)
        kappa = kappa.known(point.outputs, precision)
    else:
        point = Linearisation(chain, start.value, kappa.value)
    found = None if head is None else _freed(point, kappa, head, gradients, precision)
    free = found is not None
    if found is not None:
        point, weights = found
    else:
        own = start.error[:MEMBERS] if settled else start.error[:0]
        weights = row_weights(point, kappa, precision, (point.power(e[None]) for e in own))
    misfits = row_misfits(point, gradients, weights)
    if settled and max(misfits.values()) > FITS and precondition is not None:
        # Rounding of our own left it beside the optimum: its error is no excuse any more.
        weights, settled = weights if free else row_weights(point, kappa, precision), False
        misfits = row_misfits(point, gradients, weights)
    used, data, full, worst, untaken = 0, start, False, inf, 0.0
    if not settled and precondition is not None:
        # The recursion took the targets for known: where they are free its errors are too small.
        hard = free or float(start.error.square().mean().sqrt()) > HARD * width
        if not hard:
            point, misfits, used, _, _ = _step(
                point, misfits, gradients, weights, precondition, BRIEF, free
            )
            hard = max(misfits.values()) > FITS
        data = Estimate(point.x, start.error)
        if hard:
            numbers = sum(stage.affine.weight.numel() for stage in chain.stages)
            need = HELD * numbers
            memory.require(f"the polish on the whole update of {numbers:,} numbers", need, room)
            factored = _normal(point, weights, free).factored()
            if factored is not None:
                precondition, worst = factored.inverse, factored.worst()
            for _ in range(STEPS):
                before = objective(misfits, gradients)
                point, misfits, count, full, untaken = _step(
                    point, misfits, gradients, weights, precondition, FULL, free
                )
                used += count
                if objective(misfits, gradients) > 0.98 * before:
                    break
            samples = SAMPLES if factored is None else precision.samples
            samples = (
                max(1, min(samples, int(max(room, memory.LEAST) / need))) if room < inf else samples
            )
            few = replace(precision, samples=samples, seed=precision.seed + 1)
            noise = update_noise(point, Estimate(kappa.value, kappa.error[:samples]), few)
            errors, count, done = _normal(point, weights, free).solve(
                noise, precondition, FULL, 3e-2
            )
            used, full = used + count, full and done
            if full and untaken > 0:  # it stopped before its own optimum: it is at least that far
                errors = errors * max(1.0, untaken / float(errors.square().mean().sqrt()))
            data = Estimate(point.x, errors if full else start.error)
    log.debug("polish: %d iterations, misfit %.2g, full %s", used, max(misfits.values()), full)
    if head is not None and free:
        head = head.explained(point.outputs, point.kappa)
    return Polished(
        data, max(misfits.values()), misfits, used, full, worst if full else inf, head, free
    )


def _freed(
    point: Linearisation,
    kappa: Estimate,
    head: BatchLoss,
    gradients: Mapping[str, Tensor],
    precision: Precision,
) -> tuple[Linearisation, ParameterRows] | None:
    """The point with the κ that explains most of the update at its x, and the weights of the rows.

    None where the targets say what κ is, or where it cannot be eliminated; a head alone says
    nothing of its inputs without them.
    """
    if not head.continuous or len(point.nodes) == 1:
        return None
    held = point.moved(point.x, point.kappa)
    weights = row_weights(held, kappa, precision)
    eliminated = Eliminated.of(held, weights)
    if eliminated is None:
        return None
    rows = {name: r[None] for name, r in residuals(held, gradients).items()}
    return held.moved(held.x, held.kappa + eliminated.explained(rows)[0][0]), weights


def _normal(point: Linearisation, weights: ParameterRows, free: bool) -> Normal:
    return Normal(point, weights, Eliminated.of(point, weights) if free else None)


def _step(
    point: Linearisation,
    misfits: dict[str, float],
    gradients: Mapping[str, Tensor],
    weights: ParameterRows,
    precondition: Inverse,
    limit: int,
    free: bool,
) -> tuple[Linearisation, dict[str, float], int, bool, float]:
    """One Gauss–Newton step, shortened until it lowers the objective; undone where none does.

    A unit whose sign changes on the way bends the objective: the whole step can rise where its
    first half descends.  Where the cotangents are free they take the step that goes with it.

    Returns:
        The point and its misfits, CG iterations, whether they converged, and the rms of the part
        of the step that was not taken.
    """
    rhs = {name: r[None] for name, r in residuals(point, gradients).items()}
    normal = _normal(point, weights, free)
    dx, count, done = normal.solve(rhs, precondition, limit, 1e-3)
    dkappa = None
    if normal.free is not None:
        sent = point.jvp(dx)
        dkappa = normal.free.explained({name: rhs[name] - sent[name] for name in rhs})[0][0]
    before, length = objective(misfits, gradients), float(dx.square().mean().sqrt())
    for share in SHARES:
        kappa = None if dkappa is None else point.kappa + share * dkappa
        trial = point.moved(point.x + share * dx[0], kappa)
        fresh = row_misfits(trial, gradients, weights)
        if objective(fresh, gradients) < before:
            return trial, fresh, count, done, (1.0 - share) * length
    return point, misfits, count, done, length
