"""Gauss–Newton with conjugate gradients for ``‖r(x)‖² + λ prior(x)``, λ going down.

Only products with the Jacobian are asked for.  Where equations decide, λ → 0 leaves x to them;
where they do not, the prior has chosen on the way down.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rgap.solvers.priors import Operator, Prior

SHORTEST = 1e-3  # step length at which the line search gives up
ROUNDED = 1e-14  # of the mean diagonal: keeps a formed normal matrix definite
TOGETHER = 64  # vectors that a curvature is taken of at once
HASTE = 4  # power of the decay of λ after a step that changed next to nothing
SLOW, ENOUGH = 0.5, 1e-8  # factor on a misfit, below the second, that counts as no change any more
STOPPED = "whoever watches said so"
DAMPED = 1e-3  # of the curvature: what a failed step adds to the diagonal, then ten times it


class Point(Protocol):
    """The residual at some x, and products with its Jacobian."""

    @property
    def residual(self) -> Tensor:
        """r(x), [m]."""

    def push(self, v: Tensor) -> Tensor:
        """J v, like r, for v like x."""

    def pull(self, r: Tensor) -> Tensor:
        """Jᵀ r, like x."""

    def jacobian(self) -> Tensor | None:
        """J itself, [m, n], where it is small enough to be formed; else None."""


@dataclass(frozen=True)
class Schedule:
    """How the weight of the prior goes down and when to stop.

    Attributes:
        weight: λ of the first step.
        decay: factor from step to step; its fourth power after a step that changed nothing.
        lowest: λ at which it stays.
        smoothing: rounding of the prior's kinks at the first step; it goes down with √decay.
        steps: Gauss–Newton steps at most.
        products: conjugate-gradient iterations a step, at most.
        accuracy: relative residual at which these stop.
        target: ‖r‖² that the noise explains: no step below it.
        still: relative change of x of two steps in a row that ends the iteration; at the lowest
            weight two steps in a row that do not halve a misfit below 1e-8 end it too.
        seconds: wall time after which no further step is begun.
    """

    weight: float = 1e-2
    decay: float = 0.25
    lowest: float = 1e-9
    smoothing: float = 0.1
    steps: int = 40
    products: int = 200
    accuracy: float = 1e-2
    target: float = 0.0
    still: float = 1e-4
    seconds: float = inf


@dataclass(frozen=True)
class DescentMarks:
    """What the iteration carries from step to step besides x.

    Attributes:
        number: steps made.
        weight: λ of the next step.
        smoothing: of its prior.
        damping: of its normal equations.
        rest: steps in a row that changed nothing.
        over: nothing is left to change.
    """

    number: int
    weight: float
    smoothing: float
    damping: float = 0.0
    rest: int = 0
    over: bool = False


@dataclass(frozen=True)
class Step:
    """One step, for whoever watches; with its marks the iteration goes on from there."""

    number: int
    misfit: float  # ‖r‖² after it
    weight: float
    length: float
    products: int
    marks: DescentMarks


@dataclass(frozen=True)
class Minimum:
    """Where the iteration ended.

    Attributes:
        value: x.
        misfit: ‖r(x)‖².
        steps: one record a step.
        ended: why, in words.
    """

    value: Tensor
    misfit: float
    steps: tuple[Step, ...]
    ended: str


def gauss_newton(
    linearise: Callable[[Tensor], Point],
    start: Tensor,
    prior: Prior,
    schedule: Schedule,
    *,
    project: Callable[[Tensor], Tensor] = lambda x: x,
    watch: Callable[[Step, Tensor], bool | None] | None = None,
    marks: DescentMarks | None = None,
) -> Minimum:
    """Minimise ``‖r(x)‖² + λ prior(x)`` while λ goes down; like ``scipy.optimize.least_squares``.

    Args:
        linearise: x ↦ its :class:`Point`.
        start: x to begin with.
        prior: chooses where r does not.
        schedule: of λ, and the limits.
        project: on the admissible x, after every step.
        watch: called after every step with its record and x; True stops.
        marks: of an earlier run that ended at ``start``: goes on as it would have.

    A residual that is not finite, at the start or along a step, ends the iteration at the last x
    where it was, and ``ended`` says so.

    >>> class Line:  # one equation for two unknowns: x_0 + x_1 = 1
    ...     def __init__(self, x): self.residual = x.sum()[None] - 1
    ...     def push(self, v): return v.sum()[None]
    ...     def pull(self, r): return r.expand(2)
    ...     def jacobian(self): return None
    >>> from rgap.solvers.priors import Squares
    >>> found = gauss_newton(Line, torch.zeros(2), Squares(centre=0.0), Schedule())
    >>> bool((found.value - 0.5).abs().max() < 1e-4)
    True
    """
    deadline = time.perf_counter() + schedule.seconds
    x = project(start)
    point = linearise(x)
    misfit = float(point.residual.square().sum())
    if not isfinite(misfit):
        return Minimum(x, inf, (), "the residual is not finite at the start")
    marks = marks or DescentMarks(0, schedule.weight, schedule.smoothing)
    steps: list[Step] = []
    while marks.number < schedule.steps and not marks.over:
        weight, smoothing, damping = marks.weight, marks.smoothing, marks.damping
        if misfit <= schedule.target:
            return Minimum(x, misfit, tuple(steps), "the residual is what the noise explains")
        if time.perf_counter() > deadline:
            return Minimum(x, misfit, tuple(steps), "the time is up")
        current = prior.smoothed(smoothing)
        rhs = -(point.pull(point.residual) + 0.5 * weight * current.gradient(x))
        rhs = rhs * _free(x, rhs, project)
        dx, count = _direction(
            point, current.curvature(x), weight, damping, rhs, schedule, deadline
        )
        if not bool(torch.isfinite(dx).all()):
            return Minimum(x, misfit, tuple(steps), "the next step is not finite")
        value, past = partial(_value, prior=current, weight=weight), misfit
        moved = _shortened(linearise, project, x, dx, value, value(x, misfit), deadline)
        change = float((moved.x - x).norm() / x.norm().clamp_min(1e-300)) if moved else 0.0
        if moved is not None:
            x, point, misfit, damping = moved.x, moved.point, moved.misfit, 0.1 * damping
        else:
            damping = max(10.0 * damping, DAMPED * _largest(point, rhs))
        ends = weight <= schedule.lowest and misfit <= ENOUGH and misfit > SLOW * past
        rest = marks.rest + 1 if change < schedule.still or ends else 0
        marks = DescentMarks(
            marks.number + 1,
            max(weight * schedule.decay ** (HASTE if rest else 1), schedule.lowest),
            smoothing * schedule.decay**0.5,
            damping,
            rest,
            rest >= 2 and (weight <= schedule.lowest or moved is None),
        )
        length = moved.length if moved else 0.0
        steps.append(Step(marks.number - 1, misfit, weight, length, count, marks))
        if watch is not None and watch(steps[-1], x):
            return Minimum(x, misfit, tuple(steps), STOPPED)
    if marks.over:
        return Minimum(x, misfit, tuple(steps), "steps change nothing any more")
    return Minimum(x, misfit, tuple(steps), f"{schedule.steps} steps are done")


class _Moved(NamedTuple):
    """A step that made the function smaller: its length, and x, r and ``‖r‖²`` after it."""

    length: float
    x: Tensor
    point: Point
    misfit: float


def _value(x: Tensor, misfit: float, prior: Prior, weight: float) -> float:
    return misfit + weight * float(prior.value(x))


def _shortened(
    linearise: Callable[[Tensor], Point],
    project: Callable[[Tensor], Tensor],
    x: Tensor,
    dx: Tensor,
    value: Callable[[Tensor, float], float],
    before: float,
    deadline: float,
) -> _Moved | None:
    """The first of the steps dx, dx/2, dx/4, … with a value below ``before``."""
    length = 1.0
    while length > SHORTEST:
        trial = project(x + length * dx)
        point = linearise(trial)
        misfit = float(point.residual.square().sum())
        if isfinite(misfit) and value(trial, misfit) < before:
            return _Moved(length, trial, point, misfit)
        if time.perf_counter() > deadline:
            return None
        length *= 0.5
    return None


def conjugate_gradients(
    operator: Operator, rhs: Tensor, iterations: int, accuracy: float, deadline: float = inf
) -> tuple[Tensor, int]:
    """``A x = rhs`` for a positive semidefinite A; x and the products used.

    Args:
        operator: v ↦ A v.
        rhs: like v.
        iterations: at most.
        accuracy: relative residual to stop at.
        deadline: of ``time.perf_counter``; what was found by then is returned, and every iterate
            is a direction of descent.
    """
    x, residual = torch.zeros_like(rhs), rhs
    direction, square = rhs, float(rhs.square().sum())
    limit = accuracy**2 * square
    for count in range(iterations):
        if square <= limit or (count and time.perf_counter() > deadline):
            return x, count
        product = operator(direction)
        bend = float((direction * product).sum())
        if not bend > 0:  # a direction that nothing bends: the residual is rounding
            return x, count
        x = x + square / bend * direction
        residual = residual - square / bend * product
        fresh = float(residual.square().sum())
        direction = residual + fresh / square * direction
        square = fresh
    return x, iterations


def _free(x: Tensor, rhs: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """1 where a step along the descent moves x, 0 where the edge of the admissible holds it.

    Without this, entries at the edge bend every step and stop the line search (Bertsekas 1982).
    """
    nudge = torch.finfo(x.dtype).eps ** 0.5 * float(x.abs().max().clamp_min(1.0))
    held = (project(x + nudge * rhs.sign()) == x) & (rhs != 0)
    return (~held).to(x)


def _direction(
    point: Point,
    bend: Operator,
    weight: float,
    damping: float,
    rhs: Tensor,
    schedule: Schedule,
    deadline: float,
) -> tuple[Tensor, int]:
    """The step from ``(JᵀJ + ½ λ C + δ) dx = rhs`` on the entries that are free."""
    free = (rhs != 0).to(rhs)
    jacobian = point.jacobian()
    if jacobian is not None:
        dx = _solved(jacobian, bend, weight, damping, rhs, free)
        if dx is not None:
            return dx, 0
    normal = _normal(point, bend, weight, damping)
    return conjugate_gradients(
        lambda v: free * normal(free * v), rhs, schedule.products, schedule.accuracy, deadline
    )


def _solved(
    jacobian: Tensor, bend: Operator, weight: float, damping: float, rhs: Tensor, free: Tensor
) -> Tensor | None:
    """By Cholesky; None where rounding leaves no positive definite matrix."""
    kept = free.flatten() > 0
    size = int(kept.sum())
    if size == 0:
        return torch.zeros_like(rhs)
    eye = torch.eye(rhs.numel(), dtype=rhs.dtype, device=rhs.device)[kept].reshape(-1, *rhs.shape)
    curved = _images(bend, eye).flatten(1)[:, kept]
    own = jacobian[:, kept]
    matrix = own.T @ own + 0.25 * weight * (curved + curved.T)
    scale = float(matrix.diagonal().mean())
    matrix.diagonal().add_(damping + ROUNDED * scale)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        return None
    dx = torch.zeros_like(rhs).flatten()
    dx[kept] = torch.cholesky_solve(rhs.flatten()[kept, None], factor)[:, 0]
    return dx.reshape(rhs.shape)


def _images(operator: Operator, vectors: Tensor) -> Tensor:
    """The operator on every vector, many at once; one by one where it branches on their values."""
    try:
        together: Tensor = torch.vmap(operator, chunk_size=TOGETHER)(vectors)
    except (RuntimeError, ValueError):
        return torch.stack([operator(v) for v in vectors])
    return together


def _normal(point: Point, curvature: Operator, weight: float, damping: float) -> Operator:
    def apply(v: Tensor) -> Tensor:
        out = point.pull(point.push(v)) + 0.5 * weight * curvature(v)
        return out + damping * v if damping else out

    return apply


def _largest(point: Point, v: Tensor) -> float:
    """The curvature along v, a lower estimate of the largest."""
    return float(point.push(v).square().sum() / v.square().sum().clamp_min(1e-300))
