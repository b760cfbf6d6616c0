"""Pictures that differ from one by a change of places: those that pools may not tell from it.

A pool forgets which of its positions held what.  Where the layers below treat its positions
alike, other data give the same values, each of them isolated, however many equations there are:
patches that change places in a window, a picture that moves within a black margin, a part that
moves in front of its background.  No count of ranks sees that; the pictures themselves are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from rgap.limits import UNMOVED

__all__ = ["Rearranged", "rearrangements", "steps_of", "unmoved"]

PAIRS = 8  # of patches that change places, of one size, grid and axis
PARTS = 6  # in front of a background that are moved, of one distance between them
GRIDS = 4  # places at which a grid of patches begins
GRID = 1024  # patches that are compared
CHUNK = 32  # pictures that go through at once
BACKGROUND = 0.1  # share of the pixels that have one value, from which it is one


@dataclass(frozen=True)
class Rearranged:
    """A picture with some of its entries in other places.

    Attributes:
        words: what was done to it.
        value: [*in_shape].
    """

    words: str
    value: Tensor


def steps_of(in_shape: Sequence[int], shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Distances, in entries of the data, between positions of the values of a network.

    Args:
        in_shape: (C, *size) of the data.
        shapes: (F, *size) of the values.

    >>> steps_of((3, 32, 32), [(8, 32, 32), (16, 16, 16), (16, 1, 1), (10,)])
    (1, 2)
    """
    sizes, steps = in_shape[1:], {1}
    for shape in shapes:
        if len(shape) == len(in_shape):
            for n, m in zip(sizes, shape[1:], strict=True):
                steps |= {n // m, -(-n // m)} if m > 1 else set()  # a border adds positions
    return tuple(sorted(s for s in steps if 0 < s < max(sizes, default=1)))


def rearrangements(x: Tensor, steps: Sequence[int], off: float) -> Iterator[Rearranged]:
    """The pictures to try beside one.

    Args:
        x: the picture, [C, *size].
        steps: distances by which things are moved, see :func:`steps_of`.
        off: by which an entry may be wrong; pictures that differ by less are left out.

    Yields:
        Each another picture, not all different from each other.

    >>> x = torch.zeros(1, 1, 6)
    >>> x[0, 0, 2:4] = torch.tensor([1.0, 2.0])
    >>> {tuple(one.value.flatten().int().tolist()) for one in rearrangements(x, (1,), 0.0)} >= {
    ...     (0, 1, 2, 0, 0, 0), (0, 0, 0, 1, 2, 0), (0, 0, 2, 1, 0, 0)
    ... }
    True
    """
    for one in (*_moved(x, steps), *_parts(x, steps, off), *_swapped(x, steps)):
        if float((one.value - x).abs().max()) > off:
            yield one


def unmoved(
    values: Callable[[Tensor], Tensor], x: Tensor, others: Iterable[Rearranged]
) -> list[Rearranged]:
    """Those that give nearly the same values, the most different picture first.

    Args:
        values: [S, *in_shape] → [S, m].
        x: the picture, [*in_shape].
        others: to be told from it.
    """
    listed = list(others)
    at = values(x[None])
    size = float(at.norm()) / max(float(x.norm()), 1e-300)
    kept = list[tuple[float, int]]()
    for start in range(0, len(listed), CHUNK):
        pictures = torch.stack([one.value for one in listed[start : start + CHUNK]])
        moved = (values(pictures) - at).norm(dim=1)
        apart = (pictures - x).flatten(1).norm(dim=1)
        alike = moved <= UNMOVED * size * apart
        kept += [(-float(apart[i]), start + int(i)) for i in alike.nonzero().flatten()]
    return [listed[number] for _, number in sorted(kept)]


def _moved(x: Tensor, steps: Sequence[int]) -> Iterator[Rearranged]:
    """All of it, around the edge."""
    axes = range(1, x.ndim)
    for axis, step, sign in product(axes, steps, (1, -1)):
        if step < x.shape[axis]:
            yield Rearranged(f"moved by {_entries(step)}", x.roll(sign * step, axis))


def _swapped(x: Tensor, steps: Sequence[int]) -> Iterator[Rearranged]:
    """Two neighbouring patches in each other's place, those that differ most."""
    for axis, step in product(range(1, x.ndim), steps):
        for begin in range(min(step, GRIDS)):
            yield from _of_grid(x, axis, step, begin)


def _of_grid(x: Tensor, axis: int, step: int, begin: int) -> Iterator[Rearranged]:
    # A patch is `step` entries wide along every axis that is long enough for two of them; the last
    # of a grid that begins inside the picture goes around its edge, as circular padding does.
    sides = [step if n >= 2 * step else n for n in x.shape[1:]]
    if sides[axis - 1] != step:
        return
    axes = [i for i, side in enumerate(sides, 1) if side == step]
    turned = x.roll([-begin] * len(axes), axes)
    listed = list(
        product(*(range(0, n - side + 1, side) for n, side in zip(x.shape[1:], sides, strict=True)))
    )
    pairs = list[tuple[float, int, tuple[slice, ...], tuple[slice, ...]]]()
    for corner in listed[:: 1 + 2 * (len(listed) // (2 * GRID))]:  # odd: both parities are met
        beside = list(corner)
        beside[axis - 1] += step
        if beside[axis - 1] + step > x.shape[axis]:
            continue
        one, two = (
            (slice(None), *(slice(c, c + n) for c, n in zip(at, sides, strict=True)))
            for at in (corner, beside)
        )
        apart = float((turned[one] - turned[two]).norm())
        pairs.append((-apart, corner[axis - 1] // step % 2, one, two))
    pairs.sort(key=lambda pair: pair[0])
    size = " x ".join(str(n) for n in sides)
    for parity in (0, 1):  # of every two neighbours one pair is in the same window of a pool
        for _, _, one, two in [pair for pair in pairs if pair[1] == parity][:PAIRS]:
            value = turned.clone()
            value[one], value[two] = turned[two], turned[one]
            words = f"with two patches of {size} in each other's place"
            yield Rearranged(words, value.roll([begin] * len(axes), axes))


def _parts(x: Tensor, steps: Sequence[int], off: float) -> Iterator[Rearranged]:
    """What stands before a background of one colour, each part by itself."""
    from scipy.ndimage import binary_dilation, label

    if x.ndim < 2:
        return
    flat = x.flatten(1)
    colours, counts = torch.unique(flat.round(decimals=6), dim=1, return_counts=True)
    if float(counts.max()) < BACKGROUND * flat.shape[1]:
        return
    colour = colours[:, counts.argmax()].reshape(-1, *[1] * (x.ndim - 1))
    shown = ((x - colour).abs() > max(off, 1e-6)).any(0)
    whole = shown.cpu().numpy()
    for width in (0, *steps):
        near = binary_dilation(whole, iterations=width) if width else whole
        parts, count = label(near)
        for number in range(1, min(count, PARTS) + 1):
            part = torch.as_tensor((parts == number) & whole, device=x.device)
            rest = torch.where(part, colour, x)
            for axis, step, sign in product(range(1, x.ndim), steps, (1, -1)):
                there, what = part.roll(sign * step, axis - 1), x.roll(sign * step, axis)
                if bool((there & shown & ~part).any()):
                    continue
                words = f"with a part moved by {_entries(step)} before its background"
                yield Rearranged(words, torch.where(there, what, rest))


def _entries(count: int) -> str:
    return "one entry" if count == 1 else f"{count} entries"
