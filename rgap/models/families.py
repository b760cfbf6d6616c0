"""The layers of the networks for ImageNet, empty: one builder a family.

Parameters and buffers have the names, shapes and order of torchvision's models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["convnext", "densenet", "mobilenet", "resnet", "vgg"]


# --------------------------------------------------------------------------- residual networks


class _Shortcut(nn.Module):
    """relu(f(x) + s(x)), f some convolutions with batch norm and rectifiers between them.

    Args:
        before: channels of x.
        kernels: (channels after it, size, stride) of each convolution of f.

    s is the identity, or a 1×1 convolution with batch norm where the shapes differ.
    """

    def __init__(self, before: int, kernels: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.length, into, stride = len(kernels), before, 1
        for number, (out, size, step) in enumerate(kernels, start=1):
            conv = nn.Conv2d(into, out, size, step, size // 2, bias=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(out))
            into, stride = out, stride * step
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or into != before:
            conv = nn.Conv2d(before, into, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(into))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, before, H, W]`` to ``[B, after, ⌈H/stride⌉, ⌈W/stride⌉]``."""
        inner = x
        for number in range(1, self.length + 1):
            inner = self.relu(inner) if number > 1 else inner
            inner = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(inner))
        around = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(inner + around)
        return out


def resnet(blocks: Sequence[int], deep: bool, channels: int, classes: int) -> nn.Module:
    """Groups of ``blocks``: of two 3×3 convolutions, or if ``deep`` of 1×1, 3×3 and 1×1."""
    parts: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(channels, 64, 7, 2, 3, bias=False),
        "bn1": nn.BatchNorm2d(64),
        "relu": nn.ReLU(),
        "maxpool": nn.MaxPool2d(3, 2, 1),
    }
    into = 64
    for group, count in enumerate(blocks):
        width, row = 64 << group, list[nn.Module]()
        for number in range(count):
            stride = 2 if group and not number else 1
            plain = [(width, 3, stride), (width, 3, 1)]
            bottle = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
            row.append(_Shortcut(into, bottle if deep else plain))
            into = 4 * width if deep else width
        parts[f"layer{group + 1}"] = nn.Sequential(*row)
    parts |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts, fc=nn.Linear(into, classes)))


# ------------------------------------------------------------------------------- plain networks


def vgg(convolutions: Sequence[int], norm: bool, channels: int, classes: int) -> nn.Module:
    """Five groups of 3×3 ``convolutions``, each before a max-pool, and three full layers."""
    layers, into = list[nn.Module](), channels
    for count, width in zip(convolutions, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(into, width, 3, 1, 1))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
            into = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(into * 7 * 7, 4096), nn.ReLU(), nn.Dropout()]
    head += [nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, classes)]
    return _named(
        features=nn.Sequential(*layers),
        avgpool=nn.AdaptiveAvgPool2d(7),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(*head),
    )


# --------------------------------------------------------------------- inverted residual networks


class _Inverted(nn.Module):
    """x + f(x) where the shapes agree, else f(x): wide inside, depthwise, narrow outside."""

    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        layers = [_unit(before, wide, 1)] if expansion != 1 else []
        layers.append(_unit(wide, wide, 3, stride, groups=wide))
        narrow = nn.Conv2d(wide, after, 1, bias=False)
        self.conv = nn.Sequential(*layers, narrow, nn.BatchNorm2d(after))
        self.added = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, before, H, W]`` to ``[B, after, ⌈H/stride⌉, ⌈W/stride⌉]``."""
        inner: Tensor = self.conv(x)
        return x + inner if self.added else inner


def _unit(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU6())


def mobilenet(channels: int, classes: int) -> nn.Module:
    """Seventeen inverted residual blocks and a wide 1×1 convolution, all with ReLU6."""
    layers, into = [_unit(channels, 32, 3, 2)], 32
    for expansion, width, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for number in range(count):
            layers.append(_Inverted(into, width, 1 if number else stride, expansion))
            into = width
    return _named(
        features=nn.Sequential(*layers, _unit(into, 1280, 1)),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes)),
    )


# ------------------------------------------------------------------------ densely connected ones


class _Dense(nn.Module):
    """x and ``growth`` channels more that are computed from it, by 1×1 and 3×3 convolutions."""

    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(before), nn.ReLU()
        self.conv1 = nn.Conv2d(before, 4 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, before, H, W]`` to ``[B, before + growth, H, W]``."""
        inner = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(inner)))], 1)


def densenet(blocks: Sequence[int], growth: int, channels: int, classes: int) -> nn.Module:
    """Blocks of so many layers, each of ``growth`` channels; maps and channels halve between."""
    into = 2 * growth
    parts: dict[str, nn.Module] = {
        "conv0": nn.Conv2d(channels, into, 7, 2, 3, bias=False),
        "norm0": nn.BatchNorm2d(into),
        "relu0": nn.ReLU(),
        "pool0": nn.MaxPool2d(3, 2, 1),
    }
    for number, count in enumerate(blocks, start=1):
        row = {f"denselayer{n + 1}": _Dense(into + n * growth, growth) for n in range(count)}
        parts[f"denseblock{number}"] = _named(**row)
        into += count * growth
        if number < len(blocks):
            parts[f"transition{number}"] = _named(
                norm=nn.BatchNorm2d(into),
                relu=nn.ReLU(),
                conv=nn.Conv2d(into, into // 2, 1, bias=False),
                pool=nn.AvgPool2d(2),
            )
            into //= 2
    return _named(
        features=_named(**parts, norm5=nn.BatchNorm2d(into)),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Linear(into, classes),
    )


# ------------------------------------------------- convolutions in the manner of transformers


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of every position of ``[B, width, H, W]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        """Neither scaled nor moved."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Of the map x."""
        last = F.layer_norm(x.permute(0, 2, 3, 1), (self.width,), self.weight, self.bias, 1e-6)
        return last.permute(0, 3, 1, 2)


class _Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """With its axes in another order."""
        return x.permute(self.order)


class _Modern(nn.Module):
    """x + s ⊙ f(x): a 7×7 depthwise convolution, then two full layers at every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, 1, 3, groups=width),
            _Permute(0, 2, 3, 1),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            _Permute(0, 3, 1, 2),
        )

    def reset_parameters(self) -> None:
        """Only the scale: every layer has its own."""
        nn.init.constant_(self.layer_scale, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, width, H, W]`` to the same shape."""
        out: Tensor = x + self.layer_scale * self.block(x)
        return out


def convnext(
    blocks: Sequence[int], widths: Sequence[int], channels: int, classes: int
) -> nn.Module:
    """Groups of so many blocks, of one width each; maps halve between them."""
    layers: list[nn.Module] = []
    into = channels
    for count, width in zip(blocks, widths, strict=True):
        if layers:
            layers.append(nn.Sequential(_ChannelNorm(into), nn.Conv2d(into, width, 2, 2)))
        else:
            layers.append(nn.Sequential(nn.Conv2d(into, width, 4, 4), _ChannelNorm(width)))
        layers.append(nn.Sequential(*(_Modern(width) for _ in range(count))))
        into = width
    return _named(
        features=nn.Sequential(*layers),
        avgpool=nn.AdaptiveAvgPool2d(1),
        classifier=nn.Sequential(_ChannelNorm(into), nn.Flatten(), nn.Linear(into, classes)),
    )


def _named(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))
