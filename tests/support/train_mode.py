"""Networks whose batch norms take the statistics of the batch, with running ones that differ."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgap.analysis.probe import probe_targets
from rgap.update.losses import Loss

SHAPE = (3, 8, 8)
CLASSES = 10


def mixing_conv(act: type[nn.Module] = nn.Sigmoid, width: int = 12, seed: int = 0) -> nn.Sequential:
    """Two convolutions with a batch norm each and a fully connected head, in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), act(),
            nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), act(),
            nn.Flatten(), nn.Linear(16 * width, CLASSES),
        )  # fmt: skip
        return _moved(network, SHAPE)


def mixing_mlp(sizes: tuple[int, ...] = (12, 16, 14), seed: int = 0) -> nn.Sequential:
    """Fully connected layers, each behind a batch norm and a ReLU, in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
        network = nn.Sequential(*layers, nn.Linear(sizes[-1], 5))
        return _moved(network, sizes[:1])


def _moved(network: nn.Sequential, shape: tuple[int, ...]) -> nn.Sequential:
    """The network after its running statistics and its scales left their first values."""
    network.train()
    with torch.no_grad():
        for module in network:
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
        for _ in range(8):
            network(torch.rand(16, *shape))
    return network


def passed(network: nn.Sequential, x: Tensor) -> tuple[nn.Sequential, list[Tensor], list[Tensor]]:
    """A twin in float64, its values from the data up, and the cotangents above the data."""
    targets = probe_targets(network, x, Loss(), None, 0)
    twin = copy.deepcopy(network).double()
    values = [x]
    for module in twin:
        values.append(module(values[-1]))
    loss = F.cross_entropy(values[-1], targets)
    return twin, values, list(torch.autograd.grad(loss, values[1:]))


def buffers(network: nn.Module) -> dict[str, Tensor]:
    """A copy of every buffer."""
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def untouched(network: nn.Module, before: dict[str, Tensor]) -> bool:
    """True if the network is in train mode and its buffers are the same bit by bit."""
    same = all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    return same and all(module.training for module in network.modules())
