"""The graph of a model's forward: traced once, with the shape and the meaning of every node."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rgap.functional import DATA, Call, build_call, evaluate
from rgap.layers import Names, Piece, build
from rgap.probing import Shape, Unsupported

PROBE = 3  # batch size of the shapes that are propagated: a batch of 1 would hide mixed samples
UNKNOWN = object()  # value of a node that PyTorch cannot tell without data
_MERGES = {
    "add": "adds two branches (a skip connection)", "iadd": "adds two branches (a skip connection)",
    "sub": "subtracts two branches", "mul": "multiplies two branches",
    "cat": "concatenates branches", "concat": "concatenates branches", "stack": "stacks branches",
}  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """One node after propagation.

    Attributes:
        value: meta tensor ``[PROBE, *shape]`` if it depends on the data, else the value itself.
        data: whether it is (or holds) a tensor that depends on the data.
        piece: the link it is, None for the identity.
        reason: why it is no link; then ``piece`` means nothing.
        source: the data-dependent node it reads.
    """

    value: Any
    data: bool
    piece: Piece = None
    reason: str | None = None
    source: fx.Node | None = None


def trace(model: nn.Module) -> fx.Graph:
    """The graph of ``model.forward``; what the forward stores on modules is put back."""
    tracer = fx.Tracer()
    graph = fx.Graph()
    if tracer.is_leaf_module(model, ""):
        graph.output(graph.call_module("", (graph.placeholder("input"),)))
        return graph
    defaults = {
        name: p.default
        for name, p in list(inspect.signature(model.forward).parameters.items())[1:]
        if p.default is not inspect.Parameter.empty
    }
    with _untouched(model):
        return tracer.trace(model, concrete_args=defaults or None)


def propagate(model: nn.Module, nodes: Sequence[fx.Node], shape: Shape) -> dict[fx.Node, Traced]:
    names = {id(p): name for name, p in model.named_parameters()}
    traced: dict[fx.Node, Traced] = {}
    for node in nodes:
        if node.op == "placeholder":
            traced[node] = Traced(_meta(shape), data=True)
        elif node.op == "get_attr":
            traced[node] = Traced(attribute(model, str(node.target)), data=False)
        else:
            traced[node] = _step(model, node, traced, names)
    return traced


def attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def module_of(model: nn.Module, node: fx.Node) -> nn.Module:
    return model.get_submodule(str(node.target))


def path_of(model: nn.Module, node: fx.Node) -> str:
    if node.op != "call_module":
        return node.name
    return str(node.target) or type(model).__name__


def kind_of(model: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(module_of(model, node)).__name__
    return str(getattr(node.target, "__name__", node.target))


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Restore every module's attributes: a forward may write to ``self``."""
    kept = [
        (m, dict(m.__dict__), dict(m._parameters), dict(m._buffers), dict(m._modules))
        for m in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, parameters, buffers, modules in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for own, saved in (
                (module._parameters, parameters),
                (module._buffers, buffers),
                (module._modules, modules),
            ):
                if own != saved:
                    own.clear()
                    own.update(saved)  # type: ignore[arg-type]


def _step(model: nn.Module, node: fx.Node, traced: dict[fx.Node, Traced], names: Names) -> Traced:
    sources = [n for n in node.all_input_nodes if traced[n].data]
    if not sources:
        value = _evaluate(model, node, traced)
        return Traced(value, data=value is UNKNOWN, reason=None if value is not UNKNOWN else
                       "it could not be evaluated")  # fmt: skip
    if len(sources) > 1 or _mentions(node, sources[0]) > 1:
        name = str(getattr(node.target, "__name__", node.target)).strip("_")
        reason = _MERGES.get(name, "joins branches that both depend on the data")
        return _refused(model, node, traced, reason, sources[0])
    source = sources[0]
    before = traced[source].value
    if not isinstance(before, Tensor):
        return _refused(model, node, traced, "the shape of its input is not known", source)
    in_shape = tuple(before.shape[1:])
    if before.ndim < 2 or before.shape[0] != PROBE:
        return _refused(model, node, traced, "its input has no batch dimension", source)
    try:
        piece = _piece(model, node, traced, in_shape, names)
    except Unsupported as refusal:
        return _refused(model, node, traced, refusal.reason, source)
    out_shape = in_shape if piece is None else piece.out_shape
    return Traced(_meta(out_shape), data=True, piece=piece, source=source)


def _piece(
    model: nn.Module, node: fx.Node, traced: dict[fx.Node, Traced], in_shape: Shape, names: Names
) -> Piece:
    if node.op == "call_module":
        if len(node.args) != 1 or node.kwargs:
            raise Unsupported("it is called with more than the data")
        return build(module_of(model, node), path_of(model, node), in_shape, names)

    def place(n: fx.Node) -> Any:
        return DATA if traced[n].data else traced[n].value

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), place)
    target = node.target
    call = Call(node.name, target, tuple(args), dict(kwargs), in_shape, names)
    return build_call(call)


def _refused(
    model: nn.Module,
    node: fx.Node,
    traced: dict[fx.Node, Traced],
    reason: str,
    source: fx.Node,
) -> Traced:
    """A node that is no link: only its value, so that shapes above it are known."""
    value = _evaluate(model, node, traced)
    if value is UNKNOWN or _holds_tensor(value):
        return Traced(value, data=True, reason=reason, source=source)
    return Traced(value, data=False)  # a size, say


def _evaluate(model: nn.Module, node: fx.Node, traced: dict[fx.Node, Traced]) -> Any:
    """The node's value on the meta device; UNKNOWN where PyTorch cannot tell."""
    used = [traced[n].value for n in node.all_input_nodes]
    if any(value is UNKNOWN for value in used):
        return UNKNOWN
    data = any(traced[n].data for n in node.all_input_nodes)

    def place(n: fx.Node) -> Any:
        value = traced[n].value
        return value.to("meta") if data and isinstance(value, Tensor) else value

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), place)
    target: Any = node.target
    try:
        with torch.no_grad():
            if node.op == "call_module":
                # forward of a copy, not the module itself: no hook may notice.
                module = copy.deepcopy(module_of(model, node)).to("meta", torch.float64)
                return module.forward(*args, **kwargs)
            return evaluate(target, args, kwargs)
    except Exception as error:
        merge = str(getattr(target, "__name__", target)).strip("_") in _MERGES
        if merge and isinstance(error, RuntimeError) and "size" in str(error):
            shapes = [list(v.shape[1:]) for v in used if isinstance(v, Tensor)]
            raise ValueError(
                f"'{node.name}' joins tensors of shapes {shapes}, which do not fit; write the "
                "input_shape the model was built for"
            ) from error
        return UNKNOWN


def _mentions(node: fx.Node, source: fx.Node) -> int:
    """How often a node reads ``source`` (x + x reads it twice)."""
    count = 0

    def tally(n: fx.Node) -> fx.Node:
        nonlocal count
        count += n is source
        return n

    fx.node.map_arg((node.args, node.kwargs), tally)
    return count


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(v) for v in value)
    if isinstance(value, dict):
        return any(_holds_tensor(v) for v in value.values())
    return isinstance(value, Tensor)


def _meta(shape: Shape) -> Tensor:
    return torch.empty(PROBE, *shape, dtype=torch.float64, device="meta")
