"""What rectifiers and max-pools above a convolution let through, read off its own gradient.

Between them and the convolution stand maps channel by channel, so that each entry of its cotangent
is that above the steps, or 0: one mask for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rgap.jacobian.layer import each
from rgap.limits import SAFETY
from rgap.network.activations import Activation
from rgap.network.affine import Affine
from rgap.network.flow import Flow, Node
from rgap.network.pooling import MaxPool
from rgap.network.reshape import Op, Reshape
from rgap.precision import Estimate
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.confirmed import Through, confirmed
from rgap.separation.shifts.masks import Masked, gauge_by_masks
from rgap.separation.shifts.positions import Positions, tell_positions_apart
from rgap.separation.shifts.projections import Projected, masks_by_projection

__all__ = ["StepsAbove", "known_at", "mask_of", "nonnegative", "steps_above"]


@dataclass(frozen=True)
class StepsAbove:
    """The values from a convolution up to the cotangent that is known.

    Attributes:
        path: from the first value that reads the convolution to the highest step, in order.
        pool: the max-pool among them, or None.
        kept: True if no input of the convolution is negative.
        fault: why they are not one mask, or "".
        alone: True if nothing else leads to the highest step.
        unit: unit roundoff of the client's arithmetic.
    """

    path: tuple[Node, ...]
    pool: MaxPool | None
    kept: bool
    fault: str = ""
    alone: bool = True
    unit: float = 0.0

    @property
    def through(self) -> Through:
        """What they may let through."""
        mean = 0.5
        if self.pool is not None:
            mean = prod(self.pool.out_shape) / prod(self.pool.in_shape)
        return Through(self.nearest, mean, self.forward, self.kept)

    def nearest(self, shares: Tensor) -> Tensor:
        """The mask nearest to shares [B, F, *out] of the cotangent above."""
        return shares > 0.5 if self.pool is None else self.pool.winning(shares)

    def forward(self, z: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """The mask at the convolution's output z, and which of its entries are decided.

        Args:
            z: [B, F, *out].
            far: how far off its entries may be; every step has them in its own scale.
        """
        on = open_ = torch.ones_like(z, dtype=torch.bool)
        shut = ~on
        for node in self.path:
            link = node.link
            here = told = torch.ones_like(on)
            if isinstance(link, MaxPool):
                here, top = link.winning(z), link.spread(link.forward(z))
                second = link.spread(link.forward(torch.where(here, -torch.inf, z)))
                gap = torch.where(here, top - second, top - z)
                told = gap > 2.0 * link.spread(link.forward(far))
            elif isinstance(link, Activation):
                here, told = z > 0, z.abs() > far
            on, open_, shut = on & here, open_ & here & told, shut | (told & ~here)
            if link is not None:
                assert not isinstance(link, Affine)  # masks above one end there
                z, far = self.passed(link, z, far)
            if z.shape != on.shape:
                break
        return on, open_ | shut

    def passed(self, link: Op, z: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """The output of a step, and how far off it may be with the client's rounding."""
        out = link.forward(z)
        if isinstance(link, Activation):
            return out, link.derivative(z).abs() * far
        if not link.affine:
            return out, link.forward(far)
        scaled = link.linear(z)
        return out, link.linear(far).abs() + SAFETY * self.unit * (scaled.abs() + out.abs())


def steps_above(flow: Flow, place: int, steps: Sequence[int], unit: float = 0.0) -> StepsAbove:
    """The steps above a convolution whose masks are not known.

    Args:
        flow: the network.
        place: of the convolution's output.
        steps: places of the rectifiers and pools, the highest first.
        unit: unit roundoff of the client's arithmetic.
    """
    nodes, path, fault = flow.nodes, list[Node](), ""
    at = steps[0]
    while at > place and len(nodes[at].sources) == 1:
        path.append(nodes[at])
        [at] = nodes[at].sources
    for step in steps:
        if nodes[nodes[step].sources[0]].shape != nodes[place].shape:
            fault = f"between '{nodes[place].name}' and '{nodes[step].name}' shapes change"
    pools = [node.link for node in path if isinstance(node.link, MaxPool)]
    if len(pools) > 1:
        fault = fault or f"'{pools[0].name}' and '{pools[1].name}' are two pools at once"
    kept, pool = nonnegative(flow, nodes[place].sources[0]), pools[0] if pools else None
    return StepsAbove(tuple(reversed(path)), pool, kept, fault, at == place, unit)


def known_at(flow: Flow, values: Mapping[int, Estimate], place: int) -> Estimate | None:
    """A value that is known, or that an identity or another shape of it is known to copy."""
    if place in values:
        return values[place]
    for user in flow.users(place):
        link, copies = flow.nodes[user].link, flow.nodes[user].copies
        if copies and (copied := known_at(flow, values, user)) is not None:
            if not isinstance(link, Reshape):
                return copied
            return Estimate(link.inverse(copied.value), each(link.inverse, copied.error))
    return None


def nonnegative(flow: Flow, place: int) -> bool:
    """True if no entry of a value is below 0."""
    node = flow.nodes[place]
    if isinstance(node.link, Activation):
        return node.link.one_sided
    kept = isinstance(node.link, MaxPool | Reshape) or (node.link is None and not node.signs)
    return place > 0 and kept and all(nonnegative(flow, source) for source in node.sources)


def mask_of(
    affine: Affine, gradient: Tensor, k: Estimate, steps: StepsAbove, noise: float, room: float
) -> Tensor | str:
    """What the steps let through, 0 and 1 in [B, F, *out], or why it is not told.

    By shifts, which are linear; by projections where the positions are too many for these.

    Args:
        affine: the convolution, without groups.
        gradient: its own, float64.
        k: the cotangent above the steps, at the convolution's output.
        steps: above it.
        noise: standard error of an entry of the gradient.
        room: bytes.
    """
    if steps.fault:
        return steps.fault
    error = float(k.std.square().mean().sqrt())
    told: Masked | Projected | Unseparated = _shifted(affine, gradient, k.value, noise, error)
    if isinstance(told, Masked):
        # Few entries have a mask by chance too: with it, the input has to meet the whole gradient.
        through = steps.through if steps.alone else None
        found = confirmed(affine, gradient, told.open, k.value, noise, error, through, steps.unit)
        if isinstance(found, str):
            told = Unseparated(f"the masks that '{affine.name}' tells are not confirmed: {found}")
    if isinstance(told, Unseparated):
        shifts = told.reason
        if not steps.alone:
            return shifts
        told = masks_by_projection(
            affine, gradient, k.value, steps.through, noise, error, room, steps.unit
        )
        if isinstance(told, Unseparated):
            return f"{shifts}; {told.reason}"
    mask = told.open.to(k.value)
    if steps.pool is not None and float(steps.pool.summed(mask * (k.value != 0)).max()) > 1.0:
        return f"two entries of a window of '{steps.pool.name}' win"
    return mask


def _shifted(
    affine: Affine, gradient: Tensor, k: Tensor, noise: float, error: float
) -> Masked | Unseparated:
    """What is let through, by shifts of the kernel alone."""
    told = tell_positions_apart(affine, gradient, noise)
    if not isinstance(told, Positions):
        return told
    if told.batch != len(k):
        return Unseparated(f"'{affine.name}' tells {told.batch} samples apart, expected {len(k)}")
    return gauge_by_masks(told.cotangents, k, error)
