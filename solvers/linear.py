"""Matrix-free least squares for the stacked system: LSMR on products alone.

Used where the normal matrix would not fit the memory budget, and to project on the null space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor

from rgap.solvers.kronecker import Coupling, Kronecker
from rgap.solvers.limits import DEPENDENT, ENDS, OPEN, SINGULAR


class Products(Protocol):
    """A matrix known by its products with vectors."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def apply(self, x: Tensor) -> Tensor:
        """A x."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""


@dataclass(frozen=True)
class Stacked:
    """A = [D_g (I ⊗ K); D_w W] known by its products, acting on one table x[C, P]."""

    gradient: Kronecker  # rows already weighted
    coupling: Coupling
    weights: Tensor  # of the coupling rows

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of A."""
        _, rows, size = self.gradient.matrix.shape
        return self.gradient.channels * rows + self.coupling.rows, self.gradient.channels * size

    def apply(self, x: Tensor) -> Tensor:
        """A x for a table [C, P], flattened."""
        table = x.reshape(1, self.gradient.channels, -1)
        first = self.gradient.apply(table).flatten()
        return torch.cat([first, (self.coupling.apply(table) * self.weights).flatten()])

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y as a flat table."""
        rows = self.gradient.matrix.shape[1]
        cut = self.gradient.channels * rows
        first = self.gradient.adjoint(y[:cut].reshape(1, self.gradient.channels, rows))
        return (first + self.coupling.adjoint((y[cut:] * self.weights)[None])).flatten()


@dataclass(frozen=True)
class Iterate:
    """Outcome of one LSMR run."""

    x: Tensor
    iterations: int
    converged: bool
    condition: float


def solve_lsmr(
    system: Products,
    rhs: Tensor,
    start: Tensor | None = None,
    limit: int = 4000,
    tolerance: float = ENDS,
) -> Iterate:
    """Least-squares solution closest to ``start``.

    What lies in the null space of A keeps its value from ``start``: two random starts that end
    at the same answer show that there is no null space.
    """

    def to(x: object) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float64, device=rhs.device).flatten()

    operator = LinearOperator(
        system.shape,
        matvec=lambda x: system.apply(to(x)).cpu().numpy(),
        rmatvec=lambda y: system.adjoint(to(y)).cpu().numpy(),
        dtype=float,
    )
    x0 = rhs.new_zeros(system.shape[1]) if start is None else start.flatten()
    gap = rhs - system.apply(x0)
    result = lsmr(
        operator, gap.cpu().numpy(), atol=tolerance, btol=tolerance, conlim=SINGULAR, maxiter=limit
    )
    step, reason, count = result[0], int(result[1]), int(result[2])
    x = x0 + torch.as_tensor(step, dtype=torch.float64, device=rhs.device)
    return Iterate(x, count, reason in (0, 1, 2, 4, 5), float(result[6]))


def null_projection(stacked: Stacked, vectors: Tensor, limit: int = 4000) -> Tensor:
    """Project rows [k, C·P] on the null space of A, orthonormalised; short components go."""
    kept = []
    for vector in vectors:
        v = vector / vector.norm()
        part = solve_lsmr(stacked, v.new_zeros(stacked.shape[0]), v, limit).x
        if float(part.norm()) > OPEN:
            kept.append(part)
    if not kept:
        return vectors[:0]
    q, r = torch.linalg.qr(torch.stack(kept).T)
    basis: Tensor = q[:, r.diagonal().abs() > DEPENDENT].T
    return basis
