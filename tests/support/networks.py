"""Small random networks for the certificate: chains of every kind, deficient ones among them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "selu": nn.SELU,
    "softsign": nn.Softsign,
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
}


def small_conv(
    activation: str,
    *,
    channels: int = 6,
    classes: int = 5,
    bias: bool = True,
    depth: int = 2,
    size: int = 8,
    stride: int = 1,
    seed: int = 0,
    scale: float = 0.0,
    norm: bool = False,
) -> nn.Module:
    """A convolutional chain on [2, size, size] pictures; ``scale`` > 0: uniform weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        width, space = 2, size
        for i in range(depth):
            parts[f"conv{i}"] = nn.Conv2d(width, channels, 3, stride, 1, bias=bias)
            width, space = channels, (space + 2 - 3) // stride + 1
            if norm:
                parts[f"norm{i}"] = nn.BatchNorm2d(width)
            parts[f"act{i}"] = ACTIVATIONS[activation]()
        parts["flatten"] = nn.Flatten()
        parts["fc"] = nn.Linear(width * space * space, classes, bias=bias)
        model = nn.Sequential(parts)
        if scale:
            for parameter in model.parameters():
                nn.init.uniform_(parameter, -scale, scale)
    return model.eval()


def small_mlp(
    activation: str,
    *,
    classes: int = 5,
    bias: bool = True,
    seed: int = 0,
    widths: tuple[int, ...] = (24, 16),
    inputs: int = 32,
) -> nn.Module:
    """A fully connected chain on [2, 4, 4] inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        width = inputs
        for i, out in enumerate(widths):
            parts[f"fc{i}"] = nn.Linear(width, out, bias=bias)
            parts[f"act{i}"] = ACTIVATIONS[activation]()
            width = out
        parts["head"] = nn.Linear(width, classes, bias=bias)
        model = nn.Sequential(parts)
    return model.eval()


def picture(shape: tuple[int, ...], seed: int, batch: int = 1) -> Tensor:
    """Random pictures in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, *shape, generator=generator)
