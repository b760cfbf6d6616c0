"""The head's cotangent of a whole batch as a function of its outputs.

With R different pictures of which picture b occurs m_b times in a batch of B,
``κ_b = s m_b ∂ℓ(z_b, t_b)/∂z_b``: s = 1/B for a mean over the batch and 1 for a sum, t_b the
average target of its copies.  For B = 1 the client's κ can be read off the update; in a batch it
cannot, and depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.precision import Estimate, Precision
from rgap.update.losses import Loss
from rgap.update.targets import CLASSES


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a batch with its targets.

    Attributes:
        loss: the client's.
        targets: t, dense, before label smoothing, [R, C].
        copies: m, [R], float64.
    """

    loss: Loss
    targets: Tensor
    copies: Tensor

    @property
    def scale(self) -> Tensor:
        """s·m of every picture, [R, 1]."""
        return (self.copies / self.loss.divisor(self.targets, self.copies))[:, None]

    def cotangent(self, outputs: Tensor) -> Tensor:
        """κ at outputs z [R, C]."""
        return self.scale * self._single.cotangent(outputs, self.targets)

    @property
    def continuous(self) -> bool:
        """True if nothing but their range is known of the targets: κ may be anything."""
        return self.loss.targets != "index"

    def explained(self, outputs: Tensor, kappa: Tensor) -> BatchLoss:
        """The loss with the targets whose cotangent at outputs z [R, C] is κ."""
        return replace(self, targets=self._single.targets_from(outputs, kappa / self.scale))

    def curvature(self, outputs: Tensor, directions: Tensor) -> Tensor:
        """dκ for directions dz [S, R, C]; symmetric."""
        count, rows, classes = directions.shape
        flat = self._single.cotangent_jvp(
            outputs.expand(count, -1, -1).reshape(-1, classes),
            directions.reshape(-1, classes),
            self.targets.expand(count, -1, -1).flatten(0, 1),
        )
        return self.scale * flat.reshape(count, rows, classes)

    def known(self, outputs: Tensor, precision: Precision) -> Estimate:
        """κ with what the client's own evaluation of the loss rounds, [R, C].

        A softmax rounds p relative to itself, and p − 1 relative to 1.
        """
        kappa = self.cotangent(outputs)
        if self.loss.plain:
            own = self.targets.abs()
        else:
            own = self._single.rounding(outputs, self.targets)
        near = torch.maximum(kappa.abs(), self.scale * own)
        return Estimate(kappa, precision.normal(2.0 * near * precision.unit + precision.floor))

    @property
    def _single(self) -> Loss:
        return replace(self.loss, reduction="sum")


def loss_scale(loss: Loss, batch: float, classes: int) -> float:
    """s: what the reduction divides by."""
    if loss.reduction == "sum":
        return 1.0
    return 1.0 / (batch if loss.name in CLASSES else batch * loss.outputs(classes))
