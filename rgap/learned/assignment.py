"""The error of a batch whose order nobody knows: the least over all pairings of its pictures."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["assigned_error"]


def assigned_error(made: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each batch under its best pairing, differentiable in ``made``, [N].

    ``min_π 1/(B n) Σ_b ‖x̂_π(b) − x_b‖²`` over permutations π, which is what a gradient, a sum over
    its samples, can be asked for.

    Source: the permutation-invariant loss of Wu, Chen, Guo and Weinberger (2023).

    Args:
        made: x̂, ``[N, B, *shape]``.
        truth: x, of the same shape.

    >>> x = torch.rand(1, 3, 2, 2)
    >>> assigned_error(x[:, [2, 0, 1]], x)
    tensor([0.])
    """
    rows, samples = made.flatten(2), truth.flatten(2)
    if rows.shape[1] > 1:
        costs = torch.cdist(rows.detach(), samples).square().cpu().numpy()
        mates = torch.stack([torch.from_numpy(linear_sum_assignment(cost)[1]) for cost in costs])
        samples = torch.take_along_dim(samples, mates.to(samples.device)[:, :, None], 1)
    return (rows - samples).square().mean((1, 2))
