"""Functional calls in a traced forward, as the steps they are.

``F.relu(x)``, ``x.view(x.size(0), -1)``, ``torch.sigmoid(x)``, ``(x - mean) / std``: each call with
one data-dependent tensor becomes what the module of the same meaning becomes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgap.network import activations as act
from rgap.network.calls import DATA, Call
from rgap.network.custom import REASON, CustomFunction
from rgap.network.geometry import Geometry
from rgap.network.modules import Piece, affine_map, build, parameter_name, prelu
from rgap.network.probing import (
    UnreadyError,
    Unsupported,
    linear_function,
    padded,
    rearrangement,
    repeated,
)
from rgap.network.scaling import Scale


def build_call(call: Call) -> Piece:
    """The step or affine map that ``call`` is.

    Raises:
        Unsupported: if it is none of those the registry knows.
        ValueError: if the shape does not fit, or a dropout would draw.
    """
    if isinstance(call.target, CustomFunction):
        raise Unsupported(REASON)
    handler = CALLS.get(call.target)
    if handler is None:
        raise Unsupported(f"{call.kind} is not among the steps that the equations cover")
    return handler(call)


def _as_module(make: Callable[..., nn.Module]) -> Callable[[Call], Piece]:
    def handler(call: Call) -> Piece:
        args, kwargs = call.options()
        try:
            module = make(*args, **kwargs)
        except TypeError:  # the function has options that the module has not
            given = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])
            raise Unsupported(f"{call.kind} with {given}") from None
        return build(module, call.name, call.in_shape, call.names)

    return handler


def _max_pool(make: Callable[..., nn.Module]) -> Callable[[Call], Piece]:
    def pool(
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> nn.Module:  # the function takes its last two arguments in the other order
        return make(kernel_size, stride or None, padding, dilation, return_indices, ceil_mode)

    return _as_module(pool)


def _softmax(make: Callable[..., nn.Module]) -> Callable[[Call], Piece]:
    return _as_module(lambda dim=None, _stacklevel=3, dtype=None: make(dim))


def _arguments(call: Call, *names: str) -> dict[str, Any]:
    args, kwargs = call.options()
    return dict(zip(names, args, strict=False)) | kwargs


def _linear(call: Call) -> Piece:
    given = _arguments(call, "weight", "bias")
    return affine_map(call.name, given["weight"], given.get("bias"), call.in_shape, call.names)


def _conv(call: Call) -> Piece:
    given = _arguments(call, "weight", "bias", "stride", "padding", "dilation", "groups")
    weight, bias = given.pop("weight"), given.pop("bias", None)
    geometry = Geometry.of(tuple(weight.shape[2:]), **given)
    return affine_map(call.name, weight, bias, call.in_shape, call.names, geometry)


def _dropout(call: Call) -> Piece:
    given = _arguments(call, "p", "training", "inplace")
    if given.get("training", not isinstance(call.target, str)) and given.get("p", 0.5) > 0:
        raise UnreadyError(
            f"'{call.name}' ({call.kind}) draws random numbers that the update does not state",
            "model.eval() before capture, parse and invert, and "
            "F.dropout(x, training=self.training) in the model's forward",
        )
    return None


def _pad(call: Call) -> Piece:
    given = _arguments(call, "pad", "mode", "value")
    mode, sides = given.get("mode", "constant"), tuple(given["pad"])
    if mode != "constant":  # a border that shows the picture again
        return repeated(call.name, call.in_shape, sides, mode)
    return padded(call.name, call.in_shape, sides, float(given.get("value") or 0.0))


def _prelu(call: Call) -> Piece:
    weight = _arguments(call, "weight")["weight"]
    weight_name = parameter_name(call.name, "weight", weight, call.names)
    return prelu(call.name, weight, weight_name, call.in_shape)


def _convert(call: Call) -> Piece:
    """A change of precision or device: nothing in float64, unless it rounds to fewer digits."""
    for value in (*call.args, *call.kwargs.values()):
        dtype = value.dtype if isinstance(value, Tensor) else value
        if isinstance(dtype, torch.dtype) and dtype not in (torch.float32, torch.float64):
            raise Unsupported(f"{call.kind} rounds the data to {dtype}")
    return None


def _attribute(call: Call) -> Piece:
    name = call.args[1]
    if name == "data":
        raise Unsupported("x.data cuts the gradient off")
    if name not in ("T", "mT", "H", "mH"):  # x.shape, x.device: no tensor
        raise Unsupported(f"the attribute {name!r} is not among the steps that the equations cover")
    return rearrangement(call.on, call.name, name, call.in_shape)


def _rearranged(call: Call) -> Piece:
    args, _ = call.options()
    size = args[0] if args and isinstance(args[0], (tuple, list)) else args
    if call.kind in ("view", "reshape") and len(size) == 2 and size[0] == -1:
        width = torch.Size(call.in_shape).numel()
        if size[1] not in (width, -1):
            raise ValueError(
                f"'{call.name}' ({call.kind}) expects {size[1]} values per sample, got "
                f"[B, {', '.join(map(str, call.in_shape))}]; write the input_shape the model was "
                "built for"
            )
    return rearrangement(call.on, call.name, call.kind, call.in_shape)


def _linear_call(call: Call) -> Piece:
    return linear_function(call.on, call.name, call.kind, call.in_shape)


def _nothing(call: Call) -> Piece:
    return None


def _arithmetic(call: Call) -> Piece:
    """Y = scale ⊙ x + shift with constants."""
    kind = call.kind.strip("_").removeprefix("i") if call.kind != "index" else call.kind
    divides = kind in ("truediv", "div", "divide", "true_divide")
    if divides and not (call.args and call.args[0] is DATA):
        raise Unsupported(f"{call.kind} by the data")
    if set(call.kwargs) - {"input", "other"}:
        raise Unsupported(f"{call.kind} with {', '.join(call.kwargs)}")
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, nn.Parameter):
            name = call.names.get(id(value), "a parameter")
            raise Unsupported(f"{call.kind} with the parameter '{name}'")
    exact = Call(
        call.name, call.target, _double(call.args), _double(call.kwargs), call.in_shape, call.names
    )
    if not call.in_shape and any(isinstance(v, Tensor) and v.numel() > 1 for v in call.args):
        raise Unsupported(f"{call.kind} of one number per sample with a whole tensor")
    zero = torch.zeros(1, *call.in_shape, dtype=torch.float64)
    shift = exact.on(zero)
    if shift.shape != zero.shape:
        raise Unsupported(f"{call.kind} with a constant of another shape")
    scale = exact.on(zero + 1) - shift
    if not divides and kind not in ("mul", "multiply"):
        scale = scale.round()  # ±1: the subtraction lost it to a large shift
    return Scale(call.name, kind, call.in_shape, scale[0], shift[0])


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().double()
    if isinstance(value, tuple):
        return tuple(_double(v) for v in value)
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    return value


def _wave(function: Callable[[Tensor], Tensor]) -> Callable[[Call], Piece]:
    def handler(call: Call) -> Piece:
        return act.Opaque(call.name, call.in_shape, function, function.__name__)

    return handler


def _clamp(call: Call) -> Piece:
    return act.Opaque(call.name, call.in_shape, call.on, call.kind)


def _table() -> dict[Callable[..., Any] | str, Callable[[Call], Piece]]:
    table: dict[Callable[..., Any] | str, Callable[[Call], Piece]] = {}

    def put(handler: Callable[[Call], Piece], *targets: Callable[..., Any] | str) -> None:
        table.update(dict.fromkeys(targets, handler))

    plain: dict[type[nn.Module], tuple[Callable[..., Any] | str, ...]] = {
        nn.ReLU: (F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"),
        nn.Sigmoid: (F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_",
                     torch.special.expit),
        nn.Tanh: (F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"),
        nn.LeakyReLU: (F.leaky_relu, F.leaky_relu_),
        nn.ELU: (F.elu,),
        nn.SELU: (F.selu, torch.selu),
        nn.CELU: (F.celu, torch.celu),
        nn.Softplus: (F.softplus,),
        nn.Softsign: (F.softsign,),
        nn.LogSigmoid: (F.logsigmoid,),
        nn.GELU: (F.gelu,),
        nn.SiLU: (F.silu,),
        nn.Mish: (F.mish,),
        nn.Hardtanh: (F.hardtanh, F.hardtanh_),
        nn.ReLU6: (F.relu6,),
        nn.Hardswish: (F.hardswish,),
        nn.Hardsigmoid: (F.hardsigmoid,),
        nn.Hardshrink: (F.hardshrink, torch.hardshrink, "hardshrink"),
        nn.Softshrink: (F.softshrink,),
        nn.Tanhshrink: (F.tanhshrink,),
        nn.Threshold: (F.threshold, torch.threshold),
        nn.AvgPool1d: (F.avg_pool1d,),
        nn.AvgPool2d: (F.avg_pool2d,),
        nn.AvgPool3d: (F.avg_pool3d,),
        nn.AdaptiveAvgPool1d: (F.adaptive_avg_pool1d,),
        nn.AdaptiveAvgPool2d: (F.adaptive_avg_pool2d,),
        nn.AdaptiveAvgPool3d: (F.adaptive_avg_pool3d,),
        nn.AdaptiveMaxPool1d: (F.adaptive_max_pool1d, torch.adaptive_max_pool1d),
        nn.AdaptiveMaxPool2d: (F.adaptive_max_pool2d,),
        nn.AdaptiveMaxPool3d: (F.adaptive_max_pool3d,),
    }  # fmt: skip
    for module, targets in plain.items():
        put(_as_module(module), *targets)
    # Their derivatives are another computation in place, those of all others are the same.
    put(_as_module(partial(nn.ELU, inplace=True)), F.elu_)
    put(_as_module(partial(nn.SELU, inplace=True)), F.selu_)
    put(_as_module(partial(nn.CELU, inplace=True)), F.celu_)
    put(_max_pool(nn.MaxPool1d), F.max_pool1d, torch.max_pool1d)
    put(_max_pool(nn.MaxPool2d), F.max_pool2d, torch.max_pool2d)
    put(_max_pool(nn.MaxPool3d), F.max_pool3d, torch.max_pool3d)
    put(_softmax(nn.Softmax), F.softmax, torch.softmax, "softmax")
    put(_softmax(nn.LogSoftmax), F.log_softmax, torch.log_softmax, "log_softmax")
    put(_linear, F.linear)
    put(_conv, F.conv1d, F.conv2d, F.conv3d)
    put(_dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
        F.feature_alpha_dropout)  # fmt: skip
    put(_pad, F.pad)
    put(_rearranged, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
        torch.unsqueeze, torch.flip, torch.roll, torch.unflatten, torch.swapaxes, torch.movedim,
        F.pixel_shuffle, F.pixel_unshuffle, operator.getitem, "view", "reshape", "flatten",
        "permute", "transpose", "squeeze", "unsqueeze", "flip", "roll", "unflatten", "swapaxes",
        "movedim", "narrow", "view_as", "expand", "repeat", "repeat_interleave",
        torch.repeat_interleave)  # fmt: skip
    put(_attribute, getattr)
    put(_prelu, F.prelu, torch.prelu, "prelu")
    put(_convert, "to", "type_as")
    put(_as_module(nn.Upsample), F.interpolate)
    put(_linear_call, torch.mean, torch.sum, "mean", "sum")
    put(_nothing, "contiguous", "clone", "float", "double", "requires_grad_", torch.clone)
    put(_arithmetic, operator.add, operator.sub, operator.mul, operator.truediv, operator.neg,
        operator.iadd, operator.isub, operator.imul, operator.itruediv, torch.add, torch.sub,
        torch.mul, torch.div, torch.neg, "add", "sub", "mul", "div", "neg", "add_", "sub_",
        "mul_", "div_")  # fmt: skip
    for function in (torch.sin, torch.cos, torch.abs, torch.square):
        put(_wave(function), function, function.__name__)
    put(_clamp, torch.clamp, "clamp", torch.clip, "clip")
    return table


CALLS = _table()
