"""Positive definite matrices: a Cholesky factor, solves with it, and the extreme eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rgap.solvers.limits import SQUARED

STEPS = 3  # of subspace iteration
BLOCK = 4  # vectors of it
STRIP = 512  # rows of a product at once


def cholesky_in_place(matrix: Tensor) -> Tensor | None:
    """Lower factor of a symmetric matrix [..., n, n], which it overwrites; None if not definite."""
    # The transposed view of a symmetric matrix has the column order of LAPACK: no copy is made.
    lower, info = matrix.mT, torch.empty(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return None if bool(info.any()) else lower


def outer_products(rows: Tensor) -> Tensor:
    """A Aᵀ of A [n, m], strip by strip of its lower half: BLAS's ``syrk``, which torch lacks."""
    size = len(rows)
    products = rows.new_empty(size, size)
    for start in range(0, size, STRIP):
        own = slice(start, min(start + STRIP, size))
        torch.mm(rows[own], rows[: own.stop].T, out=products[own, : own.stop])
        products[:start, own] = products[own, :start].T
    return products


def transposed_product(matrix: Tensor, columns: Tensor) -> Tensor:
    """Aᵀ y of a few columns, A read row by row: ten times faster than through ``matrix.T``."""
    return (columns.T @ matrix).T


def backsolve(lower: Tensor, rhs: Tensor) -> Tensor:
    """(LLᵀ)⁻¹ rhs for right-hand sides [..., n, m]."""
    # torch.cholesky_solve copies the factor first: ten times slower for a few columns.
    half = torch.linalg.solve_triangular(lower, rhs, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return solved


def resolved(matrix: Tensor, lower: Tensor, squares: Tensor | None = None) -> bool:
    """True if what A = JᵀJ was formed with leaves its smallest eigenvalue, and so its inverse.

    Sums round by eps of ``√(a_ii a_jj)``, so that A scaled to a diagonal of ones is off by √n·eps
    in norm: singular values of J below the root of that are lost.

    Args:
        matrix: A, symmetric positive definite.
        lower: its Cholesky factor.
        squares: of the lengths of what its columns were computed from; by default its diagonal.
    """
    rounding: float = len(matrix) ** 0.5 * torch.finfo(matrix.dtype).eps
    return smallest_scaled(matrix, lower, squares) > SQUARED * rounding


def smallest_scaled(matrix: Tensor, lower: Tensor, squares: Tensor | None = None) -> float:
    """Smallest eigenvalue of A once its columns have length one; arguments as above."""
    squares = matrix.diagonal() if squares is None else squares
    size = squares.clamp_min(1e-300).sqrt()[:, None]
    return extremes(
        lambda v: matrix @ (v / size) / size,
        lambda v: size * backsolve(lower, size * v),
        len(matrix),
        matrix,
    )[1]


def extremes(
    product: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    size: int,
    like: Tensor,
) -> tuple[float, float]:
    """Estimated largest and smallest eigenvalue of a positive definite A, by subspace iteration.

    Args:
        product: X ↦ A X for X [size, m].
        inverse: X ↦ A⁻¹ X.
        size: order of A.
        like: a tensor of the device and the dtype to work in.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, min(BLOCK, size), generator=generator, dtype=torch.float64).to(like)
    start = torch.linalg.qr(start).Q

    def norm(operator: Callable[[Tensor], Tensor]) -> float:
        block = start
        for _ in range(STEPS):
            image = operator(block)
            if not bool(image.isfinite().all()):  # the inverse of what is singular
                return float("inf")
            block = torch.linalg.qr(image).Q
        image = operator(block)
        finite = bool(image.isfinite().all())
        return float(torch.linalg.matrix_norm(image, 2)) if finite else float("inf")

    reciprocal = norm(inverse)
    return norm(product), 1.0 / reciprocal if reciprocal > 0 else 0.0
