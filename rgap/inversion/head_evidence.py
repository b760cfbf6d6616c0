"""Whether the head bears out the certified inputs of layers: ``κ(W x + b, y) = k`` for some y.

Layers that agree with each other say nothing of the topmost one: where one of its two gradients
was changed, ``x = Gᵀ∂b/‖∂b‖²`` is off and no layer below shows it.  The loss does: x gives logits,
these a cotangent for every target, and one of them has to be the one that was sent, up to a factor
on the whole update, of which x does not depend, where enough targets tell it from other changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.arithmetic.doubles import row_blocks
from rgap.head.bias_attack import rank_one_residual
from rgap.head.features import rank_one_tolerance
from rgap.head.target import read_target
from rgap.inversion.backing import of_features
from rgap.inversion.problem import Problem
from rgap.inversion.top import head_gradients, rounded_features
from rgap.limits import SAFETY, UNTOLD
from rgap.network.chain import Stage
from rgap.precision import Estimate, Precision

__all__ = ["head_evidence", "spread_of"]


def head_evidence(problem: Problem, known: dict[int, Estimate]) -> tuple[str, float]:
    """What the head says of the inputs of layers below it, or of its own.

    Args:
        problem: of one sample.
        known: inputs of affine maps by the number of the stage, [1, *in_shape].

    Returns:
        What contradicts them, or "" (also where the loss has no equations, or the head was not
        sent); and how many times longer than stated their errors may be.
    """
    stages, loss, precision = problem.chain.stages, problem.update.loss, problem.precision
    last, top = stages[-1], max(known)
    affine = last.affine
    if not loss.equations or affine.geometry is not None or not precision.sent(affine.weight_name):
        return "", 1.0
    x = rounded_features(problem.chain, known[top], top, precision)
    weight, bias = head_gradients(last, problem)
    if not bool(x.known.all()):
        return "", 1.0
    nothing = not float(x.value.norm()) > SAFETY * spread_of(x)
    if nothing and bias is None:  # no cotangent without features
        return "", 1.0
    k = _cotangent(last, weight, bias, x, precision)
    if not bool((k.value != 0).any()):
        return "", 1.0
    if top < last.index and not nothing:
        misfit = rank_one_residual(weight, x.value[0], k.value[0])
        explained = rank_one_tolerance(affine, weight, k.value[0], x, precision)
        explained += SAFETY * spread_of(x) / float(x.value.norm())
        if misfit > explained:
            return (
                f"the gradient of '{last.name}' is not that of the input that '{stages[top].name}' "
                f"makes of its own: residual {misfit:.1e}, where rounding, noise and errors "
                f"explain {explained:.1e}"
            ), 1.0
    reading = read_target(last, x, k, loss, precision)
    if not reading.fits:
        return (
            f"with the input that the gradient of '{last.name}' carries no target of {loss.name} "
            f"gives its cotangent: the nearest is off by {reading.distance:.1e}, where rounding "
            f"and noise explain {reading.tolerance:.1e}"
        ), 1.0
    if loss.targets == "index" and reading.tolerance > UNTOLD:
        return (
            f"the errors of the input of '{last.name}' leave every target of {loss.name} open "
            f"(tolerance {reading.tolerance:.1e}), so that none tests it"
        ), 1.0
    return "", of_features(problem, last, x, k, reading) if top == last.index else 1.0


def spread_of(x: Estimate) -> float:
    """Root of the mean square length of the errors."""
    return float(x.error.flatten(1).square().sum(1).mean().sqrt())


def _cotangent(
    stage: Stage, weight: Tensor, bias: Tensor | None, x: Estimate, precision: Precision
) -> Estimate:
    """The cotangent at the head, ``∂b`` where it was sent, else ``G x / ‖x‖²``, with its errors."""
    if bias is not None and stage.affine.bias_name is not None:
        bias = bias.to(x.value)
        noise = precision.noise_std(stage.affine.bias_name, bias)
        return Estimate(bias[None], precision.normal(noise, len(x.error))[:, None])
    value, name = x.value[0], stage.affine.weight_name
    size = value.square().sum()
    k, variance = [], []
    for rows, block in row_blocks(weight, value):
        std = (block.abs() * precision.unit).square() + precision.noise_std(name, block, rows) ** 2
        k.append(block @ value / size)
        variance.append(std @ value.square() / size.square())
    found = torch.cat(k)
    error = precision.normal(torch.cat(variance).sqrt(), len(x.error))
    along = (x.error[:, 0] @ value) / size  # a longer x is a smaller k
    return Estimate(found[None], (error - along[:, None] * found)[:, None])
