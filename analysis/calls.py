"""What a forward really does: every use of a weight, and the way of the data between the uses.

One run under a `TorchFunctionMode` sees ``nn.Linear``, ``F.linear(x, weight)``, ``x.mean((2, 3))``
and ``x[:, 0]`` alike.  Its graph has one node per tensor that depends on the data.  Backwards it
gives the cotangent k = ∂L/∂z of every use, and so which outputs are read at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rgap.geometry import per_dimension, sides_of
from rgap.isolation import first_line

__all__ = ["Event", "Node", "Recording", "Use", "record", "structural_twin"]

Loss = Callable[[Tensor], Tensor]
CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
OPTIONS = ("stride", "padding", "dilation", "groups")
DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
# Steps that read a parameter entry by entry, and keep what they are given.
POINTWISE = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "prelu"}
POINTWISE |= {"add", "sub", "mul", "div", "__add__", "__radd__", "__mul__", "__rmul__", "__sub__"}
POINTWISE |= {"__rsub__", "__truediv__", "__iadd__", "__imul__", "add_", "mul_", "cat", "concat"}
LARGEST_POOL = 1024  # positions of a pool up to which the rank of its windows is computed


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
        options: stride, padding, dilation and groups of a convolution.
        inputs: u, [B, ...].
        outputs: z, [B, ...].
        read: node of u.
        node: node of z.
        module: the module, where one was called.
        cotangents: k, zero where nothing came back.
    """

    name: str
    kind: str
    weight: Tensor | None
    bias: Tensor | None
    options: dict[str, Any]
    inputs: Tensor
    outputs: Tensor
    read: tuple[int, ...]
    node: int
    module: nn.Module | None = None
    cotangents: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def covered(self) -> bool:
        """True for the layers that have equations."""
        return self.kind == "linear" or self.kind in CONVOLUTIONS

    @property
    def repeats(self) -> int:
        """Places of one sample at which a fully connected layer is applied."""
        return prod(self.inputs.shape[1:-1]) if self.kind == "linear" else 1

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
        if self.kind == "linear":
            out, width = self.weight.shape
            return {"in_features": width, "out_features": out}
        dims = CONVOLUTIONS[self.kind]
        kernel = tuple(self.weight.shape[2:])
        dilation = per_dimension(self.options["dilation"], dims)
        return {
            "input_size": tuple(self.inputs.shape[2:]),
            "in_channels": self.inputs.shape[1],
            "out_channels": self.weight.shape[0],
            "kernel_size": kernel,
            "stride": per_dimension(self.options["stride"], dims),
            "padding": sides_of(self.options["padding"], kernel, dilation),
            "dilation": dilation,
            "groups": self.options["groups"],
        }


@dataclass(frozen=True, eq=False)
class Event:
    """What happened, in order: the use of a weight, or the call of another module."""

    name: str
    module: nn.Module | None
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    use: Use | None = None


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
        found: list[list[int]] = [[] for _ in self.nodes]
        for number, node in enumerate(self.nodes):
            for source in set(node.inputs):
                found[source].append(number)
        return found


def record(model: nn.Module, inputs: Tensor, loss: Loss, *, substitute: str = "") -> Recording:
    """Run a batch forward and backward and note every use of a weight.

    Args:
        model: runs as it is; hooks that it has are left alone, so give a copy without.
        inputs: [B, *input_shape].
        loss: of the outputs.
        substitute: "": the network as it is.  "smooth": with steps that pass everything on in
            the place of those that choose by value (a softplus for a ReLU, a mean for a maximum),
            so that a cotangent is zero only where no data could change that.  "linear": the
            identity in the place of activations that are linear in pieces, likewise.

    Raises:
        ValueError: outputs that are no tensor.
    """
    recorder = _Recorder(model, len(inputs), substitute)
    handles = recorder.watch()
    try:
        with recorder:
            outputs = model(recorder.start(inputs))
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"expected one tensor from {type(model).__name__}.forward, got a "
            f"{type(outputs).__name__}; wrap it in a module whose forward returns the logits"
        )
    uses = recorder.uses
    value = loss(outputs)
    if uses and value.requires_grad:
        grads = torch.autograd.grad(value, [use.outputs for use in uses], allow_unused=True)
    else:
        grads = tuple(None for _ in uses)
    for use, k in zip(uses, grads, strict=True):
        use.inputs, z = use.inputs.detach(), use.outputs.detach()
        use.outputs = z
        use.cotangents = torch.zeros_like(z) if k is None else k.detach()
    return Recording(
        tuple(recorder.nodes),
        tuple(uses),
        tuple(recorder.events),
        recorder.at.get(id(outputs), -1),
        tuple(dict.fromkeys(recorder.chooses)),
        len(inputs),
        frozenset(path for path, m in recorder.modules.items() if path and not list(m.children())),
    )


