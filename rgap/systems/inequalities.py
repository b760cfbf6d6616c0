"""What a ReLU that is off still says: its pre-activation is not positive.

Such a unit gives no equation.  As an inequality it stands beside the equations of its stage: the
residual ``max(z, 0)`` is 0 where it holds, and Gauss–Newton sees the ones that are violated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rgap.affine import Affine


class Equations(Protocol):
    """Equations for the input of a layer."""

    @property
    def equations(self) -> int:
        """How many."""

    @property
    def expected(self) -> float:
        """Squared misfit that the errors of the right-hand side explain."""

    def misfit(self, u: Tensor) -> Tensor:
        """Weighed residual at u [B, *in_shape], flat."""


@dataclass(frozen=True)
class Bounded:
    """Equations of a stage, and ``(W u + b)_i ≤ 0`` for the units that are off.

    Attributes:
        rows: the equations.
        affine: of the stage.
        scales: 1/‖W_i‖ for a unit that is off, 0 for one that is on, [B, *out_shape].
    """

    rows: Equations
    affine: Affine
    scales: Tensor

    @classmethod
    def of(cls, rows: Equations, affine: Affine, off: Tensor) -> Bounded:
        """The inequalities of the units in ``off`` [B, *out_shape], each over the norm of its row.

        Args:
            rows: the equations of the units that are on.
            affine: of the stage.
            off: True for a unit that is off.
        """
        ones = affine.weight.new_ones(1, *affine.in_shape)
        norms = affine.squared().forward(ones).sqrt().clamp_min(1e-300)
        return cls(rows, affine, off.to(norms) / norms)

    @property
    def equations(self) -> int:
        """Those of the units that are on."""
        return self.rows.equations

    @property
    def expected(self) -> float:
        """That of the equations: a true inequality has no residual."""
        return self.rows.expected

    def misfit(self, u: Tensor) -> Tensor:
        """The residual of the equations, then by how far each inequality is missed."""
        over = (self.affine.forward(u) * self.scales).clamp_min(0)
        return torch.cat([self.rows.misfit(u), over.flatten()])
