"""Which layers a network calls, in which order, and with which sizes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd, _MaxPoolNd

from rgap.analysis.calls.recorder import record, refusal
from rgap.analysis.calls.uses import Use
from rgap.network.geometry import per_dimension
from rgap.network.isolation import meta_copy, without_hooks

__all__ = ["Call", "calls_of", "sizes_of"]

POOLS = (_AvgPoolNd, _AdaptiveAvgPoolNd, _MaxPoolNd)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer.

    Attributes:
        name: path of the module.
        module: the module; None for a layer that is called as a function.
        in_shape: of one sample.
        out_shape: of one sample.
        use: of the weight, for a layer.
    """

    name: str
    module: nn.Module | None
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    use: Use | None = None


def calls_of(model: nn.Module, shape: tuple[int, ...]) -> list[Call]:
    """Calls of layers, norms and pools in forward order.

    Args:
        model: left as it was; a copy without storage runs once.
        shape: of one sample.

    Raises:
        ValueError: the shape does not fit, or there is no such layer.
    """
    twin = without_hooks(meta_copy(model).eval())
    x = torch.empty(1, *shape, device="meta", dtype=torch.float64)
    try:
        recording = record(twin, x, torch.sum)
    except ValueError:
        raise
    except Exception as error:  # whatever a user's forward raises
        raise refusal(model, shape, error) from error
    calls = [
        Call(event.name, event.module, event.in_shape, event.out_shape, event.use)
        for event in recording.events
        if event.use is not None or isinstance(event.module, (*POOLS, _BatchNorm))
    ]
    if not any(call.use for call in calls):
        raise ValueError(
            f"expected a model with fully connected or convolutional layers, got "
            f"{type(model).__name__} with none: there is nothing to count"
        )
    return calls


def sizes_of(call: Call, *, head: bool) -> tuple[str, dict[str, Any], int]:
    """Kind and sizes for ``layer_form``, and at how many places of a sequence the layer acts.

    Args:
        call: of a covered layer.
        head: True for a fully connected layer below a softmax loss.
    """
    module, shape = call.module, call.in_shape
    if call.use is not None:
        return ("head" if head else call.use.kind), call.use.sizes(), call.use.repeats
    if isinstance(module, _BatchNorm):
        return "batch_norm", {"features": prod(shape)}, 1
    dims = len(shape) - 1
    sizes: dict[str, Any] = {"input_size": shape[1:]}
    sizes |= {"channels": shape[0], "output_size": call.out_shape[1:]}
    if isinstance(module, _AdaptiveAvgPoolNd):
        pairs = zip(shape[1:], call.out_shape[1:], strict=True)
        kernel = tuple(max(1, n // m) for n, m in pairs)  # 1 where it widens
        return "average_pool", sizes | {"kernel_size": kernel}, 1
    window: Any = module  # the base classes of pools declare no sizes
    kernel = per_dimension(window.kernel_size, dims)
    stride = per_dimension(window.stride, dims)
    padding = tuple((p, p) for p in per_dimension(window.padding, dims))
    kind = "max_pool" if isinstance(module, _MaxPoolNd) else "average_pool"
    return kind, sizes | {"kernel_size": kernel, "stride": stride, "padding": padding}, 1
