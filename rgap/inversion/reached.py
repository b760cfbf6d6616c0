"""What the recursion certified before it ended: inputs of layers above the place where it stopped.

At B = 1 the bias attack reads the input of a fully connected layer off its own gradient, whatever
lies below.  That is certified where the layer's gradient is of rank one to the rounding of the
update (tested before the recursion starts), and where the layer above, whose input its own
gradient carries too, agrees: ``x_{i+1} = φ(W_i x_i + b_i)`` within the errors of both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.head.bias_attack import rank_one_residual
from rgap.head.features import features_from_bias, rank_one_tolerance
from rgap.inversion.problem import Problem
from rgap.limits import SAFETY
from rgap.network.chain import Stage
from rgap.precision import Estimate, carried
from rgap.recursion.descend import Descent


@dataclass(frozen=True)
class Reached:
    """Certified inputs of layers, or why there is no certificate.

    Attributes:
        features: by layer name, [1, *in_shape]; empty without a certificate.
        doubt: what contradicts them, or "".
    """

    features: dict[str, Tensor]
    doubt: str = ""


def certified_features(problem: Problem, descent: Descent) -> Reached:
    """The inputs that a recursion from a bias attack determined, from the lowest layer up.

    Args:
        problem: of one sample.
        descent: where the recursion went; it began at a bias attack whose gradient is of rank one.
    """
    stages = problem.chain.stages
    start = max(descent.features, default=None)
    if start is None or descent.refuted:
        return Reached({})
    if start + 1 < len(stages):
        doubt = _contradiction(problem, stages[start], stages[start + 1], descent.features[start])
        if doubt:
            return Reached({}, doubt)
    found = {i: known for i, known in sorted(descent.features.items()) if bool(known.known.all())}
    return Reached({stages[i].name: known.value for i, known in found.items()})


def _contradiction(problem: Problem, stage: Stage, above: Stage, u: Estimate) -> str:
    """Why the input of ``above``, read off its own gradient, is not what ``u`` makes; or ""."""
    affine, precision = above.affine, problem.precision
    if affine.geometry is not None or affine.bias_name is None:
        return ""
    sent = problem.gradients.original
    bias = sent[affine.bias_name].to(affine.weight)
    if not bool((bias != 0).any()):
        return ""
    weight = affine.sent(sent)
    read, k = features_from_bias(affine, weight, bias, precision)
    misfit = rank_one_residual(weight, read.value[0], k.value[0])
    if misfit > rank_one_tolerance(affine, weight, bias, read, precision):
        return f"the gradient of '{above.name}' is not of rank one, as that of one sample is"
    z = stage.affine.forward(u.value)
    own = torch.stack([stage.affine.linear(error) for error in u.error])
    own = own + precision.normal(
        precision.sum_std(stage.affine.linear_of_squares(u.value.square()))
    )

    def rise(x: Tensor) -> Tensor:
        for op in (*stage.tail, *above.lead):
            x = op.forward(x)
        return x

    made = carried(rise, Estimate(z, own))
    made_error = made.error + precision.rounding(made.value)
    gap = float((made.value - read.value).norm())
    spread = (read.error.square() + made_error.square()).flatten(1).sum(1).mean().sqrt()
    if gap <= SAFETY * float(spread):
        return ""
    return (
        f"the input of '{above.name}' that its gradient carries is not what '{stage.name}' makes "
        f"of its own: they differ by {gap / max(float(read.value.norm()), 1e-300):.1e} of their "
        f"size, {gap / max(float(spread), 1e-300):.2g} standard errors"
    )
