"""From PyTorch's modules and functions to affine maps and steps: one registry.

A module class of your own is added by :func:`register`, or from outside by an entry point of the
group ``rgap.layers`` under the path of the class.

``build`` knows what to make of a module.  A functional call (``F.relu``, ``x.flatten(1)``,
``torch.sigmoid``) is rewritten as the module of the same meaning first, so each kind has one
handler.  What is not in the registry raises :class:`Unsupported`, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rgap.arithmetic.doubles import blocks
from rgap.network import activations as act
from rgap.network import affine
from rgap.network.affine import Affine, Geometry
from rgap.network.pooling import MaxPool, Opaque, Pool
from rgap.network.probing import (
    Shape,
    Unsupported,
    fitting,
    linear_function,
    moves_only,
    padded,
    rearrangement,
    repeated,
)
from rgap.network.reshape import Op
from rgap.network.running import BEHIND_TOKENS
from rgap.network.scaling import BatchNorm
from rgap.plugins import PluginError, Registry

Names = Mapping[int, str]  # id of a parameter → its name in the model, maybe a `Parameters`
Piece = Affine | Op | None  # None: the identity
Handler = Callable[[Any, str, Shape, Names], Piece]

HANDLERS: Registry[Handler] = Registry(
    "rgap.layers", "layer kind", "a function of (module, name, in_shape, names)", callable
)
"""Handlers by the path of the module's class, as ``"torch.nn.modules.linear.Linear"``."""


