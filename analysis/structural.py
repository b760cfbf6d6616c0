"""What the pattern of a layer's equations says, whatever the numbers in it: matchings.

The matrix of one layer is [I_C ⊗ K; I_B ⊗ W].  Its **structural rank** is the size of a maximum
matching between equations and unknowns, the rank that the pattern would have if all of its entries
were independent.  They are not: the same k and the same w stand in many places, and the two blocks
share equations (Σ_u w_f(u) (K_f' x)_u = ⟨k_f', W_f x⟩).  So it is an upper bound on the rank,
often a loose one, and never a reason to call a layer solvable.

The **Dulmage-Mendelsohn decomposition** sorts the unknowns by it.  What is certain of its parts:

* *untouched*: no equation reads the pixel; no value of k or W determines it;
* *under*: fewer equations touch these pixels than there are pixels, and no other equation touches
  them; so at least ``unknowns − structural rank`` directions among them stay open for every value
  of k and W.  A single one of them may still be determined;
* *well* and *over*: the pattern does not forbid that they are determined, which proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor

from rgap.affine import Affine
from rgap.systems.convnd import taps


@dataclass(frozen=True)
class Layout:
    """A layer as a table of taps, a fully connected one as a kernel on a single position.

    Attributes:
        groups: g.
        filters: F/g.
        channels: C/g.
        positions: N, of one channel.
        outputs: O, of one filter.
        table: input position read by output o through offset δ, [offsets, O]; −1 is padding.
    """

    groups: int
    filters: int
    channels: int
    positions: int
    outputs: int
    table: NDArray[np.int64]

    @property
    def offsets(self) -> int:
        """Number of kernel offsets δ."""
        return len(self.table)


@dataclass(frozen=True)
class StructuralParts:
    """Dulmage-Mendelsohn parts of a layer's unknowns, one mask [B, *in_shape] each.

    Attributes:
        untouched: no equation reads the pixel.
        under: touched, but by fewer equations than there are pixels.
        well: as many equations as pixels.
        over: more equations than pixels.
        rank: structural rank of the layer.
    """

    untouched: Tensor
    under: Tensor
    well: Tensor
    over: Tensor
    rank: int

    @property
    def nullity(self) -> int:
        """Directions that stay open for every k and W: unknowns − structural rank."""
        return self.under.numel() - self.rank

    def explain(self) -> str:
        """How many pixels are in which part, in one sentence."""
        total = self.under.numel()
        counts = {
            "read by no equation": int(self.untouched.sum()),
            "structurally under-determined": int(self.under.sum()),
            "well-determined": int(self.well.sum()),
            "over-determined": int(self.over.sum()),
        }
        parts = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{total} unknowns: {parts}; structural nullity {self.nullity}"


def layout(affine: Affine) -> Layout:
    """Where the taps of a layer fall.

    >>> import torch
    >>> w = torch.ones(2, 3, dtype=torch.float64)
    >>> flat = layout(Affine("fc", "linear", w, None, "fc.weight", None, (3,), (2,), None))
    >>> flat.channels, flat.positions, flat.outputs
    (3, 1, 1)
    """
    geometry = affine.geometry
    if geometry is None:
        one = np.zeros((1, 1), dtype=np.int64)
        return Layout(1, affine.out_shape[0], affine.in_shape[0], 1, 1, one)
    space, out = affine.in_shape[1:], affine.out_shape[1:]
    return Layout(
        geometry.groups,
        affine.out_shape[0] // geometry.groups,
        affine.in_shape[0] // geometry.groups,
        prod(space),
        prod(out),
        taps(geometry, space, out).numpy(),
    )


def active_units(affine: Affine, batch: int, active: Tensor | None) -> NDArray[np.bool_]:
    """The mask of units that are on as [B, groups, F/g, O]; None means that all are.

    Raises:
        ValueError: a batch below 1, a mask of another shape.
        TypeError: a mask that is not boolean.
    """
    if batch < 1:
        raise ValueError(f"expected batch >= 1, got {batch}; write the number of samples")
    plan = layout(affine)
    shape = (batch, *affine.out_shape)
    if active is None:
        active = torch.ones(shape, dtype=torch.bool)
    if active.dtype != torch.bool:
        raise TypeError(
            f"expected a boolean mask of the units that are on, got {active.dtype}; write "
            "active=z > 0"
        )
    if tuple(active.shape) != shape:
        raise ValueError(
            f"'{affine.name}' ({affine.kind}): expected active of shape {list(shape)}, got "
            f"{list(active.shape)}; write one mask per sample, [B, *out_shape]"
        )
    found = active.cpu().numpy().reshape(batch, plan.groups, plan.filters, plan.outputs)
    return np.asarray(found, dtype=np.bool_)


def gradient_pattern(affine: Affine, batch: int, active: Tensor | None = None) -> sparse.csr_array:
    """Pattern of I_C ⊗ K, [weight entries, B·C·N]; columns in the order of [B, *in_shape]."""
    plan, on = layout(affine), active_units(affine, batch, active)
    rows, columns = [], []
    for offset, position in enumerate(plan.table):
        inside = np.flatnonzero(position >= 0)
        b, g, f, o = np.nonzero(on[..., inside])
        for c in range(plan.channels):
            rows.append(((g * plan.filters + f) * plan.channels + c) * plan.offsets + offset)
            channel = (b * plan.groups + g) * plan.channels + c
            columns.append(channel * plan.positions + position[inside[o]])
    height = plan.groups * plan.filters * plan.channels * plan.offsets
    return _pattern(rows, columns, height, batch * prod(affine.in_shape))


def weight_pattern(affine: Affine, batch: int, active: Tensor | None = None) -> sparse.csr_array:
    """Pattern of I_B ⊗ W, [B·units, B·C·N]; a unit that is off leaves its row empty."""
    plan, on = layout(affine), active_units(affine, batch, active)
    rows, columns = [], []
    for position in plan.table:
        inside = np.flatnonzero(position >= 0)
        b, g, f, o = np.nonzero(on[..., inside])
        for c in range(plan.channels):
            rows.append(((b * plan.groups + g) * plan.filters + f) * plan.outputs + inside[o])
            channel = (b * plan.groups + g) * plan.channels + c
            columns.append(channel * plan.positions + position[inside[o]])
    return _pattern(rows, columns, on.size, batch * prod(affine.in_shape))


def structural_ranks(
    affine: Affine, batch: int, active: Tensor | None = None
) -> tuple[int, int, int]:
    """Maximum matchings of the gradient block, the weight block and both together.

    Args:
        affine: the layer; its weights are not read.
        batch: B.
        active: True where a unit is on, [B, *out_shape]; None: all.

    >>> import torch
    >>> from rgap.affine import convolution
    >>> w = torch.ones(2, 1, 3, 3)
    >>> conv = convolution("conv", w, None, ("conv.weight", None), (1, 6, 6))
    >>> structural_ranks(conv, 1)
    (18, 32, 36)
    """
    gradient = gradient_pattern(affine, batch, active)
    weight = weight_pattern(affine, batch, active)
    both = sparse.vstack([gradient, weight], format="csr")
    first, second, joint = (int(csgraph.structural_rank(m)) for m in (gradient, weight, both))
    return first, second, joint


def structural_parts(
    affine: Affine, batch: int = 1, active: Tensor | None = None
) -> StructuralParts:
    """Dulmage-Mendelsohn decomposition of a layer's equations, as masks over the input.

    Args:
        affine: the layer; its weights are not read.
        batch: B.
        active: True where a unit is on, [B, *out_shape]; None: all.

    Returns:
        The :class:`StructuralParts`; every pixel is in exactly one of the four masks.

    >>> import torch
    >>> from rgap.affine import convolution
    >>> w = torch.ones(4, 3, 1, 1)
    >>> conv = convolution("conv", w, None, ("conv.weight", None), (3, 8, 8), stride=2)
    >>> int(structural_parts(conv).untouched.sum()), 3 * 8 * 8 * 3 // 4
    (144, 144)
    """
    matrix = sparse.vstack(
        [gradient_pattern(affine, batch, active), weight_pattern(affine, batch, active)],
        format="csr",
    )
    under, over, rank = dulmage_mendelsohn(matrix)
    touched = np.diff(matrix.tocsc().indptr) > 0
    shape = (batch, *affine.in_shape)
    masks = (~touched, under & touched, ~under & ~over, over)
    untouched, below, well, above = (torch.from_numpy(m).reshape(shape) for m in masks)
    return StructuralParts(untouched, below, well, above, rank)


def dulmage_mendelsohn(
    matrix: sparse.csr_array,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], int]:
    """Columns of the under-determined and of the over-determined part, and the structural rank.

    From a maximum matching: a column is in the under-determined part if an alternating path leads
    to it from an unmatched column, in the over-determined part if one leads from an unmatched row.
    The parts do not depend on the matching that was found.

    >>> from scipy.sparse import csr_array
    >>> under, over, rank = dulmage_mendelsohn(csr_array([[1, 1, 0], [0, 0, 1], [0, 0, 1]]))
    >>> under.tolist(), over.tolist(), rank
    ([True, True, False], [False, False, True], 2)
    """
    height, width = matrix.shape
    row_of = csgraph.maximum_bipartite_matching(matrix, perm_type="row")  # of every column, or −1
    matched = np.flatnonzero(row_of >= 0)
    column_of = np.full(height, -1)
    column_of[row_of[matched]] = matched
    # column → row by any entry → the column that this row is matched to
    entries = matrix.tocoo()
    row, column = entries.coords
    target = column_of[row]
    known = target >= 0
    under = _reached(column[known], target[known], np.flatnonzero(row_of < 0), width)
    # unmatched row → any of its columns → the row matched to it → any of that row's columns
    free = np.unique(column[~known])
    over = _reached(target[known], column[known], free, width)
    return under, over, len(matched)


def _reached(
    source: NDArray[np.intp], target: NDArray[np.intp], starts: NDArray[np.intp], size: int
) -> NDArray[np.bool_]:
    """Nodes that directed edges lead to from the starts, the starts included."""
    root = np.full(len(starts), size)
    ends = (np.concatenate([source, root]), np.concatenate([target, starts]))
    graph = sparse.csr_array((np.ones(len(ends[0]), dtype=np.int8), ends), (size + 1, size + 1))
    found = np.zeros(size + 1, dtype=np.bool_)
    found[csgraph.breadth_first_order(graph, size, return_predecessors=False)] = True
    return found[:size]


def _pattern(
    rows: list[NDArray[np.intp]], columns: list[NDArray[np.intp]], height: int, width: int
) -> sparse.csr_array:
    places = (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_array((np.ones(len(places[0]), dtype=np.int8), places), (height, width))
