"""The gradient of a classifier's last layer, checked, in float64 and in units of counts.

Under cross-entropy with label smoothing e the rows of the head's cotangent add up to

    ``s * db_j = P_j - e B / C - (1 - e) n_j``,   ``P_j = sum_i p_ij``,

with s = B for a batch mean and s = 1 for a sum.  ``sums`` is the left-hand side plus ``e B / C``,
so that every method solves ``(1 - e) n = P - sums``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from rgap import validation
from rgap.labels.signs import check_gradients
from rgap.remedy import AS_CLASSES, INVERTED
from rgap.update.losses import Loss
from rgap.update.targets import BINARY, CROSS_ENTROPY

__all__ = ["HeadGradient"]


@dataclass(frozen=True, eq=False)
class HeadGradient:
    """What a client's update says about the last layer z = W x + b, and what is known of it.

    Args:
        weight_gradient: dL/dW, [C, d].
        bias_gradient: dL/db, [C], or None for a head without a bias.
        batch_size: B, the samples behind the gradient; of an average over local steps on
            different samples, all of them.
        weight: W, [C, d], for methods that need the model.
        bias: b, [C]; None means zero.
        loss: the client's: cross-entropy with class indices, or binary cross-entropy of one logit.
        features: the head's input for the batch [B, d], in any order, where it was recovered.
        probes: the head's input for arbitrary inputs [N, d]; they tell the sign of features
            and, for LLG*, how large they are.
        local_steps: over how many local steps the gradients are an average.

    Raises:
        TypeError: something that is no floating tensor.
        ValueError: shapes that do not fit, NaN, a batch size below 1, one class, a loss
            or targets for which label counts mean nothing.

    A single logit z is the two-class head with logits (0, z), and is turned into it.

    Example:
        >>> import torch
        >>> head = HeadGradient(torch.eye(3), torch.tensor([-0.5, 0.25, 0.25]), 4)
        >>> head.classes, head.sums.tolist()
        (3, [-2.0, 1.0, 1.0])
    """

    weight_gradient: Tensor
    bias_gradient: Tensor | None
    batch_size: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    loss: Loss = field(default_factory=Loss)
    features: Tensor | None = None
    probes: Tensor | None = None
    local_steps: int = 1

    def __post_init__(self) -> None:
        check_gradients(self.weight_gradient, self.bias_gradient)
        object.__setattr__(self, "batch_size", validation.count("batch_size", self.batch_size))
        rows, width = self.weight_gradient.shape
        refuse_loss(self.loss, rows)
        for name, tensor, shape in (
            ("weight", self.weight, (rows, width)),
            ("bias", self.bias, (rows,)),
            ("features", self.features, (self.batch_size, width)),
            ("probes", self.probes, (None, width)),
        ):
            _check(name, tensor, shape)
        if rows == 1:
            # The mean over one logit's elements is the mean over the batch.
            object.__setattr__(self, "loss", Loss(CROSS_ENTROPY, reduction=self.loss.reduction))
            for name in ("weight_gradient", "bias_gradient"):
                tensor = getattr(self, name)
                if tensor is not None:
                    object.__setattr__(self, name, torch.cat([-tensor, tensor]))
            for name in ("weight", "bias"):
                tensor = getattr(self, name)
                if tensor is not None:
                    object.__setattr__(self, name, torch.cat([torch.zeros_like(tensor), tensor]))

    @property
    def classes(self) -> int:
        """C; 2 for a single logit."""
        return int(self.weight_gradient.shape[0])

    @property
    def scale(self) -> float:
        """The factor s that turns the loss into a sum over the batch."""
        return float(self.batch_size) if self.loss.reduction == "mean" else 1.0

    @property
    def sharpness(self) -> float:
        """1 - e: the share of a target that is its label's."""
        return 1.0 - self.loss.label_smoothing

    @cached_property
    def rows(self) -> Tensor:
        """``s * dW``, [C, d], float64, on the CPU: ``sum_i (p_ij - y_ij) x_i``."""
        return self.weight_gradient.detach().double().cpu() * self.scale

    @cached_property
    def sums(self) -> Tensor:
        """``s * db + e B / C``, [C], float64, on the CPU: ``sum_i p_ij - (1 - e) n_j``.

        Raises:
            ValueError: a head without a bias; look at ``bias_gradient`` first.
        """
        if self.bias_gradient is None:
            raise ValueError("bias_gradient: expected [C], got a head without a bias.")
        smoothed = self.loss.label_smoothing * self.batch_size / self.classes
        return self.bias_gradient.detach().double().cpu() * self.scale + smoothed

    @property
    def nonnegative(self) -> bool | None:
        """True if the features of the batch or of all probes are non-negative, None if unknown."""
        known = self.probes if self.features is None else self.features
        return None if known is None or not known.numel() else bool((known >= 0).all())

    def head_parameters(self) -> tuple[Tensor, Tensor]:
        """W [C, d] and b [C] (zeros without a bias), float64, on the CPU.

        Raises:
            ValueError: the head's weights were not given.
        """
        if self.weight is None:
            raise ValueError(
                "weight: expected the head's [C, d], got None; write HeadGradient(..., "
                "weight=model.head.weight, bias=model.head.bias)."
            )
        weight = self.weight.detach().double().cpu()
        bias = None if self.bias is None else self.bias.detach().double().cpu()
        return weight, weight.new_zeros(len(weight)) if bias is None else bias

    def probabilities(self, features: Tensor) -> Tensor:
        """``softmax(W x + b)``, [N, d] → [N, C].

        Raises:
            ValueError: the head's weights were not given.
        """
        weight, bias = self.head_parameters()
        return torch.softmax(features.detach().double().cpu() @ weight.T + bias, dim=1)


