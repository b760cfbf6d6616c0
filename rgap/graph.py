"""A model's computation as a graph, and the links between its output and the first barrier."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rgap.affine import Affine
from rgap.functional import DATA, Call, build_call, evaluate
from rgap.layers import Names, Piece, Shape, Unsupported, build
from rgap.ops import Op

Link = Affine | Op

PROBE = 3  # batch size of the shapes that are propagated: a batch of 1 would hide mixed samples

ADVICE_PART = (
    "the layers above it can still be inverted, the audit still measures every layer through "
    "hooks, and matching the whole update still works"
)
ADVICE_NONE = (
    "the audit still measures every layer through hooks, and matching the whole update still works"
)
_MERGES = {
    "add": "adds two branches (a skip connection)", "iadd": "adds two branches (a skip connection)",
    "sub": "subtracts two branches", "mul": "multiplies two branches",
    "cat": "concatenates branches", "concat": "concatenates branches", "stack": "stacks branches",
}  # fmt: skip


@dataclass(frozen=True)
class Barrier:
    """A node of the network that is no link of a chain.

    Attributes:
        node: its path or name in the model.
        kind: the module's class or the function's name.
        reason: why the recursion cannot pass it.
        advice: what still can be done.
    """

    node: str
    kind: str
    reason: str
    advice: str


@dataclass(frozen=True)
class _Traced:
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


_UNKNOWN = object()


def links(model: nn.Module, shape: Shape) -> tuple[list[Link], Barrier | None, Shape]:
    """Links from the barrier (or the data) to the output, in forward order.

    Returns:
        ``(links, barrier, output_shape)``.
    """
    try:
        graph = _trace(model)
    except Exception as error:  # noqa: BLE001  (torch.fx raises whatever the forward raises)
        reason = f"torch.fx cannot trace its forward: {str(error).strip().splitlines()[0]}"
        if isinstance(error, fx.proxy.TraceError):
            reason = (
                "its forward decides by values of the data (control flow), which torch.fx cannot "
                "trace"
            )
        return [], Barrier(type(model).__name__, "control flow", reason, ADVICE_NONE), ()
    output = next(node for node in graph.nodes if node.op == "output")
    result = output.args[0]
    kind = type(model).__name__
    if not isinstance(result, fx.Node):
        reason = f"it returns {type(result).__name__} instead of one tensor"
        return [], Barrier("output", kind, reason, ADVICE_NONE), ()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    live = _ancestors(result)
    inputs = [node for node in inputs if node in live]
    if len(inputs) != 1 or str(inputs[0].target).startswith("*"):
        reason = f"its forward reads {len(inputs)} inputs instead of one tensor"
        return [], Barrier("input", kind, reason, ADVICE_NONE), ()
    traced = _propagate(model, [node for node in graph.nodes if node in live], shape)
    found, barrier = _walk(model, traced, result)
    value = traced[result].value
    out = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
    return found, barrier, out


def _trace(model: nn.Module) -> fx.Graph:
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


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo.extend(one.all_input_nodes)
    return seen


def _propagate(
    model: nn.Module, nodes: Sequence[fx.Node], shape: Shape
) -> dict[fx.Node, _Traced]:
    names = {id(p): name for name, p in model.named_parameters()}
    traced: dict[fx.Node, _Traced] = {}
    for node in nodes:
        if node.op == "placeholder":
            traced[node] = _Traced(_meta(shape), data=True)
        elif node.op == "get_attr":
            traced[node] = _Traced(_attribute(model, str(node.target)), data=False)
        else:
            traced[node] = _step(model, node, traced, names)
    return traced


def _step(
    model: nn.Module, node: fx.Node, traced: dict[fx.Node, _Traced], names: Names
) -> _Traced:
    sources = [n for n in node.all_input_nodes if traced[n].data]
    if not sources:
        value = _evaluate(model, node, traced)
        return _Traced(value, data=value is _UNKNOWN, reason=None if value is not _UNKNOWN else
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
    return _Traced(_meta(out_shape), data=True, piece=piece, source=source)


def _piece(
    model: nn.Module, node: fx.Node, traced: dict[fx.Node, _Traced], in_shape: Shape, names: Names
) -> Piece:
    if node.op == "call_module":
        if len(node.args) != 1 or node.kwargs:
            raise Unsupported("it is called with more than the data")
        return build(_module(model, node), _path(model, node), in_shape, names)

    def place(n: fx.Node) -> Any:
        return DATA if traced[n].data else traced[n].value

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), place)
    target = node.target
    call = Call(node.name, target, tuple(args), dict(kwargs), in_shape, names)
    return build_call(call)


def _refused(
    model: nn.Module,
    node: fx.Node,
    traced: dict[fx.Node, _Traced],
    reason: str,
    source: fx.Node,
) -> _Traced:
    """A node that is no link: only its value, so that shapes above it are known."""
    value = _evaluate(model, node, traced)
    if value is _UNKNOWN or _holds_tensor(value):
        return _Traced(value, data=True, reason=reason, source=source)
    return _Traced(value, data=False)  # a size, say


def _evaluate(model: nn.Module, node: fx.Node, traced: dict[fx.Node, _Traced]) -> Any:
    """The node's value on the meta device; _UNKNOWN where PyTorch cannot tell."""
    used = [traced[n].value for n in node.all_input_nodes]
    if any(value is _UNKNOWN for value in used):
        return _UNKNOWN
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
                module = copy.deepcopy(_module(model, node)).to("meta", torch.float64)
                return module.forward(*args, **kwargs)
            return evaluate(target, args, kwargs)
    except Exception as error:  # noqa: BLE001  (meta kernels raise many kinds)
        merge = str(getattr(target, "__name__", target)).strip("_") in _MERGES
        if merge and isinstance(error, RuntimeError) and "size" in str(error):
            shapes = [list(v.shape[1:]) for v in used if isinstance(v, Tensor)]
            raise ValueError(
                f"'{node.name}' joins tensors of shapes {shapes}, which do not fit; write the "
                "input_shape the model was built for"
            ) from error
        return _UNKNOWN


