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

from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.dense import Dense
from rgap.jacobian.eliminated import Eliminated
from rgap.jacobian.layer import ParameterRows
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.normal import Inverse, Normal
from rgap.jacobian.weights import Fit, row_weights, update_noise
from rgap.limits import FITS, SAFETY, SPARE
from rgap.machine import memory
from rgap.network.chain import Chain
from rgap.precision import UNKNOWN, Estimate, Precision

log = logging.getLogger(__name__)

STEPS = 4  # Gauss–Newton steps at most
BRIEF, FULL = 12, 300  # CG iterations of a step: while the recursion is accurate, and where not
DENSE = 2**24  # entries of J up to which it is formed, where the normal matrix loses a direction
COPIES = 4  # of it that a QR holds at once
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
            otherwise they are the recursion's, or as long as the way that the polish went.
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


@dataclass(frozen=True)
class Equations:
    """An update as equations for the data, ``g(x) = g`` weighed by their errors.

    Attributes:
        chain: complete chain, from the data up.
        gradients: g by parameter name, float64.
        precision: of the update.
        width: of the value range, the unit of ``HARD``.
        room: bytes for everything together; fewer errors are solved for where they do not fit.
    """

    chain: Chain
    gradients: Mapping[str, Tensor]
    precision: Precision
    width: float = 1.0
    room: float = inf


def polish(
    update: Equations,
    start: Estimate,
    kappa: Estimate | BatchLoss,
    precondition: Inverse | None,
    settled: bool = False,
) -> Polished:
    """Minimise ``Σ ‖(g(x) − g)/σ‖²`` from a start that is already close.

    Args:
        update: the equations.
        start: x from the recursion with its errors, [B, *input_shape].  Entries without any
            are those that nothing reads.
        kappa: head cotangent with its errors, [B, m]; for a batch the loss that gives it.
        precondition: approximate inverse of the normal matrix on [S, B, *input_shape]; None
            where the data came straight from a bias attack, which leaves nothing to polish.
        settled: the start was polished on the whole update already; its misfit is measured in
            units that its own error is part of.

    Raises:
        OutOfMemory: the update does not fit beside its weights and its residual.
    """
    precision, head = update.precision, None
    if isinstance(kappa, BatchLoss):
        head, point = kappa, Linearisation(update.chain, start.value, kappa)
        known = kappa.known(point.outputs, precision)
    else:
        known, point = kappa, Linearisation(update.chain, start.value, kappa.value)
    at = None if head is None else _freed(update, point, known, head)
    if at is None:
        straight = precondition is None and precision.noisy  # ∂b may be noisier than G
        own = start.error[:MEMBERS] if settled or straight else start.error[:0]
        weights = row_weights(point, known, precision, (point.power(e[None]) for e in own))
        at = _Point(point, update.gradients, weights)
    if settled and at.misfit > FITS and precondition is not None:
        # Rounding of our own left it beside the optimum: its error is no excuse any more.
        settled = False
        at = at if at.free else replace(at, weights=row_weights(point, known, precision))
    used, data, full, worst, solved = 0, start, False, inf, None
    if not settled and precondition is not None:
        # The recursion took the targets for known: where they are free its errors are too small.
        hard = at.free or float(start.error.square().mean().sqrt()) > HARD * update.width
        if not hard:
            at, used, _, _ = at.step(precondition, BRIEF)
            hard = at.misfit > FITS
        if hard:
            unread = (start.error == 0).all(0)  # set to some value, as nothing reads them
            at = replace(at, held=unread if bool(unread.any()) else None)
            at, solved, count, worst = _solved(update, at, known, precondition)
            used, full = used + count, solved is not None
        data = Estimate(at.point.x, _moved(start, at) if solved is None else solved)
    log.debug("polish: %d iterations, misfit %.2g, full %s", used, at.misfit, full)
    if head is not None and at.free:
        head = head.explained(at.point.outputs, at.point.kappa)
    worst = worst if full else inf
    return Polished(data, at.misfit, at.misfits, used, full, worst, head, at.free)


