"""Networks that several scripts measure and ``rgap.models`` does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

BINARY = "binary_cross_entropy_with_logits"
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """What ``build`` makes with weights of this seed, in eval mode; other draws are untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def vgg16(classes: int = 1000, narrower: int = 1) -> nn.Sequential:
    """VGG-16 (Simonyan and Zisserman 2015) for 3×224×224, every width divided by ``narrower``."""
    layers: dict[str, nn.Module] = {}
    channels = 3
    for number, full in enumerate(_VGG16, 1):
        if width := full // narrower:
            layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"relu{number}"] = nn.ReLU()
            channels = width
        else:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers |= {"average": nn.AdaptiveAvgPool2d(7), "flatten": nn.Flatten()}
    wide = 4096 // narrower
    layers |= {"fc1": nn.Linear(49 * channels, wide), "relu_fc1": nn.ReLU()}
    layers |= {"dropout_fc1": nn.Dropout(), "fc2": nn.Linear(wide, wide)}
    layers |= {"relu_fc2": nn.ReLU(), "dropout_fc2": nn.Dropout()}
    network = nn.Sequential()
    for name, layer in (layers | {"fc3": nn.Linear(wide, classes)}).items():
        network.add_module(name, layer)
    return network


def adam(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], rate: float) -> nn.Module:
    """The network after a step of Adam on each batch (inputs, labels), in eval mode."""
    optimiser = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for inputs, labels in batches:
        optimiser.zero_grad()
        loss_of(model(inputs), labels).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval()


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, of two classes where there is one logit."""
    if outputs.shape[1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels.float())
    return nn.functional.cross_entropy(outputs, labels)
