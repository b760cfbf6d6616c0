"""The calls of one forward, recorded while it runs: a graph where symbolic tracing finds none.

Control flow, sizes and unpacked outputs are constants of the run.  What the graph says holds for
inputs that take the same path; whoever uses it compares with the model at the inputs that matter.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rgap.network.custom import CustomFunction, kept_whole
from rgap.network.isolation import untouched
from rgap.network.modules import covered
from rgap.network.probing import PROBE, Shape
from rgap.network.watching import LayerCall, watched

__all__ = ["Recording", "record"]

_SWAPPED: dict[str, Callable[..., Any]] = {
    "__radd__": operator.add,
    "__rmul__": operator.mul,
    "__rsub__": operator.sub,
    "__rtruediv__": operator.truediv,
    "__rdiv__": operator.truediv,
}
_PLAIN: dict[str, Any] = {
    "__getitem__": operator.getitem,
    "__add__": "add",
    "__sub__": "sub",
    "__mul__": "mul",
    "__truediv__": "div",
    "__neg__": "neg",
    "__iadd__": "add_",
    "__isub__": "sub_",
    "__imul__": "mul_",
    "__itruediv__": "div_",
}


# What hands values of a tensor to Python, where they may choose what is computed.
_LOOKS = frozenset(
    (
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "item",
        "tolist",
        "numpy",
        "equal",
        "allclose",
    )
)

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class Recording:
    """A graph of what ran, and what every fully connected layer took in.

    Attributes:
        graph: calls of leaf modules and functions, in their order; a ``get_attr`` node carries its
            value in ``meta["value"]``.
        taken: inputs of every weight that ``F.linear``, or a convolution with one place to fall
            on, was called with, by ``id``.
        free: those weights, by ``id``, that were called before the forward first looked at values.
        decides: True if it did: ``if x.max() > 1``, ``float(x.sum())``.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.taken: dict[int, list[Tensor]] = {}
        self.free: set[int] = set()
        self.decides = False


