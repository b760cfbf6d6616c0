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

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor

from rgap.analysis.generic_rank.layout import Layout, active_units, layout
from rgap.network.affine import Affine


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


def structural_ranks(
    affine: Affine, batch: int, active: Tensor | None = None
) -> tuple[int, int, int]:
    """Maximum matchings of the gradient block, the weight block and both together.

    Corresponds to ``scipy.sparse.csgraph.structural_rank`` of the three matrices, which are never
    formed: rows with the same pattern are one node of a flow network, and so are the channels of a
    group, because a flow can be spread evenly over what a permutation exchanges.

    Args:
        affine: the layer; its weights are not read.
        batch: B.
        active: True where a unit is on, [B, *out_shape]; None: all.

    >>> import torch
    >>> from rgap.network.affine import convolution
    >>> w = torch.ones(2, 1, 3, 3)
    >>> conv = convolution("conv", w, None, ("conv.weight", None), (1, 6, 6))
    >>> structural_ranks(conv, 1)
    (18, 32, 36)
    """
    networks = _networks(affine, batch, active)
    gradient = sum(network.flow("gradient")[0] for network in networks)
    weight = sum(network.flow("weight")[0] for network in networks)
    return gradient, weight, sum(network.flow("both")[0] for network in networks)


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
    >>> from rgap.network.affine import convolution
    >>> w = torch.ones(4, 3, 1, 1)
    >>> conv = convolution("conv", w, None, ("conv.weight", None), (3, 8, 8), stride=2)
    >>> int(structural_parts(conv).untouched.sum()), 3 * 8 * 8 * 3 // 4
    (144, 144)
    """
    plan = layout(affine)
    masks: list[list[Tensor]] = [[], [], [], []]
    rank = 0
    for network in _networks(affine, batch, active):
        value, under, over = network.parts()
        rank += value
        touched = network.touched()
        parts = (~touched, under & touched, ~under & ~over, over)
        for mask, part in zip(masks, parts, strict=True):
            table = torch.from_numpy(part).reshape(batch, 1, plan.positions)
            mask.append(table.expand(-1, plan.channels, -1))
    shape = (batch, *affine.in_shape)
    untouched, below, well, above = (torch.cat(m, dim=1).reshape(shape) for m in masks)
    return StructuralParts(untouched, below, well, above, rank)


@dataclass(frozen=True)
class _Network:
    """Equations of one group as nodes with a capacity, pixels (sample, position) as others.

    Attributes:
        capacity: equations that share a node's pattern, [nodes].
        gradient: number of nodes that are gradient constraints; the rest are weight constraints.
        node, pixel: the two ends of every entry of the pattern.
        pixels: B·N.
        channels: C/g, unknowns per pixel.
    """

    capacity: NDArray[np.int64]
    gradient: int
    node: NDArray[np.int64]
    pixel: NDArray[np.int64]
    pixels: int
    channels: int

    def touched(self) -> NDArray[np.bool_]:
        """Pixels that an equation reads."""
        pixels = np.zeros(self.pixels, dtype=np.bool_)
        pixels[self.pixel] = True
        return pixels

    def flow(self, which: str) -> tuple[int, sparse.csr_array]:
        """Maximum matching of one block or both, and the flow between all nodes that shows it."""
        keep = {
            "gradient": self.node < self.gradient,
            "weight": self.node >= self.gradient,
            "both": np.ones(len(self.node), dtype=np.bool_),
        }[which]
        nodes = len(self.capacity)
        source, sink = nodes + self.pixels, nodes + self.pixels + 1
        tails = (np.full(nodes, source), self.node[keep], nodes + np.arange(self.pixels))
        heads = (np.arange(nodes), nodes + self.pixel[keep], np.full(self.pixels, sink))
        limits = (
            self.capacity,
            np.full(int(keep.sum()), self.channels),
            np.full(self.pixels, self.channels),
        )
        places = (np.concatenate(tails), np.concatenate(heads))
        graph = sparse.csr_matrix(
            (np.concatenate(limits).astype(np.int32), places), (sink + 1, sink + 1)
        )
        result = csgraph.maximum_flow(graph, source, sink, method="dinic")
        return int(result.flow_value), result.flow

    def parts(self) -> tuple[int, NDArray[np.bool_], NDArray[np.bool_]]:
        """Structural rank; pixels of the under-determined and of the over-determined part.

        Alternating paths from what is left over: from a pixel that is not used up, to any equation
        that reads it, to any pixel which that equation serves; from an equation that serves less
        than it could, the same with the two kinds exchanged.
        """
        rank, flow = self.flow("both")
        nodes = len(self.capacity)
        flow = flow.tocoo()
        serves = (flow.row < nodes) & (flow.col >= nodes) & (flow.data > 0)
        server, served = flow.row[serves], flow.col[serves]
        pixel = nodes + self.pixel
        size = nodes + self.pixels
        supply = np.bincount(server, weights=flow.data[serves], minlength=size)[:nodes]
        use = np.bincount(served, weights=flow.data[serves], minlength=size)[nodes:]
        spare = nodes + np.flatnonzero(use < self.channels)
        under = _reached((pixel, server), (self.node, served), spare, size)
        idle = np.flatnonzero(supply < self.capacity)
        over = _reached((self.node, served), (pixel, server), idle, size)
        return rank, under[nodes:], over[nodes:]


def _networks(affine: Affine, batch: int, active: Tensor | None) -> list[_Network]:
    plan, on = layout(affine), active_units(affine, batch, active)
    return [_network(plan, on[:, group]) for group in range(plan.groups)]


def _network(plan: Layout, on: NDArray[np.bool_]) -> _Network:
    """The network of one group; ``on`` is [B, F/g, O]."""
    batch = len(on)
    # filters with the same mask have the same rows in K; all filters have them in W
    masks, counts = np.unique(on.transpose(1, 0, 2), axis=0, return_counts=True)
    kinds = len(masks)
    gradient = kinds * plan.offsets
    capacity = np.concatenate(
        [np.repeat(counts * plan.channels, plan.offsets), on.sum(axis=1).reshape(-1)]
    )
    nodes, pixels = [], []
    for offset, position in enumerate(plan.table):
        inside = np.flatnonzero(position >= 0)
        kind, b, o = np.nonzero(masks[:, :, inside])
        nodes.append(kind * plan.offsets + offset)
        pixels.append(b * plan.positions + position[inside[o]])
        b, o = np.nonzero(on.max(axis=1)[:, inside])
        nodes.append(gradient + b * plan.outputs + inside[o])
        pixels.append(b * plan.positions + position[inside[o]])
    return _Network(
        capacity,
        gradient,
        np.concatenate(nodes),
        np.concatenate(pixels),
        batch * plan.positions,
        plan.channels,
    )


def _reached(
    sources: tuple[NDArray[np.int64], ...],
    targets: tuple[NDArray[np.int64], ...],
    starts: NDArray[np.int64],
    size: int,
) -> NDArray[np.bool_]:
    """Nodes that directed edges lead to from the starts, the starts included."""
    ends = (
        np.concatenate([*sources, np.full(len(starts), size)]),
        np.concatenate([*targets, starts]),
    )
    graph = sparse.csr_array((np.ones(len(ends[0])), ends), (size + 1, size + 1))
    reached = np.zeros(size + 1, dtype=np.bool_)
    reached[csgraph.breadth_first_order(graph, size, return_predecessors=False)] = True
    return reached[:size]
