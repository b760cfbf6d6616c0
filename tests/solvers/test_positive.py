"""What the normal equations leave of their smallest eigenvalue, against eigenvalues and σ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.solvers.positive import cholesky_in_place, resolved, smallest_scaled

F64 = torch.float64


def gram(smallest: float, seed: int, n: int = 30) -> tuple[Tensor, Tensor]:
    """AᵀA as it rounds, of a matrix whose columns differ in length, and σ of it at length one."""
    draw = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(m, n, generator=draw, dtype=F64)).Q for m in (4 * n, n))
    values = torch.linspace(1.0, 2.0, n, dtype=F64)
    values[0] = smallest
    a = (u * values) @ v.T
    units = 10.0 ** torch.linspace(-3, 3, n, dtype=F64)
    return (a * units).T @ (a * units), torch.linalg.svdvals(a / a.norm(dim=0))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4])
def test_smallest_scaled_is_that_of_the_unit_diagonal(smallest: float, seed: int) -> None:
    matrix, _ = gram(smallest, seed)
    size = matrix.diagonal().sqrt()
    wanted = float(torch.linalg.eigvalsh(matrix / size / size[:, None])[0])
    found = smallest_scaled(matrix, torch.linalg.cholesky(matrix))
    assert found == pytest.approx(wanted, rel=0.2)  # three steps, among neighbours


def test_resolved_is_where_the_smallest_eigenvalue_is_known() -> None:
    """Of two decades of σ on each side of √eps: what it lets pass is right to a tenth."""
    passed = []
    for digits in range(1, 10):
        for seed in range(4):
            matrix, values = gram(10.0**-digits, seed)
            lower = cholesky_in_place(matrix.clone())
            if lower is None or not resolved(matrix, lower):
                passed.append((digits, False))
                continue
            passed.append((digits, True))
            found = smallest_scaled(matrix, lower)
            assert found == pytest.approx(float(values[-1]) ** 2, rel=0.1)
    assert all(good for digits, good in passed if digits <= 5)
    assert not any(good for digits, good in passed if digits >= 8)


def test_what_cancelled_off_a_column_counts_as_its_rounding() -> None:
    """Resolved at its own size, not at that of the lengths that it was computed from."""
    matrix, _ = gram(1e-2, 0)
    lower = torch.linalg.cholesky(matrix)
    assert resolved(matrix, lower)
    assert not resolved(matrix, lower, 1e10 * matrix.diagonal())
