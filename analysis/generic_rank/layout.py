"""Where a layer's taps fall, the same table for linear layers and convolutions of any dimension."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgap.constraints.convnd import taps
from rgap.network.affine import Affine


@dataclass(frozen=True)
class Layout:
    """A layer as a table of taps, a fully connected one as a kernel on a single position.

    Attributes:
        groups: g.
        filters: F/g.
        channels: C/g.
        positions: N, of one channel.
        outputs: O, of one filter.
        table: input position read by output o through offset δ, [offsets, O]; −1 is padding.
        again: True where a border shows positions again: two taps of an output may read one.
    """

    groups: int
    filters: int
    channels: int
    positions: int
    outputs: int
    table: NDArray[np.int64]
    again: bool = False

    @property
    def offsets(self) -> int:
        """Number of kernel offsets δ."""
        return len(self.table)


def layout(affine: Affine) -> Layout:
    """Where the taps of a layer fall.

    >>> import torch
    >>> w = torch.ones(2, 3, dtype=torch.float64)
    >>> flat = layout(Affine("fc", "linear", w, None, "fc.weight", None, (3,), (2,), None))
    >>> flat.channels, flat.positions, flat.outputs
    (3, 1, 1)
    """
    geometry = affine.geometry
    if geometry is None:
        one = np.zeros((1, 1), dtype=np.int64)
        return Layout(1, affine.out_shape[0], affine.in_shape[0], 1, 1, one)
    space, out = affine.in_shape[1:], affine.out_shape[1:]
    return Layout(
        geometry.groups,
        affine.out_shape[0] // geometry.groups,
        affine.in_shape[0] // geometry.groups,
        prod(space),
        prod(out),
        taps(geometry, space, out).numpy(),
        geometry.border != "zeros",
    )


def require_affine(layer: object) -> None:
    """Raise unless a layer is one with its input shape, which a module alone does not know."""
    if not isinstance(layer, Affine):
        raise TypeError(
            f"expected a layer with its input shape, got {type(layer).__name__}; for a "
            "module write rgap.analysis.generic_ranks(module, input_shape, batch), for own weights "
            "rgap.network.affine.convolution('conv', conv.weight, conv.bias, ('weight', 'bias'), "
            "input_shape, Geometry.of(conv.kernel_size, stride=conv.stride, padding=conv.padding))"
            ", or linear(...) there"
        )


def active_units(affine: Affine, batch: int, active: Tensor | None) -> NDArray[np.bool_]:
    """The mask of units that are on as [B, groups, F/g, O]; None means that all are.

    Raises:
        ValueError: a batch below 1, a mask of another shape.
        TypeError: a mask that is not boolean.
    """
    if batch < 1:
        raise ValueError(f"expected batch >= 1, got {batch}; write the number of samples")
    plan = layout(affine)
    shape = (batch, *affine.out_shape)
    if active is None:
        active = torch.ones(shape, dtype=torch.bool, device=affine.weight.device)
    if active.dtype != torch.bool:
        raise TypeError(
            f"expected a boolean mask of the units that are on, got {active.dtype}; write "
            "active=z > 0"
        )
    if tuple(active.shape) != shape:
        raise ValueError(
            f"'{affine.name}' ({affine.kind}): expected active of shape {list(shape)}, got "
            f"{list(active.shape)}; write one mask per sample, [B, *out_shape]"
        )
    units = active.cpu().numpy().reshape(batch, plan.groups, plan.filters, plan.outputs)
    return np.asarray(units, dtype=np.bool_)
