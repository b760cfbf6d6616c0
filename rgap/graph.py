"""The links between a network's output and its data, or the first node that is no link."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from rgap.affine import Affine
from rgap.ops import Op
from rgap.probing import Shape
from rgap.tracing import Traced, kind_of, module_of, path_of, propagate, trace

Link = Affine | Op

ADVICE_PART = (
    "the layers above it can still be inverted, the audit still measures every layer through "
    "hooks, and matching the whole update still works"
)
ADVICE_NONE = (
    "the audit still measures every layer through hooks, and matching the whole update still works"
)


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


def links(model: nn.Module, shape: Shape) -> tuple[list[Link], Barrier | None, Shape]:
    """Links from the barrier (or the data) to the output, in forward order.

    Returns:
        ``(links, barrier, output_shape)``.
    """
    try:
        graph = trace(model)
    except Exception as error:
        reason = f"torch.fx cannot trace its forward: {_first_line(error)}"
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
    traced = propagate(model, [node for node in graph.nodes if node in live], shape)
    found, barrier = _walk(model, traced, result)
    value = traced[result].value
    out = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
    return found, barrier, out


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo.extend(one.all_input_nodes)
    return seen


def _walk(
    model: nn.Module, traced: dict[fx.Node, Traced], result: fx.Node
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
            barrier = Barrier(path_of(model, node), kind_of(model, node), reason, advice)
            return found[::-1], barrier
        if step.piece is not None:
            found.append(step.piece)
        assert step.source is not None
        node = step.source
    return found[::-1], None


def _parameter_uses(
    model: nn.Module, traced: dict[fx.Node, Traced]
) -> dict[int, list[tuple[fx.Node, str]]]:
    """For every parameter (by id): the nodes that compute with it, and its path there."""
    uses: dict[int, list[tuple[fx.Node, str]]] = {}
    for node in traced:
        if node.op == "call_module":
            prefix = f"{node.target}." if node.target else ""
            for name, p in module_of(model, node).named_parameters():
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
        own = next((name for user, name in places if user is node), None)
        other = next(((user, name) for user, name in places if user is not node), None)
        if own is None or other is None:
            continue
        here, there = path_of(model, node), path_of(model, other[0])
        if here == there:
            where = f"'{here}' is called more than once, as '{other[0].name}' and '{node.name}'"
        else:
            where = f"'{there}' and '{here}' share the parameter '{own}'"
            if other[1] != own:
                where = f"'{other[1]}' and '{own}' are the same parameter"
        return f"{where}: the update holds only the sum of both gradients"
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
