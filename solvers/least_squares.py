"""Levenberg–Marquardt for many starts of one small non-linear least-squares problem at once.

Every start has its own damping; one batched factorisation an iteration serves all of them.  The
equations hand over cost, gradient and Gauss–Newton matrix, so that residuals with many more rows
than unknowns never have to be stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rgap.solvers.tall import tall_qr

FIRST = 1e-2  # damping of the first step, relative to the diagonal of the Gauss–Newton matrix
EASIER, HARDER = 0.2, 4.0  # what a step that helps and one that does not do to it
STEEPER = 2.5  # the second of them with acceleration, where a refusal means less
LEAST, MOST = 1e-14, 1e8  # of the damping: rounding of the diagonal, and no step at all
BEND = 0.1  # share of a step at which the residual's second derivative is measured
WORTH = 0.25  # of the cost: a last step that leaves more than this was the last one
STILL = 1e-9  # a step this small against the unknowns changes nothing any more


class Equations(Protocol):
    """A non-linear least-squares problem, evaluated at S points at once."""

    def cost(self, t: Tensor) -> Tensor:
        """‖r(t)‖² in units in which 1 is no information at all, [S, n] → [S]."""

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cost [S], Jᵀr [S, n] and JᵀJ [S, n, n]."""

    def some(self, index: Tensor) -> Equations:
        """The problem at some of the points; itself, where all points share one."""


