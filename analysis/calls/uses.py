"""What a forward really does: every use of a weight, and the way of the data between the uses.

Written down by :mod:`rgap.analysis.calls.recorder`; the graph has one node per tensor that depends
on the data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rgap.network.geometry import Geometry

__all__ = ["CONVOLUTIONS", "Event", "Node", "Recording", "Use"]

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}  # by their dimensions


@dataclass(frozen=True)
class Node:
    """A tensor on the way of the data.

    Attributes:
        op: the function that made it; "input" for the batch.
        inputs: nodes that it was made from.
        entries: of one sample.
        rank: independent values among them as a function of the input of ``op``: fewer than
            ``entries`` for means over windows that overlap.
        module: path of the innermost module that was running.
        use: number of the use of a weight whose output it is.
    """

    op: str
    inputs: tuple[int, ...]
    entries: int
    rank: int
    module: str
    use: int | None = None


@dataclass(eq=False)
class Use:
    """One use of a weight by a fully connected layer or a convolution.

    Attributes:
        name: path of the layer.
        kind: "linear", "conv1d", "conv2d", "conv3d", or the name of a step that is not covered.
        weight: the parameter; None for a step that is not covered.
        bias: the parameter, if there is one.
        geometry: of a convolution, borders that the forward put around u counted as padding.
        inputs: u, [B, ...], without such borders.
        outputs: z, [B, ...].
        read: node of u.
        node: node of z.
        module: the module, where one was called.
        cotangents: k, zero where nothing came back.
        parameters: names of the weight and the bias.
        shown: entries of one sample that u shows more than once, behind a border of the forward
            that is no part of the geometry; 0 for none.
    """

    name: str
    kind: str
    weight: Tensor | None
    bias: Tensor | None
    geometry: Geometry | None
    inputs: Tensor
    outputs: Tensor
    read: tuple[int, ...]
    node: int
    module: nn.Module | None = None
    cotangents: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    parameters: tuple[str, ...] = ()
    shown: int = 0

    @property
    def covered(self) -> bool:
        """True for the layers that have equations."""
        return self.weight is not None

    @property
    def repeats(self) -> int:
        """Places of one sample at which a fully connected layer is applied."""
        return prod(self.inputs.shape[1:-1]) if self.kind == "linear" else 1

    def folded(self, batch: int) -> int:
        """Entries of dimension 0 that one of B samples has: frames, windows, a sequence first."""
        return max(1, len(self.inputs) // batch) if self.inputs.ndim > 1 else 1

    def unknowns(self, batch: int) -> int:
        """Entries of u that belong to one of B samples."""
        return self.inputs.numel() // batch

    def read_outputs(self, batch: int) -> Tensor:
        """True where the loss reads z: [places, out] of a sample, or [folded, F, *space]."""
        k = self.cotangents != 0
        tail = k.shape[-1:] if self.kind == "linear" else k.shape[1:]
        return k.reshape(batch, -1, *tail).any(0)

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """u, z and k with one row per sample and place: over a sequence, a place is a sample."""
        if self.kind != "linear":
            return self.inputs, self.outputs, self.cotangents
        u, z, k = self.inputs, self.outputs, self.cotangents
        return tuple(t.reshape(-1, t.shape[-1]) for t in (u, z, k))  # type: ignore[return-value]

    def sizes(self) -> dict[str, Any]:
        """Sizes as ``layer_form`` takes them."""
        assert self.weight is not None
        geometry = self.geometry
        if geometry is None:
            out, width = self.weight.shape
            return {"in_features": width, "out_features": out}
        return {
            "input_size": tuple(self.inputs.shape[2:]),
            "in_channels": self.inputs.shape[1],
            "out_channels": self.weight.shape[0],
            "kernel_size": geometry.kernel,
            "stride": geometry.stride,
            "padding": geometry.padding,
            "dilation": geometry.dilation,
            "groups": geometry.groups,
            "padding_mode": geometry.border,
        }


@dataclass(frozen=True, eq=False)
class Event:
    """What happened, in order: the use of a weight, or the call of another module.

    Attributes:
        name: path of the module.
        module: None for a function.
        in_shape, out_shape: without dimension 0.
        use: of the weight, if it has one.
        folded: entries of dimension 0 that one sample has.
    """

    name: str
    module: nn.Module | None
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    use: Use | None = None
    folded: int = 1


@dataclass(frozen=True, eq=False)
class Recording:
    """A forward, and the cotangents of a backward.

    Attributes:
        nodes: in the order in which they were made.
        uses: of weights, in the same order.
        events: uses and calls of other leaf modules, in the same order.
        output: node of what the model returned; −1 if it does not depend on the input.
        chooses: steps whose reads depend on the data, and for which there is no substitute.
        batch: B.
        leaves: paths of modules without parts.
    """

    nodes: tuple[Node, ...]
    uses: tuple[Use, ...]
    events: tuple[Event, ...]
    output: int
    chooses: tuple[str, ...]
    batch: int
    leaves: frozenset[str]

    def readers(self) -> list[list[int]]:
        """For every node, the nodes that were made from it."""
        places: list[list[int]] = [[] for _ in self.nodes]
        for number, node in enumerate(self.nodes):
            for source in set(node.inputs):
                places[source].append(number)
        return places
