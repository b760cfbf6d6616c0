"""Least squares with Kronecker structure: ``min ‖D_g((I_C ⊗ K)x − g)‖² + ‖D_w(Wx − c)‖²``.

The unknown is a table ``x[c, p]`` of C channels and P positions.  The first block applies one
small matrix ``K`` to every channel of a group; the second block couples the channels, sample by
sample.  The stacked dense matrix is never formed: the normal matrix is assembled from its two
structured parts and factored once, and conjugate gradients with that factor as preconditioner
remove what squaring the condition number costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from rgap.solvers.conjugate import dots, times
from rgap.solvers.positive import backsolve, cholesky_in_place, extremes
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.solvers.svd import singular_values


class Coupling(Protocol):
    """The second block: a linear map of x[S, C, P], known by its action and its Gram matrix."""

    rows: int

    def apply(self, x: Tensor) -> Tensor:
        """W x: [S, C, P] → [S, rows]."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Wᵀ y: [S, rows] → [S, C, P]."""

    def add_gram(self, weights: Tensor, into: Tensor) -> None:
        """Add Wᵀ diag(weights) W to the view ``into`` of shape [C, P, C, P].

        Where W couples no channels of different groups, ``into`` may be the blocks of the groups,
        [groups, C/groups, P, C/groups, P].
        """


