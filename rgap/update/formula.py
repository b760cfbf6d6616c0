"""A loss in numbers: its value as PyTorch computes it, its derivatives, and targets from them.

:class:`Formula` has those of a named loss in closed form, :class:`Own` those of a function of the
caller's by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.arithmetic.reverse import hessian_product
from rgap.remedy import FUNCTION
from rgap.update.loss_forms import FORMS, Form, Options, per_class
from rgap.update.reduction import Reduction
from rgap.update.targets import (
    BINARY,
    CROSS_ENTROPY,
    SQUARED,
    dense,
    require_outputs,
    require_shape,
)

__all__ = ["Formula", "Lost", "Own"]

_GAMMA = 2.0  # of Lin et al. 2017, and torchvision's default


@dataclass(frozen=True)
class Formula:
    """A loss of :data:`rgap.update.loss_forms.FORMS` with its options and its reduction.

    Raises:
        ValueError: a name that is none of them.

    >>> loss = Formula("mse_loss", Reduction(mean=True, samples=False))
    >>> z, y = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    >>> loss.value(z, y).item(), loss.cotangent(z, y).tolist()
    (2.5, [[1.0, 2.0]])
    """

    name: str
    reduction: Reduction
    smoothing: float = 0.0
    weight: tuple[float, ...] | None = None
    positive: tuple[float, ...] | None = None
    gamma: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.name not in FORMS:
            raise ValueError(_no_formula(self.name))

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``s Σ ℓ``, a scalar in the outputs' own dtype, by PyTorch's function where it has one."""
        if self.name == CROSS_ENTROPY:
            return self._cross_entropy(outputs, targets)
        y = dense(self.name, targets, outputs)
        reduction = "mean" if self.reduction.mean else "sum"
        if self.name == BINARY:
            positive = self._options(outputs).positive
            return F.binary_cross_entropy_with_logits(
                outputs, y, reduction=reduction, pos_weight=positive
            )
        if self.name == SQUARED:
            return F.mse_loss(outputs, y, reduction=reduction)
        return self._summed(outputs, y)

    def cotangent(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``κ = s ∂ℓ/∂z``, of the outputs' shape."""
        y = dense(self.name, targets, outputs)
        scale = self.reduction.scale(outputs, y)
        return scale * self._form.cotangent(outputs, y, self._options(outputs))

    def curvature(self, outputs: Tensor, targets: Tensor | None, direction: Tensor) -> Tensor:
        """``(∂κ/∂z) v``; targets may be None where it is the same for all."""
        require_outputs(self.name, outputs)
        y = torch.zeros_like(outputs) if targets is None else dense(self.name, targets, outputs)
        scale = self.reduction.scale(outputs, y)
        return scale * self._form.curvature(outputs, y, direction, self._options(outputs))

    def targets(self, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Dense targets whose κ is ``cotangent``."""
        require_outputs(self.name, outputs)
        return self.reduction.targets(self._form, self._options(outputs), outputs, cotangent)

    def _cross_entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        require_outputs(self.name, outputs)
        if targets.is_floating_point():
            targets = dense(self.name, targets, outputs)
            if self.reduction.weight is not None:  # PyTorch divides by B
                return self._summed(outputs, targets)
        else:
            require_shape(self.name, outputs, targets, index=True)
            targets = targets.long()
        return F.cross_entropy(
            outputs,
            targets,
            None if self.weight is None else outputs.new_tensor(self.weight),
            reduction="mean" if self.reduction.mean else "sum",
            label_smoothing=self.smoothing,
        )

    def _summed(self, outputs: Tensor, y: Tensor) -> Tensor:
        scale = self.reduction.scale(outputs, y)
        return scale * self._form.value(outputs, y, self._options(outputs))

    @property
    def _form(self) -> Form:
        return FORMS[self.name]

    def _options(self, outputs: Tensor) -> Options:
        return Options(
            None if self.weight is None else per_class(self.weight, outputs),
            None if self.positive is None else per_class(self.positive, outputs),
            self.smoothing,
            _GAMMA if self.gamma is None else self.gamma,
            self.alpha,
        )


@dataclass(frozen=True)
class Own:
    """A loss of one's own, ``function(outputs, targets) -> scalar``, under a name."""

    name: str
    function: Callable[[Any, Any], Tensor]

    def value(self, outputs: Any, targets: Any) -> Tensor:
        """What the function returns, one number."""
        value: object = self.function(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss: {self.name} returned {got}, expected one number; a client sends the "
                "gradient of a scalar: write its mean or its sum."
            )
        return value.reshape(())

    def cotangent(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Its derivative with respect to the outputs."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf, targets), leaf)[0]

    def curvature(self, outputs: Tensor, targets: Tensor | None, direction: Tensor) -> Tensor:
        """Its second derivative times a direction."""
        return hessian_product(lambda z: self.value(z, targets), outputs, direction)

    def targets(self, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """None follow.

        Raises:
            ValueError: always.
        """
        raise ValueError(_no_formula(self.name))


@dataclass(frozen=True)
class Lost:
    """A loss of one's own that a file could only name."""

    name: str

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Raise: there is no function."""
        raise ValueError(
            f"loss: the update was sent under {self.name!r}, a function that a file cannot hold; "
            f"write {FUNCTION}."
        )


def _no_formula(name: str) -> str:
    return (
        f"loss: {name!r} has no formula here; write one of {', '.join(map(repr, FORMS))}, or a "
        "function of outputs and targets to replay it."
    )
