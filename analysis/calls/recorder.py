"""Runs a forward and a backward once and writes down what happens to the data.

A `TorchFunctionMode` sees ``nn.Linear``, ``F.linear(x, weight)``, ``x.mean((2, 3))`` and
``x[:, 0]`` alike.  Backwards, the derivative of the loss by the output z of every use of a weight
is its cotangent k, and tells which outputs are read at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from rgap.analysis.calls.step_kinds import CHOOSE, CHOOSE_BY_INDEX, POINTWISE
from rgap.analysis.calls.substitutes import SUBSTITUTES
from rgap.analysis.calls.uses import CONVOLUTIONS, Event, Node, Recording, Use
from rgap.network.geometry import Geometry
from rgap.network.isolation import bare_copy
from rgap.network.running import first_line, looks_up, refuse_meta
from rgap.network.watching import LayerCall, watched

__all__ = ["record", "refusal", "structural_twin", "uncounted"]

Loss = Callable[[Tensor], Tensor]
OPTIONS = ("stride", "padding", "dilation", "groups")
OTHERWISE = 1.0 / 0.7310585786300049  # by which a loss is multiplied to round it in another way
ROUNDED = 1e3  # times what that moves a cotangent, below which it is rounding; others move by 1e-13
LARGEST_POOL = 1024  # positions of a pool up to which the rank of its windows is computed


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
    with watched(recorder.modules, recorder.enter, recorder.leave), recorder:
        outputs = model(recorder.start(inputs))
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"expected one tensor from {type(model).__name__}.forward, got a "
            f"{type(outputs).__name__}; wrap it in a module whose forward returns the logits"
        )
    uses = recorder.uses
    value = loss(outputs)
    cotangents = [torch.zeros_like(use.outputs) for use in uses]
    if uses and value.requires_grad:
        cotangents = _cotangents(value, uses)
    for use, k in zip(uses, cotangents, strict=True):
        use.inputs, use.outputs, use.cotangents = use.inputs.detach(), use.outputs.detach(), k
    return Recording(
        tuple(recorder.nodes),
        tuple(uses),
        tuple(recorder.events),
        recorder.at.get(id(outputs), -1),
        tuple(dict.fromkeys(recorder.chooses)),
        len(inputs),
        frozenset(path for path, m in recorder.modules.items() if path and not list(m.children())),
    )


def _cotangents(value: Tensor, uses: Sequence[Use]) -> list[Tensor]:
    """The derivative by every output, 0 for a filter of which it is rounding alone.

    The mean of a normalised channel does not depend on the channel: its cotangents are what the
    terms of a sum leave when they cancel.  Times a constant and over it they are others.
    """
    outputs = [use.outputs for use in uses]
    once = torch.autograd.grad(value, outputs, materialize_grads=True, retain_graph=True)
    again = torch.autograd.grad(OTHERWISE * value, outputs, materialize_grads=True)
    kept = []
    for use, k, other in zip(uses, once, again, strict=True):
        axis = k.ndim - 1 if use.kind == "linear" or k.ndim < 2 else 1
        rest = [d for d in range(k.ndim) if d != axis]
        gap = (other / OTHERWISE - k).square().sum(rest, keepdim=True)
        kept.append(k * (k.square().sum(rest, keepdim=True) > ROUNDED**2 * gap))
    return kept


def structural_twin(
    model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """A copy on the CPU without hooks, its weights drawn anew: standard normal over √fan-in.

    The scale and shift of a normalisation stay where all their entries are equal, as they are
    before training: the mean over normalised features is then constant, with others it is not.

    Args:
        model: left as it was.
        seed: of the weights.
        dtype: of the copy.

    Raises:
        ValueError: a parameter on the meta device; buffers have no values there to copy.
    """
    refuse_meta(model)
    twin = bare_copy(model, "cpu").to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        kept = _constant(twin)
        for parameter in (p for p in twin.parameters() if id(p) not in kept):
            width = prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
            parameter.normal_(0.0, width**-0.5, generator=generator)
        for parameter in twin.parameters():  # a scripted module has no requires_grad_ of its own
            parameter.requires_grad_(True)
    return twin


def _constant(model: nn.Module) -> set[int]:
    """Parameters with one value in all places, of what is neither a matrix nor a convolution."""
    return {
        id(p)
        for module in model.modules()
        if not isinstance(module, (nn.Linear, _ConvNd))
        for p in module.parameters(recurse=False)
        if p.numel() > 1 and bool((p == p.flatten()[0]).all())
    }


def refusal(model: nn.Module, shape: Sequence[int], error: Exception) -> ValueError:
    """The error of a forward that failed, in words."""
    tokens, why = looks_up(model), f"got from {type(model).__name__}: {first_line(error)}"
    if tokens and "embedding" in why:  # PyTorch's words are of types, not of texts
        why = f"got {type(model).__name__}, which looks its inputs up"
    return ValueError(
        f"expected a model that takes [B, {', '.join(map(str, shape))}], {why}. "
        + (tokens or "Write the input_shape the model was built for.")
    )


def uncounted(model: nn.Module, recording: Recording) -> list[str]:
    """Modules with weights of their own that the equations do not cover."""
    counted = {event.name for event in recording.events if isinstance(event.module, _BatchNorm)}
    used = {name for use in recording.uses for name in use.parameters}
    names = []
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(path, recurse=False)]
        if not own or path in counted or isinstance(module, nn.PReLU) or used.issuperset(own):
            continue
        if isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd):
            continue  # a layer that is never called
        kind = type(module).__name__
        names.append(f"'{path}' ({kind})" if path else kind)
    return names


@dataclass(frozen=True, eq=False)
class _Border:
    """A border around a tensor of the forward; ``sides`` and ``shows`` as ``Geometry`` has them."""

    around: Tensor
    node: int
    sides: tuple[int, ...]
    shows: str


class _Recorder(TorchFunctionMode):
    """Notes nodes and uses while it is active."""

    def __init__(self, model: nn.Module, batch: int, substitute: str) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.modules = dict(model.named_modules())
        self.batch, self.mode = batch, substitute
        self.instead = SUBSTITUTES[substitute]
        self.nodes: list[Node] = []
        self.uses: list[Use] = []
        self.events: list[Event] = []
        self.chooses: list[str] = []
        self.at: dict[int, int] = {}
        self.made: set[int] = set()  # tensors computed from parameters
        self.bordered: dict[int, _Border] = {}  # tensors that are others with a border around
        self.told: set[int] = set()  # masks and indices that depend on the data
        self._kept: list[Tensor] = []  # what is kept alive keeps its id
        self._stack: list[str] = [""]
        super().__init__()

    def start(self, inputs: Tensor) -> Tensor:
        """The node of the batch."""
        self._add("input", (), inputs)
        return inputs

    def enter(self, call: LayerCall) -> None:
        """A module begins to run."""
        self._stack.append(call.name)

    def leave(self, call: LayerCall) -> None:
        """It has run: an event, unless it has parts or has made the use of a weight."""
        self._stack.pop()
        own, u = call.module, call.given
        if list(own.children()) or id(u) not in self.at:
            return
        if self.events and self.events[-1].module is own:
            return  # the use that it made
        made = call.made[0] if isinstance(call.made, tuple) else call.made
        if isinstance(u, Tensor) and isinstance(made, Tensor):
            shapes = tuple(u.shape[1:]), tuple(made.shape[1:])
            folded = max(1, len(u) // self.batch)
            self.events.append(Event(call.name, own, *shapes, folded=folded))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", func))
        given = list(_tensors((args, kwargs)))
        reads = tuple(dict.fromkeys(self.at[id(t)] for t in given if id(t) in self.at))
        told = bool(reads) or any(id(t) in self.told for t in given)
        if not told or name in ("backward", "retain_grad", "requires_grad_"):
            out = func(*args, **kwargs)
            if any(id(t) in self.names for t in given):  # a weight made from others, w.T
                self._derive(out, given)
            return out
        if name == "__get__":  # x.T, x.mT; x.shape
            name = "transpose"
        if not reads:
            return self._tell(func(*args, **kwargs))
        if name == "linear" or name in CONVOLUTIONS:
            used = self._use(name, func, tuple(args), dict(kwargs))
            if used is not None:
                return used
        owned = [self.names[id(t)] for t in given if id(t) in self.names]
        if name in self.instead:
            out = self.instead[name](*args, **kwargs)
        else:
            by_data = name in CHOOSE_BY_INDEX and any(id(t) in self.told for t in given)
            if self.mode and (name in CHOOSE or by_data):
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
        if name == "pad":
            self._surround(out, *args, **kwargs)
        return self._tell(out)

    def _surround(
        self, out: Tensor, input: Tensor, pad: Sequence[int], mode: str = "constant",
        value: float | None = None,
    ) -> None:  # fmt: skip
        """Remember what a border was put around; arguments as for ``F.pad``."""
        known = mode != "constant" or not value
        if known and id(input) in self.at and min(pad) >= 0 and len(pad) <= 2 * (input.ndim - 2):
            border = "zeros" if mode == "constant" else mode
            self.bordered[id(out)] = _Border(input, self.at[id(input)], tuple(pad), border)

    def _within(self, u: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
        """The values ahead of the borders of a convolution's input, the borders as its padding.

        The border shows these values again, or zeros: it adds no unknowns.  A border around
        another goes along with it where both are zeros; one that stays is counted in
        :attr:`Use.shown`.
        """
        while (border := self.bordered.get(id(u))) is not None:
            padded = any(map(any, geometry.padding))
            if padded and (border.shows, geometry.border) != ("zeros", "zeros"):
                break
            if self.at[id(border.around)] != border.node:  # written to since
                break
            u = border.around
            geometry = replace(geometry.bordered(border.sides), border=border.shows)
        return u, geometry

    def _derive(self, out: Any, given: list[Tensor]) -> None:
        """Remember what is made of parameters alone by the name of the first of them."""
        first = next(self.names[id(t)] for t in given if id(t) in self.names)
        for tensor in _tensors(out):
            if id(tensor) not in self.names and tensor.is_floating_point():
                self.names[id(tensor)] = first
                self.made.add(id(tensor))
                self._kept.append(tensor)

    def _tell(self, out: Any) -> Any:
        """Remember masks and indices that depend on the data."""
        for tensor in _tensors(out):
            if not tensor.is_floating_point():
                self.told.add(id(tensor))
                self._kept.append(tensor)
        return out

    def _use(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        given = dict(zip(("input", "weight", "bias", *OPTIONS), args, strict=False)) | kwargs
        u, weight, bias = given["input"], given["weight"], given.get("bias")
        if id(u) not in self.at or id(weight) not in self.names or id(weight) in self.made:
            return None
        if name != "linear" and u.ndim != CONVOLUTIONS[name] + 2:
            return None
        path, module = self._owner(weight)
        z = func(*args, **kwargs)
        fresh: Tensor = z if z.requires_grad else z.requires_grad_()
        geometry = None
        if name != "linear":
            options = {what: given[what] for what in OPTIONS if what in given}
            u, geometry = self._within(u, Geometry.of(tuple(weight.shape[2:]), **options))
        node = self._add(name, (self.at[id(u)],), fresh, use=len(self.uses))
        use = Use(path, name, weight, bias, geometry, u, fresh, (self.at[id(u)],), node, module)
        use.parameters = tuple(self.names[id(p)] for p in (weight, bias) if id(p) in self.names)
        left = self.bordered.get(id(u)) if geometry is not None else None
        use.shown = 0 if left is None else left.around[0].numel()
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
        """A use without equations: a step with weights that are not covered, as an embedding."""
        path = self._stack[-1] or parameter
        for tensor in _tensors(out):
            if not tensor.is_floating_point() or not tensor.requires_grad:
                continue
            node = self._add(name, reads, tensor, use=len(self.uses))
            first = next(t for t in _tensors(args) if id(t) in self.at)
            self.uses.append(Use(path, name, None, None, None, first, tensor, reads, node))
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
            rank = _window_rank(func, args, kwargs or {}, entries, self.batch)
        elif op in ("__getitem__", "index_select") and func is not None and args:
            places = torch.arange(args[0].numel(), device=args[0].device).reshape(args[0].shape)
            rank = len(func(places, *args[1:], **(kwargs or {})).unique()) // self.batch
        self.nodes.append(Node(op, inputs, entries, rank, self._stack[-1], use))
        self._kept.append(tensor)
        self.bordered.pop(id(tensor), None)  # written to
        self.at[id(tensor)] = len(self.nodes) - 1
        return len(self.nodes) - 1


def _window_rank(func: Any, args: Any, kwargs: Any, entries: int, batch: int) -> int:
    """Rank of the linear map from a picture to its window means; large pictures: its outputs."""
    x, *rest = args if args else (kwargs["input"],)
    kwargs = {k: v for k, v in kwargs.items() if k != "input"}
    space = tuple(x.shape[2:])
    if not space or prod(space) > LARGEST_POOL:
        return entries
    unit = torch.eye(prod(space), dtype=torch.float64, device="cpu").reshape(-1, 1, *space)
    matrix = func(unit, *rest, **kwargs).flatten(1)
    planes: int = x.numel() // batch // prod(space)
    return planes * int(torch.linalg.matrix_rank(matrix))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
