"""The graph of a model's forward: traced once, with the shape and the meaning of every node."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rgap.network.affine import Affine
from rgap.network.calls import DATA, Call, evaluate
from rgap.network.custom import CustomFunction, kept_whole
from rgap.network.functions import build_call
from rgap.network.isolation import meta_copy, on_meta, untouched
from rgap.network.modules import HANDLERS, Names, Parameters, Piece, build, class_path
from rgap.network.probing import PROBE, Shape, Unsupported
from rgap.network.running import first_line

UNKNOWN = object()  # value of a node that PyTorch cannot tell without data
_MERGES = {
    "add": "adds two branches (a skip connection)", "iadd": "adds two branches (a skip connection)",
    "sub": "subtracts two branches", "mul": "multiplies two branches",
    "cat": "concatenates branches", "concat": "concatenates branches", "stack": "stacks branches",
}  # fmt: skip

_ENTRYWISE = (
    operator.add, operator.iadd, operator.sub, operator.mul, torch.add, torch.sub, torch.mul,
    "add", "add_", "sub", "mul",
)  # fmt: skip
_INPLACE = operator.iadd, "add_"


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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, torch.jit.ScriptModule) or class_path(type(m)) in HANDLERS
        return known or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of ``model.forward``; what the forward stores on modules is put back.

    Every ``get_attr`` node carries its value in ``node.meta["value"]``: constants that the forward
    makes (``torch.tensor([0.5])``) belong to the trace, not to the model.
    """
    tracer = _Tracer()
    graph = fx.Graph()
    if tracer.is_leaf_module(model, ""):
        graph.output(graph.call_module("", (graph.placeholder("input"),)))
        return graph
    defaults = {
        name: p.default
        for name, p in list(inspect.signature(model.forward).parameters.items())[1:]
        if p.default is not inspect.Parameter.empty
    }

    def whole(function: CustomFunction, args: Any, kwargs: Any) -> Any:
        if not any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    with untouched(model, hooks=False), kept_whole(whole):
        graph = tracer.trace(model, concrete_args=defaults or None)
        for node in graph.nodes:
            if node.op == "get_attr":
                node.meta["value"] = attribute(model, str(node.target))
    return graph


def result_of(graph: fx.Graph) -> Any:
    """What the forward returns; a default such as ``sizes=(1, 2)`` makes fx wrap it in a list."""
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    info = getattr(graph._codegen, "pytree_info", None)
    if info is not None and info.out_spec is not None and info.out_spec.is_leaf():
        return result[0]
    return result


def propagate(
    model: nn.Module, nodes: Sequence[fx.Node], shape: Shape, held: Sequence[Affine] = ()
) -> dict[fx.Node, Traced]:
    """Shape and meaning of every node, for inputs ``[B, *shape]``.

    Args:
        model: that was traced.
        nodes: in forward order.
        shape: of one sample of the data.
        held: layers that were read off the model already: they are not copied again.

    Raises:
        ValueError: if a layer does not accept the shape that reaches it.
    """
    names = Parameters(model, held)
    traced: dict[fx.Node, Traced] = {}
    for node in nodes:
        if node.op == "placeholder":
            traced[node] = Traced(meta(shape), data=True)
        elif node.op == "get_attr":
            traced[node] = Traced(attribute_value(node), data=False)
        else:
            traced[node] = step(model, node, traced, names)
    return traced


def attribute(model: nn.Module, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def attribute_value(node: fx.Node) -> Any:
    """The value of a ``get_attr`` node, as the trace kept it."""
    return node.meta["value"]


def module_of(model: nn.Module, node: fx.Node) -> nn.Module:
    """The module that a ``call_module`` node calls."""
    return model.get_submodule(str(node.target)) if node.target else model


def path_of(model: nn.Module, node: fx.Node) -> str:
    """Path of the node's module, or the name of the call."""
    if node.op != "call_module":
        return node.name
    return str(node.target) or type(model).__name__


def kind_of(model: nn.Module, node: fx.Node) -> str:
    """The module's class, or the function's name."""
    if node.op == "call_module":
        return type(module_of(model, node)).__name__
    if node.target is getattr:
        return f"getattr {node.args[1]}"
    return str(getattr(node.target, "__name__", node.target))


def step(model: nn.Module, node: fx.Node, traced: dict[fx.Node, Traced], names: Names) -> Traced:
    """What one call is, once its arguments are known.

    Raises:
        ValueError: a layer does not accept the shape that reaches it.
    """
    sources = [n for n in node.all_input_nodes if traced[n].data]
    if not sources:
        value = _evaluate(model, node, traced)
        return Traced(value, data=value is UNKNOWN, reason=None if value is not UNKNOWN else
                       "it could not be evaluated")  # fmt: skip
    if len(sources) > 1 or _mentions(node, sources[0]) > 1:
        name = str(getattr(node.target, "__name__", node.target)).strip("_")
        reason = _MERGES.get(name, "joins branches that both depend on the data")
        if node.op == "call_module":
            reason = "is called with several tensors that depend on the data"
        return _refused(model, node, traced, reason, sources[0])
    source = sources[0]
    before = traced[source].value
    if not isinstance(before, Tensor):
        return _refused(model, node, traced, "the shape of its input is not known", source)
    in_shape = tuple(before.shape[1:])
    if before.ndim < 1 or before.shape[0] != PROBE:
        return _refused(model, node, traced, "its input has no batch dimension", source)
    try:
        piece = _piece(model, node, traced, in_shape, names)
    except Unsupported as refusal:
        return _refused(model, node, traced, refusal.reason, source)
    except (TypeError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        reason = f"its arguments cannot be read as a step: {first_line(error)}"
        return _refused(model, node, traced, reason, source)
    out_shape = in_shape if piece is None else piece.out_shape
    return Traced(meta(out_shape), data=True, piece=piece, source=source)


def _piece(
    model: nn.Module, node: fx.Node, traced: dict[fx.Node, Traced], in_shape: Shape, names: Names
) -> Piece:
    if node.op == "call_module":
        if len(node.args) + len(node.kwargs) != 1 or set(node.kwargs) - {"input"}:
            raise Unsupported("it is called with more than the data")
        module = module_of(model, node)
        if "forward" in vars(module) and not isinstance(module, torch.jit.ScriptModule):
            raise Unsupported("its forward was replaced by another function")
        return build(module, path_of(model, node), in_shape, names)

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
        return on_meta(value) if data and isinstance(value, Tensor) else value

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), place)
    target: Any = node.target
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if node.op == "call_module":
                module = meta_copy(module_of(model, node))
                try:
                    return module.forward(*args, **kwargs)
                except RuntimeError:  # an embedding wants whole numbers
                    whole = [a.long() if isinstance(a, Tensor) else a for a in args]
                    return module.forward(*whole, **kwargs)
            metas = [a for a in args if isinstance(a, Tensor) and a.is_meta]
            if len(metas) == len(args) == 2 and not kwargs and target in _ENTRYWISE:
                return joined_on_meta(metas[0], metas[1], target in _INPLACE)
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


def joined_on_meta(a: Tensor, b: Tensor, inplace: bool) -> Tensor:
    """What a sum of meta tensors is; PyTorch's own imports its compiler for it, two seconds."""
    both = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    shape = b.expand_as(a).shape if inplace else both[0].shape
    dtype = a.dtype if inplace else torch.result_type(a, b)
    return torch.empty(shape, dtype=dtype, device=a.device)


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


def meta(shape: Shape) -> Tensor:
    """A batch of such inputs without values."""
    return torch.empty(PROBE, *shape, dtype=torch.float64, device="meta")
