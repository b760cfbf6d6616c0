"""Square matrices: one LU factorisation for solves and for the ends of the spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rgap.solvers.positive import extremes, transposed_product


@dataclass(frozen=True, eq=False)
class Square:
    """A regular matrix A [n, n] with its LU factors.

    Attributes:
        matrix: A.
        factor: L and U in one matrix.
        pivots: of the factorisation.
    """

    matrix: Tensor
    factor: Tensor
    pivots: Tensor

    def solve(self, rhs: Tensor) -> Tensor:
        """A⁻¹ rhs for [n, m]."""
        solved: Tensor = torch.linalg.lu_solve(self.factor, self.pivots, rhs)
        return solved

    def solve_transposed(self, rhs: Tensor) -> Tensor:
        """A⁻ᵀ rhs for [n, m]."""
        solved: Tensor = torch.linalg.lu_solve(self.factor, self.pivots, rhs, adjoint=True)
        return solved

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """Estimated (σ_1, σ_n), by subspace iteration with AᵀA and its inverse."""
        largest, smallest = extremes(
            lambda x: transposed_product(self.matrix, self.matrix @ x),
            lambda x: self.solve(self.solve_transposed(x)),
            len(self.matrix),
            self.matrix,
        )
        return float(largest**0.5), float(smallest**0.5)


def factored(matrix: Tensor) -> Square | None:
    """LU factors with partial pivoting, half the cost of a QR; None where a pivot is 0.

    ``scipy.linalg.lu_factor``, without its warning.

    >>> made = factored(torch.tensor([[0.0, 2.0], [1.0, 0.0]]).double())
    >>> made.solve(torch.tensor([[4.0], [3.0]]).double()).flatten().tolist()
    [3.0, 2.0]
    >>> factored(torch.ones(2, 2).double()) is None
    True
    """
    factor, pivots, info = torch.linalg.lu_factor_ex(matrix)
    if bool(info.any()) or not bool(factor.diagonal().isfinite().all()):
        return None
    return Square(matrix, factor, pivots)
