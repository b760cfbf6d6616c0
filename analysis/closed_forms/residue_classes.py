"""Ranks of a convolution in closed form: stride sorts pixels and taps into residue classes.

A tap t reads only pixels u with ``u + padding ≡ dilation·t (mod stride)``.  K falls apart into one
block per class, with F rows for every tap and B columns for every pixel, so

    rank K ≤ C Σ_r min(F T_r, B U_r),

and the relations with the weight rows leave, for any set S of classes taken as known,

    joint rank ≤ B C U(S) + C F T(S̄) − F min(F, C T(S̄)) + rank of W outside S.

The same code counts with whole numbers and with sympy's symbols.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod
from typing import Any

from rgap.network.affine import Affine

__all__ = ["Axis", "Ranks", "axis", "count", "crossed", "smallest"]

Size = Any  # an int or a sympy expression
Counts = tuple[tuple[Size, Size], ...]
MOST_CLASSES = 64  # beyond which all are counted as one, which is a bound still


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a convolution.

    Attributes:
        classes: (taps, pixels) of every residue class.
        parts: (positions, pixels) of every connected part of "position p reads pixel u".
        positions: size of the output.
    """

    classes: Counts
    parts: Counts
    positions: Size


@dataclass(frozen=True)
class Ranks:
    """Upper bounds on the ranks of the two blocks and of both together."""

    gradient: Size
    weight: Size
    joint: Size


def smallest(*values: Size) -> Size:
    """``min`` of numbers, ``sympy.Min`` where one is a symbol."""
    if all(isinstance(value, int) for value in values):
        return min(values)
    import sympy

    return sympy.Min(*values)


def axis(
    size: Size, kernel: Size, stride: Size, padding: tuple[Size, Size], dilation: Size
) -> Axis:
    """Residue classes and connected parts along one dimension.

    With numbers, taps that see padding only and pixels that no tap reads are left out; with
    symbols they are counted, which keeps the ranks upper bounds.

    Args:
        size: pixels.
        kernel: taps.
        stride: pixels between positions.
        padding: zeros before and after.
        dilation: pixels between taps.

    >>> axis(17, 3, 2, (1, 1), 1).classes
    ((2, 8), (1, 9))
    """
    low, high = padding
    positions = (size + low + high - dilation * (kernel - 1) - 1) // stride + 1
    if all(isinstance(n, int) for n in (size, kernel, stride, low, dilation)):
        return _counted(size, kernel, stride, low, dilation, positions)
    import sympy

    positions = sympy.floor((size + low + high - dilation * (kernel - 1) - 1) / sympy.S(stride)) + 1
    fixed = all(isinstance(n, int) for n in (stride, low, dilation))
    classes: list[tuple[Size, Size]] = []
    if fixed:
        apart = gcd(stride, dilation)
        step = stride // apart
        for first in range(step):
            if isinstance(kernel, int) and first >= kernel:
                continue
            taps = _every(kernel, first, step)
            offset = (dilation * first - low) % stride
            classes.append((taps, _every(size, offset, stride)))
    else:
        classes = [(kernel, size)]
    return Axis(tuple(classes), ((positions, size),), positions)


def axes_of(affine: Affine) -> list[Axis]:
    """The axes of a layer, none for a matrix; a border that shows the picture again is part of it.

    Its positions are those of the picture once more, so that ranks on the wider picture are bounds.
    """
    geometry = affine.geometry
    if geometry is None:
        return []
    space, padding = affine.in_shape[1:], geometry.padding
    if geometry.border != "zeros":
        space = tuple(n + sum(pair) for n, pair in zip(space, padding, strict=True))
        padding = tuple((0, 0) for _ in padding)
    sides = (geometry.kernel, geometry.stride, padding, geometry.dilation)
    return [axis(*side) for side in zip(space, *sides, strict=True)]


def bounds(affine: Affine, batch: Size) -> Ranks:
    """Bounds on the ranks of a layer."""
    groups = 1 if affine.geometry is None else affine.geometry.groups
    filters, channels = affine.out_shape[0] // groups, affine.in_shape[0] // groups
    ranks = count(batch, filters, channels, groups, axes_of(affine))
    if affine.geometry is None or affine.geometry.border == "zeros":
        return ranks
    most = batch * prod(affine.in_shape)
    return Ranks(*(smallest(rank, most) for rank in (ranks.gradient, ranks.weight, ranks.joint)))


