"""What storing numbers in a floating format does to them: the spacing of its numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["UNIFORM", "spacing"]

UNIFORM = 12**-0.5  # standard deviation of an error that is uniform over one spacing


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
