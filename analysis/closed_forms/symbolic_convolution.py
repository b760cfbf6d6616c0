"""A convolution: from its sizes to the expressions of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import sympy
import torch

from rgap.analysis.closed_forms.batches import every_batch
from rgap.analysis.closed_forms.closed_form import closed_form
from rgap.analysis.closed_forms.layer import SymbolicLayer, made
from rgap.analysis.closed_forms.residue_classes import Axis, Size, axis, count, smallest
from rgap.analysis.closed_forms.symbolic_sizes import Reader, Sizes, symbol
from rgap.network.affine import Affine
from rgap.network.geometry import Geometry

__all__ = ["convolution"]

CHEAP = 1e9  # effort for the critical batch of a layer that is counted at one batch size
BOUND = "rows and pixels counted by residue classes of the stride"


def convolution(kind: str, sizes: Sizes, name: str, effort: float) -> SymbolicLayer:
    """Sizes in numbers: proved for every B where possible.  Symbols: upper bounds.

    Args:
        kind: "conv1d", "conv2d" or "conv3d".
        sizes: as for `layer_form`.
        name: of the layer.
        effort: multiplications that one step of a proof may take.

    Raises:
        ValueError: sizes that are missing, unknown, or do not fit.
    """
    take = Reader(kind, sizes)
    dims = int(kind[4])
    channels, filters = take.one("in_channels"), take.one("out_channels")
    kernel, space = take.each("kernel_size", dims), take.each("input_size", dims)
    stride, dilation = take.each("stride", dims, 1), take.each("dilation", dims, 1)
    padding, groups = take.sides(dims), take.one("groups", 1)
    border = str(take.left.pop("padding_mode", "zeros"))
    batch = take.one("batch", "B")
    active = take.left.pop("active", None)
    active = None if active is None else sympy.sympify(active)
    take.left.pop("bias", None)
    for what, number in (("in_channels", channels), ("out_channels", filters)):
        if isinstance(number, int) and isinstance(groups, int) and number % groups:
            raise ValueError(
                f"{kind}: expected {what} to be a multiple of groups={groups}, got {number}; "
                f"write {what}={groups * (number // groups + 1)}"
            )
    axes = [axis(*a) for a in zip(space, kernel, stride, padding, dilation, strict=True)]
    axes = _named_outputs(take, axes)
    take.finish()
    if any(isinstance(a.positions, int) and a.positions < 1 for a in axes):
        raise ValueError(
            f"{kind}: expected a kernel that fits its input, got kernel_size {kernel} on "
            f"{space}; write a larger input_size or padding"
        )
    everything = [channels, filters, *kernel, *space, *stride, *dilation, groups]
    everything += [side for pair in padding for side in pair]
    if all(isinstance(value, int) for value in everything) and active is None:
        places = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
        geometry = Geometry(*places, groups, border)
        weight = torch.zeros(1).expand(filters, channels // groups, *kernel)
        out_shape = (filters, *(a.positions for a in axes))
        shape = (channels, *space)
        affine = Affine(name, kind, weight, None, "weight", None, shape, out_shape, geometry)
        return _of_numbers(affine, batch, effort)

    if border != "zeros":
        raise ValueError(
            f"{kind}: expected numbers for every size of a layer with padding_mode={border!r}, got "
            "symbols; write padding_mode='zeros', or sizes in numbers"
        )
    inner, outer = _share(channels, groups), _share(filters, groups)
    found = count(batch, outer, inner, groups, axes, active)
    critical = None if active is not None else _critical(outer, inner, axes, space)
    counts = (batch * channels * prod(space), found.gradient, found.weight, found.joint)
    return made(name, kind, batch, counts, critical, BOUND, exact=(False, False, False))


def _named_outputs(take: Reader, axes: list[Axis]) -> list[Axis]:
    """Symbols for output sizes that are expressions: ``output_size`` gives them a name."""
    if "output_size" not in take.left:
        return axes
    named = take.each("output_size", len(axes))
    for size, one in zip(named, axes, strict=True):
        if isinstance(one.positions, int) and size != one.positions:
            raise ValueError(
                f"{take.kind}: expected output_size {one.positions} by the other sizes, got "
                f"{size}; leave output_size out"
            )
    return [
        Axis(one.classes, tuple((size, pixels) for _, pixels in one.parts), size)
        if not isinstance(one.positions, int)
        else one
        for size, one in zip(named, axes, strict=True)
    ]


def _share(number: Size, groups: Size) -> Size:
    whole = isinstance(number, int) and isinstance(groups, int)
    return number // groups if whole else number / sympy.sympify(groups)


def _of_numbers(affine: Affine, batch: Size, effort: float) -> SymbolicLayer:
    name, kind, single = affine.name, affine.kind, prod(affine.in_shape)
    if isinstance(batch, int):
        form = closed_form(affine, batch)
        counts = (form.unknowns, form.gradient_rank, form.weight_rank, form.joint_rank)
        exact = (form.gradient_exact, form.weight_exact, form.exact)
        every = every_batch(affine, symbol("B"), min(effort, CHEAP))
        critical = every.critical if every.exact else None
        if form.exact and form.nullity and batch == 1:
            critical = 1
        return made(name, kind, batch, counts, critical, form.reason, exact=exact)
    own = batch if isinstance(batch, sympy.Symbol) else symbol("B")
    found = every_batch(affine, own, effort)
    blocks = (found.gradient, found.weight, found.joint)
    counts = (batch * single, *(rank.subs(own, batch) for rank in blocks))
    exact = (found.gradient_exact, found.weight_exact, found.exact)
    return made(name, kind, batch, counts, found.critical, found.reason, exact=exact)


def _critical(filters: Size, channels: Size, axes: Sequence[Axis], space: Sequence[Size]) -> Any:
    """At most this: B·n > F(C T − min(F, C T)) + B·known, the count with no class saturated."""
    taps = prod(sum(t for t, _ in a.classes) for a in axes)
    rank = smallest(filters, channels * taps)
    left = channels * prod(space) - rank * prod(a.positions for a in axes)  # of one sample
    rows = filters * (channels * taps - rank)
    first = sympy.floor(sympy.sympify(rows) / left) + 1
    open_ = sympy.Gt(left, 0)
    if open_ == sympy.true:
        return first
    return None if open_ == sympy.false else sympy.Piecewise((first, open_), (sympy.oo, True))
