"""Sets of directions [S, B, ...]: lengths, combinations, orthonormal bases of their span."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.solvers.positive import outer_products

NEARLY = 1e-6  # parallel: what is left of a direction after the others, lost in their Gram matrix


@dataclass(frozen=True)
class Open:
    """Directions left open: at some place, with the cotangent direction that each entails.

    Attributes:
        du: [S, B, ...].
        dk: [S, B, ...], of the cotangent there.
    """

    du: Tensor
    dk: Tensor


def orthonormalising(directions: Tensor) -> Tensor:
    """Change C with orthonormal Cᵀ du: by the Cholesky factor where that is accurate enough."""
    if len(directions) == 0:
        return directions.new_zeros(0, 0)
    scale = 1.0 / lengths(directions).clamp_min(1e-300)
    flat = directions.flatten(1)
    lower, info = torch.linalg.cholesky_ex(outer_products(flat) * scale[:, None] * scale)
    upper = lower.T
    diagonal = upper.diagonal().abs()
    if bool(info) or float(diagonal.min()) < NEARLY * float(diagonal.max()):
        upper = torch.linalg.qr(flat.T * scale, mode="r").R
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return scale[:, None] * inverse


def combined(change: Tensor, directions: Tensor) -> Tensor:
    """changeᵀ directions, [a, b] and [a, *shape] → [b, *shape]."""
    return (change.T @ directions.flatten(1)).reshape(change.shape[1], *directions.shape[1:])


def padded(rows: Tensor, before: int) -> Tensor:
    """The rows below ``before`` rows of zeros."""
    return torch.cat([rows.new_zeros(before, rows.shape[1]), rows])


def lengths(directions: Tensor) -> Tensor:
    """Length of each direction, [S]."""
    length: Tensor = directions.flatten(1).norm(dim=1)  # norm() is untyped
    return length


def scaled(scale: Tensor, directions: Tensor) -> Tensor:
    """Each direction times its entry of ``scale`` [S]."""
    return directions * scale.reshape(-1, *(1 for _ in directions.shape[1:]))
