"""What a rectifier lets through above a convolution of one tap, each position in its place.

Its gradient tells the positions apart and not where they are (:mod:`rgap.separation.shifts.
pointwise`).  The cotangents that they send to the convolution further down are known in the same
disorder; of that one, shifts tell them in their places, up to Γ [B, B]: each is in the span of one
place alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap.limits import AHEAD, FITTED, SAFETY
from rgap.network.activations import Activation
from rgap.network.affine import Affine
from rgap.network.flow import Flow
from rgap.network.scaling import Scale
from rgap.precision import Estimate, Precision
from rgap.recursion.steps_above import StepsAbove
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.confirmed import confirmed
from rgap.separation.shifts.pointwise import masks_alone
from rgap.separation.shifts.positions import tell_positions_apart

__all__ = ["mask_of_one_tap", "one_tap"]


def one_tap(affine: Affine) -> bool:
    """True for a convolution whose outputs read one place each, all places in their order."""
    at = affine.geometry
    if at is None or at.groups != 1 or prod(at.kernel) != 1:
        return False
    return affine.in_shape[1:] == affine.out_shape[1:] and prod(at.stride) == 1


def mask_of_one_tap(
    flow: Flow,
    place: int,
    k: Estimate,
    steps: StepsAbove,
    gradients: Mapping[str, Tensor],
    precision: Precision,
    room: float,
) -> Tensor | str:
    """What the steps above it let through, 0 and 1 in [B, F, *out], or why it is not told.

    Args:
        flow: the network.
        place: of the convolution.
        k: the cotangent above the steps, at its output.
        steps: above it.
        gradients: by parameter name, float64.
        precision: of the update.
        room: bytes.
    """
    affine = flow.nodes[place].link
    assert isinstance(affine, Affine)
    if steps.fault:
        return steps.fault
    if steps.pool is not None:
        return f"'{steps.pool.name}' stands above '{affine.name}', whose kernel has one tap"
    gradient = affine.sent(gradients)
    noise = precision.rms(affine.weight_name, gradient)
    above = k.value.flatten(2)
    told = masks_alone(gradient.flatten(1), above, noise, room)
    if isinstance(told, Unseparated):
        return f"positions of '{affine.name}' are not told apart by masks alone: {told.reason}"
    error = float(k.std.square().mean().sqrt())
    sent, below = _sent_below(flow, place, above * told, (noise, error), gradients)
    if isinstance(below, str):
        return below
    order = _places(flow, below, sent, gradients, precision)
    if isinstance(order, str):
        return f"positions of '{affine.name}' are told apart, not where they are: {order}"
    ordered = torch.stack([told[b][:, of] for b, of in enumerate(order)]).reshape(k.value.shape)
    found = confirmed(affine, gradient, ordered, k.value, noise, error, None, steps.unit)
    if isinstance(found, str):
        return f"the masks that '{affine.name}' tells are not confirmed: {found}"
    return ordered.to(k.value)


def _sent_below(
    flow: Flow,
    place: int,
    k: Tensor,
    errors: tuple[float, float],
    gradients: Mapping[str, Tensor],
) -> tuple[Tensor, int | str]:
    """Cotangents [B, C, P] at the output of the next layer down, in the disorder of k, and where.

    Args:
        flow: the network.
        place: of the convolution of one tap.
        k: its cotangent [B, F, P].
        errors: standard errors of an entry of its gradient, and of one of k.
        gradients: by parameter name.
    """
    affine, (noise, error) = flow.nodes[place].link, errors
    assert isinstance(affine, Affine)
    matrix = k.transpose(0, 1).flatten(1)  # [F, B P]
    inverse = torch.linalg.pinv(matrix)
    x = (inverse @ affine.sent(gradients).flatten(1)).reshape(len(k), -1, affine.in_shape[0])
    own = torch.finfo(x.dtype).eps * float(matrix.norm() * inverse.norm() * x.abs().max())
    rows = torch.hypot(x.new_tensor(noise), error * x.flatten(0, 1).norm(dim=0))  # of a channel
    far = SAFETY * (inverse.norm(dim=1)[:, None] * rows + own).reshape(x.shape).transpose(1, 2)
    sent = torch.einsum("fc,bfp->bcp", affine.weight.flatten(1), k)
    [at], opened = flow.nodes[place].sources, False
    while True:
        node = flow.nodes[at]
        if len(flow.users(at)) != 1:
            return sent, f"'{node.name}' is read by others beside '{affine.name}'"
        if isinstance(node.link, Affine):
            return sent, at
        if isinstance(node.link, Activation) and node.link.one_sided and not opened:
            sent, opened = sent * (x.transpose(1, 2) > far), True
        elif isinstance(node.link, Scale) and node.link.barrier is None and opened:
            sent = sent * node.link.scale.reshape(1, -1, 1)
        elif not (node.link is None and node.copies):
            return sent, f"'{node.name}' stands between '{affine.name}' and the layer below"
        [at] = node.sources


def _places(
    flow: Flow, below: int, sent: Tensor, gradients: Mapping[str, Tensor], precision: Precision
) -> list[Tensor] | str:
    """Which of the positions in disorder is at each place, [P] for every sample, or why not.

    Args:
        flow: the network.
        below: place of the next layer down.
        sent: cotangents [B, C, P] at its output, in any order of the positions.
        gradients: by parameter name.
        precision: of the update.
    """
    affine = flow.nodes[below].link
    assert isinstance(affine, Affine)
    if affine.geometry is None or affine.geometry.groups != 1 or flow.nodes[below].shared:
        return f"'{affine.name}' is no convolution that tells its positions by shifts"
    if not precision.sent(affine.weight_name):
        return f"the gradient of '{affine.name}' was not sent"
    gradient = affine.sent(gradients)
    known = tell_positions_apart(affine, gradient, precision.rms(affine.weight_name, gradient))
    if isinstance(known, Unseparated):
        return known.reason
    spans = known.cotangents.flatten(2).permute(2, 1, 0)  # [P, F, B]
    if len(known.cotangents) != len(sent) or len(spans) != sent.shape[2]:
        return f"'{affine.name}' tells {known.batch} samples apart, expected {len(sent)}"
    bases, _ = torch.linalg.qr(spans)
    order = []
    for of in sent:  # [C, P]
        units = of / of.norm(dim=0).clamp_min(1e-300)
        inside = (bases.transpose(1, 2) @ units).square().sum(1)  # [places, positions]
        apart = (1.0 - inside).clamp_min(0.0).sqrt()
        _, at = linear_sum_assignment(apart.cpu().numpy())
        chosen = torch.from_numpy(at).to(apart.device)
        own = apart[torch.arange(len(apart)), chosen]
        others = apart.scatter(1, chosen[:, None], torch.inf)
        nearest = torch.minimum(others.amin(1), others.amin(0)[chosen])
        if not bool(((own <= FITTED) & (AHEAD * own <= nearest)).all()):
            return (
                f"a cotangent is {float(own.max()):.1e} off the place in '{affine.name}' that is "
                f"nearest, the next is {float(nearest.min()):.1e} away"
            )
        order.append(chosen)
    return order
