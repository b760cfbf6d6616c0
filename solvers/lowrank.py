"""The leading singular triplets of a matrix of low rank, and the noise beneath them.

A gradient of a fully connected layer has the rank of its batch; what lies beneath is rounding.
Subspace iteration from a random block finds both without decomposing the whole matrix (Halko,
Martinsson and Tropp 2011).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.solvers.limits import ABOVE
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.solvers.tall import tall_qr

SPARE = 10  # columns of the block beyond the rank: they measure the noise
SMALL = 96  # rows or columns up to which the whole decomposition is cheap


@dataclass(frozen=True)
class LowRank:
    """``A ≈ U diag(S) Vᵀ`` truncated to the numerical rank.

    Attributes:
        left: U [m, r].
        values: S [r], descending.
        right: V [n, r].
        rank: the decision; ``cutoff`` is absolute, ``gap`` is σ_r over the largest noise value.
        beneath: the singular values that were cut, as far as they were computed.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    rank: Rank
    beneath: Tensor


def low_rank(
    matrix: Tensor, relative_noise: float, most: int | None = None, added: float = 0.0
) -> LowRank:
    """Singular triplets above the noise.

    Args:
        matrix: [m, n], float64.
        relative_noise: expected spectral norm of the noise over that of the matrix.  The cutoff
            is ``ABOVE`` times that, or ``ABOVE`` times the plateau that is met, if it is lower
            than a hundred times the expectation.
        most: keep at most that many (a stated rank).
        added: expected spectral norm of noise that does not scale with the matrix; adds to the
            relative one.

    Returns:
        The :class:`LowRank`.

    Raises:
        ValueError: an empty matrix.

    >>> g = torch.Generator().manual_seed(0)
    >>> a = torch.randn(200, 3, generator=g, dtype=torch.float64)
    >>> b = torch.randn(3, 300, generator=g, dtype=torch.float64)
    >>> found = low_rank(a @ b, 1e-15)
    >>> found.rank.rank, found.left.shape, bool(torch.dist(found.left * found.values
    ...     @ found.right.T, a @ b) < 1e-11)
    (3, torch.Size([200, 3]), True)
    """
    if matrix.numel() == 0:
        raise ValueError(f"matrix: expected entries, got shape {tuple(matrix.shape)}")
    left, values, right = _leading(matrix, relative_noise, added)
    relative_noise = _expected(values, relative_noise, added)
    floor = resolve_rcond(None, (matrix.shape[0], matrix.shape[1]))
    expected = max(relative_noise, floor / 16)
    rank = numerical_rank(values, min(matrix.shape), ABOVE * expected)
    if 0 < rank.rank < len(values):
        # The noise as it is: what lies just beneath the first cutoff, unless that is a signal.
        met = float(values[rank.rank] / values[0])
        if met > expected / 2:
            rank = numerical_rank(values, min(matrix.shape), ABOVE * max(met, expected))
    count = rank.rank if most is None else min(rank.rank, most)
    triplets = _spread(matrix, left[:, :count], values[:count], right[:, :count])
    return LowRank(*triplets, rank, values[count:])


def _spread(
    matrix: Tensor, left: Tensor, values: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The triplets after a step of subspace iteration by products alone.

    Householder reflections leave their rounding in the first rows of U and V: single entries are
    then off by far more than eps.  Products spread it evenly.
    """
    if not len(values):
        return left, values, right
    left = tall_qr((matrix @ right) / values)[0]
    right = tall_qr((matrix.T @ left) / values)[0]
    turn, values, back = torch.linalg.svd((left.T @ matrix) @ right)
    return left @ turn, values, right @ back.T


def _expected(values: Tensor, relative_noise: float, added: float) -> float:
    """Noise of both kinds over the largest singular value."""
    largest = float(values[0])
    return relative_noise + (added / largest if largest > 0 else 0.0)


def _leading(matrix: Tensor, relative_noise: float, added: float) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets down into the noise."""
    size = min(matrix.shape)
    block = 64
    generator = torch.Generator().manual_seed(0)
    while size > SMALL and 2 * (block + SPARE) < size:
        start = torch.randn(matrix.shape[1], block, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
        for _ in range(2):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        inner, values, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        expected = _expected(values, relative_noise, added)
        quiet = float(values[-SPARE]) <= max(expected, 1e-15) * float(values[0])
        if quiet:
            return basis @ inner, values, vh.T
        block *= 2
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, values, vh.T
