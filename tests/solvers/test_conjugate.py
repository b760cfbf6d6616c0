"""Conjugate gradients on products alone: a balance of columns, and an end that is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rgap.solvers.conjugate import cgls


def uneven(null: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with columns of very different lengths, the last few a sum of others; lengths."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(80, 40, generator=generator, dtype=torch.float64)
    matrix *= torch.logspace(0, -3, 40, dtype=torch.float64)
    for number in range(null):
        matrix[:, -1 - number] = matrix[:, number] + matrix[:, number + 1]
    return matrix, matrix.square().sum(0, keepdim=True)


def products(matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return (lambda x: x @ matrix.T), (lambda y: y @ matrix)


def test_balanced_columns_take_fewer_iterations_to_the_same_solutions() -> None:
    matrix, squares = uneven()
    rhs = torch.randn(3, 80, dtype=torch.float64)
    expected = torch.linalg.lstsq(matrix, rhs.T).solution.T
    plain = cgls(*products(matrix), rhs, 2000, 1e-12)
    balanced = cgls(*products(matrix), rhs, 2000, 1e-12, squares)
    assert torch.allclose(balanced.x, expected, rtol=1e-8, atol=0)
    assert balanced.converged
    assert 4 * balanced.iterations < plain.iterations


@pytest.mark.parametrize("balanced", [False, True])
def test_what_the_matrix_takes_to_zero_never_comes_back(balanced: bool) -> None:
    matrix, squares = uneven(null=1)
    balance = squares if balanced else torch.ones_like(squares)
    null = torch.linalg.svd(matrix).Vh[-1]
    x, gaps = torch.randn(1, 40, dtype=torch.float64), list[float]()

    def told(found: Tensor) -> bool:
        gaps.append(float((found - x).norm()))
        return False

    cgls(*products(matrix), x @ matrix.T, 200, 1e-12, balance, told)
    # Iterates are D⁻¹Aᵀy, on which D n is 0: along D n, whatever it is, x is lost as a whole.
    along = (balance[0] * null) / (balance[0] * null).norm()
    assert min(gaps) >= abs(float(along @ x[0])) * (1 - 1e-6)


def test_it_ends_where_the_solutions_are_said_to_do() -> None:
    matrix, squares = uneven()
    x = torch.randn(2, 40, dtype=torch.float64)

    def near(found: Tensor) -> bool:
        return float((found - x).norm()) <= 1e-3 * float(x.norm())

    short = cgls(*products(matrix), x @ matrix.T, 200, 1e-14, squares, near)
    long = cgls(*products(matrix), x @ matrix.T, 200, 1e-14, squares)
    assert near(short.x)
    assert short.converged
    assert short.iterations < long.iterations
