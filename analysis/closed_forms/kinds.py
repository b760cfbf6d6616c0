"""One function per layer kind: from its sizes to the expressions of its ranks."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import sympy
from sympy.polys.matrices import DomainMatrix

from rgap.analysis.closed_forms.layer import SymbolicLayer, made
from rgap.analysis.closed_forms.residue_classes import Size, axis, smallest
from rgap.analysis.closed_forms.symbolic_convolution import convolution
from rgap.analysis.closed_forms.symbolic_sizes import Reader, Sizes

__all__ = ["KINDS"]

LONGEST = 256  # pixels along a dimension for which ranks of windows are computed


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
