"""The links between a network's output and its data, or the first node that is no link."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from rgap.network.affine import Affine
from rgap.network.probing import PROBE, Shape
from rgap.network.reshape import Op
from rgap.network.running import first_line
from rgap.network.trace import Traced, kind_of, module_of, path_of, propagate, result_of, trace

Link = Affine | Op

ADVICE_PART = (
    "the layers above it can still be inverted, the audit still measures every layer through "
    "hooks, and matching the whole update still works"
)
ADVICE_NONE = (
    "the audit still measures every layer through hooks, and matching the whole update still works"
)

ADVICE_TOKENS = "the labels are still read, and the layers above it can still be inverted"


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

    @property
    def words(self) -> str:
        """Which node it is, why it is one, and what still can be done."""
        return f"'{self.node}' ({self.kind}): {self.reason}; {self.advice}"


def links(model: nn.Module, shape: Shape) -> tuple[list[Link], Barrier | None, Shape]:
    """Links from the barrier (or the data) to the output, in forward order.

    Returns:
        ``(links, barrier, output_shape)``.
    """
    kind = type(model).__name__
    try:
        graph = trace(model)
    except Exception as error:
        return [], Barrier(kind, "control flow", _untraceable(model, error), ADVICE_NONE), ()
    result = result_of(graph)
    if not isinstance(result, fx.Node):
        what = type(result).__name__.removeprefix("immutable_")
        reason = f"it returns a {what} instead of one tensor; write a forward that returns one"
        return [], Barrier("output", kind, reason, ADVICE_NONE), ()
    live = ancestors(result)
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node in live]
    starred = any(str(node.target).startswith("*") for node in inputs)
    if len(inputs) != 1 or starred:
        got = "*args" if starred else f"{len(inputs)} inputs"
        reason = f"its forward reads {got} instead of one tensor; write forward(self, x)"
        return [], Barrier("input", kind, reason, ADVICE_NONE), ()
    traced = propagate(model, [node for node in graph.nodes if node in live], shape)
    pieces, barrier = _walk(model, traced, result, _overwritten(model, graph, live))
    value = traced[result].value
    out = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
    return pieces, barrier, out


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that its value depends on."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo.extend(one.all_input_nodes)
    return seen


def _walk(
    model: nn.Module,
    traced: dict[fx.Node, Traced],
    result: fx.Node,
    overwritten: dict[fx.Node, str],
) -> tuple[list[Link], Barrier | None]:
    """From the output down to the data or the first node that is no link."""
    uses = parameter_uses(model, traced)
    pieces: list[Link] = []
    node = result
    while node.op != "placeholder":
        step = traced[node]
        reason = step.reason
        if not step.data:
            reason = "the output does not depend on the data"
        twice = shared(model, node, uses)
        if reason is None and twice is not None:
            reason = twice
        if reason is None:
            reason = overwritten.get(node)
        if reason is not None:
            node = _culprit(traced, node)
            reason = traced[node].reason or reason
            above = any(isinstance(link, Affine) for link in pieces)
            advice = ADVICE_PART if above else ADVICE_NONE
            if kind_of(model, node) in ("Embedding", "EmbeddingBag", "embedding"):
                advice = ADVICE_TOKENS
            barrier = Barrier(path_of(model, node), kind_of(model, node), reason, advice)
            return pieces[::-1], barrier
        if step.piece is not None:
            pieces.append(step.piece)
        assert step.source is not None
        node = step.source
    return pieces[::-1], None


def _culprit(traced: dict[fx.Node, Traced], node: fx.Node) -> fx.Node:
    """The node that hands no batch of known shape on: the LSTM below an ``out[0]``."""
    while (source := traced[node].source) is not None and traced[source].reason is not None:
        value = traced[source].value
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == PROBE:
            break
        node = source
    return node


def _overwritten(model: nn.Module, graph: fx.Graph, live: set[fx.Node]) -> dict[fx.Node, str]:
    """Nodes whose values an in-place call changes behind the graph's back, each with the reason.

    ``h.mul_(2)`` with its result thrown away has no edge to the output, yet ``h`` is another.
    """
    reasons: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node not in live and _in_place(model, node):
            reason = (
                f"'{path_of(model, node)}' changes it in place and its result is not used, which "
                "the graph cannot show; write x = f(x) instead of f(x)"
            )
            reasons.update(dict.fromkeys(ancestors(node) - {node}, reason))
    return reasons


def _in_place(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module_of(model, node), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    marked = name.endswith("_") and not name.endswith("__") and not name.startswith("_")
    return marked or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None


def _untraceable(model: nn.Module, error: Exception) -> str:
    """Why torch.fx found no graph, and what to write instead."""
    if isinstance(error, fx.proxy.TraceError):
        return (
            "its forward decides by values or sizes of the data, or loops over them (control "
            "flow), which torch.fx cannot trace"
        )
    for wrapper, what in (("_orig_mod", "compiled"), ("module", "wrapped")):
        inner = getattr(model, wrapper, None)
        if isinstance(inner, nn.Module):
            return f"it is a {what} model; write model.{wrapper} instead of model"
    return f"torch.fx cannot trace its forward: {first_line(error)}"


def parameter_uses(
    model: nn.Module, traced: dict[fx.Node, Traced]
) -> dict[int, list[tuple[fx.Node, str]]]:
    """For every parameter (by id): the nodes that compute with it, and its path there."""
    uses: dict[int, list[tuple[fx.Node, str]]] = {}
    for node, step in traced.items():
        if node.op == "call_module":
            prefix = f"{node.target}." if node.target else ""
            for name, p in module_of(model, node).named_parameters():
                uses.setdefault(id(p), []).append((node, prefix + name))
        elif node.op == "get_attr" and isinstance(step.value, nn.Parameter):
            for user in node.users:
                if user in traced:
                    uses.setdefault(id(step.value), []).append((user, str(node.target)))
        else:  # of a recording: a constant that was computed from parameters
            for key in node.meta.get("parameters", ()):
                for user in node.users:
                    if user in traced:
                        uses.setdefault(key, []).append((user, str(node.target)))
    return uses


def shared(
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
