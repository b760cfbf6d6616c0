"""Units of a rectifier that are on by less than the error of their value, and were taken for off.

Such a unit's cotangent is taken for 0, which contradicts the gradient of its own filter as another
model would, and no other filter.  The filters that contradict all others are left out; with the
input that the others give, their gradients are linear in their cotangents and say what is on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from rgap.halt import Halt
from rgap.limits import FITS, MOSTLY, ON, REFUTED
from rgap.network.activations import Activation
from rgap.network.affine import Affine
from rgap.network.chain import Stage
from rgap.network.reshape import Op
from rgap.precision import Estimate, Precision
from rgap.recursion.readers import ROUNDS, disagreeing
from rgap.recursion.stage import StageSolution
from rgap.recursion.steps import through

__all__ = ["Above", "are_on", "settled"]

Solve = Callable[[Estimate, Estimate], StageSolution | Halt]
ASKED = 32  # units of a filter that are asked for, at most


@dataclass(frozen=True)
class Above:
    """What is known above the tail of a stage: its output x and the cotangent at it."""

    x: Estimate
    cotangent: Estimate


def settled(
    stage: Stage,
    above: Above,
    k: Estimate,
    gradients: Mapping[str, Tensor],
    precision: Precision,
    solve: Solve,
    step: StageSolution,
) -> tuple[StageSolution, Estimate] | None:
    """A stage whose equations agree once some units of its rectifier are on, or None.

    Args:
        stage: whose equations contradict each other.
        above: what its tail was passed with.
        k: the cotangent that this gave, [B, *affine.out_shape].
        gradients: by parameter name.
        precision: of the update.
        solve: the equations for a pre-activation and a cotangent.
        step: their solution as it is.

    Returns:
        The new solution and the cotangent that it was found with.
    """
    share = _shares(stage.tail, above, precision)
    if share is None or share.numel() != k.value.numel():
        return None
    if not precision.sent(stage.affine.weight_name):
        return None
    sent = stage.affine.sent(gradients)
    z, _ = _passed(stage, above, precision, None)
    apart = _apart(stage.affine, k, sent, precision, lambda own: solve(z, own), step)
    if apart is None:
        return None
    u, filters = apart
    unsure = _asked(stage.affine, share.reshape(k.value.shape), filters)
    _, opened = _passed(stage, above, precision, unsure.reshape(share.shape))
    on = torch.zeros_like(unsure)
    on[unsure] = are_on(stage.affine, opened.value, unsure, sent, u) > 0.5
    if not bool(on.any()):
        return None
    z, k = _passed(stage, above, precision, on.reshape(share.shape))
    again = solve(z, k)
    if isinstance(again, Halt) or again.solution.value is None or again.misfit > REFUTED:
        return None
    return again, k


def are_on(affine: Affine, k: Tensor, unsure: Tensor, sent: Tensor, x: Tensor) -> Tensor:
    """Whether units in doubt are on, as 0 and 1, by the rows of their own filters.

    The gradient of filter f is linear in its cotangent: with x from the other filters, the entries
    in doubt are unknowns, a few for many rows, that are 0 or what comes from above.

    Args:
        affine: the layer.
        k: its cotangent where all of them are on, [B, *out_shape].
        unsure: which units are in doubt, as bool, like k.
        sent: the gradient of its weights.
        x: its input, [B, *in_shape].

    Returns:
        Of the units in doubt, in their order.
    """
    left = sent - affine.weight_gradient(x, torch.where(unsure, 0.0, k))
    on = torch.zeros_like(k)
    for f in unsure.transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist():
        places = unsure[:, f].nonzero()
        columns = []
        for place in places:
            at = (f, *place[1:])
            unit = torch.zeros_like(k[:1])
            unit[(0, *at)] = k[(place[0], *at)]
            columns.append(affine.weight_gradient(x[place[:1]], unit)[f].flatten())
        share = torch.linalg.lstsq(torch.stack(columns, 1), left[f].flatten()).solution
        for place, value in zip(places, share, strict=True):
            on[(place[0], f, *place[1:])] = float(value > 0.5)
    return on[unsure]


def _passed(
    stage: Stage, above: Above, precision: Precision, on: Tensor | None
) -> tuple[Estimate, Estimate]:
    """The pre-activation and the cotangent of a stage, where some units are taken to be on."""
    below = through(stage.tail, above.x, above.cotangent, precision, on=on)
    assert not isinstance(below, Halt)
    return below


def _shares(tail: tuple[Op, ...], above: Above, precision: Precision) -> Tensor | None:
    """What the one rectifier of a tail gives, in standard errors; NaN of what is on or not known.

    None where there is none, or several.
    """
    rectifiers = [i for i, op in enumerate(tail) if isinstance(op, Activation) and op.one_sided]
    if len(rectifiers) != 1:
        return None
    over = through(tail[rectifiers[0] + 1 :], above.x, above.cotangent, precision)
    if isinstance(over, Halt):
        return None
    share = over[0].value / over[0].std.clamp_min(1e-300)
    return share.masked_fill((share > ON) | ~over[0].known, torch.nan)


def _apart(
    affine: Affine,
    k: Estimate,
    sent: Tensor,
    precision: Precision,
    solve: Callable[[Estimate], StageSolution | Halt],
    step: StageSolution | Halt,
) -> tuple[Tensor, Tensor] | None:
    """The input by the filters that agree with each other, and which of all do not, as bool [F]."""
    out = torch.zeros(len(sent), dtype=torch.bool, device=sent.device)
    for _ in range(ROUNDS):
        if isinstance(step, Halt) or step.solution.value is None:
            return None
        u = step.solution.value.value
        each = _misfits(affine, u, k, sent, precision).masked_fill(out, 0.0)
        if float(each.max()) <= FITS:
            return (u, out) if bool(out.any()) else None
        out = out | disagreeing(each)
        if float(out.sum()) > (1.0 - MOSTLY) * len(out):
            return None
        step = solve(_without(k, out))
    return None


def _misfits(affine: Affine, u: Tensor, k: Estimate, sent: Tensor, precision: Precision) -> Tensor:
    """Residuals of the gradient of every filter, in standard errors (rms), [F]."""
    squares = affine.weight_gradient(precision.squares(u), k.value.square())
    variance = precision.update_std(affine.weight_name, squares).square()
    for error in k.error:
        variance = variance + affine.weight_gradient(u, error).square() / len(k.error)
    gap = affine.weight_gradient(u, k.value) - sent
    means = (part.square().flatten(1).mean(1) for part in (gap, variance.sqrt()))
    own, explained = means
    out: Tensor = (own / explained.clamp_min(1e-300)).sqrt()
    return out


def _without(k: Estimate, filters: Tensor) -> Estimate:
    """The cotangent with errors in some filters that leave these nothing to say."""
    outputs = filters.reshape(-1, *[1] * (k.value.ndim - 2))
    return replace(k, error=torch.where(outputs, 1.0 + k.value.abs().max(), k.error))


def _asked(affine: Affine, share: Tensor, filters: Tensor) -> Tensor:
    """The units of some filters that are nearest to being on, as many as equations can tell."""
    most = min(ASKED, prod(affine.weight.shape[1:]) // 2)
    outputs = filters.reshape(1, -1, *[1] * (share.ndim - 2))
    near = share.masked_fill(~outputs, torch.nan).nan_to_num(-torch.inf)
    flat = near.transpose(0, 1).flatten(1)
    most = min(max(most, 1), flat.shape[1])
    least = flat.topk(most, 1).values[:, -1].reshape(outputs.shape)
    return (near >= least) & near.isfinite()
