"""The cotangents of a batch at the output, where the head cannot tell its samples apart.

A softmax head of C classes has a gradient of rank C − 1 at most.  The first convolution below it
has more: shifts tell its positions and its samples apart (:mod:`rgap.separation.shifts`), and what
the rectifier above it lets through gives the cotangent of each sample at the output up to a factor
(:mod:`rgap.separation.shifts.spanned`), and gradients of biases say that
(:mod:`rgap.recursion.sizes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from rgap.network.affine import Affine
from rgap.network.flow import Flow
from rgap.network.scaling import BatchNorm
from rgap.precision import Estimate, Precision
from rgap.recursion.graph import Walk
from rgap.recursion.sizes import BiasSum, factors
from rgap.recursion.steps_above import steps_above
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.positions import tell_positions_apart
from rgap.separation.shifts.spanned import gauge_by_span

__all__ = ["cotangents_at_output"]


def cotangents_at_output(
    flow: Flow, gradients: Mapping[str, Tensor], precision: Precision, room: float = inf
) -> Estimate | str:
    """∂L/∂output [B, C] of every sample, in any order, or why they do not follow.

    Args:
        flow: the network, up to a fully connected layer.
        gradients: by parameter name, float64.
        precision: of the update.
        room: bytes for the equations of one convolution.

    Returns:
        The cotangents with their ensemble; B is what the convolution tells.
    """
    [outputs] = flow.nodes[-1].shape
    unit = torch.eye(outputs, dtype=torch.float64, device=next(iter(gradients.values())).device)
    above = _Above(flow, gradients, precision, room)
    above.down(Estimate(unit, unit.new_zeros(precision.samples, outputs, outputs)))
    why = "no convolution stands below a rectifier that the output's cotangent reaches"
    for place, affine in above.below.items():
        told = _from(flow, gradients, precision, above, place, affine)
        if not isinstance(told, str):
            return told
        why = told
    return why


class _Above(Walk):
    """The part of a walk above the highest convolution whose rectifier is not known."""

    def __init__(
        self, flow: Flow, gradients: Mapping[str, Tensor], precision: Precision, room: float
    ) -> None:
        super().__init__(flow, gradients, precision, lambda name: None, room)
        self.below: dict[int, Affine] = {}

    def unmask(self, place: int, affine: Affine) -> str | None:
        """Note the convolution, and end there."""
        if affine.geometry is not None and affine.geometry.groups == 1:
            self.below[place] = affine
        return f"what stands above '{affine.name}' is not known"

    def solve(self, place: int) -> bool:
        """Nothing: the cotangents are not those of samples."""
        return False


def _from(
    flow: Flow,
    gradients: Mapping[str, Tensor],
    precision: Precision,
    above: _Above,
    place: int,
    affine: Affine,
) -> Estimate | str:
    """The cotangents at the output by the masks above one convolution."""
    steps = steps_above(flow, place, above.behind[place], precision.unit)
    if steps.fault:
        return steps.fault
    if flow.nodes[place].shared or not precision.sent(affine.weight_name):
        return f"'{affine.name}' has no gradient of its own"
    gradient = affine.sent(gradients)
    noise = precision.rms(affine.weight_name, gradient)
    positions = tell_positions_apart(affine, gradient, noise)
    if isinstance(positions, Unseparated):
        return positions.reason
    told = gauge_by_span(positions.cotangents, above.state.cotangents[place].value, above.room)
    if isinstance(told, Unseparated):
        return f"'{affine.name}': {told.reason}"
    drawn = precision.normal(told.roots.new_ones(told.roots.shape[0], told.roots.shape[2]))
    error = torch.einsum("bcn,mbn->mbc", told.roots, drawn)
    walk = _Above(flow, gradients, precision, above.room)
    walk.state.masks = dict.fromkeys(above.behind[place], told.open.to(gradient))
    walk.down(Estimate(told.coordinates, error))
    return _sized(flow, gradients, precision, walk)


def _sized(
    flow: Flow, gradients: Mapping[str, Tensor], precision: Precision, walk: Walk
) -> Estimate | str:
    """The cotangents at the output, each as long as the gradients of biases say."""
    state, top, sums = walk.state, walk.state.cotangents[len(flow.nodes) - 1], list[BiasSum]()
    for place, node in enumerate(flow.nodes):
        link, k = node.link, state.cotangents.get(place)
        if k is None or place in state.ends or place in walk.behind or node.shared:
            continue
        if isinstance(link, Affine | BatchNorm) and link.bias_name is not None:
            sums.append(BiasSum.of(link.bias_name, k.value, k.error))
    alpha = factors(sums, gradients, precision)
    if isinstance(alpha, str):
        return alpha
    value = alpha.value[:, None] * top.value
    error = (alpha.value + alpha.error)[:, :, None] * (top.value + top.error) - value
    return Estimate(value, error + precision.rounding(value))
