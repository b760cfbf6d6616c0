"""Residual networks: a block, and the sum alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rgap


class Block(nn.Module):
    """``relu(f(x) + skip(x))``, two convolutions and a projection where the map shrinks."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(into, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(h)) + self.skip(x)).relu()


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Of features, or a map."""
        return x + self.inner(x)


def pictured(
    dtype: torch.dtype, side: int, widths: tuple[int, int], seed: int, stride: int = 1
) -> nn.Module:
    """Three blocks below an average, in eval mode with running statistics of photographs.

    Args:
        dtype: of the weights.
        side: of the photographs, in pixels.
        widths: of the first block, and of the two after it.
        seed: of the weights.
        stride: of the first convolution.
    """
    torch.manual_seed(seed)
    first, last = widths
    model = nn.Sequential(
        nn.Conv2d(3, first, 3, stride, 1), nn.ReLU(), Block(first, first), Block(first, last, 2),
        Block(last, last), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10),
    )  # fmt: skip
    model.train()(rgap.photos.load(16, side, dtype=torch.float32))
    return model.to(dtype).eval()
