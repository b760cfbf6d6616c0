"""Which shapes of a sample a model takes, tried out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rgap.network.batch_statistics import FEWEST, mixing
from rgap.network.isolation import untouched
from rgap.network.probing import Shape


def fitting_shape(model: nn.Module, shape: Shape) -> Shape | None:
    """A shape that the model accepts, for the message that refuses ``shape``."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layer = next((m for m in model.modules() if isinstance(m, kinds)), None)
    tries: list[Shape] = [shape[1:]] if len(shape) > 1 and shape[0] == 1 else []
    if isinstance(layer, nn.Linear):
        width = layer.in_features
        sides = [(c, math.isqrt(width // c)) for c in (1, 3) if width % c == 0]
        tries += [(c, n, n) for c, n in sides if c * n * n == width and len(shape) == 3]
        tries += [(width,), (*shape[:-1], width)]
    elif layer is not None:
        dims, channels = len(layer.kernel_size), layer.in_channels
        sizes = (8, 16, 28, 32, 48, 64, 96, 128, 224, 256, 299)
        tries += [(channels, *shape[-dims:])] if len(shape) >= dims else []
        tries += [(channels, *(n,) * dims) for n in (sizes if dims < 3 else (8, 16, 32))]
    return next((one for one in tries if runs(model, one)), None)


def runs(model: nn.Module, shape: Shape) -> bool:
    """True if the model maps such a sample to one output, two where it mixes the batch."""
    first = next(model.parameters())
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with torch.no_grad(), untouched(model, hooks=False):
            count = FEWEST if any(mixing(model)) else 1
            x = torch.zeros(count, *shape, dtype=first.dtype, device=first.device)
            out = functional_call(model, buffers, (x,))
    except Exception:
        return False
    return isinstance(out, Tensor) and out.ndim >= 1 and len(out) == count
