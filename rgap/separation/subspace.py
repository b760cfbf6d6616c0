"""What every sample of a mixture satisfies on its own: subspace consistency.

Some function f of the sample must lie in a known subspace with orthonormal basis P:
``(I − PPᵀ) f(q) = 0`` for x = V q.  Below a second fully connected layer f is that layer's input
and P the row space of its gradient; at a softmax head f is the cotangent p − e_c and P the range of
the head's gradient.  Nothing is inverted, so any activation serves.

Where φ is linear between two samples, every point of the line through them satisfies the equations
of both: ``f(q)`` moves inside the span of their own images.  That is so for samples that share a
whole pattern of active units of a piecewise linear φ, and to working precision for samples that are
nearly alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.network.chain import Stage
from rgap.precision import Precision
from rgap.separation.mixture import Mixture
from rgap.solvers.least_squares import refine, triangular_solve

LARGEST = 2**21  # entries of the Jacobians that are formed at once
VANISHED = 1e-40  # ‖f‖² below which f is nothing
FLAT = 1e-8  # σ of a direction that no equation of a root sees, relative
BLURRED = 3.0  # times the error of P that such a direction may seem to be seen by
MOST = 1e-2  # relative σ above which a direction counts as seen, whatever the error of P


@dataclass(frozen=True)
class Consistency(ABC):
    """The equations ``(I − PPᵀ) f(q) = 0`` that every sample of a mixture satisfies.

    Attributes:
        samples: the mixture whose rows q are looked for.
        basis: P, [m, p], orthonormal columns.
        blur: standard error of the entries of each column of P, [p].
        unit: relative rounding of the entries of f.
    """

    samples: Mixture
    basis: Tensor
    blur: Tensor
    unit: float

    @property
    @abstractmethod
    def source(self) -> Stage:
        """The stage whose gradient P comes from."""

    @abstractmethod
    def value(self, q: Tensor) -> Tensor:
        """f(q), [S, R] → [S, m]."""

    @abstractmethod
    def derivative(self, q: Tensor, along: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """f(q) [S, m] and ∂f/∂q [S, m, R], or its product with ``along`` [R, n], [S, m, n]."""

    def begin(self, count: int, idle: int, generator: torch.Generator) -> Consistency:
        """The equations for ``count`` fresh starts after ``idle`` rounds that found nothing."""
        return self

    def at(self, index: Tensor) -> Consistency:
        """The equations of some of the starts."""
        return self

    def within(self, directions: Tensor) -> Consistency:
        """The equations where q moves along some directions N, [R, n], only."""
        return self

    def labelled(self, labels: Tensor) -> Consistency:
        """The equations of points with these labels, [S], where they differ by label."""
        return self

    def thorough(self) -> Consistency:
        """The equations that the last steps of a root should satisfy."""
        return self

    def kinds(self, count: int) -> Tensor:
        """A number for the equations of each of ``count`` starts, equal where they are, [count]."""
        return torch.zeros(count, dtype=torch.long, device=self.samples.weights.device)

    def across_kinks(self, q: Tensor) -> Tensor:
        """Points next to q [R], one on each side of every kink of f that it lies at, [n, R]."""
        return q.new_zeros(0, len(q))

    @abstractmethod
    def pusher(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """∂f of samples x [S, n] along dx, of any direction, not only of the mixture's."""

    @abstractmethod
    def rounding(self, x: Tensor, precision: Precision) -> Tensor:
        """Standard error of the client's own evaluation of f at samples x [S, n], [S, m]."""

    @abstractmethod
    def basis_errors(
        self, k: Tensor, f: Tensor, precision: Precision
    ) -> Callable[[Tensor], Tensor]:
        """A draw of the error of Pᵀ [p, m], given the draw E of the error of G.

        Args:
            k: cotangents at the layer that P comes from, [R, ...].
            f: [R, m].
            precision: of the update.
        """

    def project(self, f: Tensor) -> Tensor:
        """(I − PPᵀ) f, [..., m]."""
        return f - (f @ self.basis) @ self.basis.T

    def projected(self, q: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """f(q) [S, m] and (I − PPᵀ) ∂f/∂q along [R, n], [S, m, n].

        J is projected before it is squared: ‖J‖² − ‖PᵀJ‖² cancels where samples are alike.
        """
        f, jacobian = self.derivative(q, along)
        return f, jacobian - self.basis @ (self.basis.T @ jacobian)

    def tolerance(self, f: Tensor) -> Tensor:
        """The relative cost that rounding alone explains, [S, m] → [S]."""
        share = f @ self.basis
        blurred = (share * self.blur).square().sum(1) * self.equations / _size(f)
        return blurred + (4.0 * self.unit) ** 2

    @property
    def rows(self) -> int:
        """Entries of a projected f."""
        return self.basis.shape[0]

    @property
    def equations(self) -> int:
        """Independent equations a sample has to satisfy."""
        return self.basis.shape[0] - self.basis.shape[1]


@dataclass(frozen=True)
class Restricted:
    """The consistency on the affine subspace q = q₀ + N t, for the solver.

    Attributes:
        consistency: f and P.
        origin: q₀, [R].
        directions: N, [R, n], orthonormal columns.
    """

    consistency: Consistency
    origin: Tensor
    directions: Tensor

    def rows(self, t: Tensor) -> Tensor:
        """Points q = q₀ + N t, [S, R]."""
        return self.origin + t @ self.directions.T

    def coordinates(self, q: Tensor) -> Tensor:
        """The t nearest to q."""
        return (q - self.origin) @ self.directions

    def cost(self, t: Tensor) -> Tensor:
        """‖(I − PPᵀ) f‖² / ‖f‖²."""
        f = self.consistency.value(self.rows(t))
        cost = self.consistency.project(f).square().sum(1) / _size(f)
        # A saturated softmax says nothing: p = e_c lies in every subspace.
        return torch.where(_size(f) > VANISHED, cost, torch.full_like(cost, torch.inf))

    def some(self, index: Tensor) -> Restricted:
        """The equations of some of the starts."""
        return replace(self, consistency=self.consistency.at(index))

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cost, Jᵀr and JᵀJ, a few starts at a time."""
        parts = []
        for index in self._few(t):
            residual, jacobian = self.some(index).linear(t[index])
            gradient = (residual[:, None, :] @ jacobian)[:, 0]
            matrix = jacobian.transpose(1, 2) @ jacobian
            parts.append((residual.square().sum(1), gradient, matrix))
        cost, gradient, matrix = (torch.cat(part) for part in zip(*parts, strict=True))
        return cost, gradient, matrix

    def refined(self, t: Tensor) -> Tensor:
        """Last steps by QR, a few starts at a time."""
        if len(t) == 0:
            return t
        return torch.cat([refine(self.some(index), t[index]) for index in self._few(t)])

    def steps(self, t: Tensor) -> Tensor:
        """Undamped Gauss–Newton steps, [S, n]."""
        if len(t) == 0 or t.shape[1] == 0:
            return torch.zeros_like(t)
        steps = []
        for index in self._few(t):
            residual, jacobian = self.some(index).linear(t[index])
            steps.append(-triangular_solve(jacobian, residual))
        return torch.cat(steps)

    def linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Residual [S, m] and Jacobian [S, m, n], over ‖f‖."""
        f, jacobian = self.consistency.projected(self.rows(t), self.directions)
        size = _size(f).sqrt()
        return self.consistency.project(f) / size[:, None], jacobian / size[:, None, None]

    def _few(self, t: Tensor) -> tuple[Tensor, ...]:
        entries = self.consistency.rows * max(t.shape[1], 1)
        return torch.split(torch.arange(len(t), device=t.device), max(1, LARGEST // entries))


def restricted(consistency: Consistency, duals: Tensor | None = None) -> Restricted:
    """The subspace ``w·q = 1``, ``d·q = 0`` for every found d."""
    w = consistency.samples.weights
    rows = w[None] if duals is None else torch.cat([w[None], duals])
    size = rows.norm(dim=1, keepdim=True)
    full, upper = torch.linalg.qr((rows / size).T, mode="complete")
    count = len(rows)
    rhs = w.new_zeros(count, 1)
    rhs[0] = 1.0 / float(size[0])
    inner = torch.linalg.solve_triangular(upper[:count].T, rhs, upper=False)
    directions = full[:, count:]
    origin = (full[:, :count] @ inner)[:, 0]
    return Restricted(consistency.within(directions), origin, directions)


def open_directions(consistency: Consistency, q: Tensor) -> int:
    """How many directions the equations leave open at q [R], up to the error of P."""
    whole = restricted(consistency)
    if whole.directions.shape[1] == 0:
        return 0
    slope = consistency.derivative(q[None], whole.directions)[1][0]
    values = torch.linalg.svdvals(consistency.project(slope.T))
    blur = float(consistency.blur.max()) * consistency.basis.shape[0] ** 0.5
    # Against f's own slope: where all samples share one pattern nothing is left of it.
    largest = float(torch.linalg.matrix_norm(slope, 2))
    return int((values < max(FLAT, min(BLURRED * blur, MOST)) * largest).sum())


def on_line(consistency: Consistency, q: Tensor) -> bool:
    """True if q [R] lies on a line of solutions, or at its end: a kink, open from one side."""
    points = torch.cat([q[None], consistency.across_kinks(q)])
    return any(open_directions(consistency, point) > 0 for point in points)


def along_directions(matrix: Tensor, along: Tensor | None) -> Tensor:
    """The slope M of a linear map, or its product with some directions."""
    return matrix if along is None else matrix @ along


def _size(f: Tensor) -> Tensor:
    return f.square().sum(1).clamp_min(1e-300)
