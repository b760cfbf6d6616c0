"""The equations of a stage as they are, where an orthonormal basis of them would be too large.

``K u = G`` and ``W u = z − b``, each block divided by the norm of its right-hand side: nothing is
formed and nothing factored, at the price of the conditioning that the blocks have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.affine import Affine
from rgap.precision import Known, Precision
from rgap.systems.known_part import entry_error


@dataclass(frozen=True)
class PlainRows:
    """Gradient and weight rows of a stage, each block with its own scale.

    Attributes:
        affine: of the stage.
        gradient: ∂L/∂W as sent.
        k: cotangent at its output, [B, *out_shape].
        z: its pre-activation, [B, *out_shape].
        active: 1 where z is known.
        scales: of the two blocks.
        expected: squared misfit that the errors of the right-hand sides explain.
    """

    affine: Affine
    gradient: Tensor
    k: Tensor
    z: Tensor
    active: Tensor
    scales: tuple[float, float]
    expected: float = 0.0

    @classmethod
    def of(
        cls, affine: Affine, gradient: Tensor, z: Known, k: Known, precision: Precision
    ) -> PlainRows:
        """The rows of a stage; arguments as for ``KnownPart.of``."""
        active = z.known.to(z.value)
        sizes = [float(gradient.norm()), float((z.value * active).norm())]
        scales = [1.0 / size if size > 0 else 0.0 for size in sizes]
        rows = entry_error(affine, gradient, k, precision) ** 2 * gradient.numel()
        gaps = float((z.std * active).nan_to_num(0.0, posinf=0.0).square().sum())
        expected = rows * scales[0] ** 2 + gaps * scales[1] ** 2
        return cls(affine, gradient, k.value, z.value, active, (scales[0], scales[1]), expected)

    @property
    def equations(self) -> int:
        """An upper bound on the independent ones."""
        return self.gradient.numel() + int(self.active.sum())

    def misfit(self, u: Tensor) -> Tensor:
        """K u − G and W u + b − z, each over the norm of its right-hand side, flat."""
        rows = (self.affine.weight_gradient(u, self.k) - self.gradient) * self.scales[0]
        gap = (self.affine.forward(u) - self.z) * self.active * self.scales[1]
        return torch.cat([rows.flatten(), gap.flatten()])
