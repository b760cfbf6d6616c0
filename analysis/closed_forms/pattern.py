"""Where the unknown weights and cotangents of a layer stand in its equations: zeros and names.

The gradient constraints of one input channel are the matrix K with
``K[(f, t), (b, u)] = k[b, f, p]`` wherever tap t of output position p reads pixel u, and the
weight constraints are ``W[(b, f, p), (b, c, u)] = w[f, c, t]``.  Which entries are zero and which
are equal depends on the geometry alone; everything here is about that pattern, never about values.

Equations that both blocks contain are counted here as well, with rows to leave out for them:
the identity Σ_u w_f(u) (K_f' x)_u = ⟨k_f', W_f x⟩ relates gradient rows to weight rows wherever
the row W_f is known on the support of k_f'.  Where padding hides taps it splits into one relation
per connected piece of the graph "tap t of position p reads a pixel", and combinations
κ = Σ a_v k_v of pieces count as well, as long as κ vanishes where the row W_f is unknown.  With
generic k the combinations are as many as a matching number says, and with generic w each relation
lets one gradient row be left out without loss of rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from rgap.network.affine import Affine

__all__ = ["Entries", "Piece", "Reads", "entries", "left_out", "pieces", "reads", "relations"]


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
    >>> from rgap.network.affine import Geometry, convolution
    >>> apart = Geometry.of((2,), stride=2)
    >>> layer = convolution("c", torch.ones(1, 1, 2), None, ("w", None), (1, 4), apart)
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


def entries(triples: Reads, active: Mask, channels: int) -> tuple[Entries, Entries]:
    """Gradient constraints I_C ⊗ K and weight constraints of one group.

    Args:
        triples: reads of the layer.
        active: where the cotangent is not zero and z is known, [B, F, positions].
        channels: input channels C of the group.

    Returns:
        The gradient block, rows (f, c, t), and the weight block, rows (b, f, p); columns
        (b, c, u).  Names: k[b, f, p] first, then w[f, c, t].
    """
    batch, filters, positions = active.shape
    taps, _, pixels = triples.sizes
    b, f, c, e = (
        axis.ravel()
        for axis in np.meshgrid(
            np.arange(batch),
            np.arange(filters),
            np.arange(channels),
            np.arange(len(triples.tap)),
            indexing="ij",
        )
    )
    t, p, u = triples.tap[e], triples.position[e], triples.pixel[e]
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


@dataclass(frozen=True)
class Piece:
    """A part of one cotangent whose taps no other part of it shares.

    Attributes:
        filter: f' it belongs to.
        support: where it may be nonzero, [B·positions].
        taps: the taps that read for it.
    """

    filter: int
    support: Mask
    taps: Ints


def pieces(triples: Reads, active: Mask) -> list[Piece]:
    """Connected pieces of every cotangent; one per filter unless padding hides many taps.

    Args:
        triples: reads of the layer.
        active: where the cotangent is not zero, [B, F, positions].
    """
    taps, positions, _ = triples.sizes
    out = []
    for filter_ in range(active.shape[1]):
        on = active[:, filter_]
        read = on.max(axis=0)[triples.position]
        tap, position = triples.tap[read], triples.position[read]
        size = taps + positions
        graph = csr_array((np.ones(len(tap)), (tap, taps + position)), shape=(size, size))
        _, label = connected_components(graph, directed=False)
        for which in np.unique(label[tap]):
            mine = label == which
            support = (on & mine[taps:]).ravel()
            out.append(Piece(filter_, support, np.flatnonzero(mine[:taps])))
    return out


def relations(triples: Reads, active: Mask, parts: list[Piece]) -> Mask:
    """Relations between gradient and weight rows: which pieces carry one for which filter.

    For a filter f, the combinations of pieces that vanish on its unknown rows have the dimension
    ``pieces − matching(pieces, unknown rows of f)``.  The matching is taken greedily (a basis of
    the transversal matroid, in one order for all f); the pieces outside it carry the relations.

    Args:
        triples: reads of the layer.
        active: where the cotangent is not zero and z is known, [B, F, positions].
        parts: of :func:`pieces`.

    Returns:
        True where piece v carries a relation with the rows of filter f, [F, pieces].
    """
    carried = np.zeros((active.shape[1], len(parts)), dtype=bool)
    if not parts:
        return carried
    seen = np.zeros(active.shape[2], dtype=bool)
    seen[triples.position] = True  # a position that reads padding only has a row of zeros, known
    pattern = np.stack([part.support for part in parts])
    cases: dict[bytes, list[int]] = {}
    for own in range(active.shape[1]):
        unknown = (~active[:, own] & seen).ravel()
        key = unknown.tobytes()
        if key not in cases:
            cases[key] = _basis(pattern[:, unknown])
        carried[own] = True
        carried[own, cases[key]] = False
    return carried


def _basis(pattern: Mask) -> list[int]:
    """Rows of a generic matrix with this zero pattern that are independent, the first ones first.

    The first rows may be scaled up against the later ones, so that the combinations that vanish
    tend to single later rows: what makes the relations of different filters independent.
    """
    owner: dict[int, int] = {}

    def augment(row: int, seen: set[int]) -> bool:
        for column in np.flatnonzero(pattern[row]).tolist():
            if column in seen:
                continue
            seen.add(column)
            if column not in owner or augment(owner[column], seen):
                owner[column] = row
                return True
        return False

    return [row for row in range(len(pattern)) if augment(row, set())]


def left_out(
    parts: list[Piece], carried: Mask, size: tuple[int, int, int], order: Ints
) -> tuple[Mask, Ints]:
    """Gradient rows to leave out, one for each relation as long as its piece has rows left.

    Any choice is sound: with generic w every minor of the relations of a piece is nonzero.  Which
    one bounds the rank best depends on where K falls short of its rows.

    Args:
        parts: of :func:`pieces`.
        carried: of :func:`relations`.
        size: filters, channels and taps of the group.
        order: of the pairs c·taps + t; those to leave out come first.

    Returns:
        Rows left out, [F·C·taps], and for every filter f the pair c·taps + t that its relations
        leave out where they can, [F].
    """
    filters, channels, taps = size
    out = np.zeros((filters, channels * taps), dtype=bool)
    lead = order[np.arange(filters) % len(order)]
    reach = [np.isin(order % taps, part.taps) for part in parts]
    for own in range(filters):
        turned = np.roll(np.arange(len(order)), -own)
        for which in np.flatnonzero(carried[own]).tolist():
            row = out[parts[which].filter]
            free = turned[reach[which][turned] & ~row[order[turned]]]
            if len(free):
                row[order[free[0]]] = True
    return out.ravel(), lead
