"""Where the unknown weights and cotangents of a layer stand in its equations: zeros and names.

The gradient constraints of one input channel are the matrix K with
``K[(f, t), (b, u)] = k[b, f, p]`` wherever tap t of output position p reads pixel u, and the
weight constraints are ``W[(b, f, p), (b, c, u)] = w[f, c, t]``.  Which entries are zero and which
are equal depends on the geometry alone; everything here is about that pattern, never about values.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from rgap.network.affine import Affine

__all__ = ["Entries", "Reads", "entries", "reads"]

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Reads:
    """All triples (tap t, output position p, pixel u) with "t of p reads u"; padding is left out.

    Attributes:
        tap: t of every triple.
        position: p of every triple.
        pixel: u of every triple.
        taps: size of the kernel, per dimension.
        positions: size of the output, per dimension.
        pixels: size of the input, per dimension.
        stride: per dimension.
        dilation: per dimension.
        padding: zeros before the picture, per dimension.
    """

    tap: Ints
    position: Ints
    pixel: Ints
    taps: tuple[int, ...]
    positions: tuple[int, ...]
    pixels: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of taps, output positions and pixels."""
        return prod(self.taps), prod(self.positions), prod(self.pixels)


def reads(affine: Affine) -> Reads:
    """The reads of one filter of a layer; a linear layer is a 1×1 kernel on a 1×1 picture.

    >>> import torch
    >>> from rgap.network.affine import convolution
    >>> layer = convolution("c", torch.ones(1, 1, 2), None, ("w", None), (1, 4), stride=2)
    >>> found = reads(layer)
    >>> found.tap.tolist(), found.position.tolist(), found.pixel.tolist()
    ([0, 0, 1, 1], [0, 1, 0, 1], [0, 2, 1, 3])
    """
    geometry = affine.geometry
    if geometry is None:
        zero = np.zeros(1, dtype=np.int64)
        return Reads(zero, zero, zero, (1,), (1,), (1,), (1,), (1,), (0,))
    taps, positions, pixels = geometry.kernel, affine.out_shape[1:], affine.in_shape[1:]
    low = tuple(before for before, _ in geometry.padding)
    tap = position = pixel = np.zeros(1, dtype=np.int64)
    for dim, size in enumerate(pixels):
        t = np.arange(taps[dim])[:, None]
        p = np.arange(positions[dim])[None, :]
        u = geometry.stride[dim] * p + geometry.dilation[dim] * t - low[dim]
        at, place = np.nonzero((u >= 0) & (u < size))
        tap = (tap[:, None] * taps[dim] + at).ravel()
        position = (position[:, None] * positions[dim] + place).ravel()
        pixel = (pixel[:, None] * size + u[at, place]).ravel()
    stride, dilation = geometry.stride, geometry.dilation
    return Reads(tap, position, pixel, taps, positions, pixels, stride, dilation, low)


@dataclass(frozen=True)
class Entries:
    """Nonzero entries of a sparse matrix whose entries are names of independent unknowns.

    Attributes:
        row: of every entry.
        column: of every entry.
        name: number of the unknown that stands there; equal numbers are equal values.
        shape: of the matrix.
    """

    row: Ints
    column: Ints
    name: Ints
    shape: tuple[int, int]

    def rows(self, keep: Mask) -> Entries:
        """The matrix with only the rows where ``keep`` is True, renumbered."""
        number = np.cumsum(keep) - 1
        use = keep[self.row]
        row = number[self.row[use]]
        return Entries(row, self.column[use], self.name[use], (int(keep.sum()), self.shape[1]))

    def below(self, other: Entries) -> Entries:
        """The rows of ``other``, and these below them; same columns, same unknowns."""
        return Entries(
            np.concatenate([other.row, self.row + other.shape[0]]),
            np.concatenate([other.column, self.column]),
            np.concatenate([other.name, self.name]),
            (other.shape[0] + self.shape[0], self.shape[1]),
        )


def entries(found: Reads, active: Mask, channels: int) -> tuple[Entries, Entries]:
    """Gradient constraints I_C ⊗ K and weight constraints of one group.

    Args:
        found: reads of the layer.
        active: where the cotangent is not zero and z is known, [B, F, positions].
        channels: input channels C of the group.

    Returns:
        The gradient block, rows (f, c, t), and the weight block, rows (b, f, p); columns
        (b, c, u).  Names: k[b, f, p] first, then w[f, c, t].
    """
    batch, filters, positions = active.shape
    taps, _, pixels = found.sizes
    b, f, c, e = (
        axis.ravel()
        for axis in np.meshgrid(
            np.arange(batch),
            np.arange(filters),
            np.arange(channels),
            np.arange(len(found.tap)),
            indexing="ij",
        )
    )
    t, p, u = found.tap[e], found.position[e], found.pixel[e]
    on = active[b, f, p]
    b, f, c, t, p, u = (axis[on] for axis in (b, f, c, t, p, u))
    column = (b * channels + c) * pixels + u
    width = batch * channels * pixels
    unknown_k = (b * filters + f) * positions + p
    weight_row = (f * channels + c) * taps + t
    gradient = Entries(weight_row, column, unknown_k, (filters * channels * taps, width))
    unknown_w = batch * filters * positions + weight_row
    weight = Entries(unknown_k, column, unknown_w, (batch * filters * positions, width))
    return gradient, weight
