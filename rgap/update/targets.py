"""Targets that a loss admits: their kind, shape and values, dense ones, and the nearest to some.

``loss`` is the name of the ``torch.nn.functional`` function, ``kind`` what `rgap.Loss.targets`
says: ``"index"``, ``"probability"`` or ``"value"``.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap import validation

__all__ = [
    "BINARIES",
    "BINARY",
    "CLASSES",
    "CROSS_ENTROPY",
    "FOCAL",
    "LOG_PROBABILITIES",
    "PROBABILITIES",
    "SIGMOID_FOCAL",
    "SQUARED",
    "admissible",
    "check",
    "dense",
    "nearest",
    "one_hot",
    "outside",
    "require_outputs",
    "require_probabilities",
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
BINARIES = (BINARY, PROBABILITIES, SIGMOID_FOCAL)  # a 0/1 label an output: 1 sends κ_j < 0
# 2**16 label vectors is the most that anyone can usefully enumerate.
_MOST_LOGITS_LISTED = 16


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


def dense(loss: str, targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets in the shape and dtype of ``outputs``; see `rgap.Loss.dense`."""
    require_outputs(loss, outputs)
    if loss in CLASSES and not targets.is_floating_point():
        require_shape(loss, outputs, targets, index=True)
        return one_hot(targets.long(), outputs)
    require_shape(loss, outputs, targets)
    return targets.to(outputs.dtype).reshape(outputs.shape)  # [B] to [B, 1]


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Class indices [B, *positions] as dense targets with the classes along dimension 1."""
    return F.one_hot(labels, like.shape[1]).movedim(-1, 1).to(like.dtype)


def nearest(loss: str, kind: str, dense: Tensor) -> tuple[Tensor, float]:
    """The admissible targets next to dense ones, and how far off; see `rgap.Loss.read`."""
    finite = bool(torch.isfinite(dense).all())
    if kind == "index":
        if loss in CLASSES:
            labels = dense.argmax(dim=1)
            rounded = one_hot(labels, dense)
        else:
            rounded = (dense > 0.5).to(dense.dtype)
            single = dense.ndim == 2 and dense.shape[1] == 1
            labels = rounded.long().reshape(-1) if single else rounded.long()
        return labels, float((dense - rounded).abs().max()) if finite else math.inf
    if not finite:
        return dense, math.inf
    return dense, outside(loss, dense) if kind == "probability" else 0.0


def admissible(loss: str, kind: str, classes: int) -> list[int] | list[tuple[int, ...]] | None:
    """Every target one sample can have, or None when continuous; see `rgap.Loss.admissible`."""
    if kind != "index":
        return None
    if loss in CLASSES:
        return list(range(classes))
    if classes == 1:
        return [0, 1]
    if classes > _MOST_LOGITS_LISTED:
        raise ValueError(
            f"classes: {classes} logits have 2**{classes} label vectors, too many to list; "
            "read them from the cotangent with Loss.read(Loss.targets_from(outputs, k))."
        )
    return list(itertools.product((0, 1), repeat=classes))


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


def require_probabilities(loss: str, outputs: Tensor) -> None:
    """Raise if ``loss`` takes probabilities and the model's outputs are none."""
    outputs = outputs.detach()
    if loss == PROBABILITIES and not bool(((outputs >= 0) & (outputs <= 1)).all()):
        raise ValueError(
            "outputs: binary_cross_entropy expects probabilities in [0, 1], got values from "
            f"{float(outputs.min()):.3g} to {float(outputs.max()):.3g}; for logits write "
            "loss='binary_cross_entropy_with_logits'."
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
