"""What the singular values of the head's gradient say about a batch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rgap.analysis.causes.cause import FIT, Cause, CauseKind, cause, sentence, sharper
from rgap.limits import LAW
from rgap.network.chain import Chain
from rgap.recovery import Recovery, Status
from rgap.solvers.rank import numerical_rank
from rgap.update.losses import Loss
from rgap.update.targets import CROSS_ENTROPY
from rgap.update.update import Update

PAIRS = 3  # shown

__all__ = ["Pair", "head_causes", "same_class_pairs"]


@dataclass(frozen=True)
class Pair:
    """Two samples of one class at the head.

    ``value = ‖x_a − x_b‖·‖p_a − p_b‖/(2B)`` is about the singular value of the head's gradient that
    tells them apart, for a mean over the batch; without the B for a sum.

    Attributes:
        first, second: rows of the batch.
        label: their class.
        distance: ‖x_a − x_b‖ of their features.
        difference: ‖p_a − p_b‖ of their predictions.
        value: as above.
    """

    first: int
    second: int
    label: int
    distance: float
    difference: float
    value: float


def same_class_pairs(
    features: Tensor, predictions: Tensor, labels: Tensor, loss: Loss
) -> tuple[Pair, ...]:
    """Every pair of one class with its singular value, the hardest first.

    Args:
        features: input of the head [B, d].
        predictions: softmax outputs [B, C].
        labels: class of every sample [B].
        loss: for its reduction.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    >>> p = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.5, 0.5]])
    >>> pair, = same_class_pairs(x, p, torch.tensor([0, 0, 1]), Loss())
    >>> pair.first, pair.second, round(pair.value, 4)  # √2 · √0.08 / 6
    (0, 1, 0.0667)
    """
    share = 1 / len(features) if loss.reduction == "mean" else 1.0
    pairs = []
    for a in range(len(features)):
        for b in range(a + 1, len(features)):
            if int(labels[a]) != int(labels[b]):
                continue
            distance = float((features[a] - features[b]).norm())
            difference = float((predictions[a] - predictions[b]).norm())
            value = distance * difference * share / 2
            pairs.append(Pair(a, b, int(labels[a]), distance, difference, value))
    return tuple(sorted(pairs, key=lambda pair: pair.value))


def head_causes(
    recovery: Recovery,
    update: Update | None,
    chain: Chain | None,
    batch: int,
    pairs: tuple[Pair, ...],
) -> list[Cause]:
    """What the singular values σ_1 ≥ σ_2 ≥ … of the head's gradient say about the batch.

    A batch of B samples with different features has B of them above the rounding of the update.

    Args:
        recovery: the answer.
        update: that was inverted, or None.
        chain: of the model, or None where it is no chain.
        batch: B, as stated or counted.
        pairs: samples of one class, the hardest to tell apart first.
    """
    if update is None or chain is None or not chain.stages:
        return []
    stage = chain.stages[-1]
    gradient = stage.affine.sent(update.gradients)
    if stage.affine.geometry is not None or not bool(gradient.any()):
        return []
    values = torch.linalg.svdvals(gradient.double())
    unit = torch.finfo(update.dtype).eps
    classes, lost = prod(stage.affine.out_shape), recovery.inputs is None
    if update.loss.name == CROSS_ENTROPY and batch >= classes and lost:
        words = (
            f"a softmax head with {classes} classes has a gradient of rank at most {classes - 1}: "
            f"by itself it cannot tell {batch} samples apart."
        )
        changes = (
            f"a batch of {classes - 1} at most",
            "more classes",
            "two fully connected layers in a row with biases, below which no such limit holds",
        )
        return [cause(CauseKind.HEAD_LIMIT, stage.name, float(batch), sentence(words), changes)]
    if batch > len(values):
        return []
    ratio = float(values[batch - 1] / values[0])
    if batch > 1 and lost and ratio < LAW * unit:
        told = numerical_rank(values, len(values), LAW * unit).rank
        words = (
            f"the gradient of '{stage.name}' tells {told} of {batch} samples apart: σ_{batch}/σ_1 "
            f"is {ratio:.1e}, below {LAW:.0f} rounding units of {_short(update.dtype)} "
            f"({LAW * unit:.1e}). Samples of one class whose predictions agree send nearly the "
            "same cotangent."
        )
        for pair in pairs[:PAIRS]:
            words += (
                f" Samples {pair.first} and {pair.second} of class {pair.label}: "
                f"‖x_a − x_b‖·‖p_a − p_b‖/(2B) = {pair.value:.1e}, {pair.value / values[0]:.1e} of "
                "σ_1."
            )
        others = (
            *sharper(update),
            "labels that differ",
            "a smaller batch",
            "a trained or larger head",
        )
        return [cause(CauseKind.ALIKE, stage.name, ratio, sentence(words), others)]
    beyond = values[batch:]
    if (
        recovery.status is Status.INCONSISTENT
        and len(beyond)
        and beyond[0] > LAW * unit * values[0]
    ):
        rows, columns = gradient.flatten(1).shape
        free = (rows - batch) * (columns - batch)
        sigma = float((beyond.square().sum() / free).sqrt())
        words = (
            f"the gradient of '{stage.name}' has a rank above the batch size {batch}: what is "
            f"beyond it has {sigma:.1e} rms on an entry. It looks like noise of that size, a "
            "larger batch, or another model."
        )
        changes = (f"noise={sigma:.1e} if noise was added", "the true batch size", *FIT[:1])
        return [cause(CauseKind.MISFIT, stage.name, sigma, sentence(words), changes)]
    return []


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
