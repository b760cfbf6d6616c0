"""The part of a network that is a chain from the data up, whatever the rest of it is.

:func:`rgap.network.parse` walks from the output down and ends at the first node that is no link.
What the bias attack needs is the other end: the steps from the data to the lowest fully connected
layer with a bias.  Above that layer nothing matters: ``G = k xᵀ`` and ``∂b = k`` hold there under
attention, skip connections, dropout, several heads and any loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from rgap.arithmetic.doubles import Doubles
from rgap.network.affine import Affine
from rgap.network.agreement import by_mode
from rgap.network.batch_statistics import FEWEST, mixing
from rgap.network.chain import Chain, assemble
from rgap.network.connected import fully_connected
from rgap.network.graph import Link, parameter_uses, shared
from rgap.network.modules import Parameters
from rgap.network.probing import Shape
from rgap.network.recording import record
from rgap.network.trace import UNKNOWN, Traced, attribute_value, meta, module_of, step, trace

__all__ = ["Prefix", "affine_input", "find_pairs", "find_prefix", "reaches"]

AGREES = 1e-4  # relative difference of a layer's input between the chain and the model itself


@dataclass(frozen=True)
class Prefix:
    """A chain from the data to a fully connected layer.

    Attributes:
        chain: its last stage is that layer; complete for its own parameters.
        argument: which of the model's arguments the data are, "" for its only one.
    """

    chain: Chain
    argument: str = ""


def find_pairs(
    model: nn.Module, shape: Shape, gradients: Doubles, held: Sequence[Affine] = ()
) -> list[Chain]:
    """Chains that end with two fully connected layers in a row, the lowest first.

    Args as for :func:`find_prefix`.
    """
    recording = record(model, shape)
    if recording is None:
        return []
    chains = []
    for chain in _chains(model, recording.graph, shape, gradients, held, biased=False):
        layers = [stage.affine for stage in chain.stages[-2:]]
        pair = len(layers) == 2 and all(affine.geometry is None for affine in layers)
        if pair and reaches(model, chain, _trial(model, shape)):
            chains.append(chain)
    return chains


def find_prefix(
    model: nn.Module, shape: Shape, gradients: Doubles, held: Sequence[Affine] = ()
) -> Prefix | None:
    """The chain to the lowest fully connected layer whose bias gradient carries its input.

    Args:
        model: in any mode; a dropout that is on, or a batch norm that mixes, is no link.
        shape: of one input.
        gradients: by parameter name.
        held: layers that were read off the same model already: they are not copied again.
    """
    recording = record(model, shape)
    if recording is not None:
        for chain in _chains(model, recording.graph, shape, gradients, held):
            if reaches(model, chain, _trial(model, shape)):
                return Prefix(chain)
        return None
    try:
        graph = trace(model)
    except Exception:
        return None
    places = [node for node in graph.nodes if node.op == "placeholder"]
    if len(places) < 2:
        return None
    for place in places:
        for chain in _chains(model, graph, shape, gradients, held, place):
            return Prefix(chain, str(place.target))
    return None


def reaches(model: nn.Module, chain: Chain, x: Tensor) -> bool:
    """True if the chain computes what its last layer takes in when the model itself runs on x.

    False too where the forward looked at values of the data before: another input, for which it
    decides otherwise, may be taken to the same.
    """
    recording = record(model, chain.input_shape, x)
    if recording is None:
        return False
    affine = chain.stages[-1].affine
    weight = dict(model.named_parameters())[affine.weight_name]
    taken = recording.taken.get(id(weight), [])
    if len(taken) != 1 or id(weight) not in recording.free:
        return False
    expected = affine_input(chain, x.to(affine.weight)).flatten(1)
    got = taken[0].to(expected).flatten(1)
    if got.shape != expected.shape:
        return False
    return float((got - expected).norm()) <= AGREES * float(expected.norm().clamp_min(1e-300))


def affine_input(chain: Chain, x: Tensor) -> Tensor:
    """Input of the last affine map of a chain."""
    for stage in chain.stages[:-1]:
        x = stage.forward(x)[1]
    for op in chain.stages[-1].lead:
        x = op.forward(x)
    return x


def _trial(model: nn.Module, shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    count = FEWEST if any(mixing(model)) else 1
    x = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    return x.to(next(model.parameters()).device)


def _chains(
    model: nn.Module,
    graph: fx.Graph,
    shape: Shape,
    gradients: Doubles,
    held: Sequence[Affine],
    data: fx.Node | None = None,
    biased: bool = True,
) -> list[Chain]:
    """Chains to the fully connected layers of a graph, or those with a bias, the lowest first."""
    traced = _propagated(model, graph, shape, data, held)
    uses = parameter_uses(model, traced)
    chains = []
    for node, made in traced.items():
        piece = made.piece
        if not isinstance(piece, Affine) or not fully_connected(piece):
            continue
        name = piece.bias_name
        if piece.weight_name not in gradients:  # a frozen layer sent none
            continue
        bias = gradients.get(name or "")
        if biased and (bias is None or not bool((bias != 0).any())):
            continue
        links = _down(model, traced, node, uses)
        if links is not None:
            parameters = tuple(name for name, _ in model.named_parameters())
            *below, top = assemble(links)
            stages = (*below, replace(top, tail=()))  # a convolution's is a reshape
            chains.append(Chain(stages, None, shape, top.affine.out_shape, parameters))
    return [chain.to(gradients.device) for chain in chains]


def _propagated(
    model: nn.Module, graph: fx.Graph, shape: Shape, data: fx.Node | None, held: Sequence[Affine]
) -> dict[fx.Node, Traced]:
    """Meaning of every node; a layer that does not take the shape ends its own path only."""
    names = Parameters(model, held)
    traced: dict[fx.Node, Traced] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            own = data is None or node is data
            traced[node] = (
                Traced(meta(shape), data=True)
                if own
                else Traced(UNKNOWN, data=True, reason="it is another input of the model")
            )
        elif node.op == "get_attr":
            traced[node] = Traced(attribute_value(node), data=False)
        elif _draws(model, node):
            source = next(n for n in node.all_input_nodes if traced[n].data)
            value = traced[source].value
            traced[node] = Traced(value, True, reason="it is in train mode", source=source)
        else:
            try:
                traced[node] = step(model, node, traced, names)
            except ValueError as error:
                traced[node] = Traced(UNKNOWN, data=True, reason=str(error))
    return traced


def _draws(model: nn.Module, node: fx.Node) -> bool:
    """True for a module that draws, or mixes the batch, because it is in train mode."""
    return node.op == "call_module" and bool(by_mode(module_of(model, node)))


def _down(
    model: nn.Module,
    traced: dict[fx.Node, Traced],
    top: fx.Node,
    uses: dict[int, list[tuple[fx.Node, str]]],
) -> list[Link] | None:
    """Links from the data to a node, or None where there is a node that is none.

    A value between two affine maps has to go to the upper one alone: else its cotangent is a sum.
    """
    pieces: list[Link] = []
    crowded = False
    node = top
    while node.op != "placeholder":
        made = traced[node]
        if made.reason is not None or not made.data or made.source is None:
            return None
        if shared(model, node, uses) is not None:
            return None
        if node is not top:
            crowded |= sum(traced[user].data for user in node.users if user in traced) > 1
            if crowded and isinstance(made.piece, Affine):
                return None
        if made.piece is not None:
            pieces.append(made.piece)
        node = made.source
    return None if traced[node].reason is not None else pieces[::-1]