class _Recorder(TorchFunctionMode):
    def __init__(self, recording: Recording, x: Tensor) -> None:
        super().__init__()
        self.recording, self.graph = recording, recording.graph
        self.nodes: dict[int, fx.Node] = {}
        self.alive: dict[int, weakref.ref[Tensor]] = {}  # an id is one tensor's while it lives
        self.made_of: dict[int, tuple[weakref.ref[Tensor], frozenset[int]]] = {}
        self.constants = 0
        self.muted = 0
        self._know(x, self.graph.placeholder("input"))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before = None if self.muted else self._mapped(args, kwargs)
        out = func(*args, **kwargs)
        if func is F.linear or (func in _CONVOLUTIONS and out.shape[2:].numel() == 1):
            self._take(*args[:2], **{k: v for k, v in kwargs.items() if k in ("input", "weight")})
        if getattr(func, "__name__", "") in _LOOKS and before is not None:
            self.recording.decides = True
        if before is None and isinstance(out, Tensor):
            self._derive(out, (args, kwargs))
        if before is not None and self._holds(out):
            self.add("call_function", *_target(func, *before), out)
        return out

    def add(self, op: str, target: Any, args: Any, kwargs: Any, out: Any) -> None:
        """A node, and one for every tensor of a tuple that it gives."""
        if isinstance(target, str) and op == "call_function":
            op = "call_method"
        node = self.graph.create_node(op, target, args, kwargs)
        if isinstance(out, Tensor):
            self._know(out, node)
            return
        for place, one in enumerate(out):
            if isinstance(one, Tensor):
                self._know(one, self.graph.call_function(operator.getitem, (node, place)))

    def whole(self, function: CustomFunction, args: Any, kwargs: Any) -> Any:
        """A custom autograd function as one node, whatever it calls."""
        before = None if self.muted else self._mapped(args, kwargs)
        self.muted += 1
        try:
            out = function(*args, **kwargs)
        finally:
            self.muted -= 1
        if before is not None and self._holds(out):
            self.add("call_function", function, *before, out)
        return out

    def _know(self, value: Tensor, node: fx.Node) -> None:
        """The tensor came from the node; forgotten when it goes, so that no activation is kept."""
        key = id(value)

        def forget(_: weakref.ref[Tensor]) -> None:
            self.nodes.pop(key, None)
            self.alive.pop(key, None)

        self.nodes[key] = node
        self.alive[key] = weakref.ref(value, forget)

    def _derive(self, out: Tensor, given: Any) -> None:
        """A tensor without data in it remembers the parameters that it was computed from."""
        parameters = frozenset[int]().union(*map(self._parameters, _leaves(given)))
        if parameters and not isinstance(out, nn.Parameter):
            key = id(out)
            gone = weakref.ref(out, lambda _: self.made_of.pop(key, None))
            self.made_of[key] = gone, parameters

    def _parameters(self, value: Any) -> frozenset[int]:
        if isinstance(value, nn.Parameter):
            return frozenset((id(value),))
        return self.made_of[id(value)][1] if id(value) in self.made_of else frozenset()

    def node_of(self, value: Any) -> fx.Node | None:
        """The node that made a tensor, None for what does not depend on the data."""
        return self.nodes.get(id(value)) if isinstance(value, Tensor) else None

    def _take(self, input: Tensor, weight: Tensor) -> None:
        self.recording.taken.setdefault(id(weight), []).append(input.detach().clone())
        if not self.recording.decides:
            self.recording.free.add(id(weight))

    def _mapped(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Arguments with nodes for tensors; None where no data are among them."""
        if not any(self.node_of(value) is not None for value in _leaves((args, kwargs))):
            return None
        return self._map(args), self._map(kwargs)

    def _map(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            node = self.node_of(value)
            if node is None:
                node = self.graph.create_node("get_attr", f"constant_{self.constants}")
                node.meta["value"] = value
                node.meta["parameters"] = self._parameters(value)
                self.constants += 1
            return node
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._map, value)) if type(value) in (tuple, list) else tuple(
                map(self._map, value)
            )  # fmt: skip
        if isinstance(value, dict):
            return {k: self._map(v) for k, v in value.items()}
        return value

    def _holds(self, out: Any) -> bool:
        return any(isinstance(value, Tensor) for value in _leaves(out))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for one in value for leaf in _leaves(one)]
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in _leaves(one)]
    return [value]


def _target(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """A call as a symbolic trace would have it: methods by name, operators in their order."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr, (*args[:1], getattr(func, "__self__", func).__name__), {}
    if name in _SWAPPED:
        return _SWAPPED[name], (args[1], args[0]), kwargs
    if getattr(torch.Tensor, name, None) == func:
        return _PLAIN.get(name, name), args, kwargs
    return func, args, kwargs


def record(model: nn.Module, shape: Shape, x: Tensor | None = None) -> Recording | None:
    """Run a model once and record it; None where it does not run on such inputs.

    Args:
        model: with a forward of one tensor; it is left as it was.
        shape: of one input.
        x: what to run on; by default random inputs, as many as shapes are probed with.
    """
    first = next(model.parameters())
    if x is None:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(PROBE, *shape, generator=generator, dtype=torch.float64)
    x = x.to(first)
    recording = Recording()
    recorder = _Recorder(recording, x)
    leaves = {name: module for name, module in model.named_modules() if _leaf(module)}
    inputs: dict[LayerCall, fx.Node | None] = {}

    def enter(call: LayerCall) -> None:
        recorder.muted += 1
        alone = recorder.muted == 1 and len(call.args) == 1
        inputs[call] = recorder.node_of(call.args[0]) if alone else None

    def leave(call: LayerCall) -> None:
        recorder.muted -= 1
        node = inputs.pop(call)
        if node is not None and isinstance(call.made, Tensor) and not call.kwargs:
            recorder.add("call_module", call.name, (node,), {}, call.made)

    try:
        watch = watched(leaves, enter, leave)
        with untouched(model), torch.no_grad(), watch, recorder, kept_whole(recorder.whole):
            model(x)
    except Exception:
        return None
    return recording


def _leaf(module: nn.Module) -> bool:
    return covered(module) and not list(module.children())
