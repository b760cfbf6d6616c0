"""Which layers a network calls, in which order, and with which sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd, _MaxPoolNd

from rgap.geometry import per_dimension, sides_of
from rgap.isolation import meta_copy
from rgap.running import first_line

__all__ = ["Call", "calls_of", "head_of", "pooled_inputs", "sizes_of"]

POOLS = (_AvgPoolNd, _AdaptiveAvgPoolNd, _MaxPoolNd)

COVERED = (nn.Linear, _ConvNd, _BatchNorm, _AvgPoolNd, _AdaptiveAvgPoolNd, _MaxPoolNd)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer.

    Attributes:
        name: path of the module.
        module: the module.
        in_shape: of one sample.
        out_shape: of one sample.
    """

    name: str
    module: nn.Module
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]


def calls_of(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[Call], tuple[str, ...]]:
    """Calls of the layers that the closed forms cover, and notes on what they leave out.

    Args:
        model: left as it was; a copy without storage runs once.
        shape: of one sample.

    Raises:
        ValueError: the shape does not fit, or there is no such layer.
    """
    twin = meta_copy(model).eval()
    calls: list[Call] = []
    left: list[str] = []
    for name, module in twin.named_modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if isinstance(module, COVERED) and not isinstance(module, _ConvTransposeNd):
            module.register_forward_hook(_note(name, calls))
        elif next(module.parameters(recurse=False), None) is not None and not isinstance(
            module, nn.PReLU
        ):
            left.append(f"'{name}' ({type(module).__name__})" if name else type(module).__name__)
    try:
        with torch.no_grad():
            twin(torch.empty(1, *shape, device="meta", dtype=torch.float64))
    except Exception as error:  # whatever a user's forward raises
        raise ValueError(
            f"expected a model that takes [B, {', '.join(map(str, shape))}], got from "
            f"{type(model).__name__}: {first_line(error)}; write the input_shape the model was "
            "built for"
        ) from error
    if not any(isinstance(call.module, (nn.Linear, _ConvNd)) for call in calls):
        raise ValueError(
            f"expected a model with fully connected or convolutional layers, got "
            f"{type(model).__name__} with none: there is nothing to count"
        )
    notes = []
    if left:
        notes.append(f"Not counted: {', '.join(left)}.")
    if any(isinstance(module, nn.ReLU) for module in twin.modules()):
        notes.append("Units are taken as on; every ReLU that is off takes a weight row away.")
    if any(isinstance(call.module, _MaxPoolNd) for call in calls):
        notes.append("The places of the winners of max-pools are taken as known.")
    return calls, tuple(notes)


def pooled_inputs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Entries of one sample ahead of the pools that lead into a layer, by the layer's name.

    What a pool takes away is counted with the first layer that is called after it.

    Args:
        model: left as it was.
        shape: of one sample.

    Raises:
        ValueError: as :func:`calls_of`.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    >>> pooled_inputs(net, (1, 6, 6))
    {'0': 0, '3': 32}
    """
    found: dict[str, int] = {}
    ahead = 0
    for call in calls_of(model, shape)[0]:
        if isinstance(call.module, POOLS):
            ahead = max(ahead, prod(call.in_shape))
        elif isinstance(call.module, (nn.Linear, _ConvNd)):
            found[call.name], ahead = max(found.get(call.name, 0), ahead), 0
    return found


def _note(name: str, calls: list[Call]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        calls.append(Call(name, module, tuple(args[0].shape[1:]), tuple(out.shape[1:])))

    return hook


def head_of(calls: list[Call]) -> Call | None:
    """The fully connected layer that ends the network, if one does."""
    last = calls[-1]
    ends = isinstance(last.module, nn.Linear) and len(last.in_shape) == 1
    return last if ends else None


def sizes_of(call: Call, *, head: bool) -> tuple[str, dict[str, Any], int]:
    """Kind and sizes for ``layer_form``, and at how many places of a sequence the layer acts.

    Args:
        call: of a covered layer.
        head: True for a fully connected layer below a softmax loss.

    Raises:
        ValueError: a padding mode that is not zeros.
    """
    module, shape = call.module, call.in_shape
    if isinstance(module, nn.Linear):
        features = {"in_features": module.in_features, "out_features": module.out_features}
        return ("head" if head else "linear"), features, prod(shape[:-1])
    if isinstance(module, _BatchNorm):
        return "batch_norm", {"features": prod(shape)}, 1
    dims = len(shape) - 1
    sizes: dict[str, Any] = {"input_size": shape[1:]}
    if isinstance(module, _ConvNd):
        if module.padding_mode != "zeros":
            raise ValueError(
                f"'{call.name}' ({type(module).__name__}): expected padding_mode='zeros', got "
                f"{module.padding_mode!r}; its border repeats unknowns, which is not counted"
            )
        kernel = per_dimension(module.kernel_size, dims)
        dilation = per_dimension(module.dilation, dims)
        return (
            f"conv{dims}d",
            sizes
            | {
                "in_channels": module.in_channels,
                "out_channels": module.out_channels,
                "kernel_size": kernel,
                "stride": per_dimension(module.stride, dims),
                "padding": sides_of(module.padding, kernel, dilation),
                "dilation": dilation,
                "groups": module.groups,
            },
            1,
        )
    sizes |= {"channels": shape[0], "output_size": call.out_shape[1:]}
    if isinstance(module, _AdaptiveAvgPoolNd):
        pairs = zip(shape[1:], call.out_shape[1:], strict=True)
        return "average_pool", sizes | {"kernel_size": tuple(n // m for n, m in pairs)}, 1
    window: Any = module  # the base classes of pools declare no sizes
    kernel = per_dimension(window.kernel_size, dims)
    stride = per_dimension(window.stride, dims)
    padding = tuple((p, p) for p in per_dimension(window.padding, dims))
    kind = "max_pool" if isinstance(module, _MaxPoolNd) else "average_pool"
    return kind, sizes | {"kernel_size": kernel, "stride": stride, "padding": padding}, 1
