"""The cotangent of one sample below a step of any kind, from the convolution below it alone.

Shifts give the cotangent K̃ of a convolution up to a matrix [B, B] (:mod:`rgap.separation.shifts`).
Of one sample that is a number, which the gradients of biases on the way up to the step say
(:mod:`rgap.recursion.sizes`).  What the step does (SiLU, GELU, a function of one's own) need not be
known, nor what stands above it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rgap.limits import FITS, OWN
from rgap.network.affine import Affine
from rgap.network.flow import Flow
from rgap.network.scaling import BatchNorm, Scale
from rgap.precision import Estimate, Precision
from rgap.recursion.sizes import BiasSum, factors
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.positions import tell_positions_apart
from rgap.separation.shifts.refined import refined

__all__ = ["cotangent_below"]


def cotangent_below(
    flow: Flow, place: int, step: int, gradients: Mapping[str, Tensor], precision: Precision
) -> Estimate | str:
    """∂L/∂(input of a step) [1, *shape], or why it does not follow.

    Args:
        flow: the network.
        place: of the convolution below the step, without groups.
        step: of the step, above it.
        gradients: by parameter name, float64.
        precision: of the update.
    """
    affine = flow.nodes[place].link
    assert isinstance(affine, Affine)
    if flow.nodes[place].shared or not precision.sent(affine.weight_name):
        return f"'{affine.name}' has no gradient of its own"
    gradient = affine.sent(gradients)
    noise = precision.rms(affine.weight_name, gradient)
    told = tell_positions_apart(affine, gradient, noise)
    if isinstance(told, Unseparated):
        return told.reason
    if told.batch != 1:
        return f"'{affine.name}' tells {told.batch} samples apart, whose scales are open"
    made, misfit = refined(affine, gradient, told.cotangents, told.inputs, noise)
    if not misfit <= FITS:
        return f"what '{affine.name}' tells apart misses its gradient by {misfit:.1e} errors"
    squares = affine.weight_gradient(made.x.square(), made.k.square())
    std = precision.update_std(affine.weight_name, squares)
    draws = (precision.normal(std, samples=1)[0] for _ in range(precision.samples))
    drawn, _ = made.moved(made.solve(torch.stack([made.adjoint(draw) for draw in draws])))
    own = OWN * torch.finfo(gradient.dtype).eps * made.k.square().mean().sqrt()
    drawn = drawn + precision.normal(own.expand_as(made.k))  # our own arithmetic
    raised = _raised(flow, place, step, made.k, drawn)
    if isinstance(raised, str):
        return raised
    k, error, sums = raised
    alpha = factors(sums, gradients, precision)
    if isinstance(alpha, str):
        return f"'{affine.name}': {alpha}"
    value, members = alpha.value * k, alpha.value + alpha.error
    return Estimate(value, members.reshape(-1, *[1] * k.ndim) * (k + error) - value)


def _raised(
    flow: Flow, place: int, step: int, k: Tensor, error: Tensor
) -> tuple[Tensor, Tensor, list[BiasSum]] | str:
    """K̃ at the input of the step, its error, and all biases on the way, or what hinders."""
    sums, at = list[BiasSum](), place

    def heard(name: str | None) -> None:
        if name is not None:
            sums.append(BiasSum.of(name, k, error))

    link = flow.nodes[at].link
    assert isinstance(link, Affine)
    heard(link.bias_name)
    while True:
        users = flow.users(at)
        if len(users) != 1:
            return f"'{flow.nodes[at].name}' is read by {len(users)} others"
        [user] = users
        if user == step:
            return k, error, sums
        node = flow.nodes[user]
        if isinstance(node.link, Scale) and node.link.barrier is None:
            k, error = k / node.link.scale, error / node.link.scale
            if isinstance(node.link, BatchNorm) and not node.shared:
                heard(node.link.bias_name)
        elif node.link is None and node.signs:
            sign = node.signs[node.sources.index(at)]
            k, error = k * sign, error * sign
        else:
            return f"'{node.name}' stands between '{flow.nodes[place].name}' and the step"
        at = user
