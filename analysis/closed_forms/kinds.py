"""One function per layer kind: from its sizes to the expressions of its ranks.

Sizes are what the caller writes: numbers, names of symbols, or sympy expressions.
:func:`layer_form` takes them for any kind; a new kind is one function and a line in :data:`KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import sympy
import torch
from sympy.polys.matrices import DomainMatrix

from rgap.analysis.closed_forms.batches import BOUND, every_batch
from rgap.analysis.closed_forms.closed_form import closed_form
from rgap.analysis.closed_forms.layer import SymbolicLayer, made
from rgap.analysis.closed_forms.residue_classes import Axis, Size, axis, count, smallest
from rgap.analysis.closed_forms.witness import EFFORT
from rgap.network.affine import Affine
from rgap.network.geometry import Geometry

__all__ = ["KINDS", "Reader", "Sizes", "convolution", "layer_form", "symbol"]


Sizes = dict[str, Any]
CHEAP = 1e9  # effort for the critical batch of a layer that is counted at one batch size
LONGEST = 256  # pixels along a dimension for which ranks of windows are computed


def symbol(name: str) -> sympy.Symbol:
    """The symbol of a size: a positive integer.

    >>> symbol("H").is_positive
    True
    """
    return sympy.Symbol(name, positive=True, integer=True)


class Reader:
    """Takes sizes by name, one error for all that is wrong with them.

    Args:
        kind: of the layer, for the errors.
        sizes: by name; what was not taken is in ``left``.
    """

    def __init__(self, kind: str, sizes: Sizes) -> None:
        self.kind = kind
        self.left = dict(sizes)

    def one(self, name: str, default: Any = None, least: int = 1) -> Size:
        """One size; required where there is no default."""
        if name not in self.left and default is None:
            raise ValueError(
                f"{self.kind}: expected the size {name!r}, got {sorted(self.left)}; write "
                f"{{'{name}': 3, ...}} or {{'{name}': 'n', ...}} for a symbol"
            )
        return self._value(name, self.left.pop(name, default), least)

    def each(self, name: str, dims: int, default: Any = None, least: int = 1) -> list[Size]:
        """One size per dimension, or one for all of them."""
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
        """Padding before and after the picture, per dimension."""
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
        """Refuse sizes that nobody took."""
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
    ranks = count(batch, outer, inner, groups, axes, active)
    critical = None if active is not None else _critical(outer, inner, axes, space)
    counts = (batch * channels * prod(space), ranks.gradient, ranks.weight, ranks.joint)
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
    ranks = every_batch(affine, own, effort)
    blocks = (ranks.gradient, ranks.weight, ranks.joint)
    counts = (batch * single, *(rank.subs(own, batch) for rank in blocks))
    exact = (ranks.gradient_exact, ranks.weight_exact, ranks.exact)
    return made(name, kind, batch, counts, ranks.critical, ranks.reason, exact=exact)


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


def _linear(kind: str, sizes: Sizes, name: str, _: float) -> SymbolicLayer:
    """Nullity (B − rank k)(n − rank W): both blocks act on one factor of a product."""
    take = Reader(kind, sizes)
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
    symbols = sympy.Tuple(width, out, batch).free_symbols - sympy.sympify(batch).free_symbols
    open_ = None
    if symbols:  # as a product; with numbers a single maximum reads better
        open_ = sympy.Max(0, batch - out) * sympy.Max(0, width - out)
    return made(name, kind, batch, counts, critical, reason, left_open=open_)


def _less(a: Size, b: Size) -> bool | None:
    return None if (told := sympy.Lt(a, b)) not in (sympy.true, sympy.false) else bool(told)


def _head(kind: str, sizes: Sizes, name: str, _: float) -> SymbolicLayer:
    """The rows of K = (P − Y)/B sum to zero: rank at most C − 1."""
    take = Reader(kind, sizes)
    width, classes = take.one("in_features"), take.one("out_features")
    batch = take.one("batch", "B")
    take.left.pop("bias", None)
    take.finish()
    rows = 1 if classes == 1 else classes - 1  # one logit has no sum to satisfy
    rank = width * smallest(batch, rows)
    reason = "cotangents of a softmax sum to zero over the classes; its logits are not known"
    counts = (batch * width, rank, 0, rank)
    symbols = sympy.Tuple(width, rows, batch).free_symbols - sympy.sympify(batch).free_symbols
    open_ = width * sympy.Max(0, batch - rows) if symbols else None
    return made(name, kind, batch, counts, rows + 1, reason, left_open=open_)


def _pool(kind: str, sizes: Sizes, name: str, _: float) -> SymbolicLayer:
    """One mean (or one largest value) for every window: equations of W's kind, none of K's."""
    take = Reader(kind, sizes)
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
    numbers = all(isinstance(n, int) for n in (*space, *kernel, *stride, *windows))
    unknowns, rank = batch * channels * prod(space), batch * channels * prod(windows)
    exact = kind == "average_pool" and disjoint
    reason = "one mean for every window, and the windows are disjoint"
    if kind == "max_pool":
        reason = "its values are known, the places of its winners are not: their count at best"
    elif not disjoint and numbers and windows == regular and max(space) <= LONGEST:
        sides = zip(space, kernel, stride, padding, windows, strict=True)
        rank = batch * channels * prod(_window_rank(*side) for side in sides)
        exact = True
        reason = "windows are products of intervals, and ranks multiply"
    elif not disjoint:
        reason = "one mean for every window; windows that overlap may depend on one another"
    if not exact and not disjoint:
        rank = smallest(rank, unknowns)
    critical = None if (some := _less(rank, unknowns)) is None else 1 if some else sympy.oo
    if not exact and critical == sympy.oo:
        critical = None
    flags = (True, exact, exact)
    return made(name, kind, batch, (unknowns, 0, rank, rank), critical, reason, exact=flags)


def _window_rank(size: int, kernel: int, stride: int, padding: tuple[int, int], out: int) -> int:
    """Rank of the windows along one dimension, exactly: overlapping windows can be dependent."""
    starts = [stride * p - padding[0] for p in range(out)]
    rows = [[int(start <= u < start + kernel) for u in range(size)] for start in starts]
    return int(DomainMatrix(rows, (out, size), sympy.ZZ).convert_to(sympy.QQ).rank())


def _pointwise(kind: str, sizes: Sizes, name: str, _: float) -> SymbolicLayer:
    take = Reader(kind, sizes)
    features, batch = take.one("features"), take.one("batch", "B")
    reasons = {
        "batch_norm": "affine in eval mode, and invertible where no scale is 0",
        "invertible": "strictly monotone: every z follows from its φ(z)",
        "relu": "z is known where the unit is on, and only its sign elsewhere",
    }
    unknowns = batch * features
    rank, critical, open_ = unknowns, sympy.oo, None
    if kind == "relu":
        fraction = sympy.sympify(take.left.pop("active", sympy.Symbol("rho", positive=True)))
        rank = fraction * unknowns
        critical = sympy.oo if fraction == 1 else 1
        open_ = (1 - fraction) * unknowns
    take.finish()
    counts = (unknowns, 0, rank, rank)
    return made(name, kind, batch, counts, critical, reasons[kind], left_open=open_)


# Kind, sizes, name, and the effort of a proof for those that need one.
KINDS: dict[str, Callable[[str, Sizes, str, float], SymbolicLayer]] = {
    "linear": _linear,
    "head": _head,
    "conv1d": convolution,
    "conv2d": convolution,
    "conv3d": convolution,
    "average_pool": _pool,
    "max_pool": _pool,
    "batch_norm": _pointwise,
    "invertible": _pointwise,
    "relu": _pointwise,
}


def layer_form(
    kind: str, sizes: Mapping[str, Any], *, name: str | None = None, effort: float = EFFORT
) -> SymbolicLayer:
    """Counts of one layer; every size is a number, a sympy symbol, or the name of one.

    ``sizes`` takes the arguments of the PyTorch module, and ``batch`` (the symbol B if left out).
    Convolutions take ``in_channels, out_channels, kernel_size, input_size`` and, if they differ
    from PyTorch's defaults, ``stride, padding, dilation, groups, padding_mode``; a size per
    dimension is a tuple, a padding per side a pair in that tuple; ``output_size`` names output
    sizes that the symbols leave as expressions.  ``linear`` and ``head`` (a linear layer below a
    softmax loss) take ``in_features, out_features``; pools ``channels, input_size, kernel_size``;
    ``batch_norm``, ``invertible`` and ``relu`` take ``features``, and ``relu`` the fraction
    ``active`` of units that are on.

    Where all sizes but B are numbers, most convolutions are proved for every B; with sizes left as
    symbols their ranks are upper bounds, and called that.

    Args:
        kind: "linear", "head", "conv1d", "conv2d", "conv3d", "average_pool", "max_pool",
            "batch_norm", "invertible" or "relu".
        sizes: by name.
        name: of the layer; its kind if None.
        effort: multiplications that one step of a proof may take; what is not proved is a bound.

    Raises:
        ValueError: an unknown kind, a missing or an unknown size, a number below 1.

    >>> sizes = {"in_channels": 12, "out_channels": 12, "kernel_size": 5, "input_size": (16, 16),
    ...          "stride": 2, "padding": 2}
    >>> conv = layer_form("conv2d", sizes)
    >>> conv.joint_rank, conv.nullity, conv.critical_batch, conv.exact
    (Min(3072*B, 768*B + 3456), 1152*Max(0, 2*B - 3), 2, True)
    """
    if kind not in KINDS:
        raise ValueError(f"expected kind in {sorted(KINDS)}, got {kind!r}; write kind='conv2d'")
    return KINDS[kind](kind, dict(sizes), name or kind, effort)
