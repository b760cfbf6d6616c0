"""How a loss is reduced over a batch: the scale of a mean or a sum, which targets may move too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.update.loss_forms import Form, Options, per_class
from rgap.update.targets import one_hot

__all__ = ["Reduction"]


@dataclass(frozen=True)
class Reduction:
    """A sum, or a mean over samples, over entries, or by the weights of the batch's classes.

    Attributes:
        mean: False for a sum.
        samples: True for a mean over samples and positions, False for one over all entries.
        weight: of each class, where the mean divides by those of the batch; else None.

    >>> y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> Reduction(True, True, (1.0, 3.0)).scale(y, y).item()  # 1/(1 + 3 + 3)
    0.1428571492433548
    >>> Reduction(True, False).scale(y, y)
    0.16666666666666666
    """

    mean: bool
    samples: bool
    weight: tuple[float, ...] | None = None

    def scale(self, outputs: Tensor, dense: Tensor) -> float | Tensor:
        """What the sum is multiplied by, for outputs [B, C, ...] and dense targets."""
        if not self.mean:
            return 1.0
        if self.weight is not None:
            return 1.0 / (per_class(self.weight, outputs) * dense).sum()
        count = outputs.numel()
        return 1.0 / (count // outputs.shape[1] if self.samples else count)

    def divisor(self, targets: Tensor, copies: Tensor) -> float:
        """What it is divided by: of dense targets [R, C] that occur ``copies`` [R] times."""
        if not self.mean:
            return 1.0
        if self.weight is not None:
            return float(copies @ (targets @ targets.new_tensor(self.weight)))
        count = float(copies.sum())
        return count if self.samples else count * targets.shape[1]

    def targets(self, form: Form, options: Options, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Dense targets of which ``cotangent`` is the reduced one.

        Where targets weigh the mean, the class of each sample comes first, by its sign: with all
        classes known the divisor is, and with it the scale.
        """
        if self.weight is None or not self.mean:
            scale = self.scale(outputs, outputs.new_empty(0))
            return form.target(outputs, cotangent / scale, options)
        best, least = outputs, math.inf
        for labels in _classes_at(outputs, cotangent):
            guess = one_hot(labels, outputs)
            target = form.target(outputs, cotangent / self.scale(outputs, guess), options)
            gap = float((target - guess).abs().max())
            if gap < least or least == math.inf:
                best, least = target, gap
        return best


def _classes_at(outputs: Tensor, cotangent: Tensor) -> list[Tensor]:
    """The classes with the least cotangent; for one sample every class."""
    if len(outputs) == 1 and outputs.ndim == 2:
        every = torch.arange(outputs.shape[1], device=outputs.device)
        return [c.reshape(1) for c in every]
    return [cotangent.argmin(1)]
