"""One function per layer kind: from its sizes to the expressions of its ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import sympy

from rgap.affine import Affine
from rgap.analysis.symbolic_classes import Axis, Ranks, Size, axis, count, smallest
from rgap.analysis.symbolic_layer import SymbolicLayer
from rgap.geometry import Geometry

__all__ = ["KINDS", "symbol"]

FARTHEST = 1 << 24  # batch size up to which a critical one is looked for
Sizes = dict[str, Any]


def symbol(name: str) -> sympy.Symbol:
    """The symbol of a size: a positive integer.

    >>> symbol("H").is_positive
    True
    """
    return sympy.Symbol(name, positive=True, integer=True)


class _Reader:
    """Takes sizes by name, one error for all that is wrong with them."""

    def __init__(self, kind: str, sizes: Sizes) -> None:
        self.kind = kind
        self.left = dict(sizes)

    def one(self, name: str, default: Any = None, least: int = 1) -> Size:
        if name not in self.left and default is None:
            raise ValueError(
                f"{self.kind}: expected the size {name!r}, got {sorted(self.left)}; write "
                f"{{'{name}': 3, ...}} or {{'{name}': 'n', ...}} for a symbol"
            )
        return self._value(name, self.left.pop(name, default), least)

    def each(self, name: str, dims: int, default: Any = None, least: int = 1) -> list[Size]:
        value = self.left.pop(name, default)
        if isinstance(value, (tuple, list)):
            if len(value) != dims:
                raise ValueError(
                    f"{self.kind}: expected {dims} sizes in {name!r}, got {value!r}; write one "
                    "for every dimension"
                )
            return [self._value(name, v, least) for v in value]
        self.left[name] = value
        if value is None:
            del self.left[name]
        return [self.one(name, default, least)] * dims

    def sides(self, dims: int) -> list[tuple[Size, Size]]:
        value = self.left.pop("padding", 0)
        per_dimension = value if isinstance(value, (tuple, list)) else (value,) * dims
        if len(per_dimension) != dims:
            raise ValueError(
                f"{self.kind}: expected {dims} paddings, got {value!r}; write one for every "
                "dimension, a pair where its two sides differ"
            )
        out = []
        for side in per_dimension:
            low, high = side if isinstance(side, (tuple, list)) else (side, side)
            out.append((self._value("padding", low, 0), self._value("padding", high, 0)))
        return out

    def finish(self) -> None:
        if self.left:
            raise ValueError(
                f"{self.kind}: got sizes {sorted(self.left)} that it does not have; leave them out"
            )

    def _value(self, name: str, value: Any, least: int) -> Size:
        if isinstance(value, str):
            return symbol(value)
        if isinstance(value, sympy.Integer):
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole and not isinstance(value, sympy.Expr):
            raise ValueError(
                f"{self.kind}: expected {name} to be a whole number >= {least}, a sympy expression "
                f"or the name of a symbol, got {value!r}; write {name}={max(least, 1)}"
            )
        return value


def _layer(
    name: str,
    kind: str,
    batch: Size,
    counts: Sequence[Size],
    critical: Any,
    reason: str,
    *,
    exact: bool = True,
) -> SymbolicLayer:
    unknowns, gradient, weight, joint = (sympy.sympify(value) for value in counts)
    when = None if critical is None else sympy.sympify(critical)
    return SymbolicLayer(
        name, kind, sympy.sympify(batch), unknowns, gradient, weight, joint, when, exact, reason
    )


def _linear(kind: str, sizes: Sizes, name: str) -> SymbolicLayer:
    """Nullity (B − rank k)(n − rank W): both blocks act on one factor of a product."""
    take = _Reader(kind, sizes)
    width, out = take.one("in_features"), take.one("out_features")
    batch = take.one("batch", "B")
    take.left.pop("bias", None)  # ∂b gives k, which the rest takes as known
    take.finish()
    rank_k, rank_w = smallest(batch, out), smallest(width, out)
    joint = width * rank_k + batch * rank_w - rank_k * rank_w
    narrow = _less(out, width)
    critical = None if narrow is None else out + 1 if narrow else sympy.oo
    reason = "the null space is the product of those of k and W"
    counts = (batch * width, width * rank_k, batch * rank_w, joint)
    return _layer(name, kind, batch, counts, critical, reason)


def _less(a: Size, b: Size) -> bool | None:
    return None if (told := sympy.Lt(a, b)) not in (sympy.true, sympy.false) else bool(told)


def _head(kind: str, sizes: Sizes, name: str) -> SymbolicLayer:
    """The rows of K = (P − Y)/B sum to zero: rank at most C − 1."""
    take = _Reader(kind, sizes)
    width, classes = take.one("in_features"), take.one("out_features")
    batch = take.one("batch", "B")
    take.left.pop("bias", None)
    take.finish()
    rows = 1 if classes == 1 else classes - 1  # one logit has no sum to satisfy
    rank = width * smallest(batch, rows)
    reason = "cotangents of a softmax sum to zero over the classes; its logits are not known"
    return _layer(name, kind, batch, (batch * width, rank, 0, rank), rows + 1, reason)


def _convolution(kind: str, sizes: Sizes, name: str) -> SymbolicLayer:
    take = _Reader(kind, sizes)
    dims = int(kind[4])
    channels, filters = take.one("in_channels"), take.one("out_channels")
    kernel, space = take.each("kernel_size", dims), take.each("input_size", dims)
    stride, dilation = take.each("stride", dims, 1), take.each("dilation", dims, 1)
    padding, groups = take.sides(dims), take.one("groups", 1)
    batch = take.one("batch", "B")
    active = take.left.pop("active", None)
    active = None if active is None else sympy.sympify(active)
    take.left.pop("bias", None)
    take.finish()
    for what, number in (("in_channels", channels), ("out_channels", filters)):
        if isinstance(number, int) and isinstance(groups, int) and number % groups:
            raise ValueError(
                f"{kind}: expected {what} to be a multiple of groups={groups}, got {number}; "
                f"write {what}={groups * (number // groups + 1)}"
            )
    inner, outer = _share(channels, groups), _share(filters, groups)
    axes = [axis(*a) for a in zip(space, kernel, stride, padding, dilation, strict=True)]
    if any(isinstance(a.positions, int) and a.positions < 1 for a in axes):
        raise ValueError(
            f"{kind}: expected a kernel that fits its input, got kernel_size {kernel} on "
            f"{space}; write a larger input_size or padding"
        )
    everything = [channels, filters, *kernel, *space, *stride, *dilation, groups]
    everything += [side for pair in padding for side in pair]
    numbers = all(isinstance(value, int) for value in everything)
    if numbers and isinstance(batch, int) and active is None:
        geometry = Geometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
        return _counted(kind, name, batch, (channels, filters), space, axes, geometry)

    def ranks(samples: Size) -> Ranks:
        return count(samples, outer, inner, groups, axes, active)

    single = channels * prod(space)
    if numbers and active is None:
        critical: Any = _first(lambda b: b * single - ranks(b).joint)
    else:
        critical = None if active is not None else _unsaturated(outer, inner, groups, axes, space)
    found = ranks(batch)
    counts = (batch * single, found.gradient, found.weight, found.joint)
    reason = "rows and pixels counted by residue classes of the stride; an upper bound on the rank"
    return _layer(name, kind, batch, counts, critical, reason, exact=False)


def _share(number: Size, groups: Size) -> Size:
    whole = isinstance(number, int) and isinstance(groups, int)
    return number // groups if whole else number / sympy.sympify(groups)


def _first(nullity: Callable[[int], int]) -> Any:
    """Smallest B with nullity(B) > 0; the nullity is convex in B and 0 at B = 0."""
    low, high = 0, 1
    while nullity(high) <= 0:
        low, high = high, 2 * high
        if high > FARTHEST:
            return sympy.oo
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if nullity(middle) > 0 else (middle, high)
    return high


def _unsaturated(
    filters: Size, channels: Size, groups: Size, axes: Sequence[Axis], space: Sequence[Size]
) -> Any:
    """B* from B·n > rank K + B·rank W − overlap with every row of K and W independent."""
    taps = prod(sum(t for t, _ in a.classes) for a in axes)
    known = filters * prod(a.positions for a in axes)
    deficit = groups * (channels * prod(space) - known)  # of one sample, left to the gradient
    rows = groups * filters * (channels * taps - filters)
    return sympy.floor(sympy.sympify(rows) / deficit) + 1


def _counted(
    kind: str,
    name: str,
    batch: int,
    maps: tuple[int, int],
    space: Sequence[int],
    axes: Sequence[Axis],
    geometry: Geometry,
) -> SymbolicLayer:
    """The counts of numbers only: by matching, with a proof where there is one."""
    import torch

    from rgap.analysis.symbolic_closed import closed_form

    (channels, filters), groups = maps, geometry.groups
    weight = torch.zeros(1).expand(filters, channels // groups, *geometry.kernel)
    out_shape = (filters, *(a.positions for a in axes))
    shape = (channels, *space)
    affine = Affine(name, kind, weight, None, "weight", None, shape, out_shape, geometry)
    form = closed_form(affine, batch)
    critical = _first(
        lambda b: (
            b * prod(shape) - count(b, filters // groups, channels // groups, groups, axes).joint
        )
    )
    counts = (form.unknowns, form.gradient_rank, form.weight_rank, form.joint_rank)
    exact = form.exact and form.gradient_exact and form.weight_exact
    return _layer(name, kind, batch, counts, critical, form.reason, exact=exact)


def _pool(kind: str, sizes: Sizes, name: str) -> SymbolicLayer:
    """One mean (or one largest value) for every window: equations of W's kind, none of K's."""
    take = _Reader(kind, sizes)
    space = take.left.get("input_size", ())
    dims = len(space) if isinstance(space, (tuple, list)) else 1
    channels, space = take.one("channels"), take.each("input_size", dims)
    kernel = take.each("kernel_size", dims)
    stride = take.each("stride", dims, sizes.get("kernel_size"))
    padding, batch = take.sides(dims), take.one("batch", "B")
    axes = [axis(n, k, s, p, 1) for n, k, s, p in zip(space, kernel, stride, padding, strict=True)]
    regular = [a.positions for a in axes]
    windows = take.each("output_size", dims, tuple(regular))
    take.finish()
    tiles = zip(stride, kernel, padding, windows, regular, strict=True)
    disjoint = all(s == k and p == (0, 0) and w == r for s, k, p, w, r in tiles)
    unknowns, rank = batch * channels * prod(space), batch * channels * prod(windows)
    if not disjoint:
        rank = smallest(rank, unknowns)
    critical = None if (some := _less(rank, unknowns)) is None else 1 if some else sympy.oo
    if kind == "max_pool":
        reason = "its values are known, the places of its winners are not: their count at best"
    elif disjoint:
        reason = "one mean for every window, and the windows are disjoint"
    else:
        reason = "one mean for every window; windows that overlap may depend on one another"
    exact = kind == "average_pool" and disjoint
    return _layer(name, kind, batch, (unknowns, 0, rank, rank), critical, reason, exact=exact)


def _pointwise(kind: str, sizes: Sizes, name: str) -> SymbolicLayer:
    take = _Reader(kind, sizes)
    features, batch = take.one("features"), take.one("batch", "B")
    reasons = {
        "batch_norm": "affine in eval mode, and invertible where no scale is 0",
        "invertible": "strictly monotone: every z follows from its φ(z)",
        "relu": "z is known where the unit is on, and only its sign elsewhere",
    }
    unknowns = batch * features
    rank, critical = unknowns, sympy.oo
    if kind == "relu":
        fraction = sympy.sympify(take.left.pop("active", sympy.Symbol("rho", positive=True)))
        rank = fraction * unknowns
        critical = sympy.oo if fraction == 1 else 1
    take.finish()
    return _layer(name, kind, batch, (unknowns, 0, rank, rank), critical, reasons[kind])


KINDS: dict[str, Callable[[str, Sizes, str], SymbolicLayer]] = {
    "linear": _linear,
    "head": _head,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "average_pool": _pool,
    "max_pool": _pool,
    "batch_norm": _pointwise,
    "invertible": _pointwise,
    "relu": _pointwise,
}
