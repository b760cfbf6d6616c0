"""The normal equations of the whole update, ``JᵀΣ⁻¹J dx = JᵀΣ⁻¹ r``.

Applied without forming J, and solved by conjugate gradients; for an input of moderate size formed
and factored, column block by column block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.jacobian.eliminated import Eliminated
from rgap.jacobian.layer import ParameterRows
from rgap.jacobian.linearisation import Linearisation
from rgap.solvers.conjugate import dots, times
from rgap.solvers.positive import backsolve, cholesky_in_place, extremes, resolved

Inverse = Callable[[Tensor], Tensor]

LARGEST = 4096  # unknowns up to which the normal matrix is formed
COLUMNS = 64  # formed at once


@dataclass(frozen=True)
class Normal:
    """JᵀΣ⁻¹J at a point, or JᵀΣ⁻¹PJ where the head's cotangents are eliminated.

    Attributes:
        point: the update linearised.
        weights: 1/σ of the entries of the update, by parameter name, broadcast over each filter.
        free: takes out what the cotangents explain.
        held: entries of x that are no unknowns, as no layer reads them; bool [B, *input_shape].
    """

    point: Linearisation
    weights: ParameterRows
    free: Eliminated | None = None
    held: Tensor | None = None

    def apply(self, v: Tensor) -> Tensor:
        """JᵀΣ⁻¹J v for S directions [S, B, *input_shape]."""
        return self.adjoint(self.point.jvp(v))

    def adjoint(self, rows: ParameterRows) -> Tensor:
        """JᵀΣ⁻¹ r for S updates, or JᵀΣ⁻¹P r."""
        if self.free is not None:
            rows = self.free.explained(rows)[1]
        return self.point.vjp({n: rows[n] * self.weights[n].square() for n in rows})

    def solve(
        self, rows: ParameterRows, precondition: Inverse, limit: int, tolerance: float
    ) -> tuple[Tensor, int, bool]:
        """Least-squares solutions for S updates by preconditioned CG, all at once.

        Args:
            rows: right-hand sides by parameter name, [S, *parameter.shape].
            precondition: approximate inverse, on [S, B, *input_shape].
            limit: iterations at most.
            tolerance: decrease of the energy norm of the residual at which it stops.

        Returns:
            The solutions, the iterations, and whether all of them converged.
        """
        residual = self.adjoint(rows)
        x = torch.zeros_like(residual)
        z = precondition(residual)
        direction, energy = z, dots(residual, z)
        first = energy.clone()
        for iteration in range(limit):
            image = self.apply(direction)
            curvature = dots(direction, image)
            alpha = torch.where(curvature > 0, energy / curvature.clamp_min(1e-300), 0 * energy)
            x = x + times(alpha, direction)
            residual = residual - times(alpha, image)
            z = precondition(residual)
            fresh = dots(residual, z)
            if bool((fresh <= tolerance**2 * first).all()):
                return x, iteration + 1, True
            direction = z + times(fresh / energy.clamp_min(1e-300), direction)
            energy = fresh
        return x, limit, False

    def factored(self) -> Factored | None:
        """The matrix formed and factored; None if that does not resolve its smallest direction."""
        x = self.point.x
        size = x.numel()
        eye = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *x.shape)
        columns, lengths = [], []
        for part in torch.split(eye, COLUMNS):
            rows = self.point.jvp(part)
            weighed = [(rows[n] * self.weights[n]).flatten(1) for n in rows]
            lengths.append(torch.cat(weighed, 1).square().sum(1))
            columns.append(self.adjoint(rows).flatten(1))
        matrix = torch.cat(columns)
        matrix, squares = (matrix + matrix.T) / 2, torch.cat(lengths)
        if self.held is not None:
            unread = self.held.flatten() & (squares == 0)
            matrix.diagonal()[unread] = squares[unread] = 1.0
        lower = cholesky_in_place(matrix.clone())
        # What free cotangents explain of a column takes nothing off what the column rounds.
        if lower is None or not resolved(matrix, lower, squares):
            return None
        return Factored(matrix, lower)

    @property
    def small(self) -> bool:
        """True if the matrix may be formed."""
        return self.point.x.numel() <= LARGEST


@dataclass(frozen=True)
class Factored:
    """JᵀΣ⁻¹J as a matrix, and its Cholesky factor."""

    matrix: Tensor
    lower: Tensor

    def inverse(self, v: Tensor) -> Tensor:
        """(JᵀΣ⁻¹J)⁻¹ v for S directions [S, B, *input_shape]."""
        return backsolve(self.lower, v.flatten(1).T).T.reshape(v.shape)

    def worst(self) -> float:
        """Standard error of the direction that the update fixes least."""
        smallest = extremes(
            lambda v: self.matrix @ v, lambda v: backsolve(self.lower, v), len(self.matrix),
            self.matrix,
        )[1]  # fmt: skip
        return smallest**-0.5 if smallest > 0 else float("inf")
