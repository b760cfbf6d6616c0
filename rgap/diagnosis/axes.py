"""Which axes of a layer's weight are its filters, and which its input channels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

__all__ = ["by_filter", "by_input"]


def by_filter(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight, or a gradient of it, [F, entries that make one output channel].

    Args:
        module: fully connected, or a convolution, whose weight is [F, C/g, *k]; a transposed one
            has [C, F/g, *k].
        weight: in the module's own shape.

    >>> layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    >>> by_filter(layer, layer.weight).shape
    torch.Size([6, 18])
    """
    if not isinstance(module, _ConvTransposeNd):
        return weight.flatten(1)
    parts = weight.reshape(module.groups, -1, *weight.shape[1:])  # [g, C/g, F/g, *k]
    return parts.transpose(1, 2).flatten(0, 1).flatten(1)


def by_input(module: nn.Module, weight: Tensor) -> Tensor:
    """The same of a layer without groups, [C, entries that one input channel meets].

    >>> layer = nn.ConvTranspose2d(4, 6, 3)
    >>> by_input(layer, layer.weight).shape, by_input(nn.Linear(3, 2), nn.Linear(3, 2).weight).shape
    (torch.Size([4, 54]), torch.Size([3, 2]))
    """
    own = isinstance(module, _ConvTransposeNd)
    return (weight if own else weight.transpose(0, 1)).flatten(1)
