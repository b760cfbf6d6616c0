"""The cotangents of a batch at the output, where the head cannot tell its samples apart.

A softmax head of C classes has a gradient of rank C − 1 at most.  The first convolution below it
has more: shifts tell its positions and its samples apart (:mod:`rgap.separation.shifts`), and what
the rectifier above it lets through gives the cotangent of each sample at the output up to a factor
(:mod:`rgap.separation.shifts.spanned`).  Gradients of biases are sums over the samples, linear in
these factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from rgap.limits import FITS
from rgap.network.affine import Affine
from rgap.network.flow import Flow
from rgap.network.scaling import BatchNorm
from rgap.precision import Estimate, Precision
from rgap.recursion.graph import Walk
from rgap.recursion.steps_above import steps_above
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.positions import tell_positions_apart
from rgap.separation.shifts.spanned import gauge_by_span
from rgap.solvers.rank import numerical_rank, resolve_rcond

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
    """The cotangents at the output, each as long as the gradients of biases say.

    ``∂b = Σ_b α_b Σ_p k_b`` for every bias above the convolution, linear in the α_b.
    """
    state, top = walk.state, walk.state.cotangents[len(flow.nodes) - 1]
    columns, moved, sums, errors = [], [], [], []
    for place, node in enumerate(flow.nodes):
        link, k = node.link, state.cotangents.get(place)
        if k is None or place in state.ends or place in walk.behind or node.shared:
            continue
        if not isinstance(link, Affine | BatchNorm) or not precision.sent(link.bias_name):
            continue
        assert link.bias_name is not None
        rows = k.value.reshape(len(k.value), len(gradients[link.bias_name]), -1)
        columns.append(rows.sum(2).T)
        moved.append(k.error.reshape(len(k.error), *rows.shape).sum(3).transpose(1, 2))
        sums.append(gradients[link.bias_name])
        squares = rows.square().sum((0, 2))
        errors.append(precision.update_std(link.bias_name, squares, sums[-1]))
    if not sums or sum(map(len, sums)) <= len(top.value):
        return (
            f"{sum(map(len, sums))} gradients of biases above it say how much each of "
            f"{len(top.value)} samples weighs"
        )
    sent, own = torch.cat(sums), torch.cat(errors)
    table, tables = torch.cat(columns), torch.cat(moved, 1)
    scaled = table / own[:, None]
    rank = numerical_rank(
        torch.linalg.svdvals(scaled),
        scaled.shape[1],
        resolve_rcond(None, (len(scaled), len(top.value))),
    )
    if rank.rank < scaled.shape[1]:
        return f"gradients of biases above it tell {rank.rank} of {scaled.shape[1]} samples apart"
    sizes = torch.linalg.lstsq(scaled, (sent / own)[:, None]).solution[:, 0]
    spread = (tables * sizes).sum(2).square().mean(0)  # of what the table gives, by its own error
    weights = (own.square() + spread).sqrt()
    sizes = _least(table, sent, weights)
    left = ((sent - table @ sizes) / weights).square().split([len(own) for own in sums])
    gap = max(float(own.mean().sqrt()) for own in left)  # of every bias by itself
    if not gap <= FITS:
        return f"gradients of biases above it miss the samples told apart by {gap:.1e} errors"
    drawn = _least(table + tables, sent + precision.normal(own), weights)
    value = sizes[:, None] * top.value
    error = drawn[:, :, None] * (top.value + top.error) - value
    return Estimate(value, error + precision.rounding(value))


def _least(table: Tensor, sums: Tensor, weights: Tensor) -> Tensor:
    """Weighted least squares of one table [n, B], or of an ensemble [M, n, B]."""
    scaled = table / weights[:, None]
    solved: Tensor = torch.linalg.lstsq(scaled, (sums / weights)[..., None]).solution[..., 0]
    return solved
