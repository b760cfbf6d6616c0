"""The linear equations of one stage: gradient, weight and virtual constraints, by layer kind.

Dispatch by the kind of the affine map; an unknown kind raises and names the layer.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rgap.constraints import convnd, linear
from rgap.network.affine import Affine
from rgap.solvers.kronecker import Kronecker


class WeightConstraint(Protocol):
    """What every layer kind offers of its weight block (see ``convnd`` and ``linear``)."""

    rows: int

    def apply(self, x: Tensor) -> Tensor:
        """W x without bias: tables [S, C, P] → rows [S, rows]."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Wᵀ y: rows [S, rows] → tables [S, C, P]."""

    def add_gram(self, weights: Tensor, into: Tensor) -> None:
        """Add Wᵀ diag(weights) W to ``into`` [C, P, C, P], or to the blocks of its groups."""

    def fold(self, x: Tensor) -> Tensor:
        """Tables [S, C, P] → samples [S·B, *in_shape]."""

    def unfold(self, u: Tensor, count: int = 1) -> Tensor:
        """Samples [S·B, *in_shape] → tables [S, C, P]."""


def gradient_constraint(affine: Affine, cotangent: Tensor, *, read_only: bool = False) -> Kronecker:
    """The matrix of the gradient constraint of ``affine`` for the cotangent k [B, *out].

    Args:
        affine: the layer.
        cotangent: k.
        read_only: leave out the columns of positions that no kernel reads (:attr:`Affine.reads`).
    """
    if affine.geometry is None:
        return linear.gradient_constraint(affine, cotangent)
    return convnd.gradient_constraint(affine, cotangent, read_only=read_only)


def gradient_rows(affine: Affine, gradient: Tensor) -> Tensor:
    """∂L/∂W laid out as right-hand sides of the gradient constraint, [..., C, rows]."""
    if affine.geometry is None:
        return linear.gradient_rows(affine, gradient)
    return convnd.gradient_rows(affine, gradient)


def weight_constraint(affine: Affine, batch: int, *, read_only: bool = False) -> WeightConstraint:
    """The weight constraint of ``affine`` for a batch of ``batch`` samples.

    With ``read_only`` its tables leave out the positions that no kernel reads; ``fold`` puts 0
    there.
    """
    if affine.geometry is None:
        return linear.WeightConstraint(affine, batch)
    return convnd.WeightConstraint(affine, batch, read_only=read_only)


def dense_weights(affine: Affine) -> Tensor:
    """W as a matrix [outputs, inputs], entry by entry."""
    return affine.weight if affine.geometry is None else convnd.dense_weights(affine)
