"""Steps that pass everything on, for those that choose by value or are linear in pieces.

With them a cotangent is zero only where no data could change that, and a network that is linear in
pieces is looked at where all units are on one side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rgap.network.geometry import per_dimension

__all__ = ["SUBSTITUTES"]


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
        mean: Tensor = pool(x, kernel_size, stride, padding, ceil_mode)
        return mean

    return run


SMOOTH: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("relu", "relu6", "threshold", "hardtanh", "hardswish", "hardsigmoid",
                     "clamp", "clip", "clamp_min", "clamp_max", "hardshrink", "softshrink"),
                    _softplus),
    **dict.fromkeys(("relu_", "hardtanh_", "clamp_", "clip_", "threshold_"), _softplus_in_place),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
                    lambda x, *_, **__: x * 1.0),
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

SUBSTITUTES: dict[str, dict[str, Callable[..., Any]]] = {
    "": {},
    "smooth": SMOOTH,
    "linear": STRAIGHT,
}
