"""Bias attack: the input of a fully connected layer from its weight and bias gradients at B = 1.

``G = k xᵀ`` and ``∂b = k`` give ``x = Gᵀ∂b / ‖∂b‖²``, least squares over the rows, whatever the
activation above.  (Geiping et al. 2020, Proposition 3.1; dividing one row by one entry, as often
done, loses precision where that entry is small.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.arithmetic.doubles import row_blocks


def bias_attack(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """Input of a fully connected layer, exact for a single sample.

    Args:
        weight_gradient: G = ∂L/∂W, [m, n]; in any precision, read block of rows by block.
        bias_gradient: ∂b = ∂L/∂b, [m].

    Returns:
        x, [n].

    Raises:
        ValueError: if the bias gradient is zero: then no row carries the input.

    >>> x, k = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0, 3.0])
    >>> bias_attack(torch.outer(k, x), k).round(decimals=4)
    tensor([1., 2.])
    """
    scale = bias_gradient.abs().max()
    if not scale > 0:
        raise ValueError(
            "expected a bias gradient with a non-zero entry, got all zeros: no row of this layer "
            "carries its input"
        )
    k = bias_gradient / scale  # ‖∂b‖² underflows long before ∂b does
    total = k.new_zeros(weight_gradient.shape[1])
    for rows, block in row_blocks(weight_gradient, k):
        total += block.T @ k[rows]
    return total / (k @ k) / scale


def rank_one_residual(weight_gradient: Tensor, x: Tensor, k: Tensor) -> float:
    """‖G − k xᵀ‖ / ‖G‖: zero for one sample, of order one for a mixture of several."""
    gaps, norms = [], []
    for rows, block in row_blocks(weight_gradient, x):
        gaps.append((block - torch.outer(k[rows], x)).norm())
        norms.append(block.norm())
    size = torch.stack(norms).norm()
    return float(torch.stack(gaps).norm() / size.clamp_min(torch.finfo(size.dtype).tiny))
