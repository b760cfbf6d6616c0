"""Targets that a loss admits: their kind, shape and values.

``loss`` is the name of the ``torch.nn.functional`` function, ``kind`` what `rgap.Loss.targets`
says: ``"index"``, ``"probability"`` or ``"value"``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap import validation

__all__ = [
    "BINARY",
    "CLASSES",
    "CROSS_ENTROPY",
    "FOCAL",
    "LOG_PROBABILITIES",
    "PROBABILITIES",
    "SIGMOID_FOCAL",
    "SQUARED",
    "check",
    "outside",
    "require_outputs",
    "require_shape",
]

CROSS_ENTROPY = "cross_entropy"
BINARY = "binary_cross_entropy_with_logits"
SQUARED = "mse_loss"
LOG_PROBABILITIES = "nll_loss"
PROBABILITIES = "binary_cross_entropy"
FOCAL = "focal_loss"
SIGMOID_FOCAL = "sigmoid_focal_loss"
CLASSES = (CROSS_ENTROPY, LOG_PROBABILITIES, FOCAL)  # one class a sample, along dimension 1


def check(loss: str, kind: str, outputs: Tensor, targets: Tensor) -> None:
    """Raise unless ``targets`` are admissible for ``outputs``; see `rgap.Loss.check_targets`."""
    require_outputs(loss, outputs)
    if targets.is_complex():
        raise TypeError(f"targets: expected real numbers, got {targets.dtype}.")
    if loss in CLASSES and kind == "index":
        _check_indices(loss, outputs, targets)
        return
    if kind != "index" and not targets.is_floating_point():
        index = ", or Loss(targets='index')" if kind == "probability" else ""
        raise TypeError(
            f"targets: {loss} with targets={kind!r} expects floating numbers of shape "
            f"{tuple(outputs.shape)}, got {targets.dtype}; write targets.float(){index}."
        )
    require_shape(loss, outputs, targets)
    if targets.is_floating_point():
        validation.require_finite("targets", targets, "clean the targets first")
    if kind == "index" and not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError(
            f"targets: {loss} expects labels 0 and 1; for soft labels write "
            f"Loss({loss!r}, targets='probability')."
        )
    if kind == "probability":
        # Rows of a softmax in the targets' own precision must pass.
        tolerance = max(1e-4, 8.0 * torch.finfo(targets.dtype).eps)
        if outside(loss, targets) > tolerance:
            rows = " and rows that sum to 1" if loss == CROSS_ENTROPY else ""
            raise ValueError(f"targets: expected probabilities in [0, 1]{rows}.")


def outside(loss: str, dense: Tensor) -> float:
    """How far soft targets lie outside [0, 1], and their rows from summing to 1."""
    worst = max(float((-dense).max()), float((dense - 1).max()), 0.0)
    if loss == CROSS_ENTROPY:
        worst = max(worst, float((dense.sum(dim=1) - 1).abs().max()))
    return worst


def require_outputs(loss: str, outputs: Tensor) -> None:
    """Raise unless the model's outputs have a shape that ``loss`` takes."""
    if loss not in CLASSES:
        if outputs.ndim == 0:
            raise ValueError(f"outputs: {loss} expects [B] or [B, C], got a scalar.")
    elif outputs.ndim < 2 or outputs.shape[1] < 2:
        raise ValueError(
            f"outputs: {loss} expects [B, C] or [B, C, ...] with C >= 2, got "
            f"{tuple(outputs.shape)}; "
            "for a single logit write loss='binary_cross_entropy_with_logits'."
        )


def require_shape(loss: str, outputs: Tensor, targets: Tensor, *, index: bool = False) -> None:
    """Raise unless ``targets`` have one entry per sample (``index``) or the outputs' shape."""
    column = loss not in CLASSES and outputs.ndim == 2 and outputs.shape[1] == 1
    expected = (len(outputs), *outputs.shape[2:]) if index else tuple(outputs.shape)
    if tuple(targets.shape) == expected or (column and targets.shape == outputs.shape[:1]):
        return
    hint = ""
    if index and loss == CROSS_ENTROPY and targets.shape == outputs.shape:
        hint = "; write targets.argmax(dim=1), or Loss('cross_entropy', targets='probability')"
    raise ValueError(
        f"targets: {loss} with outputs {tuple(outputs.shape)} expects shape {expected}, got "
        f"{tuple(targets.shape)} ({targets.dtype}){hint}."
    )


def _check_indices(loss: str, outputs: Tensor, targets: Tensor) -> None:
    if targets.is_floating_point() or targets.dtype == torch.bool:
        soft = "; for soft targets write Loss('cross_entropy', targets='probability')"
        raise TypeError(
            f"targets: {loss} expects class indices, a long tensor of shape "
            f"{(len(outputs), *outputs.shape[2:])}, got {targets.dtype} of shape "
            f"{tuple(targets.shape)}{soft if loss == CROSS_ENTROPY else ''}."
        )
    require_shape(loss, outputs, targets, index=True)
    classes = outputs.shape[1]
    wrong = targets[(targets < 0) | (targets >= classes)]
    if len(wrong):
        raise ValueError(
            f"targets: expected class indices 0 to {classes - 1} (the model has {classes} "
            f"outputs), got {sorted(set(wrong.tolist()))[:5]}; ignore_index is not "
            "offered, leave those samples out of the batch."
        )
