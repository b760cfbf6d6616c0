"""Which entries of a stage's input its equations fix, where they leave directions of it open.

With A the error-weighted equations and ``AᵀA = Σ λ_i v_i v_iᵀ`` the direction v_i is known to the
standard error ``λ_i^{-1/2}``.  Directions known to less than a set error span the open space N.
Entry j is determined if e_j is orthogonal to N: the norm ``r_j`` of its row of an orthonormal
basis of N is zero up to rounding.  Its error is then that of the directions that are known, and
at most ``r_j`` times the length of what N holds of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.limits import EIGENVALUE, ROW
from rgap.precision import UNKNOWN, Estimate
from rgap.solvers.kronecker import Factor

MOST = 3072  # unknowns up to which the weighted equations are decomposed (28 s on one core)


@dataclass(frozen=True)
class Kept(Factor):
    """The equations on the directions that they fix: ``(AᵀA)⁻¹`` there and 0 on the open ones.

    Attributes:
        basis: v_i of the directions that are known, [n, r].
        eigenvalues: λ_i, [r].
        rows: r_j, the norm of each entry's row of the open space's basis, [n].
    """

    basis: Tensor
    eigenvalues: Tensor
    rows: Tensor

    def precondition(self, x: Tensor) -> Tensor:
        """Σ v_i v_iᵀ x / λ_i."""
        flat = x.reshape(x.shape[0], -1)
        return ((flat @ self.basis) / self.eigenvalues @ self.basis.T).reshape(x.shape)

    @property
    def largest(self) -> float:
        """σ_1 of A."""
        return float(self.eigenvalues.max().sqrt())

    @property
    def smallest(self) -> float:
        """The smallest σ of A that counts."""
        return float(self.eigenvalues.min().sqrt())

    def determined(self) -> Tensor:
        """Entries orthogonal to the open space, bool [n]."""
        return self.rows <= ROW


def kept(whole: Factor, matrix: Tensor, error: float) -> Kept | None:
    """The directions that the equations fix, or None if there are none.

    Args:
        whole: the weighted equations; its own factor is not used.
        matrix: AᵀA, [n, n].
        error: standard error above which a direction is open.
    """
    values, vectors = torch.linalg.eigh(matrix)
    # AᵀA holds eigenvalues only down to the rounding of its largest one.
    rounding = len(values) * torch.finfo(values.dtype).eps * float(values.max())
    fixed = values > max(error**-2, EIGENVALUE * rounding)
    if not bool(fixed.any()):
        return None
    rows = vectors[:, ~fixed].norm(dim=1)
    return Kept(
        whole.gradient,
        whole.coupling,
        whole.weights,
        whole.cholesky,
        vectors[:, fixed],
        values[fixed],
        rows,
    )


def marked(known: Estimate, determined: Tensor, rows: Tensor, signs: Tensor) -> Estimate:
    """A solution with what is open marked as unknown, and what leaks into the rest as its error.

    Open entries keep the value of the shortest solution: one of many.

    Args:
        known: u [B, *in_shape] with its ensemble.
        determined: bool [B, *in_shape].
        rows: r_j, [B, *in_shape].
        signs: ±1 for every member and entry, [S, B, *in_shape].
    """
    length = float(known.value.norm())  # that of an open part nobody has seen: of this order
    leak = rows * length * signs
    error = torch.where(determined, known.error + leak, UNKNOWN * signs)
    return Estimate(known.value, error)
