"""What an update says about itself: underflow, compression, another loss than the declared one.

No equation models these.  What they leave looks like a gradient of another model, or like missing
equations, so a recovery says what the update looks like instead.
"""

from __future__ import annotations

import torch

from rgap.inversion.problem import Problem
from rgap.update.compression import compression, terms_of
from rgap.update.targets import CROSS_ENTROPY

COARSE = 1e-3  # a sum that is only known to this share of its terms tests nothing


def warnings(problem: Problem) -> tuple[str, ...]:
    """What the head's gradient says about itself: underflow, and another loss than declared."""
    if not problem.chain.stages or compressed(problem) is not None:
        return problem.notes
    said = [*problem.notes, *_underflow(problem)]
    if _softmax_shaped(problem):
        said.append(
            "the head's bias gradient sums to 0 and exactly one of its entries is negative: the "
            f"shape of cross_entropy, not of {problem.update.loss.name}, which admits every "
            "target; if the client used cross_entropy, the labels recovered here mean nothing (at "
            "a batch of one the inputs do not depend on them)"
        )
    return tuple(said)


def compressed(problem: Problem) -> str | None:
    """`compression` of the update that a problem is about."""
    noise = problem.update.noise
    return compression(problem.gradients.original, terms_of(problem.chain, problem.stated), noise)


def _underflow(problem: Problem) -> list[str]:
    head = problem.chain.stages[-1].affine
    said = []
    info = torch.finfo(problem.update.dtype)
    for name in (n for n in (head.bias_name, head.weight_name) if n is not None):
        if not problem.precision.sent(name):
            continue
        g = problem.update.gradients[name].abs()
        low = int(((g > 0) & (g < info.smallest_normal)).sum())
        rows = g.flatten(1).amax(1) if g.ndim > 1 else g
        gone = int((rows == 0).sum())
        if low or gone:
            said.append(
                f"head gradient '{name}' underflowed in {problem.update.dtype}: {gone} rows are "
                f"zero, {low} entries are subnormal"
            )
    return said


def _softmax_shaped(problem: Problem) -> bool:
    """True if a loss that takes any target was declared for what looks like p − one-hot.

    The entries of p − y sum to 0 up to their rounding.  For squared error they do so only if
    outputs and targets have the same sum, which a linear head does not give.
    """
    stage, loss = problem.chain.stages[-1], problem.update.loss
    if not problem.precision.sent(stage.affine.bias_name):
        return False
    continuous = loss.name != CROSS_ENTROPY and loss.targets != "index"
    if not continuous or problem.batch > 1 or not loss.plain or stage.affine.bias_name is None:
        return False
    k = problem.gradients[stage.affine.bias_name].flatten()
    size = float(k.abs().max())
    added = float(problem.precision.noise_std(stage.affine.bias_name, k).max())
    rounding = len(k) * (4 * problem.precision.unit * size + added)
    return (
        int((k < 0).sum()) == 1
        and abs(float(k.sum())) <= rounding
        and rounding < COARSE * size  # else a chance of that order to pass
    )