def structural_twin(
    model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """A copy on the CPU without hooks, its weights drawn anew: standard normal over √fan-in."""
    twin = copy.deepcopy(model).cpu().to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with torch.no_grad():
        for parameter in twin.parameters():
            width = prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(drawn * width**-0.5)
            parameter.requires_grad_(True)
    return twin


class _Recorder(TorchFunctionMode):
    """Notes nodes and uses while it is active."""

    def __init__(self, model: nn.Module, batch: int, substitute: str) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.modules = dict(model.named_modules())
        self.batch, self.mode = batch, substitute
        self.instead = {"": {}, "smooth": SMOOTH, "linear": STRAIGHT}[substitute]
        self.nodes: list[Node] = []
        self.uses: list[Use] = []
        self.events: list[Event] = []
        self.chooses: list[str] = []
        self.at: dict[int, int] = {}
        self._kept: list[Tensor] = []  # what is kept alive keeps its id
        self._stack: list[str] = [""]
        super().__init__()

    def start(self, inputs: Tensor) -> Tensor:
        """The node of the batch."""
        self._add("input", (), inputs)
        return inputs

    def watch(self) -> list[Any]:
        """Hooks that say which module is running."""
        handles = []
        for path, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue

            def enter(_: nn.Module, __: Any, path: str = path) -> None:
                self._stack.append(path)

            def leave(own: nn.Module, args: Any, output: Any, path: str = path) -> None:
                self._stack.pop()
                if not list(own.children()) and args and isinstance(args[0], Tensor):
                    out = output[0] if isinstance(output, tuple) else output
                    if self.events and self.events[-1].module is own:
                        return  # the use that it made
                    if isinstance(out, Tensor) and id(args[0]) in self.at:
                        shapes = tuple(args[0].shape[1:]), tuple(out.shape[1:])
                        self.events.append(Event(path, own, *shapes))

            handles += [module.register_forward_pre_hook(enter),
                        module.register_forward_hook(leave)]  # fmt: skip
        return handles

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", func))
        reads = tuple(
            dict.fromkeys(self.at[id(t)] for t in _tensors((args, kwargs)) if id(t) in self.at)
        )
        if not reads or name in ("__get__", "backward", "retain_grad", "requires_grad_"):
            return func(*args, **kwargs)
        if name == "linear" or name in CONVOLUTIONS:
            used = self._use(name, func, tuple(args), dict(kwargs), reads)
            if used is not None:
                return used
        owned = [self.names[id(t)] for t in _tensors((args, kwargs)) if id(t) in self.names]
        if name in self.instead:
            out = self.instead[name](*args, **kwargs)
        else:
            if self.mode and name in CHOOSE:
                self.chooses.append(name)
            out = func(*args, **kwargs)
        if owned and name not in POINTWISE:
            return self._opaque(name, owned[0], args, out, reads)
        if name in ("__setitem__", "copy_"):
            self._add(name, reads, args[0])
            return out
        for tensor in _tensors(out):
            if tensor.is_floating_point():
                self._add(name, reads, tensor, func, args, kwargs)
        return out

    def _use(
        self, name: str, func: Any, args: Any, kwargs: Any, reads: tuple[int, ...]
    ) -> Tensor | None:
        given = dict(zip(("input", "weight", "bias", *OPTIONS), args, strict=False)) | kwargs
        u, weight, bias = given["input"], given["weight"], given.get("bias")
        if id(u) not in self.at or id(weight) not in self.names or id(weight) in self.at:
            return None
        if name != "linear" and u.ndim != CONVOLUTIONS[name] + 2:
            return None
        path, module = self._owner(weight)
        z = func(*args, **kwargs)
        fresh: Tensor = z if z.requires_grad else z.requires_grad_()
        node = self._add(name, (self.at[id(u)],), fresh, use=len(self.uses))
        options = {what: given.get(what, DEFAULTS[what]) for what in OPTIONS}
        use = Use(path, name, weight, bias, options, u, fresh, (self.at[id(u)],), node, module)
        self.uses.append(use)
        shapes = tuple(u.shape[1:]), tuple(z.shape[1:])
        self.events.append(Event(path, module, *shapes, use))
        passed = fresh.clone()  # what comes next may overwrite its input
        self._kept.append(passed)
        self.at[id(passed)] = node
        return passed

    def _opaque(
        self, name: str, parameter: str, args: Any, out: Any, reads: tuple[int, ...]
    ) -> Any:
        """A step with weights that is not covered: what it takes in is read, no one says how."""
        path = self._stack[-1] or parameter
        for tensor in _tensors(out):
            if not tensor.is_floating_point() or not tensor.requires_grad:
                continue
            node = self._add(name, reads, tensor, use=len(self.uses))
            first = next(t for t in _tensors(args) if id(t) in self.at)
            self.uses.append(Use(path, name, None, None, {}, first, tensor, reads, node))
        return out

    def _owner(self, weight: Tensor) -> tuple[str, nn.Module | None]:
        running = self.modules[self._stack[-1]]
        if getattr(running, "weight", None) is weight:
            return self._stack[-1], running
        return self.names[id(weight)].removesuffix(".weight"), None

    def _add(
        self,
        op: str,
        inputs: tuple[int, ...],
        tensor: Tensor,
        func: Any = None,
        args: Any = (),
        kwargs: Any = None,
        use: int | None = None,
    ) -> int:
        entries = tensor.numel() // self.batch
        rank = entries
        if op.endswith(("avg_pool1d", "avg_pool2d", "avg_pool3d")) and func is not None:
            rank = _window_rank(func, args, kwargs or {}, entries)
        self.nodes.append(Node(op, inputs, entries, rank, self._stack[-1], use))
        self._kept.append(tensor)
        self.at[id(tensor)] = len(self.nodes) - 1
        return len(self.nodes) - 1


def _window_rank(func: Any, args: Any, kwargs: Any, entries: int) -> int:
    """Rank of a mean over windows; its number of values where the picture is large."""
    x, *rest = args if args else (kwargs["input"],)
    kwargs = {k: v for k, v in kwargs.items() if k != "input"}
    space = tuple(x.shape[2:])
    if not space or prod(space) > LARGEST_POOL:
        return entries
    unit = torch.eye(prod(space), dtype=torch.float64).reshape(-1, 1, *space)
    matrix = func(unit, *rest, **kwargs).flatten(1)
    return int(x.shape[1]) * int(torch.linalg.matrix_rank(matrix))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _softplus(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return F.softplus(x)


def _softplus_in_place(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.copy_(F.softplus(x.clone()))


def _average(dims: int) -> Callable[..., Tensor]:
    pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]

    def run(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
            ceil_mode: bool = False, return_indices: bool = False) -> Tensor:  # fmt: skip
        if per_dimension(dilation, dims) != (1,) * dims or return_indices:
            raise ValueError("a max-pool with dilation or with indices has no plain mean")
        found: Tensor = pool(x, kernel_size, stride, padding, ceil_mode)
        return found

    return run


SMOOTH: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("relu", "relu6", "threshold", "hardtanh", "hardswish", "hardsigmoid",
                     "clamp", "clip", "clamp_min", "clamp_max", "hardshrink", "softshrink"),
                    _softplus),
    **dict.fromkeys(("relu_", "hardtanh_", "clamp_", "clip_", "threshold_"), _softplus_in_place),
    **{f"max_pool{d}d": _average(d) for d in (1, 2, 3)},
    "adaptive_max_pool1d": lambda x, size, *_, **__: F.adaptive_avg_pool1d(x, size),
    "adaptive_max_pool2d": lambda x, size, *_, **__: F.adaptive_avg_pool2d(x, size),
    "adaptive_max_pool3d": lambda x, size, *_, **__: F.adaptive_avg_pool3d(x, size),
    "amax": lambda x, dim=(), keepdim=False: x.mean(dim, keepdim),
    "amin": lambda x, dim=(), keepdim=False: x.mean(dim, keepdim),
}  # fmt: skip
STRAIGHT = SMOOTH | dict.fromkeys(
    ("relu", "relu6", "threshold", "hardtanh", "hardswish", "hardsigmoid", "clamp", "clip",
     "clamp_min", "clamp_max", "hardshrink", "softshrink", "leaky_relu", "prelu", "rrelu", "elu",
     "selu", "celu", "relu_", "hardtanh_", "clamp_", "leaky_relu_", "elu_"),
    lambda x, *_, **__: x * 1.0,
)  # fmt: skip
# Steps whose reads depend on values, without a substitute.
CHOOSE = {"max", "min", "topk", "sort", "gather", "where", "maximum", "minimum", "masked_fill",
          "masked_select", "median", "kthvalue", "index_select", "take_along_dim", "fmax",
          "max_unpool2d"}  # fmt: skip


def refusal(model: nn.Module, shape: Sequence[int], error: Exception) -> ValueError:
    """The error of a forward that failed, in words."""
    return ValueError(
        f"expected a model that takes [B, {', '.join(map(str, shape))}], got from "
        f"{type(model).__name__}: {first_line(error)}; write the input_shape the model was "
        "built for"
    )
