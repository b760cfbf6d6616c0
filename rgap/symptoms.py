"""What an update says about itself: underflow, compression, another loss than the declared one.

No equation models these.  What they leave looks like a gradient of another model, or like missing
equations, so a recovery says what the update looks like instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from rgap.doubles import BLOCK
from rgap.network import Chain
from rgap.problem import Problem
from rgap.pruning import pruned
from rgap.targets import CROSS_ENTROPY

FEWEST = 32  # entries: below that, equal magnitudes happen by chance
COARSE = 1e-3  # a sum that is only known to this share of its terms tests nothing


def warnings(problem: Problem) -> tuple[str, ...]:
    """What the head's gradient says about itself: underflow, and another loss than declared."""
    if not problem.chain.stages or compressed(problem) is not None:
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


def compressed(problem: Problem) -> str | None:
    """`compression` of the update that a problem is about."""
    noise = problem.update.noise
    return compression(problem.gradients.original, terms_of(problem.chain, problem.stated), noise)


def compression(
    gradients: Mapping[str, Tensor],
    terms: Mapping[str, int],
    noise: Mapping[str, Tensor] | None = None,
) -> str | None:
    """What the update looks like if it was compressed, in words; None for a plain gradient.

    - Signs: in every tensor all entries that are not zero have one magnitude.
    - Pruned: the zeros of a weight's gradient are not those of a sum of as few outer products as
      the batch has samples and positions (:mod:`rgap.pruning`).  Dead units, dark pixels and
      padding leave none of that kind.

    Args:
        gradients: by parameter name.
        terms: outer products that the gradient of a weight is a sum of, samples times positions;
            other tensors are not looked at for zeros.
        noise: standard deviation of the noise of entries, by parameter name.

    Returns:
        A clause that names the compression, or None.

    >>> g = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    >>> compression({"weight": g}, {"weight": 1}) is None
    True
    >>> compression({"weight": 0.01 * g.sign()}, {})
    'every tensor has entries of one magnitude only, as sign compression leaves them'
    """
    if _one_magnitude(gradients):
        return "every tensor has entries of one magnitude only, as sign compression leaves them"
    for name, count in terms.items():
        gradient = gradients.get(name)
        if gradient is None or gradient.ndim < 2:
            continue
        own = (noise or {}).get(name)
        if pruned(gradient, count, 0.0 if own is None else float(own.max())):
            share = float((gradient == 0).double().mean())
            products = "one outer product" if count == 1 else f"{count} outer products"
            return (
                f"{100 * share:.0f} % of the entries of '{name}' are exactly zero, not in whole "
                f"rows and columns of {products} but as pruning to the largest entries leaves them"
            )
    return None


def terms_of(chain: Chain, batch: int | None) -> dict[str, int]:
    """Outer products that the gradient of each stage's weight is a sum of; {} of an unknown batch.

    Positions are those of the layer's output: windows of a convolution, tokens.
    """
    if batch is None:
        return {}
    found = {}
    for stage in chain.stages:
        affine = stage.affine
        groups = 1 if affine.geometry is None else affine.geometry.groups
        found[affine.weight_name] = batch * groups * prod(affine.out_shape[1:])
    return found


def _one_magnitude(gradients: Mapping[str, Tensor]) -> bool:
    """True if in every tensor all entries that are not zero have one magnitude.

    A single layer with one or two outputs on binary inputs may send that: ``k = (p, -p)``.
    """
    tables = [g for g in gradients.values() if g.ndim > 1]
    if len(tables) == 1 and len(tables[0]) <= 2:
        return False
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
