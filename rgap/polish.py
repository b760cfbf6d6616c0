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

import torch
from torch import Tensor

from rgap.bilinear import Rows
from rgap.jacobian import Linearisation
from rgap.network import Chain
from rgap.normal import Inverse, Normal
from rgap.precision import Known, Precision

log = logging.getLogger(__name__)

STEPS = 4  # Gauss–Newton steps at most
BRIEF, FULL = 12, 300  # CG iterations of a step: while the recursion is accurate, and where not
SAMPLES = 4  # noise samples of the full solve; each averages over all pixels
FITS = 10.0  # misfit up to which the update counts as reproduced; above, a full solve follows
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
    """

    data: Known
    misfit: float
    misfits: dict[str, float]
    iterations: int
    full: bool
    worst: float = inf


def polish(
    chain: Chain,
    gradients: Mapping[str, Tensor],
    start: Known,
    kappa: Known,
    precision: Precision,
    precondition: Inverse | None,
    width: float = 1.0,
) -> Polished:
    """Minimise ``Σ ‖(g(x) − g)/σ‖²`` from a start that is already close.

    Args:
        chain: complete chain.
        gradients: the update, float64, by parameter name.
        start: x from the recursion with its errors, [B, *input_shape].
        kappa: head cotangent with its errors.
        precision: of the update.
        precondition: approximate inverse of the normal matrix on [S, B, *input_shape]; None
            where the data came straight from a bias attack, which leaves nothing to polish.
        width: of the value range, the unit of ``HARD``.
    """
    point = Linearisation(chain, start.value, kappa.value)
    weights = _weights(point, kappa, precision)
    misfits = _misfits(point, gradients, weights)
    if precondition is None:
        return Polished(start, max(misfits.values()), misfits, 0, full=False)
    hard = float(start.error.square().mean().sqrt()) > HARD * width
    used = 0
    if not hard:
        point, misfits, used, _ = _step(point, misfits, gradients, weights, precondition, BRIEF)
        hard = max(misfits.values()) > FITS
    data, full, worst = Known(point.x, start.error), False, inf
    if hard:
        factored = Normal(point, weights).factored()
        if factored is not None:
            precondition, worst = factored.inverse, factored.worst()
        for _ in range(STEPS):
            before = _objective(misfits, gradients)
            point, misfits, count, full = _step(
                point, misfits, gradients, weights, precondition, FULL
            )
            used += count
            if _objective(misfits, gradients) > 0.98 * before:
                break
        samples = SAMPLES if factored is None else precision.samples
        few = replace(precision, samples=samples, seed=precision.seed + 1)
        noise = _noise(point, Known(kappa.value, kappa.error[:samples]), few)
        errors, count, done = Normal(point, weights).solve(noise, precondition, FULL, 3e-2)
        used, full = used + count, full and done
        data = Known(point.x, errors if full else start.error)
    log.debug("polish: %d iterations, misfit %.2g, full %s", used, max(misfits.values()), full)
    return Polished(data, max(misfits.values()), misfits, used, full, worst if full else inf)


def _step(
    point: Linearisation,
    misfits: dict[str, float],
    gradients: Mapping[str, Tensor],
    weights: Rows,
    precondition: Inverse,
    limit: int,
) -> tuple[Linearisation, dict[str, float], int, bool]:
    """One Gauss–Newton step, undone where it does not lower the objective."""
    rhs = {name: r[None] for name, r in _residual(point, gradients).items()}
    dx, count, done = Normal(point, weights).solve(rhs, precondition, limit, 1e-3)
    trial = Linearisation(point.chain, point.x + dx[0], point.kappa)
    fresh = _misfits(trial, gradients, weights)
    if _objective(fresh, gradients) < _objective(misfits, gradients):
        point, misfits = trial, fresh
    return point, misfits, count, done


def _weights(point: Linearisation, kappa: Known, precision: Precision) -> Rows:
    """1/σ per gradient entry, pooled over each filter.

    σ holds the rounding of the entry's own sum, the stated noise, and what the client's rounding
    at every other step does to the entry, sampled one member at a time.
    """
    single = replace(precision, samples=1, seed=precision.seed + 2)
    zero = torch.zeros((1, *point.x.shape), dtype=torch.float64, device=point.x.device)
    squares = point.squares()
    pooled = {name: _pool(precision.update_std(s).square()) for name, s in squares.items()}
    count = min(8, len(kappa.error))
    for member in range(count):
        carried = point.jvp(zero, kappa.error[member : member + 1], inject=single)
        for name, rows in carried.items():
            pooled[name] = pooled[name] + _pool(rows[0].square()) / count
    return {
        name: pooled[name].sqrt().clamp_min(1e-300).reciprocal().reshape(-1, *([1] * (s.ndim - 1)))
        for name, s in squares.items()
    }


def _noise(point: Linearisation, kappa: Known, precision: Precision) -> Rows:
    """Samples of the update's error: rounding of the whole computation, and the stated noise."""
    zero = torch.zeros(
        (precision.samples, *point.x.shape), dtype=torch.float64, device=point.x.device
    )
    carried = point.jvp(zero, kappa.error, inject=precision)
    own = {n: precision.normal(precision.update_std(s)) for n, s in point.squares().items()}
    return {name: own[name] + carried[name] for name in own}


def _pool(variance: Tensor) -> Tensor:
    """Mean over everything but the filters."""
    return variance if variance.ndim == 1 else variance.flatten(1).mean(1)


def _residual(point: Linearisation, gradients: Mapping[str, Tensor]) -> Rows:
    return {name: gradients[name] - g for name, g in point.gradients().items()}


def _misfits(
    point: Linearisation, gradients: Mapping[str, Tensor], weights: Rows
) -> dict[str, float]:
    gaps = _residual(point, gradients)
    return {n: float((gap * weights[n]).square().mean().sqrt()) for n, gap in gaps.items()}


def _objective(misfits: Mapping[str, float], gradients: Mapping[str, Tensor]) -> float:
    """Σ of squared weighted residuals; infinite if any is not a number."""
    total = sum(m * m * gradients[name].numel() for name, m in misfits.items())
    return total if total == total else float("inf")