@dataclass(frozen=True)
class _Point(Fit):
    """Where the polish stands; free cotangents are eliminated.

    Attributes:
        held: entries of the data that nothing reads, as bool, or None.
    """

    held: Tensor | None = None

    def dense(self) -> Dense:
        """J itself, factored."""
        return Dense(self.point, self.weights, self.free, self.held)

    def normal(self) -> Normal:
        """JᵀΣ⁻¹J, without what free cotangents explain."""
        free = Eliminated.of(self.point, self.weights) if self.free else None
        return Normal(self.point, self.weights, free, self.held)

    def solve(
        self, rows: ParameterRows, by: Inverse | None, limit: int, tolerance: float
    ) -> tuple[Tensor, Tensor | None, int, bool]:
        """Steps of x and of free κ for S updates, CG iterations, and whether all converged.

        Args:
            rows: right-hand sides by parameter name, [S, *parameter.shape].
            by: preconditioner; None for a QR of J itself.
            limit: iterations at most.
            tolerance: decrease of the energy norm at which they stop.
        """
        if by is None:
            return *self.dense().solve(rows), 0, True
        normal = self.normal()
        dx, count, done = normal.solve(rows, by, limit, tolerance)
        if normal.free is None:
            return dx, None, count, done
        sent = self.point.jvp(dx)
        left = {name: rows[name] - sent[name] for name in rows}
        return dx, normal.free.explained(left)[0], count, done

    def step(self, by: Inverse | None, limit: int) -> tuple[_Point, int, bool, float]:
        """One Gauss–Newton step, shortened until it lowers the objective; undone where none does.

        Returns:
            The point, CG iterations, whether they converged, and the rms of the part of the step
            that was not taken.
        """
        if by is None:
            moved, share, dx = self.dense().stepped(self)
            return moved, 0, True, (1.0 - share) * float(dx.square().mean().sqrt())
        dx, dkappa, count, done = self.solve(self.left, by, limit, 1e-3)
        moved, share = self.shortened(dx, dkappa)
        return moved, count, done, (1.0 - share) * float(dx.square().mean().sqrt())


def _moved(start: Estimate, at: _Point) -> Tensor:
    """The recursion's errors for where the polish left it, [S, B, *input_shape].

    It is off by no more than the start and the way from there.  A way that is longer than what the
    start's own errors leave room for makes them as long; free targets they know nothing of.
    """
    if at.free:
        return torch.full_like(start.error, UNKNOWN)
    way = float((at.point.x - start.value).abs().max())
    room = SAFETY / SPARE * float(start.std.max())
    return start.error * max(1.0, way / max(room, 1e-300))


def _freed(
    update: Equations, point: Linearisation, kappa: Estimate, head: BatchLoss
) -> _Point | None:
    """The point with the κ that explains most of the update at its x, and the weights of the rows.

    None where the targets say what κ is, or where it cannot be eliminated; a head alone says
    nothing of its inputs without them.
    """
    if not head.continuous or len(point.nodes) == 1:
        return None
    held = point.moved(point.x, point.kappa)
    weights = row_weights(held, kappa, update.precision)
    eliminated = Eliminated.of(held, weights)
    if eliminated is None:
        return None
    at = _Point(held, update.gradients, weights, free=True)
    freed = held.moved(held.x, held.kappa + eliminated.explained(at.left)[0][0])
    return replace(at, point=freed)


def _solved(
    update: Equations, at: _Point, kappa: Estimate, precondition: Inverse
) -> tuple[_Point, Tensor | None, int, float]:
    """Gauss–Newton to its end, and noise samples solved along with it.

    Returns:
        The point, the errors of its x [S, B, *input_shape] or None where an iteration did not
        converge, CG iterations, and the standard error of the direction that is fixed least.
    """
    numbers = sum(stage.affine.weight.numel() for stage in update.chain.stages)
    need, precision, room = HELD * numbers, update.precision, update.room
    memory.require(f"the polish on the whole update of {numbers:,} numbers", need, room)
    by: Inverse | None = precondition
    normal, worst, used, untaken, samples = at.normal(), inf, 0, 0.0, SAMPLES
    if normal.small:
        samples, factored = precision.samples, normal.factored()
        entries = Dense.entries(at.point, at.free)
        if factored is not None:
            by, worst = factored.inverse, factored.worst()
        elif entries <= DENSE and 8.0 * COPIES * entries <= room:
            by, worst = None, at.dense().worst()
        if worst == inf and by is not None:  # a direction is lost in rounding, and J is too large
            return at, None, used, worst
    for _ in range(STEPS):
        before = at.objective
        at, count, full, untaken = at.step(by, FULL)
        used += count
        if at.objective > 0.98 * before:
            break
    if by is None and worst == inf:  # nothing says how well the direction that is lost is known
        return at, None, used, worst
    if room < inf:
        samples = max(1, min(samples, int(max(room, memory.LEAST) / need)))
    few = replace(precision, samples=samples, seed=precision.seed + 1)
    noise = update_noise(at.point, Estimate(kappa.value, kappa.error[:samples]), few)
    errors, _, count, done = at.solve(noise, by, FULL, 3e-2)
    if not (full and done):
        return at, None, used + count, worst
    if untaken > 0:  # it stopped before its own optimum: it is at least that far
        errors = errors * max(1.0, untaken / float(errors.square().mean().sqrt()))
    return at, errors, used + count, worst
