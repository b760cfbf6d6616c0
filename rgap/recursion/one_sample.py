"""The cotangent of one sample below a step of any kind, from the convolution below it alone.

Shifts give the cotangent K̃ of a convolution up to a matrix [B, B] (:mod:`rgap.separation.shifts`).
Of one sample that is a number α, and the gradient of a bias on the way up is a sum over positions,

    ∂b = α Σ_p c_p,

with c the cotangent at the bias that K̃ makes: one unknown for as many equations as filters.  What
the step does (SiLU, GELU, a function of one's own) need not be known, nor what stands above it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rgap.limits import FITS
from rgap.network.affine import Affine
from rgap.network.flow import Flow
from rgap.network.scaling import BatchNorm, Scale
from rgap.precision import Estimate, Precision
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.positions import Positions, moved, tell_positions_apart

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
    gradient = affine.sent(gradients)
    noise = precision.rms(affine.weight_name, gradient)
    told = tell_positions_apart(affine, gradient, noise)
    if isinstance(told, Unseparated):
        return told.reason
    if told.batch != 1:
        return f"'{affine.name}' tells {told.batch} samples apart, whose scales are open"
    made = told.cotangents
    drawn = _errors(affine, gradient, told, noise, precision)
    raised = _raised(flow, place, step, made, drawn)
    if isinstance(raised, str):
        return raised
    k, error, biases = raised
    found = _scale(biases, gradients, precision)
    if isinstance(found, str):
        return f"'{affine.name}': {found}"
    alpha, members = found
    value = alpha * k
    return Estimate(value, members.reshape(-1, *[1] * k.ndim) * (k + error) - value)


def _errors(
    affine: Affine, gradient: Tensor, told: Positions, noise: float, precision: Precision
) -> Tensor:
    """Ensemble of the error of K̃, [S, 1, F, *out].

    Least squares gave K̃ and X̃ in turn, so that its entries err together, and by more than X̃ as it
    is would let them: each member is solved again.
    """
    std = torch.full_like(gradient, noise * max(1.0, told.misfit))
    changes = (precision.normal(std, 1)[0] for _ in range(precision.samples))
    members = [moved(affine, gradient, told, change) - told.cotangents for change in changes]
    rms = told.cotangents.square().mean().sqrt()
    own = told.condition * torch.finfo(gradient.dtype).eps * rms
    return torch.stack(members) + precision.normal(own.expand_as(told.cotangents))


Bias = tuple[str, Tensor, Tensor]  # its name, what K̃ makes of its gradient [F], the error [S, F]


def _raised(
    flow: Flow, place: int, step: int, k: Tensor, error: Tensor
) -> tuple[Tensor, Tensor, list[Bias]] | str:
    """K̃ at the input of the step, its error, and all biases on the way, or what hinders."""
    biases, at = list[Bias](), place

    def heard(name: str | None) -> None:
        if name is not None:
            biases.append((name, k.flatten(2).sum((0, 2)), error.flatten(3).sum((1, 3))))

    link = flow.nodes[at].link
    assert isinstance(link, Affine)
    heard(link.bias_name)
    while True:
        users = flow.users(at)
        if len(users) != 1:
            return f"'{flow.nodes[at].name}' is read by {len(users)} others"
        [user] = users
        if user == step:
            return k, error, biases
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


def _scale(
    biases: list[Bias], gradients: Mapping[str, Tensor], precision: Precision
) -> tuple[float, Tensor] | str:
    """α by least squares, and its ensemble [S]."""
    sent = [bias for bias in biases if precision.sent(bias[0])]
    if not sent:
        return "no bias above it says how large its cotangent is"
    column = torch.cat([made for _, made, _ in sent])
    moved = torch.cat([error for _, _, error in sent], 1)
    sums = torch.cat([gradients[name] for name, _, _ in sent])
    alpha, own, stds = 0.0, torch.ones_like(sums), sums
    for _ in range(2):  # once to see how large the errors are, once weighed by them
        alpha = float((column * sums / own**2).sum() / (column / own).square().sum())
        squares = [(name, (alpha * made).square()) for name, made, _ in sent]
        stds = torch.cat([precision.update_std(n, s, gradients[n]) for n, s in squares])
        own = (stds.square() + (alpha * moved).square().mean(0)).sqrt()
    gap = float(((sums - alpha * column) / own).square().mean().sqrt())
    if not gap <= FITS:
        return f"gradients of biases above it miss its cotangent by {gap:.1e} errors"
    drawn = sums + precision.normal(stds)
    tables = column + moved
    members = (tables * drawn / own**2).sum(1) / (tables / own).square().sum(1)
    return alpha, members