class Linearised(Protocol):
    """The same problem with its Jacobian at hand."""

    def cost(self, t: Tensor) -> Tensor:
        """‖r(t)‖², [S, n] → [S]."""

    def linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Residual [S, m] and Jacobian [S, m, n]."""

    def some(self, index: Tensor) -> Linearised:
        """The problem at some of the points; itself, where all points share one."""


@dataclass(frozen=True)
class Roots:
    """Where the starts ended.

    Attributes:
        value: [S, n].
        cost: ‖r‖² there, [S]; infinite where a start left the numbers.
        settled: the last step changed nothing any more, or the cost is below the tolerance, [S].
        iterations: done.
    """

    value: Tensor
    cost: Tensor
    settled: Tensor
    iterations: int


def levenberg_marquardt(
    equations: Equations,
    start: Tensor,
    *,
    tolerance: float = 0.0,
    enough: float = 1.0,
    patience: int | None = None,
    max_iterations: int = 60,
) -> Roots:
    """Minimise ``‖r(t)‖²`` from every start; corresponds to ``scipy.optimize.least_squares``.

    A start that has settled is left alone: only the others cost anything from then on.

    Args:
        equations: cost, gradient and Gauss–Newton matrix.
        start: [S, n].
        tolerance: cost at which a start counts as settled.
        enough: share of the starts that must settle before all of them stop.
        patience: iterations in which no start settles after which all of them stop, once a
            quarter of them has settled; no such limit if None.
        max_iterations: evaluations of the Gauss–Newton matrix at most.

    Returns:
        The :class:`Roots`, in the order of the starts.

    Source: Marquardt (1963), with the damping scaled by the diagonal.

    >>> class Circle:
    ...     def cost(self, t):
    ...         return (t.square().sum(1) - 1.0).square()
    ...     def normal(self, t):
    ...         r, j = t.square().sum(1) - 1.0, 2 * t
    ...         return r.square(), j * r[:, None], j[:, :, None] * j[:, None, :]
    ...     def some(self, index):
    ...         return self
    >>> found = levenberg_marquardt(Circle(), torch.tensor([[3.0, 0.0], [0.1, 0.1]]).double())
    >>> found.value.norm(dim=1).allclose(torch.ones(2).double())
    True
    """
    t = start.clone()
    if t.shape[1] == 0:  # nothing is unknown
        return Roots(t, equations.cost(t), t.new_ones(len(t), dtype=torch.bool), 0)
    cost = equations.cost(t).nan_to_num(torch.inf, posinf=torch.inf)
    settled = cost <= tolerance
    damping = t.new_full((len(t),), FIRST)
    done = last = 0
    while done < max_iterations and float(settled.double().mean()) < enough:
        if patience is not None and done - last > patience and 4 * int(settled.sum()) >= len(t):
            break
        done += 1
        live = (~settled).nonzero().flatten()
        own = equations.some(live)
        at, before, weight = t[live], cost[live], damping[live]
        _, gradient, matrix = own.normal(at)
        step, solved = _step(gradient, matrix, weight)
        fresh = own.cost(at + step).nan_to_num(torch.inf, posinf=torch.inf)
        better = solved & (fresh < before)
        # Checked before the damping grows: a refused step is short, which proves nothing.
        small = step.norm(dim=1) <= STILL * at.norm(dim=1)
        settled[live] = (fresh.minimum(before) <= tolerance) | (solved & small)
        last = done if bool(settled[live].any()) else last
        damping[live] = torch.where(better, weight * EASIER, weight * HARDER).clamp(LEAST, MOST)
        t[live] = torch.where(better[:, None], at + step, at)
        cost[live] = torch.where(better, fresh, before)
    return Roots(t, cost, settled, done)


def refine(equations: Linearised, t: Tensor, steps: int = 4) -> Tensor:
    """Last Gauss–Newton steps by QR: the normal equations lose half the digits of a flat direction.

    A step that does not lower the cost is not taken.

    Args:
        equations: residual and Jacobian.
        t: near a minimum, [S, n].
        steps: at most.
    """
    if t.shape[1] == 0:
        return t
    t, cost = t.clone(), equations.cost(t)
    live = torch.arange(len(t), device=t.device)
    for _ in range(steps):
        own = equations.some(live)
        residual, jacobian = own.linear(t[live])
        trial = t[live] - triangular_solve(jacobian, residual)
        before = cost[live]
        fresh = own.cost(trial).nan_to_num(torch.inf, posinf=torch.inf)
        t[live] = torch.where((fresh < before)[:, None], trial, t[live])
        cost[live] = fresh.minimum(before)
        live = live[fresh < WORTH * before]
        if len(live) == 0:
            break
    return t


def geodesic(
    equations: Linearised,
    start: Tensor,
    *,
    tolerance: float = 0.0,
    enough: float = 0.0,
    max_iterations: int = 150,
    first: float = 1e-3,
    follow: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> Roots:
    """Levenberg–Marquardt by QR with geodesic acceleration, for small, badly conditioned problems.

    The normal equations of :func:`levenberg_marquardt` stall in a narrow curved valley; here each
    step bends along it by the second derivative of the residual in its own direction.

    Args:
        equations: residual and Jacobian.
        start: [S, n].
        tolerance: cost at which a start counts as solved.
        enough: share of the starts that must be solved before all stop; at least one.
        max_iterations: at most.
        first: damping of the first step, relative to the mean of the diagonal of JᵀJ.
        follow: where a step from t leads, (t, step) ↦ t + step to first order; along a valley
            whose course is known it may bend.

    Source: Transtrum and Sethna (2012).

    >>> class Valley:  # of Rosenbrock
    ...     def cost(self, t):
    ...         return self.linear(t)[0].square().sum(1)
    ...     def linear(self, t):
    ...         x, y = t[:, 0], t[:, 1]
    ...         r = torch.stack([1 - x, 1e3 * (y - x * x)], 1)
    ...         j = torch.stack([torch.stack([-1 + 0 * x, 0 * x], 1),
    ...                          torch.stack([-2e3 * x, 1e3 + 0 * x], 1)], 1)
    ...         return r, j
    >>> found = geodesic(Valley(), torch.tensor([[-1.2, 1.0]]).double(), tolerance=1e-24)
    >>> bool((found.value - 1).abs().max() < 1e-9)
    True
    """
    t, cost = start.clone(), equations.cost(start).nan_to_num(torch.inf)
    size = t.shape[1]
    damping = t.new_full((len(t),), first)
    done = 0
    while done < max_iterations and int((cost <= tolerance).sum()) < max(1, enough * len(t)):
        done += 1
        residual, jacobian = equations.linear(t)
        rows = residual.shape[1]
        scale = jacobian.square().sum((1, 2)) / size
        eye = torch.eye(size, dtype=t.dtype, device=t.device)
        eye = eye * (damping * scale).sqrt()[:, None, None]
        basis, upper = tall_qr(torch.cat([jacobian, eye], 1))
        across = basis[:, :rows].transpose(1, 2)

        def solve(r: Tensor, across: Tensor = across, upper: Tensor = upper) -> Tensor:
            rhs = across @ r[:, :, None]
            out: Tensor = torch.linalg.solve_triangular(upper, rhs, upper=True)[:, :, 0]
            return -out

        velocity = solve(residual)
        ahead = equations.linear(follow(t, BEND * velocity))[0]
        along = (jacobian @ velocity[:, :, None])[:, :, 0]
        bend = solve(2.0 / BEND * ((ahead - residual) / BEND - along))
        gentle = 2.0 * bend.norm(dim=1) < 0.75 * velocity.norm(dim=1)
        bent = velocity + 0.5 * torch.where(gentle[:, None], bend, torch.zeros_like(bend))
        trial = follow(t, bent)
        fresh = equations.cost(trial).nan_to_num(torch.inf)
        better = fresh < cost
        t = torch.where(better[:, None], trial, t)
        cost = torch.where(better, fresh, cost)
        damping = torch.where(better, damping * EASIER, damping * STEEPER).clamp(1e-18, MOST)
    return Roots(t, cost, cost <= tolerance, done)


def triangular_solve(jacobian: Tensor, residual: Tensor) -> Tensor:
    """``J⁺ r`` by QR for S tall Jacobians [S, m, n], [S, m] → [S, n]; 0 without full rank."""
    basis, upper = tall_qr(jacobian)
    rhs = basis.transpose(1, 2) @ residual[:, :, None]
    out: Tensor = torch.linalg.solve_triangular(upper, rhs, upper=True)[:, :, 0]
    fine = out.isfinite().all(1, keepdim=True)
    return torch.where(fine, out, torch.zeros_like(out))


def _step(gradient: Tensor, matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Damped Gauss–Newton steps and which of them could be computed."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    scale = diagonal + 1e-12 * diagonal.amax(1, keepdim=True)
    lower, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(damping[:, None] * scale))
    step = -torch.cholesky_solve(gradient[:, :, None], lower)[:, :, 0]
    fine = (info == 0) & step.isfinite().all(1)
    return torch.where(fine[:, None], step, torch.zeros_like(step)), fine
