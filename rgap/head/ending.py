"""A loss of probabilities behind the step that makes them, as the loss of logits that both are.

``nll_loss`` of a log-softmax is cross-entropy, ``binary_cross_entropy`` of a sigmoid is the binary
loss of logits, and cross-entropy does not notice a log-softmax.  The step goes, its loss with it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rgap.network.chain import Chain
from rgap.network.reshape import Op, Reshape
from rgap.update.losses import Loss
from rgap.update.targets import BINARY, CROSS_ENTROPY, LOG_PROBABILITIES, PROBABILITIES

__all__ = ["folded"]

_PAIRS = {
    (LOG_PROBABILITIES, "log_softmax"): CROSS_ENTROPY,
    (CROSS_ENTROPY, "log_softmax"): CROSS_ENTROPY,
    (PROBABILITIES, "sigmoid"): BINARY,
}


def folded(chain: Chain, loss: Loss, batch: int | None) -> tuple[Chain, Loss]:
    """The chain up to its logits and the loss of these, where the last step belongs to the loss.

    Args:
        chain: of the model.
        loss: as the client minimised it, of the model's outputs.
        batch: size of the batch where it is known: a mean weighed by the class of its only sample
            is not weighed.
    """
    if loss.own or not loss.known:
        return chain, loss
    if chain.stages and chain.output_shape:
        last = chain.stages[-1]
        tail = _without_reshapes(last.tail)
        name = _PAIRS.get((loss.name, tail[-1].kind)) if tail else None
        if name is not None and _along_classes(tail[-1]):
            stage = replace(last, tail=last.tail[: last.tail.index(tail[-1])])
            chain = replace(chain, stages=(*chain.stages[:-1], stage))
            loss = replace(loss, name=name)
    alone = batch == 1 and loss.reduction == "mean" and loss.targets == "index"
    if alone and loss.weight is not None and loss.name == CROSS_ENTROPY and not (
        loss.label_smoothing or len(chain.output_shape) > 1
    ):  # fmt: skip
        loss = replace(loss, weight=None)
    return chain, loss


def _without_reshapes(tail: tuple[Op, ...]) -> list[Op]:
    kept = list(tail)
    while kept and isinstance(kept[-1], Reshape) and kept[-1].in_shape == kept[-1].out_shape:
        kept.pop()
    return kept


def _along_classes(op: Op) -> bool:
    """True for a log-softmax over the classes of one output [C], and for what acts by entries."""
    if op.elementwise:
        return True
    if len(op.in_shape) != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    z: Tensor = torch.randn(3, *op.in_shape, generator=generator, dtype=torch.float64)
    return bool(torch.allclose(op.forward(z), torch.log_softmax(z, 1)))
