"""Losses: their value, their cotangent in closed form, and the targets read back from it.

The cotangent k = dL/d(outputs) is where a gradient starts to talk about the labels.  With s the
scale of the reduction (1/B for a mean over samples, 1/numel over entries, 1 for a sum) and y the
targets:

=====================================  =============================  ==================
loss (``torch.nn.functional`` name)    cotangent                      options
=====================================  =============================  ==================
``cross_entropy``                      ``s (softmax(z) - y)``         ``weight``,
                                                                      ``label_smoothing``
``nll_loss`` of log-probabilities      ``-s w y``                     ``weight``
``focal_loss``                         ``s a F(q) (y - p)``           ``weight``, ``gamma``
``binary_cross_entropy_with_logits``   ``s (sigmoid(z) - y)``         ``pos_weight``
``binary_cross_entropy``               ``s (z - y) / (z (1 - z))``
``sigmoid_focal_loss``                 ``s a (2y - 1) H(r)``          ``alpha``, ``gamma``
``mse_loss``                           ``2 s (z - y)``
=====================================  =============================  ==================

The formulas in full are those of :mod:`rgap.update.loss_forms`.  A loss of one's own is a function
``loss(outputs, targets)`` that returns a scalar, and an unknown one is ``"unknown"``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap import validation
from rgap.arithmetic.reverse import hessian_product
from rgap.update.loss_forms import FORMS, Form, Options
from rgap.update.targets import (
    BINARY,
    CLASSES,
    CROSS_ENTROPY,
    FOCAL,
    LOG_PROBABILITIES,
    PROBABILITIES,
    SIGMOID_FOCAL,
    SQUARED,
    check,
    outside,
    require_outputs,
    require_shape,
)

__all__ = ["UNKNOWN", "Loss"]

UNKNOWN = "unknown"
_TARGETS = {
    CROSS_ENTROPY: ("index", "probability"),
    BINARY: ("index", "probability"),
    SQUARED: ("value",),
    LOG_PROBABILITIES: ("index",),
    PROBABILITIES: ("index", "probability"),
    FOCAL: ("index",),
    SIGMOID_FOCAL: ("index",),
}
_WEIGHTED = {
    "weight": (CROSS_ENTROPY, LOG_PROBABILITIES, FOCAL),
    "pos_weight": (BINARY,),
    "gamma": (FOCAL, SIGMOID_FOCAL),
    "alpha": (SIGMOID_FOCAL,),
}
_EQUATIONS = (CROSS_ENTROPY, BINARY, SQUARED)
_GAMMA = 2.0  # of Lin et al. 2017, and torchvision's default
# 2**16 label vectors is the most that anyone can usefully enumerate.
_MOST_LOGITS_LISTED = 16


@dataclass(frozen=True)
class _Lost:
    """A loss of one's own that a file could only name."""

    name: str

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        raise ValueError(
            f"loss: the update was sent under {self.name!r}, a function that a file cannot hold; "
            "write dataclasses.replace(update, loss=the_function)."
        )


