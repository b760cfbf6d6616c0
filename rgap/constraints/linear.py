"""Equations of a fully connected layer in the unknown input u [B, n].

* gradient constraint: ``kᵀ u = G``; the same matrix ``K = kᵀ`` [m, B] for every input feature;
* weight constraint: ``W u_b = z_b − b``, the same map for every sample.

It is the convolution's structure with n channels of one position each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.network.affine import Affine
from rgap.solvers.kronecker import Kronecker


def gradient_constraint(affine: Affine, cotangent: Tensor) -> Kronecker:
    """K = kᵀ of the gradient constraint, [1, m, B]; ``cotangent`` is [B, m]."""
    return Kronecker(cotangent.T.unsqueeze(0), affine.in_shape[0])


def gradient_rows(affine: Affine, gradient: Tensor) -> Tensor:
    """∂L/∂W as right-hand sides, [..., m, n] → [..., n, m]."""
    return gradient.transpose(-1, -2)


class WeightConstraint:
    """W of the weight constraint as a coupling of the table u[feature, sample]."""

    def __init__(self, affine: Affine, batch: int) -> None:
        self.affine = affine
        self.batch = batch
        self.rows = batch * affine.out_shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """W u without bias: [S, n, B] → [S, B·m]."""
        return self.affine.linear(self.fold(x)).reshape(x.shape[0], -1)

    def adjoint(self, y: Tensor) -> Tensor:
        """Wᵀ y: [S, B·m] → [S, n, B]."""
        return self.unfold(self.affine.adjoint(y.reshape(-1, *self.affine.out_shape)), y.shape[0])

    def fold(self, x: Tensor) -> Tensor:
        """Table [S, n, B] → samples [S·B, n]."""
        return x.transpose(1, 2).flatten(0, 1)

    def unfold(self, u: Tensor, count: int = 1) -> Tensor:
        """Samples [S·B, n] → table [S, n, B]."""
        return u.reshape(count, self.batch, -1).transpose(1, 2)

    def add_gram(self, weights: Tensor, into: Tensor) -> None:
        """Add Wᵀ diag(weights) W, one sample at a time."""
        w = self.affine.weight
        for b, d in enumerate(weights.reshape(self.batch, -1)):
            into[:, b, :, b] += torch.einsum("fc,f,fe->ce", w, d, w)
