"""Least squares with entries that are not negative, for many right-hand sides of one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nonnegative_least"]

ROUNDS = 40  # of the multipliers
PENALTY = 0.03  # of an entry's distance from its nearest that is allowed, over a column's square


def nonnegative_least(matrix: Tensor, rhs: Tensor, start: Tensor) -> Tensor:
    r"""Near the solutions of ``min ‖A x − b‖, x ≥ 0``, from near them; one factor for all b.

    With ADMM's multipliers u, Cholesky factors of :math:`A^\top A + \tau I` once,

    .. math:: y = (A^\top A + \tau I)^{-1}(A^\top b + \tau (x - u)), \quad
              x = \max(y + u, 0), \quad u \leftarrow u + y - x .

    Source: Boyd, Parikh, Chu, Peleato and Eckstein (2011), §6.4.

    Args:
        matrix: A [m, n].
        rhs: b [m, s].
        start: x [n, s].

    >>> a, b = torch.eye(2).double(), torch.tensor([[1.0], [-1.0]]).double()
    >>> [f"{entry:.3f}" for entry in nonnegative_least(a, b, torch.zeros(2, 1))[:, 0].tolist()]
    ['1.000', '0.000']
    """
    normal, right = matrix.T @ matrix, matrix.T @ rhs
    penalty = PENALTY * float(normal.diagonal().mean())
    normal.diagonal().add_(penalty)
    lower = torch.linalg.cholesky(normal)
    x = start.to(rhs).clamp_min(0.0)
    u = torch.zeros_like(x)
    for _ in range(ROUNDS):
        y = torch.cholesky_solve(right + penalty * (x - u), lower)
        x = (y + u).clamp_min(0.0)
        u = u + y - x
    return x