@dataclass(frozen=True)
class Loss:
    """The loss a client minimised, with every option that changes its gradient.

    Args:
        name: name of the ``torch.nn.functional`` function, see the module's table; ``"unknown"``
            where it is not known.  Of a ``function`` any name.
        reduction: ``"mean"`` or ``"sum"``. Over the batch for losses of class indices (with
            ``weight`` by PyTorch's divisor, the weights of the batch), over all elements for the
            others, as in PyTorch.
        label_smoothing: PyTorch's, in [0, 1), cross-entropy only.
        targets: ``"index"`` for class indices [B] or ``[B, *positions]`` and 0/1 labels (binary),
            ``"probability"`` for soft targets of the outputs' shape. ``mse_loss`` always has
            ``"value"``: real numbers of the outputs' shape.
        weight: class weights, one a class: of cross-entropy, NLL and focal loss.
        pos_weight: weight of label 1 of the binary loss, one number or one a logit.
        gamma: focusing exponent of a focal loss, by default 2.
        alpha: weight of label 1 against label 0 of ``sigmoid_focal_loss``.
        function: a loss of one's own, ``function(outputs, targets) -> scalar``; outputs are what
            the model returns, a tuple or a dict too.

    Raises:
        ValueError: an option that PyTorch or this library does not have.

    Source: the cotangent of the cross-entropy is the identity behind iDLG (Zhao et al. 2020); the
    focal losses are those of Lin et al. 2017.

    Example:
        >>> import torch
        >>> loss = Loss("cross_entropy", label_smoothing=0.1)
        >>> outputs = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
        >>> k = loss.cotangent(outputs, torch.tensor([0]))
        >>> labels, distance = loss.read(loss.targets_from(outputs, k))
        >>> labels.tolist(), distance < 1e-12
        ([0], True)
        >>> Loss("cross_entropy", weight=[1.0, 2.0, 4.0]).weight
        (1.0, 2.0, 4.0)
    """

    name: str = CROSS_ENTROPY
    reduction: str = "mean"
    label_smoothing: float = 0.0
    targets: str = "index"
    weight: tuple[float, ...] | None = None
    pos_weight: tuple[float, ...] | None = None
    gamma: float | None = None
    alpha: float | None = None
    function: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        self._require_reduction()
        if self.function is not None or self.name == UNKNOWN:
            self._require_plain()
            return
        if self.name not in _TARGETS:
            raise ValueError(validation.unknown_loss(self.name, list(_TARGETS)))
        self._require_smoothing()
        for option, losses in _WEIGHTED.items():
            if getattr(self, option) is not None and self.name not in losses:
                raise ValueError(
                    f"Loss.{option}: {self.name} has none; it is an option of "
                    f"{' and '.join(losses)}."
                )
        object.__setattr__(self, "weight", _numbers("weight", self.weight))
        object.__setattr__(self, "pos_weight", _numbers("pos_weight", self.pos_weight))
        self._require_focus()
        if self.name == SQUARED and self.targets == "index":
            object.__setattr__(self, "targets", "value")  # the only kind it has
        if self.targets not in _TARGETS[self.name]:
            raise ValueError(
                f"Loss.targets: {self.name} takes {' or '.join(map(repr, _TARGETS[self.name]))}, "
                f"got {self.targets!r}."
            )

    @classmethod
    def of(cls, loss: object) -> Loss:
        """The `Loss` meant by a name, a `Loss`, one of PyTorch's loss modules, or a function.

        Args:
            loss: for instance ``"cross_entropy"``, ``nn.CrossEntropyLoss(label_smoothing=0.1)``, a
                function of outputs and targets, or None for one that is not known.

        Raises:
            ValueError: unknown name, ``ignore_index``, weights of places, ``reduction="none"``.
            TypeError: anything else.

        Example:
            >>> Loss.of("mse_loss").targets
            'value'
            >>> Loss.of(nn.BCELoss()).name, Loss.of(None).known
            ('binary_cross_entropy', False)
        """
        if isinstance(loss, Loss):
            return loss
        if loss is None:
            return cls(UNKNOWN)
        if isinstance(loss, str):
            return cls(loss)
        names: dict[type[nn.Module], str] = {
            nn.CrossEntropyLoss: CROSS_ENTROPY,
            nn.BCEWithLogitsLoss: BINARY,
            nn.MSELoss: SQUARED,
            nn.BCELoss: PROBABILITIES,
            nn.NLLLoss: LOG_PROBABILITIES,
        }
        for kind, name in names.items():
            if isinstance(loss, kind):
                validation.refuse_loss_options(loss)
                smoothing = float(getattr(loss, "label_smoothing", 0.0))
                options = {key: getattr(loss, key, None) for key in ("weight", "pos_weight")}
                return cls(name, str(loss.reduction), smoothing, **options)  # type: ignore[arg-type]
        if callable(loss) and not isinstance(loss, type):
            return cls(str(getattr(loss, "__name__", type(loss).__name__)), function=loss)
        raise TypeError(
            f"loss: expected one of {', '.join(map(repr, _TARGETS))}, a Loss or a function of "
            f"outputs and targets, got {type(loss).__name__}; write for instance "
            "Loss('cross_entropy')."
        )

    @classmethod
    def lost(cls, name: str) -> Loss:
        """A loss of one's own of which only the name is left, as a file has it."""
        return cls(name, function=_Lost(name))

    @property
    def known(self) -> bool:
        """True if the loss of given outputs and targets can be computed."""
        return self.name != UNKNOWN and not isinstance(self.function, _Lost)

    @property
    def own(self) -> bool:
        """True if it is a function of the caller's."""
        return self.function is not None

    @property
    def equations(self) -> bool:
        """True if the closed identities of the head hold: no weights, no focus, no other form.

        Where they do not, a single sample's targets are found by trying them.
        """
        plain = self.weight is None and self.pos_weight is None
        return self.name in _EQUATIONS and plain and not self.own

    @property
    def plain(self) -> bool:
        """True if ``outputs`` are what the model gives, not what steps of its own are yet to take.

        See :class:`rgap.head.behind.Behind`.
        """
        return True

    def outputs(self, classes: int) -> int:
        """Entries of a target of a sample with ``classes`` entries at the loss's argument."""
        return classes

    def magnitude(self, outputs: Tensor) -> float:
        """``|∂κ/∂y|``: what a change of one entry of a target moves its cotangent by.

        The same everywhere where :attr:`equations` hold.
        """
        scale = self._scale(outputs, torch.empty(0, device=outputs.device))
        assert isinstance(scale, float)
        smooth = (1.0 - self.label_smoothing) * scale
        return 2.0 * scale if self.name == SQUARED else smooth

    def open_at(self, outputs: Tensor) -> str:
        """Why a target does not follow from its cotangent; "" where it does."""
        return ""

    def rounding(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the cotangent of the client rounds with where it cancels: ``|∂κ/∂y| · 1[y ≠ 0]``.

        p − y rounds relative to 1 where y is not 0, and relative to p elsewhere.
        """
        y = self.dense(targets, outputs)
        present = (y != 0) | (self.label_smoothing > 0)
        return present.to(outputs) * self.magnitude(outputs)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Scalar loss of ``outputs`` [B, C] against admissible or dense ``targets``.

        ``torch.nn.functional`` does the work in the outputs' own dtype, so a float32 loss is truly
        a float32 loss. Only shapes are checked here (this runs inside Jacobian products); values
        are checked by `check_targets`.
        """
        if self.function is not None:
            return self._scalar(self.function(outputs, targets))
        form = self._form()
        if self.name == CROSS_ENTROPY:
            require_outputs(self.name, outputs)
            if targets.is_floating_point():
                targets = self.dense(targets, outputs)
                if self.weight is not None and self.targets == "index":  # PyTorch divides by B
                    scale = self._scale(outputs, targets)
                    return scale * form.value(outputs, targets, self._options(outputs))
            else:
                require_shape(self.name, outputs, targets, index=True)
                targets = targets.long()
            weight = None if self.weight is None else outputs.new_tensor(self.weight)
            return F.cross_entropy(
                outputs, targets, weight, reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )  # fmt: skip
        dense = self.dense(targets, outputs)
        if self.name == BINARY:
            positive = self._options(outputs).positive
            return F.binary_cross_entropy_with_logits(
                outputs, dense, reduction=self.reduction, pos_weight=positive
            )
        if self.name == SQUARED:
            return F.mse_loss(outputs, dense, reduction=self.reduction)
        return self._scale(outputs, dense) * form.value(outputs, dense, self._options(outputs))

    def cotangent(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``dL / d outputs`` in closed form (table in the module's docstring), shape of outputs.

        That of a loss of one's own is autograd's.
        """
        if self.own:
            return self._derivative(outputs, targets)
        y = self.dense(targets, outputs)
        return self._scale(outputs, y) * self._form().cotangent(outputs, y, self._options(outputs))

    def cotangent_jvp(
        self, outputs: Tensor, direction: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        """``(d^2 L / d outputs^2) direction``; shapes of ``outputs`` and ``direction`` are equal.

        The same for every admissible target where :attr:`equations` hold: ``s (p * v - p <p, v>)``
        row by row for cross-entropy, ``s p (1 - p) v`` for the binary loss, ``2 s v`` for squared
        error. For the others ``targets`` have to be given.
        """
        if direction.shape != outputs.shape:
            raise ValueError(
                f"direction: expected the outputs' shape {tuple(outputs.shape)}, got "
                f"{tuple(direction.shape)}."
            )
        if targets is None and not self.equations:
            raise ValueError(
                f"targets: the curvature of {self.name} with these options depends on them; write "
                "loss.cotangent_jvp(outputs, direction, targets)."
            )
        if self.own:
            return hessian_product(lambda z: self(z, targets), outputs, direction)
        require_outputs(self.name, outputs)
        y = torch.zeros_like(outputs) if targets is None else self.dense(targets, outputs)
        options = self._options(outputs)
        scale = self._scale(outputs, y)
        return scale * self._form().curvature(outputs, y, direction, options)

    def targets_from(self, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Dense targets, before label smoothing, whose cotangent at ``outputs`` is ``cotangent``.

        The inverse of `cotangent` in its second argument; shape of ``outputs``. Whether what comes
        out is admissible is `read`'s question. A focal loss is not affine in its targets: what
        comes out is exact at the admissible ones only.

        Raises:
            ValueError: a shape that differs; a loss without a formula.
        """
        if cotangent.shape != outputs.shape:
            raise ValueError(
                f"cotangent: expected the outputs' shape {tuple(outputs.shape)}, got "
                f"{tuple(cotangent.shape)}."
            )
        form, options = self._form(), self._options(outputs)
        require_outputs(self.name, outputs)
        if self._weighs_batch:
            return self._weighted_targets(outputs, cotangent)
        scale = self._scale(outputs, outputs.new_empty(0))
        return form.target(outputs, cotangent / scale, options)

    def read(self, dense: Tensor) -> tuple[Tensor, float]:
        """Nearest admissible targets to ``dense`` and the max-abs distance to the admissible set.

        Class indices (long, [B] or ``[B, *positions]``) for a loss of classes with
        ``targets="index"``; 0/1 labels (long, [B] for one logit, else the shape of ``dense``) for a
        binary one. Soft targets and real values are returned as they are; for soft targets the
        distance is how far they lie outside the probabilities, for real values it is 0. Anything
        not finite is at distance infinity.
        """
        finite = bool(torch.isfinite(dense).all())
        if self.targets == "index":
            if self.name in CLASSES:
                labels = dense.argmax(dim=1)
                nearest = _one_hot(labels, dense)
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
        if self.name in CLASSES:
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
        if self.name in CLASSES and not targets.is_floating_point():
            require_shape(self.name, outputs, targets, index=True)
            return _one_hot(targets.long(), outputs)
        require_shape(self.name, outputs, targets)
        return targets.to(outputs.dtype).reshape(outputs.shape)  # [B] to [B, 1]

    def check_targets(self, outputs: Any, targets: Any) -> None:
        """Raise unless ``targets`` are admissible for ``outputs``: kind, shape and values.

        Those of a loss of one's own are its own affair.

        Raises:
            TypeError: a tensor of the wrong kind (soft targets for ``"index"`` and the reverse).
            ValueError: wrong shape, an index out of range, a probability outside [0, 1] or rows
                that do not sum to 1, NaN or infinity; outputs that are none of the loss's.
        """
        if self.own:
            return
        self._form()
        check(self.name, self.targets, outputs, targets)
        if self.name == PROBABILITIES and not bool(((outputs >= 0) & (outputs <= 1)).all()):
            raise ValueError(
                "outputs: binary_cross_entropy expects probabilities in [0, 1], got values from "
                f"{float(outputs.min()):.3g} to {float(outputs.max()):.3g}; for logits write "
                "loss='binary_cross_entropy_with_logits'."
            )
        classes = outputs.shape[1] if outputs.ndim > 1 else 1
        for option in ("weight", "pos_weight"):
            given: tuple[float, ...] | None = getattr(self, option)
            if given is not None and len(given) not in ((1, classes) if classes else (1,)):
                raise ValueError(
                    f"Loss.{option}: expected {classes} numbers, one a class, got {len(given)}."
                )

    @property
    def _weighs_batch(self) -> bool:
        """True if the divisor of the mean is the sum of the weights of the batch's classes."""
        weighted = self.weight is not None and self.name in (CROSS_ENTROPY, LOG_PROBABILITIES)
        return weighted and self.targets == "index" and self.reduction == "mean"

    def divisor(self, targets: Tensor, copies: Tensor) -> float:
        """What the mean divides by: of dense targets [R, C] that occur ``copies`` [R] times."""
        if self.reduction == "sum":
            return 1.0
        if self._weighs_batch:
            assert self.weight is not None
            return float(copies @ (targets @ targets.new_tensor(self.weight)))
        count = float(copies.sum())
        return count if self.name in CLASSES else count * targets.shape[1]

    def _scale(self, outputs: Tensor, dense: Tensor) -> float | Tensor:
        if self.reduction == "sum":
            return 1.0
        if self._weighs_batch:
            weight = self._options(outputs).weight
            assert weight is not None
            return 1.0 / (weight * dense).sum()
        count = outputs.numel()
        return 1.0 / (count // outputs.shape[1] if self.name in CLASSES else count)

    def _weighted_targets(self, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Targets of a mean that is weighed by them: the class of each sample first, by its sign.

        With all classes known the divisor is, and with it the scale.
        """
        form, options = self._form(), self._options(outputs)
        best, least = outputs, math.inf
        for labels in self._classes_at(outputs, cotangent):
            guess = _one_hot(labels, outputs)
            target = form.target(outputs, cotangent / self._scale(outputs, guess), options)
            gap = float((target - guess).abs().max())
            if gap < least or least == math.inf:
                best, least = target, gap
        return best

    def _classes_at(self, outputs: Tensor, cotangent: Tensor) -> list[Tensor]:
        """The classes with the least cotangent; for one sample every class."""
        if len(outputs) == 1 and outputs.ndim == 2:
            every = torch.arange(outputs.shape[1], device=outputs.device)
            return [c.reshape(1) for c in every]
        return [cotangent.argmin(1)]

    def _form(self) -> Form:
        if self.name not in FORMS or self.own:
            raise ValueError(
                f"loss: {self.name!r} has no formula here; write one of "
                f"{', '.join(map(repr, FORMS))}, or a function of outputs and targets to replay it."
            )
        return FORMS[self.name]

    def _options(self, outputs: Tensor) -> Options:
        def broadcast(values: Sequence[float] | None) -> Tensor | None:
            if values is None:
                return None
            return outputs.new_tensor(values).reshape(-1, *[1] * max(outputs.ndim - 2, 0))

        return Options(
            broadcast(self.weight),
            broadcast(self.pos_weight),
            self.label_smoothing,
            _GAMMA if self.gamma is None else self.gamma,
            self.alpha,
        )

    def _scalar(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss: {self.name} returned {got}, expected one number; a client sends the "
                "gradient of a scalar: write its mean or its sum."
            )
        return value.reshape(())

    def _derivative(self, outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            return torch.autograd.grad(self(leaf, targets), leaf)[0]

    def _require_reduction(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(
                f"Loss.reduction: expected 'mean' or 'sum', got {self.reduction!r}; a client sends "
                "the gradient of a scalar, so write the reduction it used."
            )

    def _require_smoothing(self) -> None:
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

    def _require_plain(self) -> None:
        given = [option for option in _WEIGHTED if getattr(self, option) is not None]
        if self.label_smoothing:
            given.append("label_smoothing")
        if given:
            what = "an unknown loss" if self.name == UNKNOWN else "a loss of your own"
            raise ValueError(f"Loss.{given[0]}: {what} has no options; put them into the function.")

    def _require_focus(self) -> None:
        if self.gamma is not None and not 0.0 <= self.gamma < math.inf:
            raise ValueError(
                f"Loss.gamma: expected a finite number of at least 0, got {self.gamma!r}; write "
                "gamma=2.0."
            )
        if self.alpha is not None and not 0.0 < self.alpha < 1.0:
            raise ValueError(
                f"Loss.alpha: expected a number in (0, 1), got {self.alpha!r}; write alpha=0.25."
            )


def _numbers(name: str, values: Any) -> tuple[float, ...] | None:
    """Weights as a tuple of positive numbers."""
    if values is None:
        return None
    listed = values.detach().flatten().tolist() if isinstance(values, Tensor) else values
    numbers = tuple(float(v) for v in (listed if isinstance(listed, Sequence) else [listed]))
    if not numbers or not all(0.0 < v < math.inf for v in numbers):
        raise ValueError(
            f"Loss.{name}: expected positive numbers, got {numbers}; a class of weight 0 leaves no "
            "trace in the gradient: leave its samples out of the batch."
        )
    return numbers


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Class indices [B, *positions] as dense targets with the classes along dimension 1."""
    return F.one_hot(labels, like.shape[1]).movedim(-1, 1).to(like.dtype)
