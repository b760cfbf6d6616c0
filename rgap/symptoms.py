"""What an update says about itself: underflow, compression, another loss than the declared one.

No equation models these.  What they leave looks like a gradient of another model, or like missing
equations, so a recovery says what the update looks like instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rgap.doubles import BLOCK
from rgap.problem import Problem
from rgap.targets import CROSS_ENTROPY

FEWEST = 32  # entries: below that, equal magnitudes and zeros happen by chance
SPARSE = 0.45  # share of unexplained zeros; in a tensor of a ReLU network there are up to 0.25
COARSE = 1e-3  # a sum that is only known to this share of its terms tests nothing


def warnings(problem: Problem) -> tuple[str, ...]:
    """What the head's gradient says about itself: underflow, and another loss than declared."""
    if not problem.chain.stages or compression(problem.gradients.original) is not None:
        return problem.notes
    found = [*problem.notes, *_underflow(problem)]
    if _softmax_shaped(problem):
        found.append(
            "the head's bias gradient sums to 0 and exactly one of its entries is negative: the "
            f"shape of cross_entropy, not of {problem.update.loss.name}, which admits every "
            "target; if the client used cross_entropy, the labels recovered here mean nothing (at "
            "a batch of one the inputs do not depend on them)"
        )
    return tuple(found)


def compression(gradients: Mapping[str, Tensor]) -> str | None:
    """What the update looks like if it was compressed, in words; None for a plain gradient.

    - Signs: in every tensor all entries that are not zero have one magnitude.
    - Sparsified: in one tensor about half of the entries or more are exactly zero although their
      row and their column are not.  Rows and columns are those of the weights [out, in·offsets]:
      a dead unit zeroes a whole row, a dead input or an offset that only meets padding a whole
      column.  (The largest entries of a gradient of low rank can fill rows and columns too: not
      every sparsified update is seen.)

    Args:
        gradients: by parameter name.

    Returns:
        A clause that names the compression, or None.

    >>> g = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    >>> compression({"weight": g}) is None
    True
    >>> compression({"weight": 0.01 * g.sign()})
    'every tensor has entries of one magnitude only, as sign compression leaves them'
    """
    if _one_magnitude(gradients):
        return "every tensor has entries of one magnitude only, as sign compression leaves them"
    worst, place = 0.0, ""
    for name, gradient in gradients.items():
        if gradient.ndim < 2:
            continue
        table = gradient.flatten(1) != 0
        # what stays without rows and columns of zeros
        met = int(table.any(1).sum()) * int(table.any(0).sum())
        zeros = met - int(table.count_nonzero())
        share = zeros / met if met >= FEWEST else 0.0
        worst, place = max((worst, place), (share, name))
    if worst <= SPARSE:
        return None
    return (
        f"{100 * worst:.0f} % of the entries of '{place}' are exactly zero where neither dead "
        "units nor padding explain it, as pruning to the largest entries leaves them"
    )


def _one_magnitude(gradients: Mapping[str, Tensor]) -> bool:
    """True if in every tensor all entries that are not zero have one magnitude."""
    count = 0
    for gradient in gradients.values():
        largest = torch.maximum(gradient.amax(), -gradient.amin()) if gradient.numel() else 0.0
        others = 0
        for part in torch.split(gradient.flatten(), BLOCK):
            others += int(((part != 0) & (part.abs() != largest)).sum())
            count += int(part.count_nonzero())
        if others:
            return False
    return count >= FEWEST


def _underflow(problem: Problem) -> list[str]:
    head = problem.chain.stages[-1].affine
    found = []
    info = torch.finfo(problem.update.dtype)
    for name in (n for n in (head.bias_name, head.weight_name) if n is not None):
        if not problem.precision.sent(name):
            continue
        g = problem.update.gradients[name].abs()
        low = int(((g > 0) & (g < info.smallest_normal)).sum())
        rows = g.flatten(1).amax(1) if g.ndim > 1 else g
        gone = int((rows == 0).sum())
        if low or gone:
            found.append(
                f"head gradient '{name}' underflowed in {problem.update.dtype}: {gone} rows are "
                f"zero, {low} entries are subnormal"
            )
    return found


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
