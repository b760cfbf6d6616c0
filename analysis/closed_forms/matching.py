"""Rank of a matrix of repeated unknowns, bounded above and below by matchings alone.

The lower bound wants degrees of the unknowns for which one term of a minor stands out
(:func:`degrees`).
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import (
    connected_components,
    maximum_bipartite_matching,
    min_weight_full_bipartite_matching,
)

from rgap.analysis.closed_forms.pattern import Entries, Ints, Mask, Reads

__all__ = ["SCALE", "STYLES", "degrees", "leading_term", "structural"]


SCALE = 1 << 34  # of the degrees: sums over 2^16 rows stay whole numbers in float64


def structural(matrix: Entries) -> int:
    """Largest matching of rows with columns: no matrix of this pattern has a higher rank.

    >>> column = np.array([0, 0])
    >>> structural(Entries(np.array([0, 1]), column, np.array([0, 1]), (2, 3)))
    1
    """
    return int((_matching(matrix.row, matrix.column, matrix.shape) >= 0).sum())


def leading_term(matrix: Entries, degree: NDArray[np.int64]) -> int:
    """Size of a minor that is not zero as a polynomial: a lower bound on the generic rank.

    Put t^degree in the place of every unknown.  If the heaviest largest matching of a connected
    component is unique, its product is the only term of the highest degree in the minor of its
    rows and columns; nothing cancels it, and the minor is not zero.  All numbers are integers, so
    the answer is exact.

    Args:
        matrix: the pattern.
        degree: of every unknown, whole numbers of at most :data:`SCALE` in size.

    Returns:
        Sum of the matchings that are proved; components without a proof count 0.

    >>> row, column = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    >>> matrix = Entries(row, column, np.array([0, 1, 1, 0]), (2, 2))  # determinant a² − b²
    >>> leading_term(matrix, np.array([3, 1]))
    2
    """
    rows, columns = matrix.shape
    graph = csr_array(
        (np.ones(len(matrix.row)), (matrix.row, matrix.column + rows)),
        shape=(rows + columns, rows + columns),
    )
    _, label = connected_components(graph, directed=False)
    order = np.argsort(label[matrix.row], kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(label[matrix.row][order])) + 1)
    return sum(
        _component(matrix.row[part], matrix.column[part], degree[matrix.name[part]])
        for part in parts
        if len(part)
    )


def _component(row: Ints, column: Ints, degree: NDArray[np.int64]) -> int:
    row = np.unique(row, return_inverse=True)[1]
    column = np.unique(column, return_inverse=True)[1]
    wide, tall = _corners(row, column)
    proved = 0
    for part, across, down in ((wide, row, column), (tall, column, row)):
        if part.any():
            size = _full(across[part], down[part], degree[part])
            if size == 0:
                return 0
            proved += size
    return proved


def _corners(row: Ints, column: Ints) -> tuple[Mask, Mask]:
    """Entries of the block whose rows, and of the block whose columns, can all be matched.

    The coarse decomposition of Dulmage and Mendelsohn: rows and columns that an alternating path
    reaches from an unmatched column are wide, the rest is tall.  A tall row has no entry in a wide
    column, so the ranks of the two blocks add up to no more than the rank of the whole.
    """
    shape = (int(row.max()) + 1, int(column.max()) + 1)
    partner = _matching(row, column, shape)
    reached = np.ones(shape[1], dtype=bool)
    reached[partner[partner >= 0]] = False
    while True:
        touched = np.zeros(shape[0], dtype=bool)
        touched[row[reached[column]]] = True
        more = reached.copy()
        more[partner[touched]] = True  # a row left unmatched would lengthen the matching
        if (more == reached).all():
            return reached[column], ~touched[row]
        reached = more


def _full(row: Ints, column: Ints, degree: NDArray[np.int64]) -> int:
    """Number of rows, all of which can be matched, if their heaviest matching is unique; or 0."""
    row = np.unique(row, return_inverse=True)[1]
    column = np.unique(column, return_inverse=True)[1]
    shape = (int(row.max()) + 1, int(column.max()) + 1)
    heavy = (degree - 2 * SCALE).astype(np.float64)  # no stored zeros
    table = csr_array((heavy, (row, column)), shape=shape)
    chosen, partner = min_weight_full_bipartite_matching(table, maximize=True)
    mate = np.full(shape[1], -1)
    mate[partner] = chosen
    own = np.zeros(shape[0])
    taken = mate[column] == row
    own[row[taken]] = heavy[taken]
    inside = mate[column] >= 0
    end, start = mate[column[inside]], row[inside]
    loss = own[start] - heavy[inside]
    return shape[0] if _unique(start, end, loss, shape[0]) else 0


def _unique(start: Ints, end: Ints, loss: NDArray[np.float64], size: int) -> bool:
    """True if no cycle of exchanges is free: then the heaviest matching is the only one."""
    order = np.argsort(end, kind="stable")
    start, end, loss = start[order], end[order], loss[order]
    first = np.flatnonzero(np.diff(end, prepend=-1))  # every row ends its own exchange
    height = np.zeros(size)
    while True:  # Bellman–Ford: exchanges never gain, so it settles
        lower = np.minimum.reduceat(height[start] + loss, first)
        if (lower == height).all():
            break
        height = lower
    free = (loss + height[start] == height[end]) & (start != end)
    graph = csr_array((np.ones(int(free.sum())), (start[free], end[free])), shape=(size, size))
    count, _ = connected_components(graph, directed=True, connection="strong")
    return bool(count == size)


def _matching(row: Ints, column: Ints, shape: tuple[int, int]) -> Ints:
    """Column of every row in a largest matching, −1 where it has none."""
    ones = np.ones(len(row), dtype=np.int8)
    table = csr_array((ones, (row, column)), shape=shape)
    return np.asarray(maximum_bipartite_matching(table, perm_type="column"), dtype=np.int64)


# (concave in the position, lift of the row left out, lift of the cotangents over the weights)
STYLES: tuple[tuple[bool, float, float], ...] = (
    (True, 0.0, 0.0),
    (True, 8.0, 0.0),
    (True, 0.0, -5.0),
    (True, 8.0, -5.0),
    (True, 0.0, 5.0),
    (False, 0.0, 0.0),
    (True, 8.0, 5.0),
    (False, 8.0, 0.0),
    (True, 2.0, 0.0),
    (False, 30.0, 0.0),
    (False, 300.0, 0.0),
    (False, 2.0, 0.0),
)


def degrees(
    triples: Reads,
    size: tuple[int, int, int],
    lead: Ints,
    style: tuple[bool, float, float],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Degree of every unknown: k[b, f, p] first, then w[f, c, t].

    Strictly concave degrees in p and in t make heaviest matchings monotone and so nearly always
    unique, as in the mixed subdivisions of sparse resultants; a lift of w[f, lead(f)] lets the
    weight rows take the pixels of the gradient rows that were left out.

    Args:
        triples: reads of the layer.
        size: batch, filters and channels of the group.
        lead: pair c·taps + t per filter, of ``left_out``.
        style: one of :data:`STYLES`.
        rng: draws them.
    """
    batch, filters, channels = size
    concave, lift, over = style
    if concave:
        cotangents = _concave(triples.positions, batch * filters, rng) + over
        weights = _concave(triples.taps, filters * channels, rng)
    else:
        cotangents = rng.normal(size=(batch * filters, prod(triples.positions)))
        weights = rng.normal(size=(filters * channels, prod(triples.taps)))
    weights.reshape(filters, -1)[np.arange(filters), lead] += lift
    joined = np.concatenate([cotangents.ravel(), weights.ravel()])
    joined += 1e-3 * rng.normal(size=joined.shape)
    joined -= joined.mean()
    scaled: NDArray[np.int64] = np.rint(joined * (SCALE / np.abs(joined).max())).astype(np.int64)
    return scaled


def _concave(size: tuple[int, ...], count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """``count`` random concave quadratics on a grid, [count, points]."""
    points = np.stack(np.unravel_index(np.arange(prod(size)), size), axis=1).astype(np.float64)
    dims = len(size)
    mixed = rng.normal(size=(count, dims, dims))
    form = mixed @ mixed.transpose(0, 2, 1) + 0.1 * np.eye(dims)
    steep = 2.0 ** rng.uniform(-2, 2, size=count) / max(size) ** 2
    form *= (steep / np.trace(form, axis1=1, axis2=2))[:, None, None]
    away = points - rng.uniform(-0.5, 1.5, size=(count, 1, dims)) * np.array(size)
    values: NDArray[np.float64] = -np.einsum("npd,nde,npe->np", away, form, away)
    return values + rng.normal(size=(count, 1))
