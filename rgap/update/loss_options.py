"""What a loss may say beside its name: which options each has, and in which range."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rgap.update.loss_forms import FORMS
from rgap.update.targets import BINARY, CROSS_ENTROPY, LOG_PROBABILITIES, PROBABILITIES, SQUARED

__all__ = [
    "OPTIONS",
    "UNKNOWN",
    "of_module",
    "require_classes",
    "require_none",
    "require_reduction",
    "settled",
]

UNKNOWN = "unknown"
# Losses that have an option.
OPTIONS = {
    option: tuple(name for name, form in FORMS.items() if option in form.options)
    for option in ("weight", "pos_weight", "gamma", "alpha")
}
_MODULES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: CROSS_ENTROPY,
    nn.BCEWithLogitsLoss: BINARY,
    nn.MSELoss: SQUARED,
    nn.BCELoss: PROBABILITIES,
    nn.NLLLoss: LOG_PROBABILITIES,
}
# What people write instead; answered with the name to write, never silently translated.
_MEANT = {
    "ce": "cross_entropy",
    "crossentropy": "cross_entropy",
    "crossentropyloss": "cross_entropy",
    "nll": "nll_loss",
    "nllloss": "nll_loss",
    "focal": "focal_loss",
    "bce": "binary_cross_entropy_with_logits",
    "bcewithlogitsloss": "binary_cross_entropy_with_logits",
    "bceloss": "binary_cross_entropy",
    "mse": "mse_loss",
    "mseloss": "mse_loss",
    "l2": "mse_loss",
}


def of_module(loss: object) -> dict[str, Any] | None:
    """Name and options of one of PyTorch's loss modules; None for anything else.

    Raises:
        ValueError: ``ignore_index``, weights of places.

    >>> of_module(nn.MSELoss(reduction="sum"))["name"], of_module("mse_loss")
    ('mse_loss', None)
    """
    for kind, name in _MODULES.items():
        if isinstance(loss, kind):
            _refuse_options(loss)
            options = {key: getattr(loss, key, None) for key in ("weight", "pos_weight")}
            smoothing = float(getattr(loss, "label_smoothing", 0.0))
            reduction = str(loss.reduction)
            return {"name": name, "reduction": reduction, "label_smoothing": smoothing, **options}
    return None


def settled(
    name: str, label_smoothing: float, targets: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Weights as tuples and the kind of targets, of a loss that has a formula here.

    Args:
        name: of the loss.
        label_smoothing: as declared.
        targets: kind of targets, as declared.
        options: values of :data:`OPTIONS`, None where there is none.

    Raises:
        ValueError: an option that the loss does not have, or one out of range.
    """
    if name not in FORMS:
        raise ValueError(_unknown(name))
    if not (0.0 <= label_smoothing < 1.0):
        raise ValueError(
            f"Loss.label_smoothing: expected a number in [0, 1), got {label_smoothing!r}; "
            "at 1 the gradient no longer depends on the labels."
        )
    if label_smoothing and name != CROSS_ENTROPY:
        raise ValueError(
            f"Loss.label_smoothing: {name} has none in PyTorch; smooth the targets "
            "yourself and write Loss(..., targets='probability')."
        )
    for option, losses in OPTIONS.items():
        if options[option] is not None and name not in losses:
            raise ValueError(
                f"Loss.{option}: {name} has none; it is an option of {' and '.join(losses)}."
            )
    weights = {key: _numbers(key, options[key]) for key in ("weight", "pos_weight")}
    _require_focus(options["gamma"], options["alpha"])
    if name == SQUARED and targets == "index":
        targets = "value"  # the only kind it has
    kinds = FORMS[name].targets
    if targets not in kinds:
        raise ValueError(
            f"Loss.targets: {name} takes {' or '.join(map(repr, kinds))}, got {targets!r}."
        )
    return {**weights, "targets": targets}


def require_none(name: str, label_smoothing: float, options: Mapping[str, Any]) -> None:
    """Raise if an unknown loss, or one of the caller's own, has options."""
    given = [option for option, value in options.items() if value is not None]
    if label_smoothing:
        given.append("label_smoothing")
    if given:
        what = "an unknown loss" if name == UNKNOWN else "a loss of your own"
        raise ValueError(f"Loss.{given[0]}: {what} has no options; put them into the function.")


def require_reduction(reduction: str) -> None:
    """Raise unless a loss is reduced to a scalar."""
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"Loss.reduction: expected 'mean' or 'sum', got {reduction!r}; a client sends "
            "the gradient of a scalar, so write the reduction it used."
        )


def require_classes(option: str, given: Sequence[float] | None, classes: int) -> None:
    """Raise unless there is one weight, or one a class."""
    if given is not None and len(given) not in ((1, classes) if classes else (1,)):
        raise ValueError(
            f"Loss.{option}: expected {classes} numbers, one a class, got {len(given)}."
        )


def _require_focus(gamma: float | None, alpha: float | None) -> None:
    if gamma is not None and not 0.0 <= gamma < math.inf:
        raise ValueError(
            f"Loss.gamma: expected a finite number of at least 0, got {gamma!r}; write gamma=2.0."
        )
    if alpha is not None and not 0.0 < alpha < 1.0:
        raise ValueError(
            f"Loss.alpha: expected a number in (0, 1), got {alpha!r}; write alpha=0.25."
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


def _refuse_options(loss: nn.Module) -> None:
    """Raise if a PyTorch loss module has an option that `rgap.Loss` has not."""
    if isinstance(loss, (nn.BCELoss, nn.BCEWithLogitsLoss)) and loss.weight is not None:
        raise ValueError(
            f"loss: {type(loss).__name__}(weight=...) weighs places of the batch, not classes, and "
            "is not offered by name; write the loss as a function of outputs and targets."
        )
    if getattr(loss, "ignore_index", -100) != -100:
        raise ValueError(
            f"loss: {type(loss).__name__}(ignore_index=...) is not supported; leave the ignored "
            "samples out of the batch."
        )


def _unknown(name: object) -> str:
    """The message for a loss that has no formula here."""
    known = ", ".join(map(repr, FORMS))
    text = f"loss: expected one of {known}, got {name!r}"
    key = str(name).lower()
    close = difflib.get_close_matches(key, list(FORMS), n=1)
    guess = _MEANT.get(key) or (close[0] if close else None)
    return f"{text}; write loss={guess!r}." if guess else f"{text}."