class Parameters(dict[int, str]):
    """Names of a model's parameters by ``id``, and copies in float64 that somebody holds already.

    Args:
        model: whose parameters they are.
        held: affine maps read off the same model before; their tensors are taken where their
            values are those of the parameters still.
    """

    def __init__(self, model: nn.Module, held: Iterable[Affine] = ()) -> None:
        super().__init__({id(p): name for name, p in model.named_parameters()})
        self._held: dict[str, Tensor] = {}
        for layer in held:
            self._held[layer.weight_name] = layer.weight
            if layer.bias is not None and layer.bias_name is not None:
                self._held[layer.bias_name] = layer.bias

    def held(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Copies of both in float64, or None."""
        first = self._copy(weight)
        second = None if bias is None else self._copy(bias)
        if first is None or (bias is not None and second is None):
            return None
        return first, second

    def _copy(self, parameter: Tensor) -> Tensor | None:
        copy = self._held.get(self.get(id(parameter), ""))
        if copy is None or copy.device != parameter.device or copy.numel() != parameter.numel():
            return None
        copy = copy.view(parameter.shape)  # a convolution may have been read as a matrix
        pairs = zip(blocks(copy), blocks(parameter), strict=True)
        return copy if all(torch.equal(own, new.double()) for own, new in pairs) else None


def register(*modules: type[nn.Module]) -> Callable[[Handler], Handler]:
    """Make a function the handler of module classes."""

    def add(handler: Handler) -> Handler:
        for module in modules:
            HANDLERS.register(class_path(module), handler)
        return handler

    return add


def class_path(kind: type) -> str:
    """Where a class is defined, ``package.module.Class``: the name of its entry point."""
    return f"{kind.__module__}.{kind.__qualname__}"


def handler_of(kind: type[nn.Module]) -> Handler | None:
    """The handler of a module class or of the nearest class that it inherits from.

    Raises:
        PluginError: a distribution offers one that does not load.
    """
    paths = (class_path(base) for base in kind.__mro__)
    return next((HANDLERS[path] for path in paths if path in HANDLERS), None)


def covered(module: nn.Module) -> bool:
    """True if a handler says what the module is; nothing is loaded."""
    return any(class_path(base) in HANDLERS for base in type(module).__mro__)


def build(module: nn.Module, name: str, in_shape: Shape, names: Names) -> Piece:
    """The affine map or step that ``module`` is, for inputs ``[B, *in_shape]``.

    Args:
        module: a leaf of the model.
        name: its path.
        in_shape: without the batch dimension.
        names: parameter names by ``id``.

    Raises:
        Unsupported: if the registry has no such module, or not with these options, or what a
            distribution offers for it does not load.
        ValueError: if the shape does not fit.
    """
    try:
        handler = handler_of(type(module))
    except PluginError as error:
        raise Unsupported(str(error)) from error
    if handler is not None:
        return handler(module, name, in_shape, names)
    what = f"{type(module).__name__} is not among the layers that the equations cover"
    if isinstance(module, torch.jit.ScriptModule):
        what = "a TorchScript module has no forward to read; write the module it was made from"
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        what = f"{type(module).__name__} wraps a model; write model.module instead of model"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        what = f"{type(module).__name__} takes whole numbers, {BEHIND_TOKENS}"
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)):
        what = f"{type(module).__name__} normalises by the statistics of its own input"
    raise Unsupported(what)


def parameter_name(owner: str, what: str, value: Any, names: Names) -> str:
    """Name of a parameter in the model; refuses what is computed from other parameters."""
    if id(value) not in names:
        raise Unsupported(
            f"the {what} of '{owner}' is no parameter of the model but computed from others "
            "(weight norm, parametrisation or a plain tensor)"
        )
    if not value.is_floating_point():
        raise Unsupported(f"the {what} of '{owner}' is {value.dtype}: it needs real numbers")
    return names[id(value)]


def affine_map(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    in_shape: Shape,
    names: Names,
    geometry: Geometry | None = None,
) -> Affine:
    """A linear layer (matrix weight) or a convolution (weight of 3 to 5 dimensions)."""
    weight_name = parameter_name(name, "weight", weight, names)
    both = (weight_name, None if bias is None else parameter_name(name, "bias", bias, names))
    held = names.held(weight, bias) if isinstance(names, Parameters) else None
    if held is not None:
        weight, bias = held
    if weight.ndim == 2:
        along = len(in_shape) > 1 and in_shape[-1] == weight.shape[1]
        if along and prod(in_shape[:-1]) != 1:
            raise Unsupported(
                f"the linear layer is applied along [B, {', '.join(map(str, in_shape))}], once "
                "for every position, not once for every sample"
            )
        own = in_shape[-1:] if along else in_shape
        made = affine.linear(name, weight, bias, both, own, copy=held is None)
        ones = in_shape[:-1] if along else ()
        return replace(made, in_shape=(*ones, *own), out_shape=(*ones, *made.out_shape))
    return affine.convolution(name, weight, bias, both, in_shape, geometry, held is None)


@register(nn.Linear)
def _linear(module: nn.Linear, name: str, in_shape: Shape, names: Names) -> Piece:
    return affine_map(name, module.weight, module.bias, in_shape, names)


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv(module: nn.Conv2d, name: str, in_shape: Shape, names: Names) -> Piece:
    return affine_map(
        name, module.weight, module.bias, in_shape, names, Geometry.of(
            tuple(module.weight.shape[2:]), stride=module.stride, padding=module.padding,
            dilation=module.dilation, groups=module.groups, border=module.padding_mode),
    )  # fmt: skip


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def _batch_norm(module: nn.BatchNorm2d, name: str, in_shape: Shape, names: Names) -> Piece:
    if module.training:
        raise Unsupported(f"{type(module).__name__} in train mode mixes the samples of the batch")
    if module.running_mean is None or module.running_var is None:
        raise Unsupported(
            f"{type(module).__name__} with track_running_stats=False mixes the samples of the "
            "batch even in eval mode"
        )
    dims = {nn.BatchNorm1d: (1, 2), nn.BatchNorm2d: (3,), nn.BatchNorm3d: (4,)}
    kind = type(module).__name__.lower().replace("batchnorm", "batch_norm")
    if in_shape[0] != module.num_features or len(in_shape) not in dims.get(type(module), (1, 3)):
        raise ValueError(
            f"'{name}' ({kind}) expects [B, {module.num_features}, ...], got "
            f"[B, {', '.join(map(str, in_shape))}]; write the input_shape the model was built for"
        )
    deviation = (_double(module.running_var) + module.eps).sqrt()
    pairs = [
        None if p is None else (parameter_name(name, what, p, names), _double(p))
        for what, p in (("weight", module.weight), ("bias", module.bias))
    ]
    mean = _double(module.running_mean)
    return BatchNorm(name, kind, in_shape, mean, deviation, pairs[0], pairs[1])


@register(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
          nn.AlphaDropout, nn.FeatureAlphaDropout)  # fmt: skip
def _nothing(module: nn.Module, name: str, in_shape: Shape, names: Names) -> Piece:
    return None


def prelu(name: str, weight: Tensor, weight_name: str, in_shape: Shape) -> Piece:
    """PReLU with one slope, or one for every channel."""
    if not in_shape:  # PyTorch takes the batch of [B] numbers for the channels
        raise Unsupported("prelu of one number per sample, without a channel dimension")
    return act.PReLU(name, in_shape, weight, weight_name)


@register(nn.PReLU)
def _prelu(module: nn.PReLU, name: str, in_shape: Shape, names: Names) -> Piece:
    weight_name = parameter_name(name, "weight", module.weight, names)
    return prelu(name, module.weight, weight_name, in_shape)


@register(nn.LeakyReLU, nn.RReLU)
def _leaky(module: Any, name: str, in_shape: Shape, names: Names) -> Piece:
    if isinstance(module, nn.RReLU):  # eval mode: the mean of its random slopes
        return act.LeakyReLU(name, in_shape, (module.lower + module.upper) / 2)
    if module.negative_slope == 0:
        return act.ReLU(name, in_shape)
    return act.LeakyReLU(name, in_shape, module.negative_slope)


_PLAIN: dict[type[nn.Module], tuple[type[act.Activation], tuple[str, ...]]] = {
    nn.ReLU: (act.ReLU, ()),
    nn.Sigmoid: (act.Sigmoid, ()),
    nn.Tanh: (act.Tanh, ()),
    nn.ELU: (act.ELU, ("alpha", "inplace")),
    nn.SELU: (act.SELU, ("inplace",)),
    nn.CELU: (act.CELU, ("alpha", "inplace")),
    nn.Softplus: (act.Softplus, ("beta", "threshold")),
    nn.Softsign: (act.Softsign, ()),
    nn.LogSigmoid: (act.LogSigmoid, ()),
}


@register(*_PLAIN)
def _activation(module: nn.Module, name: str, in_shape: Shape, names: Names) -> Piece:
    made, options = _PLAIN[type(module)]
    return made(name, in_shape, **{option: getattr(module, option) for option in options})


_CLOSED: dict[type[nn.Module], str] = {
    nn.GELU: "gelu", nn.SiLU: "silu", nn.Mish: "mish", nn.Hardtanh: "hardtanh",
    nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.Hardsigmoid: "hardsigmoid",
    nn.Hardshrink: "hardshrink", nn.Softshrink: "softshrink", nn.Tanhshrink: "tanhshrink",
    nn.Threshold: "threshold",
}  # fmt: skip


@register(*_CLOSED)
def _closed(module: nn.Module, name: str, in_shape: Shape, names: Names) -> Piece:
    return act.Opaque(name, in_shape, _out_of_place(module), _CLOSED[type(module)])


_LOSSY: dict[type[nn.Module], tuple[str, str]] = {
    **{
        kind: (f"{prefix}max_pool{dims}d", "keeps the winner but not its place")
        for dims, prefix, kind in (
            (1, "", nn.MaxPool1d), (2, "", nn.MaxPool2d), (3, "", nn.MaxPool3d),
            (1, "adaptive_", nn.AdaptiveMaxPool1d), (2, "adaptive_", nn.AdaptiveMaxPool2d),
            (3, "adaptive_", nn.AdaptiveMaxPool3d),
        )
    },
    nn.LPPool1d: ("lp_pool1d", "keeps a norm of each window, not its entries"),
    nn.LPPool2d: ("lp_pool2d", "keeps a norm of each window, not its entries"),
    nn.Softmax: ("softmax", "leaves a constant added to its inputs open"),
    nn.LogSoftmax: ("log_softmax", "leaves a constant added to its inputs open"),
    nn.Softmin: ("softmin", "leaves a constant added to its inputs open"),
    nn.LocalResponseNorm: ("local_response_norm", "divides by a norm of its own input"),
}  # fmt: skip

_POOLS = nn.LPPool1d, nn.LPPool2d


@register(*_LOSSY)
def _lossy(module: Any, name: str, in_shape: Shape, names: Names) -> Piece:
    kind, reason = _LOSSY[type(module)]
    if getattr(module, "return_indices", False):
        raise Unsupported(f"{kind} with return_indices=True returns two tensors")
    if "softm" in kind and (module.dim is None or module.dim in (0, -1 - len(in_shape))):
        raise Unsupported(f"{kind} needs dim=1 or another dimension that is not the batch")
    function = fitting(module.forward, name, kind, in_shape)
    if "max_pool" in kind:
        if moves_only(function, in_shape):
            return rearrangement(function, name, kind, in_shape)
        return MaxPool(name, kind, in_shape, module, function, reason)
    made = Pool if isinstance(module, _POOLS) else Opaque
    return made(name, kind, in_shape, function, reason)


_AVERAGES: dict[type[nn.Module], str] = {
    nn.AvgPool1d: "avg_pool1d", nn.AvgPool2d: "avg_pool2d", nn.AvgPool3d: "avg_pool3d",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d", nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool3d",
}  # fmt: skip


@register(*_AVERAGES)
def _average(module: nn.Module, name: str, in_shape: Shape, names: Names) -> Piece:
    kind = _AVERAGES[type(module)]
    dims = int(kind[-2])
    if len(in_shape) != dims + 1:
        raise ValueError(
            f"'{name}' ({kind}) expects {dims + 1} dimensions after the batch, got "
            f"[B, {', '.join(map(str, in_shape))}]; write the input_shape the model was built for"
        )
    return linear_function(module.forward, name, kind, in_shape)


@register(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
          nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)  # fmt: skip
def _pad(module: nn.ConstantPad2d, name: str, in_shape: Shape, names: Names) -> Piece:
    return padded(name, in_shape, tuple(module.padding), float(module.value))


_BORDERS = {"reflection": "reflect", "replication": "replicate", "circular": "circular"}


@register(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
          nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
          nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)  # fmt: skip
def _repeat(module: nn.Module, name: str, in_shape: Shape, names: Names) -> Piece:
    mode = type(module).__name__.partition("Pad")[0].lower()
    return repeated(name, in_shape, tuple(module.padding), _BORDERS[mode])  # type: ignore[arg-type]


@register(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
def _rearrange(module: nn.Module, name: str, in_shape: Shape, names: Names) -> Piece:
    kind = type(module).__name__.lower().replace("pixel", "pixel_").replace("channel", "channel_")
    return rearrangement(module.forward, name, kind, in_shape)


@register(nn.Upsample)
def _upsample(module: nn.Upsample, name: str, in_shape: Shape, names: Names) -> Piece:
    if module.mode != "nearest":
        raise Unsupported(f"upsample with mode={module.mode!r}: only 'nearest' is covered")
    return rearrangement(module.forward, name, "upsample", in_shape)


def _out_of_place(module: nn.Module) -> Callable[[Tensor], Tensor]:
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False  # type: ignore[assignment]
    function: Callable[[Tensor], Tensor] = module.forward
    return function


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64, copy=True)
