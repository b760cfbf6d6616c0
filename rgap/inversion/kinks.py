"""Units at a kink of their activation, below which a contradiction refutes nothing.

Weights and data on a grid (halves under whole numbers, binary pictures) give z = 0 exactly.  The
answer is off by rounding, its z by as much, and on the other side of a kink φ' is another number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rgap.head.behind import Behind
from rgap.inversion.problem import Problem
from rgap.limits import KINK, ON
from rgap.network.activations import Activation
from rgap.network.chain import Stage
from rgap.network.reshape import Op
from rgap.precision import Estimate, carried
from rgap.recursion.reached import Descent

__all__ = ["at_kinks"]


def at_kinks(problem: Problem, descent: Descent) -> str:
    """Why the tensors that an answer misses refute nothing, in words, or "".

    The slope of a unit whose z lies within its error of a kink is either of two; the gradients of
    its layer and of those below follow from it, and an answer that is fitted to them misses all.
    """
    above: Estimate | None = None  # what the layer below makes of its input
    for stage in problem.chain.stages:
        read = descent.features.get(stage.index, above and _through(stage.lead, above))
        if read is None:
            continue
        z = carried(stage.affine.forward, read)
        count = _turning(_steps(problem, stage), z.value, ON * z.std)
        above = _through(stage.tail, z)
        if count:
            return (
                f"{count} outputs of '{stage.name}' lie within their error of a kink of the "
                "activation, where either slope may have been the client's"
            )
    return ""


def _steps(problem: Problem, stage: Stage) -> Sequence[Op]:
    """What stands between a layer and the next one, or the loss."""
    loss, last = problem.update.loss, problem.chain.stages[-1]
    return loss.steps if stage is last and isinstance(loss, Behind) else stage.tail


def _through(steps: Sequence[Op], known: Estimate) -> Estimate:
    """A value behind the steps between two layers, with its errors."""
    for op in steps:
        known = carried(op.forward, known)
    return known


def _turning(tail: Sequence[Op], z: Tensor, off: Tensor) -> int:
    """Units of which the slope is another at z − off and at z + off, up to the first activation."""
    low, high = z - off, z + off
    for op in tail:
        if isinstance(op, Activation):
            one, other = op.derivative(low), op.derivative(high)
            steep = torch.maximum(one.abs().amax(), other.abs().amax())
            return int(((one - other).abs() > KINK * steep).sum())
        low, high = op.forward(low), op.forward(high)
    return 0
