"""A network as a directed graph: affine maps and steps, and where branches part and meet.

A chain (:mod:`rgap.network.chain`) is the case in which every value is read once.  Here a value may
be read several times, and sums and concatenations bring branches together.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rgap.network.affine import Affine
from rgap.network.agreement import disagreement, refuse_unready
from rgap.network.batch_statistics import mixing
from rgap.network.graph import Link, ancestors, parameter_uses, shared
from rgap.network.probing import Shape
from rgap.network.reshape import Reshape
from rgap.network.running import first_line
from rgap.network.trace import Traced, path_of, propagate, result_of, trace

__all__ = ["Flow", "Node", "flow_of"]

_SUMS = {
    operator.add: 1.0, operator.iadd: 1.0, torch.add: 1.0, "add": 1.0, "add_": 1.0,
    operator.sub: -1.0, operator.isub: -1.0, torch.sub: -1.0, "sub": -1.0, "sub_": -1.0,
}  # fmt: skip
_JOINS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True, eq=False)
class Node:
    """One value of the network, and how it comes from others.

    Attributes:
        name: path of the module, or name of the call.
        sources: places of the values that it reads.
        shape: of one sample of it.
        link: the affine map or step; None for the identity, a sum, a join, the data.
        signs: of a sum, +1 or −1 a source.
        joined: True where the sources stand one after the other along the first axis.
        shared: why the gradients of its parameters are not its own, or "".
    """

    name: str
    sources: tuple[int, ...]
    shape: Shape
    link: Link | None = None
    signs: tuple[float, ...] = ()
    joined: bool = False
    shared: str = ""

    @property
    def copies(self) -> bool:
        """True for the identity and other shapes: the entries are those of the one source."""
        plain = self.link is None and len(self.sources) == 1 and not (self.signs or self.joined)
        return plain or isinstance(self.link, Reshape)

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """The value from those of its sources, [B, *shape]."""
        if self.signs:
            first, *others = (
                s * x if s != 1.0 else x for s, x in zip(self.signs, values, strict=True)
            )
            return sum(others, first)
        if self.joined:
            return torch.cat(list(values), 1)
        return values[0] if self.link is None else self.link.forward(values[0])

    def spread(self, k: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The cotangents at the sources of a sum, a join or the identity.

        Args:
            k: the cotangent at it, [..., B, *shape].
            sizes: of the sources along the first axis of a sample.
        """
        if self.signs:
            return [sign * k for sign in self.signs]
        if self.joined:
            return list(torch.split(k, list(sizes), k.ndim - len(self.shape)))
        return [k]


@dataclass(frozen=True, eq=False)
class Flow:
    """The values of a network in forward order; the data come first, the output last.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> flow = flow_of(net, (3,))
    >>> [node.name for node in flow.nodes[1:]], flow.cuts()
    (['0', '1', '2'], [0, 1, 2, 3])
    """

    nodes: tuple[Node, ...]
    name: str = ""

    @property
    def in_shape(self) -> Shape:
        """Of one sample of the data."""
        return self.nodes[0].shape

    def users(self, place: int) -> list[int]:
        """Places of the values that read this one."""
        return [at for at, node in enumerate(self.nodes) if place in node.sources]

    def depth(self, place: int) -> int:
        """Affine layers with parameters on the longest path from the data to a value."""
        depths = [0]
        for node in self.nodes[1 : place + 1]:
            below = max(depths[source] for source in node.sources)
            depths.append(below + isinstance(node.link, Affine))
        return depths[place]

    def forward(self, x: Tensor) -> Tensor:
        """The network's output for data [B, *input_shape]."""
        values: list[Tensor] = [x]
        for node in self.nodes[1:]:
            values.append(node.forward([values[place] for place in node.sources]))
        return values[-1]

    def cuts(self) -> list[int]:
        """Places of values through which every path from the data to the output leads."""
        furthest, cuts = 0, []
        for place in range(len(self.nodes)):
            if place >= furthest:
                cuts.append(place)
            furthest = max([furthest, *self.users(place)])
        return cuts


def flow_of(
    model: nn.Module, input_shape: Sequence[int], held: Sequence[Affine] = ()
) -> Flow | str:
    """The graph that ``model`` is for inputs [B, *input_shape], or why it is none that is read.

    Args:
        model: the network.
        input_shape: of one sample.
        held: layers that were read off the model already: they are not copied again.

    Raises:
        ValueError: dropout in train mode; a shape that does not fit.
    """
    refuse_unready(model, mixing=True)
    for name, module in mixing(model):
        return f"'{name}' ({type(module).__name__}) mixes the samples of the batch"
    try:
        graph = trace(model)
    except Exception as error:
        return f"torch.fx cannot trace its forward: {first_line(error)}"
    result = result_of(graph)
    if not isinstance(result, fx.Node):
        return "it returns several values; write a forward that returns one tensor"
    live = ancestors(result)
    order = [node for node in graph.nodes if node in live]
    if sum(node.op == "placeholder" for node in order) != 1:
        return "its forward reads several inputs; write forward(self, x)"
    traced = propagate(model, order, tuple(input_shape), held)
    uses = parameter_uses(model, traced)
    places: dict[fx.Node, int] = {}
    nodes: list[Node] = []
    for node in order:
        if not traced[node].data:
            continue
        made = _node(model, node, traced, places)
        if isinstance(made, str):
            return f"'{path_of(model, node)}' {made}"
        nodes.append(replace(made, shared=shared(model, node, uses) or ""))
        places[node] = len(nodes) - 1
    device = next(model.parameters()).device
    flow = Flow(tuple(_placed(node, device) for node in nodes), type(model).__name__)
    return disagreement(model, [flow], tuple(input_shape), complete=True) or flow


def _node(
    model: nn.Module, node: fx.Node, traced: dict[fx.Node, Traced], places: dict[fx.Node, int]
) -> Node | str:
    """The node, or why it is none."""
    step = traced[node]
    sources = tuple(places[source] for source in node.all_input_nodes if source in places)
    value = step.value
    shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
    made = Node(path_of(model, node), sources, shape)
    if step.reason is None:
        return replace(made, link=step.piece)
    sign = _SUMS.get(node.target) if node.op != "call_module" else None
    given = tuple(places[a] for a in node.args if isinstance(a, fx.Node) and a in places)
    if sign is not None and len(given) == len(node.args) == 2 and not node.kwargs:
        if all(traced[a].value.shape == value.shape for a in node.all_input_nodes):
            return replace(made, sources=given, signs=(1.0, sign))
        return "adds branches of different shapes"
    if node.target in _JOINS and node.args and _axis(node) == 1:
        parts: Any = node.args[0]
        if all(part in places for part in parts):
            return replace(made, sources=tuple(places[part] for part in parts), joined=True)
    return step.reason


def _axis(node: fx.Node) -> object:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _placed(node: Node, device: torch.device) -> Node:
    return node if node.link is None else replace(node, link=node.link.to(device))
