"""What a recovery of a batch has to keep to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rgap
from rgap.analysis import score
from rgap.precision import Precision
from rgap.recovery import Recovery, Status
from rgap.separation.batch import Batch
from rgap.update.losses import Loss


def batch_of(model: nn.Module, x: Tensor, y: Tensor, loss: str | Loss = "cross_entropy") -> Batch:
    """What separating is told of the update of a batch, with its true size."""
    update = rgap.capture(model, x, y, loss=loss)
    gradients = {name: g.double() for name, g in update.gradients.items()}
    chain = rgap.network.parse(model, tuple(x.shape[1:]))
    return Batch(chain, gradients, update.loss, Precision(update.dtype), len(x))


def expanded(recovery: Recovery) -> tuple[Tensor, Tensor]:
    """Rows and labels, each as often as it occurs."""
    assert recovery.inputs is not None and recovery.labels is not None
    copies = recovery.multiplicities
    if copies is None:
        copies = torch.ones(len(recovery.inputs), dtype=torch.long)
    return (
        recovery.inputs.repeat_interleave(copies, 0),
        recovery.labels.repeat_interleave(copies, 0),
    )


def distance(recovery: Recovery, x: Tensor, y: Tensor) -> float:
    """Largest error of any entry at the best one-to-one match of pictures with their labels.

    Infinite where the number of samples or any label is wrong.
    """
    beside = score(recovery, x, y)
    if beside.surplus or beside.worst == float("inf"):
        return float("inf")
    if y.is_floating_point():
        named = expanded(recovery)[1][beside.order].double()
        return max(beside.worst, float((named - y.double()).abs().max()))
    return beside.worst if beside.label_accuracy == 1.0 else float("inf")


def counted(recovery: Recovery, x: Tensor, y: Tensor) -> bool:
    """True if copies were found as such: ``AMBIGUOUS``, and every picture within its bound."""
    if recovery.inputs is None:
        return False
    assert recovery.status is Status.AMBIGUOUS and recovery.error_bound is not None
    assert distance(recovery, x, y) <= recovery.error_bound
    return True


def certified(recovery: Recovery, x: Tensor, y: Tensor) -> bool:
    """True if ``EXACT``; asserts that every picture then is within its bound, and every label."""
    if not recovery.exact:
        assert recovery.certified != {"inputs", "targets"}
        return False
    assert recovery.error_bound is not None
    error = distance(recovery, x, y)
    assert error <= recovery.error_bound, (error, recovery.error_bound, recovery.reason)
    return True


def true_roots(batch: Batch, x: Tensor) -> Tensor:
    """Q of the different pictures x at the first layer."""
    return x.double().flatten(1) @ batch.mixture(0).right
