"""Singular values and right singular vectors of long matrices through a QR factorisation first.

LAPACK's SVD of a [300, 4096] matrix works on all of it; its triangular factor is [300, 300], has
the same singular values, and costs one QR (Chan, An improved algorithm for computing the singular
value decomposition, 1982).
"""

from __future__ import annotations

import torch
from torch import Tensor

LONG = 1.5  # aspect ratio from which the QR pays


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of [..., rows, columns], descending; ``numpy.linalg.svd(compute_uv=False)``.

    >>> singular_values(torch.eye(2, 9, dtype=torch.float64)).tolist()
    [1.0, 1.0]
    """
    values: Tensor = torch.linalg.svdvals(_triangle(_tall(matrix)))
    return values


def right_singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(σ [..., r], Vᵀ [..., r, columns]) with r = min(rows, columns).

    >>> s, vh = right_singular_vectors(torch.diag(torch.tensor([2.0, 1.0]))[:, [0, 1]])
    >>> s.tolist()
    [2.0, 1.0]
    """
    rows, columns = matrix.shape[-2:]
    if columns > LONG * rows:
        q, r = torch.linalg.qr(matrix.transpose(-1, -2))
        _, values, vh = torch.linalg.svd(r.transpose(-1, -2), full_matrices=False)
        return values, vh @ q.transpose(-1, -2)
    _, values, vh = torch.linalg.svd(_triangle(matrix), full_matrices=False)
    return values, vh


def _tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.transpose(-1, -2)


def _triangle(matrix: Tensor) -> Tensor:
    """R of the QR factorisation where the matrix is tall enough to gain from it."""
    if matrix.shape[-2] > LONG * matrix.shape[-1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    return matrix
