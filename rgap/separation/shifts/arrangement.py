"""Which taps of a kernel stand side by side and below each other, and how many samples that bears.

The gradient at tap u is ``G_u = Kᵀ S_u X``, the sum over output positions p of ``k_p`` times what p
reads through u.  Taps of a stack V stand below each other, the others side by side,

    M[(v, f), (u, c)] = G[f, c, u + v],
    M = L Y,    L[(v, f), q] = k[q − v, f],    Y[q, (u, c)] = x[q + u, c],

where q runs over the grid of outputs widened by V.  One step e of the output takes ``step`` taps:
``x[(q + e) + u] = x[q + (u + e)]`` is what tells the positions apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd, prod

import torch
from torch import Tensor

from rgap.network.geometry import Geometry

__all__ = ["Arrangement", "arrangements"]

Place = tuple[int, ...]


@dataclass(frozen=True)
class Arrangement:
    """One way to lay out the taps of a kernel; one entry per spatial dimension.

    Attributes:
        stack: V, taps that stand below each other.
        grid: positions q, the outputs widened by the stack.
        span: taps that stand side by side.
        step: taps that one step of the output takes.
        exchanged: True where k and x have changed places: G with its taps reversed is the gradient
            of the convolution that has k for its input and x for its cotangent.

    >>> g = Geometry.of((3, 3), padding=1)
    >>> first = arrangements(g, (4, 4))[0]
    >>> first.grid, first.shared(0), first.largest_batch(512, 512)
    ((4, 4), 6, 32)
    """

    stack: Place
    grid: Place
    span: Place
    step: Place
    exchanged: bool = False

    @property
    def size(self) -> int:
        """Positions of one sample."""
        return prod(self.grid)

    @property
    def axes(self) -> list[int]:
        """Those along which there is a step to take."""
        return [axis for axis, size in enumerate(self.grid) if size > 1]

    def shared(self, axis: int) -> int:
        """Taps u of which u and u + e stand side by side, e one step along the axis."""
        taps = list(self.span)
        taps[axis] -= self.step[axis]
        return prod(taps)

    def largest_batch(self, filters: int, channels: int) -> int:
        """B up to which L can have full column rank, and what two neighbours read full row rank.

        ``B |grid| ≤ |V| F``, and along each axis ``B |grid| (1 + 1/grid_a) < |U_a| C``, F and C
        exchanged where k and x are: one column more than rows to read, so that a null space is
        seen and not forced.

        Args:
            filters: F.
            channels: C.
        """
        rows, columns = (channels, filters) if self.exchanged else (filters, channels)
        most = prod(self.stack) * rows // self.size
        for axis in self.axes:
            read = self.size + self.size // self.grid[axis]
            most = min(most, (self.shared(axis) * columns - 1) // read)
        return most

    def blocks(self, gradient: Tensor) -> dict[Place, Tensor]:
        """M by columns: [|V| F, C] for every tap u."""
        if self.exchanged:
            gradient = gradient.transpose(0, 1).flip(*range(2, gradient.ndim))
        below = list(product(*map(range, self.stack)))
        return {
            u: torch.cat([self._tap(gradient, u, v) for v in below])
            for u in product(*map(range, self.span))
        }

    def pairs(self, axis: int) -> Iterator[tuple[Place, Place]]:
        """Taps (u, u + e)."""
        for u in product(*map(range, self.span)):
            moved = tuple(t + self.step[axis] * (a == axis) for a, t in enumerate(u))
            if moved[axis] < self.span[axis]:
                yield u, moved

    def cotangents(self, left: Tensor, out: Place) -> Tensor:
        """K [B, F, *out] from L [|V| F, |grid| B], the mean over the stack.

        Args:
            left: L, samples of a position side by side.
            out: sizes of the output, the grid without the stack.
        """
        below = list(product(*map(range, self.stack)))
        table = left.reshape(len(below), -1, *self.grid, left.shape[1] // self.size)
        k = torch.zeros_like(table[0][(slice(None), *(slice(n) for n in out))])
        for part, v in zip(table, below, strict=True):
            k += part[(slice(None), *(slice(a, a + n) for a, n in zip(v, out, strict=True)))]
        return k.movedim(-1, 0) / len(below)

    def _tap(self, gradient: Tensor, u: Place, v: Place) -> Tensor:
        """G_{u + v}, [F, C]."""
        place = [a + b * s for a, b, s in zip(u, v, self.step, strict=True)]
        for number in place:  # each selection takes its axis away
            gradient = gradient.select(2, number)
        return gradient


def arrangements(geometry: Geometry, space: tuple[int, ...]) -> list[Arrangement]:
    """All that the kernel allows, those of the smallest matrices first.

    Args:
        geometry: of the convolution, without groups.
        space: sizes of its input.
    """
    made = []
    dims = len(geometry.kernel)
    steps = [gcd(s, d) for s, d in zip(geometry.stride, geometry.dilation, strict=True)]
    if all(d == g for d, g in zip(geometry.dilation, steps, strict=True)):
        step = tuple(s // d for s, d in zip(geometry.stride, geometry.dilation, strict=True))
        made += _stacks(geometry, space, geometry.out_space(space), step, False)
    turned = _exchanged(geometry)
    if turned is not None:
        made += _stacks(turned, geometry.out_space(space), space, (1,) * dims, True)
    return sorted(made, key=lambda one: (prod(one.stack), one.exchanged))


def _exchanged(geometry: Geometry) -> Geometry | None:
    """That of the convolution which reads k and has x for its cotangent; None where there is none.

    A stride leaves places between the entries of k, and a border shows those of x again.
    """
    reach = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
    padding = tuple(
        (r - low, r - high) for r, (low, high) in zip(reach, geometry.padding, strict=True)
    )
    plain = set(geometry.stride) == set(geometry.dilation) == {1} and geometry.border == "zeros"
    if not plain or min(min(pair) for pair in padding) < 0:
        return None
    return Geometry(geometry.kernel, geometry.stride, padding, geometry.dilation, 1)


def _stacks(
    geometry: Geometry, space: Place, out: Place, step: Place, exchanged: bool
) -> list[Arrangement]:
    made = []
    for stack in product(*(range(1, k + 1) for k in geometry.kernel)):
        span = tuple(k - s * (v - 1) for k, s, v in zip(geometry.kernel, step, stack, strict=True))
        grid = tuple(n + v - 1 for n, v in zip(out, stack, strict=True))
        one = Arrangement(stack, grid, span, step, exchanged)
        if min(span) < 1 or any(span[axis] <= step[axis] for axis in one.axes):
            continue
        if all(_read(geometry, space, one, axis) for axis in range(len(grid))):
            made.append(one)
    return made


def _read(geometry: Geometry, space: Place, one: Arrangement, axis: int) -> bool:
    """True if every position reads something through the taps, along each axis on both sides.

    One that reads padding alone is no row of Y, and a step from it or to it says nothing.
    """
    if geometry.border != "zeros":
        return True
    low = geometry.padding[axis][0]
    most = one.span[axis] - one.step[axis] if axis in one.axes else one.span[axis]
    places = range(one.grid[axis] + (axis in one.axes))
    return all(
        any(
            0 <= geometry.stride[axis] * q + geometry.dilation[axis] * u - low < space[axis]
            for u in range(most)
        )
        for q in places
    )
