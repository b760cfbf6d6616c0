"""Convolutions of random kernel, stride and padding under a fully connected layer."""

import random

import torch
from torch import nn

__all__ = ["chain_of"]


def chain_of(seed: int) -> tuple[nn.Module, torch.Tensor]:
    """Convolutions of random geometry under a fully connected layer, and a random picture."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels, size = draw.choice((1, 2, 3)), (draw.randint(6, 10), draw.randint(6, 10))
    kernel = (draw.randint(1, 4), draw.randint(1, 4))
    filters = draw.choice((4, 8, channels * kernel[0] * kernel[1] * 2))
    act = draw.choice((nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ReLU))
    stride = (draw.randint(1, 4), draw.randint(1, 4))
    padding = tuple(draw.randint(0, k // 2) for k in kernel)
    layers = [nn.Conv2d(channels, filters, kernel, stride, padding), act()]
    x = torch.rand(1, channels, *size, dtype=torch.float64)
    if draw.random() < 0.4 and min(layers[0].double()(x).shape[2:]) > 2:
        second = nn.Conv2d(filters, 2 * filters, draw.randint(1, 3), draw.randint(1, 3))
        layers += [second, act()]
    body = nn.Sequential(*layers).double()
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(body(x).numel(), 5))
    return net.double().eval(), x
