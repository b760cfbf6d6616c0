"""QR of tall matrices: the same factors as Householder's, for any condition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.solvers.tall import tall_qr

F64 = torch.float64


def matrices(condition: float, *lead: int, m: int = 40, n: int = 12) -> Tensor:
    """Random matrices [*lead, m, n] with singular values from 1 down to 1/condition."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(*lead, m, n, generator=generator, dtype=F64)).Q
    v = torch.linalg.qr(torch.randn(*lead, n, n, generator=generator, dtype=F64)).Q
    return u * torch.logspace(0, -torch.tensor(condition).log10(), n, dtype=F64) @ v.mT


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e9, 1e14])
def test_orthogonal_and_exact_at_any_condition(condition: float) -> None:
    a = matrices(condition, 3)
    q, r = tall_qr(a)
    assert torch.allclose(q.mT @ q, torch.eye(12, dtype=F64).expand(3, -1, -1), atol=1e-13)
    assert torch.allclose(q @ r, a, atol=1e-14)
    assert torch.equal(r, r.triu())


def test_the_factors_are_those_of_householder_up_to_sign() -> None:
    a = matrices(1e5)
    q, r = tall_qr(a)
    reference = torch.linalg.qr(a)
    sign = reference.R.diagonal().sign()
    assert torch.allclose(q, reference.Q * sign, atol=1e-10)
    assert torch.allclose(r, reference.R * sign[:, None], atol=1e-13)


def test_one_singular_matrix_of_a_stack_leaves_the_others_alone() -> None:
    a = matrices(10.0, 2, 2)
    a[0, 1, :, 3] = a[0, 1, :, 2]
    q, r = tall_qr(a)
    assert q.shape == a.shape and r.shape == (2, 2, 12, 12)
    assert torch.allclose(q @ r, a, atol=1e-14)
    assert torch.allclose(q.mT @ q, torch.eye(12, dtype=F64).expand(2, 2, -1, -1), atol=1e-13)


@pytest.mark.parametrize("shape", [(5, 0), (3, 7), (1, 1)])
def test_shapes_at_the_edge(shape: tuple[int, int]) -> None:
    a = torch.ones(shape, dtype=F64)
    q, r = tall_qr(a)
    assert torch.allclose(q @ r, a)
