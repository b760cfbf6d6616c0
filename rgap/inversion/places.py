"""The place of some entries of a batch in words: the last row, a border of one pixel, channel 1."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["described"]

FEW = 6  # lines of a picture that are listed one by one
_NUMBERS = ("", "", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_AXES = {1: ("position",), 2: ("row", "column"), 3: ("slice", "row", "column")}


def described(mask: Tensor) -> str:
    """The place of some entries of a batch, in words.

    Args:
        mask: True at them, [B, *shape] with shape [n], [C, L], [C, H, W] or [C, D, H, W].

    >>> mask = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    >>> mask[..., 3, :] = True
    >>> described(mask)
    'the last row'
    >>> mask[..., :, 0] = True
    >>> described(mask)
    'the last row and the first column'
    >>> mask[:] = False
    >>> mask[:, 1:] = True
    >>> described(mask)
    'channels 1 to 2'
    """
    if not bool(mask.any()):
        return "nothing"
    if not bool((mask == mask[:1]).all()):
        where = {n: described(one[None]) for n, one in enumerate(mask) if bool(one.any())}
        places = set(where.values())
        if len(places) == 1:
            return f"{places.pop()} of {len(where)} pictures"
        if len(mask) <= FEW:
            return "; ".join(f"of picture {n} {said}" for n, said in where.items())
        return f"{int(mask.sum())} values of {len(where)} pictures"
    one = mask[0]
    if one.ndim == 1:
        return _lines(one, "entry")
    channels = one.flatten(1)
    if bool((channels == channels[:1]).all()):
        return _space(one[0]) or _box(one)
    full = channels.all(1)
    return _lines(full, "channel") if torch.equal(channels.any(1), full) else _box(one)


def _space(mask: Tensor) -> str:
    """Whole lines of a picture's positions [*space]; "" where they are no lines."""
    names = _AXES.get(mask.ndim)
    if names is None or bool(mask.all()):
        return "every value" if bool(mask.all()) else ""
    union = torch.zeros_like(mask)
    axes: list[tuple[Tensor, str]] = []
    for axis, name in enumerate(names):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        full = mask.all(others) if others else mask
        if bool(full.any()):
            shape = [1] * mask.ndim
            shape[axis] = -1
            union |= full.reshape(shape)
            axes.append((full, name))
    if not torch.equal(union, mask):
        return ""
    widths = [_border(full) for full, _ in axes]
    if len(axes) == mask.ndim > 1 and widths[0] and set(widths) == {widths[0]}:
        return f"a border of {widths[0]} pixel{'s' if widths[0] > 1 else ''}"
    return " and ".join(_lines(full, name) for full, name in axes)


def _border(full: Tensor) -> int:
    """Width p where the first and the last p lines are meant and no others; else 0."""
    rest = torch.nonzero(~full).flatten()
    low, high = int(rest[0]), len(full) - 1 - int(rest[-1])
    return low if low == high and len(rest) == len(full) - 2 * low else 0


def _lines(full: Tensor, name: str) -> str:
    """Which of the lines of one axis, bool [n]."""
    index = torch.nonzero(full).flatten().tolist()
    first, last, count, size = index[0], index[-1], len(index), len(full)
    names = f"{name}s" if name != "entry" else "entries"
    if count == size:
        return f"all {size} {names}"
    if last - first + 1 == count:
        if name != "channel" and last == size - 1:
            return f"the last {name}" if count == 1 else f"the last {_number(count)} {names}"
        if name != "channel" and first == 0:
            return f"the first {name}" if count == 1 else f"the first {_number(count)} {names}"
        return f"{name} {first}" if count == 1 else f"{names} {first} to {last}"
    steps = {b - a for a, b in pairwise(index)}
    if len(steps) == 1 and count > 2:
        return f"every {_ordinal(steps.pop())} {name} from {first} to {last}"
    if count <= FEW:
        return f"{names} {', '.join(map(str, index[:-1]))} and {index[-1]}"
    return f"{count} of {size} {names} (between {first} and {last})"


def _box(one: Tensor) -> str:
    """How many entries, and the smallest box around them."""
    where = torch.nonzero(one)
    low, high = where.amin(0).tolist(), where.amax(0).tolist()
    names = ("entries",) if one.ndim == 1 else (
        "channels", *(f"{name}s" for name in _AXES.get(one.ndim - 1, ("places",) * (one.ndim - 1)))
    )  # fmt: skip
    ranges = ", ".join(f"{name} {a} to {b}" for name, a, b in zip(names, low, high, strict=True))
    return f"{len(where)} values within {ranges}"


def _number(count: int) -> str:
    return _NUMBERS[count] if 1 < count < len(_NUMBERS) else str(count)


def _ordinal(step: int) -> str:
    return {2: "second", 3: "third"}.get(step, f"{step}th")
