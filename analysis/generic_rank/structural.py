"""What the pattern of a layer's equations says, whatever the numbers in it: matchings.

The matrix of one layer is [I_C ⊗ K; I_B ⊗ W].  Its **structural rank** is the size of a maximum
matching between equations and unknowns, the rank that the pattern would have if all of its entries
were independent.  They are not: the same k and the same w stand in many places, and the two blocks
share equations (Σ_u w_f(u) (K_f' x)_u = ⟨k_f', W_f x⟩).  So it is an upper bound on the rank,
often a loose one, and never a reason to call a layer solvable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor

from rgap.analysis.generic_rank.layout import Layout, active_units, layout
from rgap.network.affine import Affine


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
    gradient = sum(network.flow("gradient") for network in networks)
    weight = sum(network.flow("weight") for network in networks)
    return gradient, weight, sum(network.flow("both") for network in networks)


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

    def flow(self, which: str) -> int:
        """Maximum matching of one block or both."""
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
        return int(csgraph.maximum_flow(graph, source, sink, method="dinic").flow_value)


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