def refuse_loss(loss: Loss, logits: int) -> None:
    """Raise unless targets of ``loss`` are labels that can be counted.

    Raises:
        ValueError: soft or real-valued targets, several logits under the binary loss, one
            logit under cross-entropy.
    """
    if loss.own:
        raise ValueError(
            "loss: expected cross_entropy, binary_cross_entropy_with_logits or mse_loss, got the "
            f"function {loss.name!r}, which has no identity between the gradient and the label "
            f"counts; write {AS_CLASSES} and a module whose forward returns the logits only, if it "
            "is cross-entropy of these, or state the labels."
        )
    if not loss.equations:
        raise ValueError(
            f"loss: expected cross_entropy, binary_cross_entropy_with_logits or mse_loss without "
            f"weights, got {loss.name} with options: class weights and other forms break the "
            f"identity between the gradient and the label counts; write {INVERTED} for a single "
            "sample."
        )
    if loss.targets != "index":
        raise ValueError(
            f"loss: expected class labels, got {loss.name} with targets={loss.targets!r}: "
            f"continuous targets have no counts; write {INVERTED}, or "
            f"{AS_CLASSES} if the client's targets were class indices."
        )
    if loss.name == BINARY and logits > 1:
        raise ValueError(
            f"loss: expected one logit for {loss.name}, got {logits}: one sample may have "
            "several labels or none, so counts do not add up to the batch size; write "
            "rgap.invert(model, update).labels."
        )
    if loss.name == CROSS_ENTROPY and logits < 2:
        raise ValueError(
            "loss: expected at least 2 classes for cross_entropy, got a head with 1: its softmax "
            "is constant and its gradient zero; write Loss('binary_cross_entropy_with_logits')."
        )


def _check(name: str, tensor: Tensor | None, shape: tuple[int | None, ...]) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name}: expected a floating tensor, got {got}; write {name}.double().")
    fits = tensor.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join("N" if n is None else str(n) for n in shape)
        advice = (
            "; one row per sample of the batch, flattened as the head takes it"
            if name == "features"
            else ""
        )
        raise ValueError(f"{name}: expected [{expected}], got {list(tensor.shape)}{advice}.")
    validation.require_finite(name, tensor, "check where it was computed")