def _every(size: Size, first: int, step: int) -> Size:
    """How many of 0 … size − 1 are ``first`` plus a multiple of ``step``."""
    if isinstance(size, int):
        return len(range(first, size, step))
    if step == 1:
        return size - first
    import sympy

    return sympy.floor((size - 1 - first) / sympy.S(step)) + 1


def _counted(size: int, kernel: int, stride: int, low: int, dilation: int, positions: int) -> Axis:
    taps: dict[int, set[int]] = {}
    pixels: dict[int, set[int]] = {}
    parts: list[tuple[set[int], set[int]]] = []
    for p in range(positions):
        window = {}
        for t in range(kernel):
            u = stride * p + dilation * t - low
            if 0 <= u < size:
                window[u] = t
                taps.setdefault(dilation * t % stride, set()).add(t)
                pixels.setdefault(dilation * t % stride, set()).add(u)
        if not window:
            continue
        seen = set(window)
        joined = ({p}, seen)
        apart = []
        for part in parts:
            if part[1] & seen:
                joined[0].update(part[0])
                joined[1].update(part[1])
            else:
                apart.append(part)
        parts = [*apart, joined]
    return Axis(
        tuple((len(taps[r]), len(pixels[r])) for r in sorted(taps)),
        tuple((len(p), len(u)) for p, u in parts),
        positions,
    )


def crossed(axes: Sequence[Counts]) -> Counts:
    """Products of one pair a dimension, for every choice of them."""
    return tuple(
        (_times(a for a, _ in pairs), _times(b for _, b in pairs)) for pairs in product(*axes)
    )


def _times(factors: Iterable[Size]) -> Size:
    return prod(factors)


def count(
    batch: Size,
    filters: Size,
    channels: Size,
    groups: Size,
    axes: Sequence[Axis],
    active: Size | None = None,
) -> Ranks:
    """Bounds on the ranks of a convolution.

    Args:
        batch: B.
        filters: F of one group.
        channels: C of one group.
        groups: number of groups.
        axes: of the spatial dimensions.
        active: fraction of the units that are on, or None where all are.

    >>> axes = [axis(17, 3, 2, (1, 1), 1)] * 2  # the second convolution of a CNN6-d
    >>> count(1, 20, 12, 1, axes)
    Ranks(gradient=1968, weight=1620, joint=3188)
    """
    classes = _by_saturation(crossed([a.classes for a in axes]))
    parts = crossed([a.parts for a in axes])
    if not classes:  # every tap of every position reads padding
        return Ranks(0, 0, 0)
    if len(classes) > MOST_CLASSES:
        classes = ((_total(t for t, _ in classes), _total(u for _, u in classes)),)
    positions = _times(a.positions for a in axes)
    rows = filters
    if isinstance(positions, int) and not (isinstance(filters, int) and filters <= positions):
        rows = smallest(filters, batch * positions)  # the cotangents of F filters span no more
    gradient = _total(channels * smallest(rows * t, batch * u) for t, u in classes)
    per_position = smallest(filters, channels * _total(t for t, _ in classes))
    weight = batch * _total(smallest(per_position * p, channels * u) for p, u in parts)
    if active is not None:
        weight = smallest(weight, active * batch * filters * positions)
    bounds = [gradient + weight]
    numbers = all(isinstance(size, int) for pair in classes for size in pair)
    if not numbers:  # all or nothing: expressions that still can be read
        classes = ((_total(t for t, _ in classes), _total(u for _, u in parts)),)
    for cut in range(len(classes) + 1):
        inside, outside = classes[:cut], classes[cut:]
        bound = batch * channels * _total(u for _, u in inside)
        if outside:
            left = _total(t for t, _ in outside)
            # a filter that is off somewhere keeps its relation with itself only
            shared = 1 if active is not None else smallest(filters, channels * left)
            # of the rows of W outside all classes there are no more than unknowns there; all of W
            # has no more than unknowns already
            rest = smallest(weight, batch * channels * _total(u for _, u in outside))
            bound += rows * (channels * left - shared) + (rest if inside else weight)
        bounds.append(bound)
    return Ranks(groups * gradient, groups * weight, groups * smallest(*bounds))


def _total(terms: Iterable[Size]) -> Size:
    return sum(terms, 0)


def _by_saturation(classes: Counts) -> Counts:
    """Classes in the order in which a smaller batch saturates them, where sizes are numbers."""
    if all(isinstance(t, int) and isinstance(u, int) for t, u in classes):
        return tuple(sorted(classes, key=lambda pair: pair[1] / pair[0]))
    return classes
