"""Zeros that no sample leaves: of how many outer products the support of a gradient is made.

The gradient of a weight is a sum of outer products, ``G = Σ_t k_t x_tᵀ``, one a sample and
position.  Where k_t or x_t have zeros (dead units, dark pixels, padding, max pooling), the support
of each term is still a rectangle of rows and columns, so that the support of G is a union of at
most as many rectangles as there are terms.  Entries that are not zero and of which no two lie in
one rectangle of the support,

    ``g_ij ≠ 0, g_kl ≠ 0`` and ``g_il = 0`` or ``g_kj = 0``

(a fooling set, as communication complexity calls it), need a rectangle each: more of them than
terms are a proof that entries were set to zero afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fooling_set", "pruned"]

LOOKED = (64, 256)  # rows and columns among which entries are looked for
CLEAR = 8.0  # times what a value may be hidden below, that all others must exceed
MANY = (4, 8)  # times the terms and beside them: more rectangles than a batch misstated has
GAP = 8.0  # of the smallest value times rows and columns over the median: 1 on a whole gradient
EMPTY = 0.45  # share of zeros that dead units and padding hardly leave where terms are many
ENTRIES = 32  # of a table whose share of zeros is no accident


def pruned(gradient: Tensor, terms: int, hidden: float = 0.0) -> bool:
    """True if entries of a weight's gradient were set to zero, wherever they are or the smallest.

    More rectangles than the stated terms prove that something is wrong.  That it is pruning and no
    larger batch is said of many more, or where small values are missing: a gradient has entries of
    every size.  Where the terms are too many to be counted so (windows of a convolution), half the
    entries must be missing, and all small ones.

    Args:
        gradient: of a weight, [out, ...].
        terms: outer products that it is said to be a sum of: samples times positions.
        hidden: level below which a value may have become zero by rounding or noise.

    >>> g = torch.outer(torch.arange(1.0, 9.0), torch.linspace(0.5, 1, 8))
    >>> g = g * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    >>> pruned(g * (g.abs() > 2), 1), pruned(g, 1)
    (True, False)
    """
    table = gradient.detach().flatten(1)
    rows = (table != 0).any(1).nonzero().flatten()
    columns = (table != 0).any(0).nonzero().flatten()
    if not len(rows):
        return False
    table = table[_spread(rows, LOOKED[0])][:, _spread(columns, LOOKED[1])]
    sizes = table[table != 0].abs()
    hidden = max(hidden, float(torch.finfo(gradient.dtype).smallest_normal))
    if len(sizes) in (0, table.numel()) or float(sizes.min()) <= CLEAR * hidden:
        return False
    gap = float(sizes.min() / sizes.median()) * sum(table.shape)
    if min(table.shape) <= terms:
        zeros = 1.0 - len(sizes) / table.numel()
        return gap > 2 * GAP and zeros > EMPTY and table.numel() >= ENTRIES
    most = MANY[0] * terms + MANY[1]
    rectangles = fooling_set(table, most)
    return rectangles > most or (rectangles > terms and gap > GAP)


def fooling_set(table: Tensor, most: int) -> int:
    """Entries of [m, n] of which no two lie in one rectangle of the support, up to ``most`` + 1.

    Chosen greedily, those with the emptiest row and column first.

    >>> x, k = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 3.0, 1.0])
    >>> fooling_set(torch.outer(k, x), 2), fooling_set(torch.eye(3), 2)
    (1, 3)
    """
    support = table != 0
    cost = support.sum(1, keepdim=True) * support.sum(0, keepdim=True)
    left, count = support.clone(), 0
    while count <= most and bool(left.any()):
        place = int(torch.where(left, cost, cost.max() + 1).argmin())
        i, j = divmod(place, left.shape[1])
        left &= ~(support[:, j, None] & support[i])
        count += 1
    return count


def _spread(places: Tensor, most: int) -> Tensor:
    """At most so many of them, evenly spread."""
    if len(places) <= most:
        return places
    return places[torch.linspace(0, len(places) - 1, most, device=places.device).long()]
