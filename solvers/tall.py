"""QR of tall matrices at the speed of products."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.solvers.limits import NEAR


def tall_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``A = Q R`` of tall matrices [..., m, n], as :func:`torch.linalg.qr` in reduced mode.

    Two passes of a Cholesky factor of AᵀA, which a first pass with ‖I − QᵀQ‖ < 1 makes orthogonal
    to rounding; whatever fails that test (condition beyond about 1e7) goes through Householder
    reflections.  R has a positive diagonal.

    Args:
        matrix: A, m ≥ n.

    Source: Yamamoto, Nakatsukasa, Yanagisawa and Fukaya (2015).

    >>> a = torch.arange(12.0).double().reshape(4, 3).sin()
    >>> q, r = tall_qr(a)
    >>> torch.allclose(q @ r, a), torch.allclose(q.T @ q, torch.eye(3).double())
    (True, True)
    """
    m, n = matrix.shape[-2:]
    if n == 0 or m < n:
        basis, upper = torch.linalg.qr(matrix)
        return basis, upper
    flat = matrix.reshape(-1, m, n)
    first, upper, failed = _pass(flat)
    again = first.mT @ first
    eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    failed = failed | ~((again - eye).abs().sum(2).amax(1) < NEAR)
    second, info = torch.linalg.cholesky_ex(again)
    failed = failed | (info != 0)
    basis = torch.linalg.solve_triangular(second.mT, first, upper=True, left=False)
    upper = second.mT @ upper
    for i in failed.nonzero().flatten().tolist():
        basis[i], upper[i] = torch.linalg.qr(flat[i])
    return basis.reshape(matrix.shape), upper.reshape(*matrix.shape[:-2], n, n)


def _pass(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: Q, R, and where there was no factor."""
    lower, info = torch.linalg.cholesky_ex(flat.mT @ flat)
    basis = torch.linalg.solve_triangular(lower.mT, flat, upper=True, left=False)
    return basis, lower.mT, info != 0