def _walk(
    model: nn.Module, traced: dict[fx.Node, _Traced], result: fx.Node
) -> tuple[list[Link], Barrier | None]:
    """From the output down to the data or the first node that is no link."""
    uses = _parameter_uses(model, traced)
    found: list[Link] = []
    node = result
    while node.op != "placeholder":
        step = traced[node]
        reason = step.reason
        if not step.data:
            reason = "the output does not depend on the data"
        shared = _shared(model, node, uses)
        if reason is None and shared is not None:
            reason = shared
        if reason is not None:
            above = any(isinstance(link, Affine) for link in found)
            advice = ADVICE_PART if above else ADVICE_NONE
            barrier = Barrier(_path(model, node), _kind(model, node), reason, advice)
            return found[::-1], barrier
        if step.piece is not None:
            found.append(step.piece)
        assert step.source is not None
        node = step.source
    return found[::-1], None


def _parameter_uses(
    model: nn.Module, traced: dict[fx.Node, _Traced]
) -> dict[int, list[tuple[fx.Node, str]]]:
    """For every parameter (by id): the nodes that compute with it, and its path there."""
    uses: dict[int, list[tuple[fx.Node, str]]] = {}
    for node in traced:
        if node.op == "call_module":
            prefix = f"{node.target}." if node.target else ""
            for name, p in _module(model, node).named_parameters():
                uses.setdefault(id(p), []).append((node, prefix + name))
        elif node.op == "get_attr" and isinstance(traced[node].value, nn.Parameter):
            for user in node.users:
                if user in traced:
                    uses.setdefault(id(traced[node].value), []).append((user, str(node.target)))
    return uses


def _shared(
    model: nn.Module, node: fx.Node, uses: dict[int, list[tuple[fx.Node, str]]]
) -> str | None:
    """Why a node's parameters do not stand alone, or None."""
    for places in uses.values():
        own = [name for user, name in places if user is node]
        others = [(user, name) for user, name in places if user is not node]
        if own and others:
            other, name = others[0]
            first, second = f"'{node.name}' ({own[0]})", f"'{other.name}' ({name})"
            return (
                f"its parameters are used in two places, {second} and {first}: the update holds "
                "only the sum of both gradients"
            )
    return None


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


def _attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _module(model: nn.Module, node: fx.Node) -> nn.Module:
    return model.get_submodule(str(node.target))


def _path(model: nn.Module, node: fx.Node) -> str:
    if node.op != "call_module":
        return node.name
    return str(node.target) or type(model).__name__


def _kind(model: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(_module(model, node)).__name__
    return str(getattr(node.target, "__name__", node.target))
