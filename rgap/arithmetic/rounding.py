"""What storing numbers in a floating format does to them: the spacing of its numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ABSENT", "LARGEST", "SMALLEST", "UNIFORM", "absent", "coherence", "spacing"]

UNIFORM = 12**-0.5  # standard deviation of an error that is uniform over one spacing
ABSENT = 1e30  # standard deviation of the noise of an entry that was not sent at all
# Between these sizes squares of entries, of errors and of their reciprocals are float64 numbers.
# No error counts as smaller; entries may be, for probabilities down to 1e-300 still tell logits.
SMALLEST, LARGEST = 1e-140, 1e30
LOST = 0.5  # share of still entries at which the typical one is below half a spacing


def absent(zeros: Tensor) -> Tensor:
    """The noise ``ABSENT`` of entries that were not sent, in numbers that reach it.

    >>> absent(torch.zeros(2, dtype=torch.float16))
    tensor([1.0000e+30, 1.0000e+30])
    """
    wide = torch.promote_types(zeros.dtype, torch.float32)
    return torch.full_like(zeros, ABSENT, dtype=wide)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from each value's size to the next larger number of ``dtype``, float64.

    Rounding to nearest is off by half of it at most, and by ``UNIFORM`` times it in the root mean
    square where nothing prefers one place between two numbers to another.  (At a power of two the
    numbers below are twice as dense; the larger distance counts.  NumPy: ``np.spacing``.)

    >>> spacing(torch.tensor([1.0, -0.75, 0.0]), torch.float32).log2().tolist()
    [-23.0, -24.0, -149.0]
    """
    info = torch.finfo(dtype)
    size = values.detach().double().abs()
    exponent = torch.frexp(size).exponent
    # |v| = m 2^e with m in [1/2, 1), so its numbers lie eps 2^(e-1) apart; subnormal ones all alike
    grid = torch.exp2(exponent.double() - 1) * info.eps
    return torch.where(size > 0, grid, 0.0).clamp_min(info.smallest_normal * info.eps)


def coherence(still: Tensor, dead: Tensor) -> Tensor:
    """By how much to widen the error of the entries of a matrix that rounding left where they were.

    Where single entries round away, their errors are as good as independent of the gradient.  Where
    most of the entries that one input meets did, the errors *are* the gradient with its sign
    turned, and N of them add up to √N times as much as independent ones.

    Args:
        still: True where a weight is what it was, or a gradient 0, [m, n, ...]; inputs are
            dimension 1.
        dead: rows of which nothing moved, their bias neither, [m]: units that were off.

    >>> moved = torch.tensor([[0, 1], [0, 1], [0, 0], [0, 0], [0, 1], [0, 1]], dtype=torch.bool)
    >>> dead = torch.tensor([False, False, True, True, False, False])
    >>> coherence(~moved, dead).T.tolist()
    [[2.0, 2.0, 1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    """
    alive = (~dead).reshape(-1, *[1] * (still.ndim - 1)).expand_as(still)
    others = [d for d in range(still.ndim) if d != 1]
    lost = (still & alive).sum(others, keepdim=True).double()
    most = lost > LOST * alive.sum(others, keepdim=True)
    return torch.where(still & alive & most, lost.sqrt().clamp_min(1.0), 1.0)
