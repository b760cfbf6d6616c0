"""Losses: their value, their cotangent in closed form, and the targets read back from it.

The cotangent k = dL/d(outputs) is where a gradient starts to talk about the labels. For every loss
offered here it is *affine in the target* at fixed outputs, so it can be turned around:

=====================================  =============================  ===============
loss (``torch.nn.functional`` name)    cotangent, s = scale           s for a mean
=====================================  =============================  ===============
``cross_entropy``                      ``s (softmax(z) - y)``         ``1 / B``
``binary_cross_entropy_with_logits``   ``s (sigmoid(z) - y)``         ``1 / z.numel()``
``mse_loss``                           ``2 s (z - y)``                ``1 / z.numel()``
=====================================  =============================  ===============

With ``reduction="sum"`` s = 1. Label smoothing e replaces y by ``(1 - e) y + e / C``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap import validation
from rgap.targets import (
    BINARY,
    CROSS_ENTROPY,
    SQUARED,
    check,
    outside,
    require_outputs,
    require_shape,
)

__all__ = ["Loss"]

_TARGETS = {
    CROSS_ENTROPY: ("index", "probability"),
    BINARY: ("index", "probability"),
    SQUARED: ("value",),
}
# 2**16 label vectors is the most that anyone can usefully enumerate.
_MOST_LOGITS_LISTED = 16


@dataclass(frozen=True)
class Loss:
    """The loss a client minimised, with every option that changes its gradient.

    Args:
        name: name of the ``torch.nn.functional`` function: ``"cross_entropy"``,
            ``"binary_cross_entropy_with_logits"`` or ``"mse_loss"``.
        reduction: ``"mean"`` or ``"sum"``. Over the batch for cross-entropy, over all elements
            for the other two, as in PyTorch.
        label_smoothing: PyTorch's, in [0, 1), cross-entropy only.
        targets: ``"index"`` for class indices [B] (cross-entropy) and 0/1 labels (binary),
            ``"probability"`` for soft targets of the outputs' shape. ``mse_loss`` always has
            ``"value"``: real numbers of the outputs' shape.

    Raises:
        ValueError: an option that PyTorch or this library does not have.

    Source: the cotangent of the cross-entropy is the identity behind iDLG (Zhao et al. 2020).

    Example:
        >>> import torch
        >>> loss = Loss("cross_entropy", label_smoothing=0.1)
        >>> outputs = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
        >>> k = loss.cotangent(outputs, torch.tensor([0]))
        >>> labels, distance = loss.read(loss.targets_from(outputs, k))
        >>> labels.tolist(), distance < 1e-12
        ([0], True)
    """

    name: str = CROSS_ENTROPY
    reduction: str = "mean"
    label_smoothing: float = 0.0
    targets: str = "index"

    def __post_init__(self) -> None:
        if self.name not in _TARGETS:
            raise ValueError(validation.unknown_loss(self.name, list(_TARGETS)))
        if self.reduction not in ("mean", "sum"):
            raise ValueError(
                f"Loss.reduction: expected 'mean' or 'sum', got {self.reduction!r}; a client sends "
                "the gradient of a scalar, so write the reduction it used."
            )
        if not (0.0 <= self.label_smoothing < 1.0):
            raise ValueError(
                f"Loss.label_smoothing: expected a number in [0, 1), got {self.label_smoothing!r}; "
                "at 1 the gradient no longer depends on the labels."
            )
        if self.label_smoothing and self.name != CROSS_ENTROPY:
            raise ValueError(
                f"Loss.label_smoothing: {self.name} has none in PyTorch; smooth the targets "
                "yourself and write Loss(..., targets='probability')."
            )
        if self.name == SQUARED and self.targets == "index":
            object.__setattr__(self, "targets", "value")  # the only kind it has
        if self.targets not in _TARGETS[self.name]:
            raise ValueError(
                f"Loss.targets: {self.name} takes {' or '.join(map(repr, _TARGETS[self.name]))}, "
                f"got {self.targets!r}."
            )

    @classmethod
    def of(cls, loss: str | Loss | nn.Module) -> Loss:
        """The `Loss` meant by a name, a `Loss`, or one of PyTorch's loss modules.

        Args:
            loss: for instance ``"cross_entropy"`` or ``nn.CrossEntropyLoss(label_smoothing=0.1)``.

        Raises:
            ValueError: unknown name, class weights, ``ignore_index``, ``reduction="none"``.
            TypeError: anything else.

        Example:
            >>> Loss.of("mse_loss")
            Loss(name='mse_loss', reduction='mean', label_smoothing=0.0, targets='value')
        """
        if isinstance(loss, Loss):
            return loss
        if isinstance(loss, str):
            return cls(loss)
        names = {
            nn.CrossEntropyLoss: CROSS_ENTROPY,
            nn.BCEWithLogitsLoss: BINARY,
            nn.MSELoss: SQUARED,
        }
        for kind, name in names.items():
            if isinstance(loss, kind):
                validation.refuse_loss_options(loss)
                smoothing = float(getattr(loss, "label_smoothing", 0.0))
                return cls(name, reduction=str(loss.reduction), label_smoothing=smoothing)
        raise TypeError(
            f"loss: expected one of {', '.join(map(repr, _TARGETS))} or a Loss, "
            f"got {type(loss).__name__}; write for instance Loss('cross_entropy')."
        )

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar loss of ``outputs`` [B, C] against admissible or dense ``targets``.

        ``torch.nn.functional`` does the work in the outputs' own dtype, so a float32 loss is truly
        a float32 loss. Only shapes are checked here (this runs inside Jacobian products); values
        are checked by `check_targets`.
        """
        if self.name == CROSS_ENTROPY:
            require_outputs(self.name, outputs)
            if targets.is_floating_point():
                targets = self.dense(targets, outputs)
            else:
                require_shape(self.name, outputs, targets, index=True)
                targets = targets.long()
            return F.cross_entropy(
                outputs, targets, reduction=self.reduction, label_smoothing=self.label_smoothing
            )
        dense = self.dense(targets, outputs)
        if self.name == BINARY:
            return F.binary_cross_entropy_with_logits(outputs, dense, reduction=self.reduction)
        return F.mse_loss(outputs, dense, reduction=self.reduction)

    def cotangent(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``dL / d outputs`` in closed form (table in the module's docstring), shape of outputs."""
        target = self._smoothed(self.dense(targets, outputs))
        scale = self._scale(outputs)
        if self.name == CROSS_ENTROPY:
            # The row sum is 1 for every admissible target; kept so that targets which are only
            # normalised to their own precision give autograd's value.
            weight = target.sum(dim=1, keepdim=True)
            return scale * (torch.softmax(outputs, dim=1) * weight - target)
        if self.name == BINARY:
            return scale * (torch.sigmoid(outputs) - target)
        return 2.0 * scale * (outputs - target)

    def cotangent_jvp(self, outputs: Tensor, direction: Tensor) -> Tensor:
        """``(d^2 L / d outputs^2) direction``; the same for every admissible target.

        Cross-entropy: ``s (p * v - p <p, v>)`` row by row; binary: ``s p (1 - p) v``; squared
        error: ``2 s v``. Shapes of ``outputs`` and ``direction`` are equal.
        """
        if direction.shape != outputs.shape:
            raise ValueError(
                f"direction: expected the outputs' shape {tuple(outputs.shape)}, got "
                f"{tuple(direction.shape)}."
            )
        require_outputs(self.name, outputs)
        scale = self._scale(outputs)
        if self.name == CROSS_ENTROPY:
            p = torch.softmax(outputs, dim=1)
            # Centring the direction first avoids subtracting two nearly equal products.
            return scale * p * (direction - (p * direction).sum(dim=1, keepdim=True))
        if self.name == BINARY:
            return scale * torch.sigmoid(outputs) * torch.sigmoid(-outputs) * direction
        return 2.0 * scale * direction

    def targets_from(self, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Dense targets, before label smoothing, whose cotangent at ``outputs`` is ``cotangent``.

        The inverse of `cotangent` in its second argument; shape of ``outputs``. Whether what comes
        out is admissible is `read`'s question.
        """
        if cotangent.shape != outputs.shape:
            raise ValueError(
                f"cotangent: expected the outputs' shape {tuple(outputs.shape)}, got "
                f"{tuple(cotangent.shape)}."
            )
        require_outputs(self.name, outputs)
        scale = self._scale(outputs)
        if self.name == CROSS_ENTROPY:
            smoothed = torch.softmax(outputs, dim=1) - cotangent / scale
            eps = self.label_smoothing
            return (smoothed - eps / outputs.shape[1]) / (1.0 - eps)
        if self.name == BINARY:
            return torch.sigmoid(outputs) - cotangent / scale
        return outputs - cotangent / (2.0 * scale)

    def read(self, dense: Tensor) -> tuple[Tensor, float]:
        """Nearest admissible targets to ``dense`` and the max-abs distance to the admissible set.

        Class indices (long [B]) for cross-entropy with ``targets="index"``; 0/1 labels (long, [B]
        for one logit, else the shape of ``dense``) for the binary loss. Soft targets and real
        values are returned as they are; for soft targets the distance is how far they lie outside
        the probabilities, for real values it is 0. Anything not finite is at distance infinity.
        """
        finite = bool(torch.isfinite(dense).all())
        if self.targets == "index":
            if self.name == CROSS_ENTROPY:
                labels = dense.argmax(dim=1)
                nearest = F.one_hot(labels, dense.shape[1]).to(dense.dtype)
            else:
                nearest = (dense > 0.5).to(dense.dtype)
                single = dense.ndim == 2 and dense.shape[1] == 1
                labels = nearest.long().reshape(-1) if single else nearest.long()
            return labels, float((dense - nearest).abs().max()) if finite else math.inf
        if not finite:
            return dense, math.inf
        return dense, outside(self.name, dense) if self.targets == "probability" else 0.0

    def admissible(self, classes: int) -> list[int] | list[tuple[int, ...]] | None:
        """Every target one sample can have with ``classes`` outputs, or None when continuous.

        Raises:
            ValueError: a multi-label loss with more than 16 logits (2**C label vectors); the sign
                of each entry of the cotangent gives them without a list, see `read`.

        Example:
            >>> Loss("cross_entropy").admissible(3)
            [0, 1, 2]
        """
        if self.targets != "index":
            return None
        if self.name == CROSS_ENTROPY:
            return list(range(classes))
        if classes == 1:
            return [0, 1]
        if classes > _MOST_LOGITS_LISTED:
            raise ValueError(
                f"classes: {classes} logits have 2**{classes} label vectors, too many to list; "
                "read them from the cotangent with Loss.read(Loss.targets_from(outputs, k))."
            )
        return list(itertools.product((0, 1), repeat=classes))

    def dense(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """Targets in the shape and dtype of ``outputs`` (one-hot for indices), before smoothing.

        Targets that are dense already pass through. Targets [B] are taken for outputs [B, 1] by
        the binary and the squared loss, as labels usually come.
        """
        require_outputs(self.name, outputs)
        if self.name == CROSS_ENTROPY and not targets.is_floating_point():
            require_shape(self.name, outputs, targets, index=True)
            return F.one_hot(targets.long(), outputs.shape[1]).to(outputs.dtype)
        require_shape(self.name, outputs, targets)
        return targets.to(outputs.dtype).reshape(outputs.shape)  # [B] to [B, 1]

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise unless ``targets`` are admissible for ``outputs``: kind, shape and values.

        Raises:
            TypeError: a tensor of the wrong kind (soft targets for ``"index"`` and the reverse).
            ValueError: wrong shape, an index out of range, a probability outside [0, 1] or rows
                that do not sum to 1, NaN or infinity.
        """
        check(self.name, self.targets, outputs, targets)

    def _smoothed(self, dense: Tensor) -> Tensor:
        eps = self.label_smoothing
        return dense if eps == 0.0 else (1.0 - eps) * dense + eps / dense.shape[1]

    def _scale(self, outputs: Tensor) -> float:
        if self.reduction == "sum":
            return 1.0
        return 1.0 / (outputs.shape[0] if self.name == CROSS_ENTROPY else outputs.numel())
