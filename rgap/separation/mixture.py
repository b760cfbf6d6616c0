"""The gradient of a fully connected layer as a mixture of samples, in compact coordinates.

``G = Kᵀ X`` has the rank R of the batch.  With G = U S Vᵀ the samples are ``X = Q Vᵀ``, the
cotangents ``Kᵀ = U S Q⁻¹``, and the bias gradient ``∂b = Kᵀ1`` gives ``Q w = 1``, w = S⁻¹Uᵀ∂b.
Whatever separates the samples only has to find the R rows of Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from rgap.network.chain import Stage
from rgap.precision import Precision
from rgap.solvers.lowrank import LowRank, low_rank

INSIDE = 1e-3  # share of a bias gradient outside the range of G at which they do not belong


@dataclass(frozen=True)
class Mixture:
    """U, S, V and w of one fully connected stage.

    Attributes:
        stage: the stage.
        gradient: G = ∂L/∂W, [m, n].
        bias_gradient: ∂b, [m], or None.
        triplets: the singular triplets above the noise.
        noise: the relative noise that the rank was decided with.
    """

    stage: Stage
    gradient: Tensor
    bias_gradient: Tensor | None
    triplets: LowRank
    noise: float

    @property
    def rank(self) -> int:
        """R, the number of samples that the gradient tells apart."""
        return self.triplets.rank.rank

    @property
    def left(self) -> Tensor:
        """U, [m, R]."""
        return self.triplets.left

    @property
    def right(self) -> Tensor:
        """V, [n, R]."""
        return self.triplets.right

    @property
    def values(self) -> Tensor:
        """S, [R]."""
        return self.triplets.values

    @property
    def ratio(self) -> float:
        """σ_R/σ_1, the conditioning of the mixture."""
        return float(self.values[-1] / self.values[0]) if self.rank else 0.0

    @property
    def entry_noise(self) -> float:
        """Standard error of one entry of G, as expected or, if that is more, as met beneath it."""
        if not self.rank:
            return 0.0
        m, n = self.gradient.shape
        beneath = self.triplets.beneath
        met = float(beneath[0]) if len(beneath) else 0.0
        return max(self.noise * float(self.values[0]), met) / float(m**0.5 + n**0.5)

    @cached_property
    def weights(self) -> Tensor:
        """W with ``Q w = 1``, [R].

        Raises:
            ValueError: no bias.
        """
        if self.bias_gradient is None:
            raise ValueError(f"'{self.stage.name}' has no bias and hence no w")
        return self.dual(self.bias_gradient)

    def inputs(self, q: Tensor) -> Tensor:
        """X = Q Vᵀ of rows q [S, R], in the shape of the layer's input, [S, *in_shape]."""
        return (q @ self.right.T).reshape(-1, *self.stage.affine.in_shape)

    def dual(self, cotangent: Tensor) -> Tensor:
        """S⁻¹Uᵀk, the functional that is 1 on its own sample and 0 on all others; [..., m]."""
        return (cotangent @ self.left) / self.values

    def outside(self, cotangent: Tensor) -> Tensor:
        """Share of k outside the range of G, in [0, 1]; [..., m] → [...]."""
        kept = (cotangent @ self.left) @ self.left.T
        size = torch.linalg.vector_norm(cotangent, dim=-1).clamp_min(1e-300)
        out: Tensor = torch.linalg.vector_norm(cotangent - kept, dim=-1) / size
        return out

    def spare(self, lost: int = 0) -> int:
        """Equations that are left to refute a root: m − R of a sample, for R − 1 unknowns.

        Where none is, other points than samples satisfy as many.

        Args:
            lost: equations that follow from the others, as those of a softmax that sums to 1.
        """
        return self.gradient.shape[0] - lost - self.rank - (self.rank - 1)

    def blurred(self, cotangent: Tensor) -> float:
        """Standard error of :meth:`outside` for a cotangent in the range, [m].

        A column u_i of U is off by ``ε/σ_i`` in each of the m − R directions beside the range, so
        that ``‖(I − UUᵀ)k‖² ≈ (m − R) Σ_i (k·u_i ε/σ_i)²``.
        """
        share = (cotangent @ self.left) * self.entry_noise / self.values
        beside = max(len(cotangent) - self.rank, 1)
        return float(share.norm() / cotangent.norm().clamp_min(1e-300)) * sqrt(beside)


def relative_rounding(shape: tuple[int, int], precision: Precision) -> float:
    """Spectral norm of what rounding adds to a gradient over that of the gradient.

    Each entry is a sum rounded to the client's precision.  A random matrix of entries ε has the
    norm ε(√m + √n), and a gradient of entries of size g at most g√(mn).
    """
    m, n = shape
    return float(2.0 * precision.unit * (m**-0.5 + n**-0.5))


def mixture(
    stage: Stage, gradient: Tensor, bias_gradient: Tensor | None, precision: Precision
) -> Mixture:
    """The mixture of a fully connected stage; gradient as sent, float64."""
    noise = relative_rounding((gradient.shape[0], gradient.shape[1]), precision)
    added = precision.noise_norm(stage.affine.weight_name, gradient) if precision.noisy else 0.0
    triplets = low_rank(gradient, noise, added=added)
    largest = triplets.rank.largest
    if largest > 0:
        noise += added / largest
    return Mixture(stage, gradient, bias_gradient, triplets, noise)
