"""Equations that both blocks of a layer contain, counted, and rows to leave out for them.

The identity Σ_u w_f(u) (K_f' x)_u = ⟨k_f', W_f x⟩ relates gradient rows to weight rows wherever
the row W_f is known on the support of k_f'.  Where padding hides taps it splits into one relation
per connected piece of the graph "tap t of position p reads a pixel", and combinations
κ = Σ a_v k_v of pieces count as well, as long as κ vanishes where the row W_f is unknown.  With
generic k the combinations are as many as a matching number says, and with generic w each relation
lets one gradient row be left out without loss of rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from rgap.analysis.closed_forms.pattern import Ints, Mask, Reads

__all__ = ["Piece", "left_out", "pieces", "relations"]


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


def pieces(found: Reads, active: Mask) -> list[Piece]:
    """Connected pieces of every cotangent; one per filter unless padding hides many taps.

    Args:
        found: reads of the layer.
        active: where the cotangent is not zero, [B, F, positions].
    """
    taps, positions, _ = found.sizes
    out = []
    for filter_ in range(active.shape[1]):
        on = active[:, filter_]
        read = on.max(axis=0)[found.position]
        tap, position = found.tap[read], found.position[read]
        size = taps + positions
        graph = csr_array((np.ones(len(tap)), (tap, taps + position)), shape=(size, size))
        _, label = connected_components(graph, directed=False)
        for which in np.unique(label[tap]):
            mine = label == which
            support = (on & mine[taps:]).ravel()
            out.append(Piece(filter_, support, np.flatnonzero(mine[:taps])))
    return out


def relations(found: Reads, active: Mask, parts: list[Piece]) -> Mask:
    """Relations between gradient and weight rows: which pieces carry one for which filter.

    For a filter f, the combinations of pieces that vanish on its unknown rows have the dimension
    ``pieces − matching(pieces, unknown rows of f)``.  The matching is taken greedily (a basis of
    the transversal matroid, in one order for all f); the pieces outside it carry the relations.

    Args:
        found: reads of the layer.
        active: where the cotangent is not zero and z is known, [B, F, positions].
        parts: of :func:`pieces`.

    Returns:
        True where piece v carries a relation with the rows of filter f, [F, pieces].
    """
    carried = np.zeros((active.shape[1], len(parts)), dtype=bool)
    if not parts:
        return carried
    seen = np.zeros(active.shape[2], dtype=bool)
    seen[found.position] = True  # a position that reads padding only has a row of zeros, known
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
