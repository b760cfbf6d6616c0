"""Networks that people use, for 32×32 pictures (their CIFAR form) or as ImageNet has them.

Running statistics are those of photographs, eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap

__all__ = ["CLASSES", "NETWORKS", "STATISTICS", "photographs", "side"]

CLASSES, STATISTICS = 10, 32  # photographs that the running statistics are of
LARGE, STORED = 224, 64  # pixels


class Block(nn.Module):
    """Two 3×3 convolutions and what leads past them."""

    step = staticmethod(F.relu)

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Identity()
        if stride > 1:
            shorter = nn.Conv2d(into, out, 1, stride, bias=False)
            self.skip = nn.Sequential(shorter, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Of the map x."""
        h = self.step(self.bn1(self.conv1(x)))
        return self.step(self.bn2(self.conv2(h)) + self.skip(x))


class Before(nn.Module):
    """The same with norms and rectifiers before the convolutions (He et al. 2016b)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(into), nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(into, out, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Of the map x."""
        inner = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(inner)))) + self.skip(x)


def _residual(block: Callable[[int, int, int], nn.Module], last: list[nn.Module]) -> nn.Module:
    """Four groups of two blocks for 32×32 pictures: no pool, no stride in the first convolution."""
    blocks, into = [], 64
    for group in range(4):
        for number in range(2):
            out = 64 << group
            blocks.append(block(into, out, 2 if group and not number else 1))
            into = out
    first: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False)]
    first += [] if last else [nn.BatchNorm2d(64), nn.ReLU()]
    head = [*last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]
    return nn.Sequential(*first, *blocks, *head)


VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def vgg16(normed: bool) -> nn.Module:
    """For 32×32 pictures: thirteen convolutions, a max-pool where the table has 0, one layer."""
    layers, into = list[nn.Module](), 3
    for width in VGG16:
        if not width:
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(into, width, 3, 1, 1))
        layers += [nn.BatchNorm2d(width), nn.ReLU()] if normed else [nn.ReLU()]
        into = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, CLASSES))


def bent(model: nn.Module) -> nn.Module:
    """The same network with SiLU for every ReLU."""
    for module in model.modules():
        for name, inner in module.named_children():
            if isinstance(inner, nn.ReLU):
                setattr(module, name, nn.SiLU())
        if isinstance(module, Block):
            module.step = F.silu
    return model


def small(name: str) -> nn.Module:
    """A network for ImageNet as CIFAR has it: the first convolution 3×3, no stride, no pool."""
    model = rgap.models.IMAGENET[name](classes=CLASSES)
    for path, module in list(model.named_modules()):
        owner, _, own = path.rpartition(".")
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            first = nn.Conv2d(3, module.out_channels, 3, 1, 1, bias=module.bias is not None)
            setattr(model.get_submodule(owner), own, first)
        elif isinstance(module, nn.MaxPool2d):
            setattr(model.get_submodule(owner), own, nn.Identity())
    return model


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: _residual(Block, []),
    "preact18": lambda: _residual(Before, [nn.BatchNorm2d(512), nn.ReLU()]),
    "silu18": lambda: bent(_residual(Block, [])),
    "vgg16": lambda: vgg16(False),
    "vgg16_bn": lambda: vgg16(True),
    "resnet34": lambda: small("resnet34"),
    "resnet50": lambda: small("resnet50"),
    "densenet121": lambda: small("densenet121"),
    "mobilenet_v2": lambda: small("mobilenet_v2"),
    "resnet18_224": lambda: rgap.models.IMAGENET["resnet18"](classes=CLASSES),
    "resnet50_224": lambda: rgap.models.IMAGENET["resnet50"](classes=CLASSES),
}


def side(name: str) -> int:
    """Of the pictures that the network of a name takes, in pixels."""
    return LARGE if name.endswith("_224") else 32


def photographs(count: int, pixels: int, start: int = 0) -> Tensor:
    """Those of the package [count, 3, pixels, pixels]; large ones are enlarged from 64 pixels."""
    if pixels <= STORED:
        return rgap.photos.load(count, pixels, start=start, dtype=torch.float64)
    stored = rgap.photos.load(count, STORED, start=start, dtype=torch.float64)
    return F.interpolate(stored, pixels, mode="bicubic", antialias=True).clamp(0, 1)


def _built(name: str) -> nn.Module:
    """With running statistics of photographs."""
    model = _BUILDERS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        model.train()(photographs(STATISTICS, side(name)).float())
    return model.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {name: partial(_built, name) for name in _BUILDERS}