@dataclass(frozen=True)
class Kronecker:
    """The first block: K_γ, [groups, rows, P], applied to each of the channels of group γ."""

    matrix: Tensor
    channels: int

    def apply(self, x: Tensor) -> Tensor:
        """K x: [S, C, P] → [S, C, rows]."""
        groups, _, size = self.matrix.shape
        x = x.reshape(x.shape[0], groups, -1, size)
        return torch.einsum("grp,sgcp->sgcr", self.matrix, x).flatten(1, 2)

    def adjoint(self, y: Tensor) -> Tensor:
        """Kᵀ y: [S, C, rows] → [S, C, P]."""
        groups, rows, _ = self.matrix.shape
        y = y.reshape(y.shape[0], groups, -1, rows)
        return torch.einsum("grp,sgcr->sgcp", self.matrix, y).flatten(1, 2)

    def scaled(self, weights: Tensor) -> Kronecker:
        """Rows multiplied by ``weights`` [groups, rows]."""
        return Kronecker(self.matrix * weights[:, :, None], self.channels)

    @cached_property
    def spectra(self) -> Tensor:
        """Singular values of each K_γ, [groups, min(rows, P)]."""
        return singular_values(self.matrix)

    def rank(self, rcond: float | None = None, noise: float = 0.0) -> Rank:
        """Rank of the whole block, summed over groups with one cutoff per group."""
        groups, rows, size = self.matrix.shape
        tolerance = resolve_rcond(rcond, (rows, size), noise=noise)
        ranks = [numerical_rank(values, size, tolerance) for values in self.spectra]
        return Rank.summed(ranks, self.channels // groups)


@dataclass(frozen=True)
class Factor:
    """A factored, error-weighted system: factor once, solve for many right-hand sides."""

    gradient: Kronecker  # rows already weighted
    coupling: Coupling | None
    weights: Tensor | None  # of the coupling rows, [rows]
    cholesky: Tensor  # of AᵀA; of its blocks [blocks, n, n] where it is block diagonal

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """Estimated largest and smallest singular value of A, by subspace iteration."""
        channels, size = self.gradient.channels, self.gradient.matrix.shape[2]

        def columns(operator: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: operator(x.T.reshape(-1, channels, size)).flatten(1).T

        largest, smallest = extremes(
            columns(lambda x: self.adjoint(self.apply(x))),
            columns(self.precondition),
            channels * size,
            self.cholesky,
        )
        return largest**0.5, smallest**0.5

    @property
    def largest(self) -> float:
        """Estimated σ_1 of A."""
        return self.extremes[0]

    @property
    def smallest(self) -> float:
        """Estimated σ_n of A."""
        return self.extremes[1]

    @property
    def condition(self) -> float:
        """Estimated σ_1/σ_n of the weighted stacked matrix."""
        return self.largest / self.smallest if self.smallest > 0 else float("inf")

    def apply(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """A x, the weighted rows of both blocks."""
        if self.coupling is None or self.weights is None:
            return self.gradient.apply(x), None
        return self.gradient.apply(x), self.coupling.apply(x) * self.weights

    def adjoint(self, y: tuple[Tensor, Tensor | None]) -> Tensor:
        """Aᵀ y."""
        out = self.gradient.adjoint(y[0])
        if self.coupling is not None and self.weights is not None and y[1] is not None:
            out = out + self.coupling.adjoint(y[1] * self.weights)
        return out

    def precondition(self, x: Tensor) -> Tensor:
        """(AᵀA)⁻¹ x by the Cholesky factor."""
        if self.cholesky.ndim == 3:  # of every group, or P×P and for all channels of the group
            blocks, size, _ = self.cholesky.shape
            table = x.reshape(x.shape[0], blocks, -1, size)
            out = backsolve(self.cholesky, table.permute(1, 3, 0, 2).flatten(2))
            out = out.reshape(blocks, size, x.shape[0], -1).permute(2, 0, 3, 1)
            return out.reshape(x.shape)
        return backsolve(self.cholesky, x.reshape(x.shape[0], -1).T).T.reshape(x.shape)

    def solve(
        self, rhs: tuple[Tensor, Tensor | None], iterations: int = 60, tolerance: float = 1e-15
    ) -> tuple[Tensor, int]:
        """Least-squares solutions for a batch of weighted right-hand sides.

        Preconditioned CGLS: the factor of the normal matrix is the preconditioner, the products
        with A itself carry the accuracy, so the answer is as good as a QR solve while
        cond(A) < 1e8.

        Args:
            rhs: weighted right-hand sides, ([S, C, rows_g], [S, rows_w] or None).
            iterations: upper limit of refinement steps; 0 trusts the factor alone.
            tolerance: stop when a step changes no solution by more than this, relatively.

        Returns:
            The solutions [S, C, P] and the number of iterations used.
        """
        x = self.precondition(self.adjoint(rhs))
        if iterations == 0:
            return x, 0
        residual = _subtract(rhs, self.apply(x))
        gradient = self.adjoint(residual)
        z = self.precondition(gradient)
        direction, energy = z, dots(gradient, z)
        best = energy.clone()
        for step in range(iterations):
            image = self.apply(direction)
            curvature = dots(image[0], image[0])
            if image[1] is not None:
                curvature = curvature + dots(image[1], image[1])
            alpha = torch.where(curvature > 0, energy / curvature.clamp_min(1e-300), energy * 0)
            update = times(alpha, direction)
            x = x + update
            change = update.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp_min(1e-300)
            if float(change.max()) < tolerance:
                return x, step + 1
            second = None if image[1] is None else times(alpha, image[1])
            residual = _subtract(residual, (times(alpha, image[0]), second))
            gradient = self.adjoint(residual)
            z = self.precondition(gradient)
            fresh = dots(gradient, z)
            # Rounding ends the descent; going on would only random-walk around the solution.
            if bool((fresh > 0.25 * best).all()) and step > 1:
                return x, step + 1
            best = torch.minimum(best, fresh)
            direction = z + times(fresh / energy.clamp_min(1e-300), direction)
            energy = fresh
        return x, iterations


def factor(
    gradient: Kronecker,
    gradient_weights: Tensor,
    coupling: Coupling | None,
    coupling_weights: Tensor | None,
    apart: bool = False,
) -> Factor | None:
    """Factor the weighted normal matrix, or None when it is not numerically positive definite.

    Without a coupling the normal matrix is block diagonal and each K_γᵀK_γ is factored alone;
    with one that keeps the groups apart, each group is.

    Args:
        gradient: the Kronecker block.
        gradient_weights: one over the standard error of its rows, [groups, rows].
        coupling: the second block or None.
        coupling_weights: one over the standard error of its rows, [rows].
        apart: the coupling joins no channels of different groups.
    """
    weighted = gradient.scaled(gradient_weights)
    blocks = weighted.matrix.transpose(1, 2) @ weighted.matrix  # [groups, P, P]
    if coupling is None or coupling_weights is None:
        matrix = blocks
    else:
        groups, _, size = gradient.matrix.shape
        channels = gradient.channels
        parts = groups if apart else 1
        own = channels // parts
        matrix = blocks.new_zeros(parts, own * size, own * size)
        view = matrix.view(parts, own, size, own, size)
        for c in range(channels):
            view[c // own, c % own, :, c % own, :] = blocks[c // (channels // groups)]
        coupling.add_gram(coupling_weights.square(), view if parts > 1 else view[0])
        matrix = matrix if parts > 1 else matrix[0]
    lower = cholesky_in_place(matrix)
    return None if lower is None else Factor(weighted, coupling, coupling_weights, lower)


def _subtract(
    a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    second = None if a[1] is None or b[1] is None else a[1] - b[1]
    return a[0] - b[0], second
