"""Networks for ImageNet by name, tensor for tensor those whose trained weights are published.

Names, shapes and order of all parameters and buffers, and what eval mode computes, are those of
torchvision's models, so that a state dict saved there loads here; torchvision itself is not needed.
Without one the weights are drawn as PyTorch initialises each layer (not as each paper does), and
running statistics are 0 and 1.

Every factory takes ``classes`` and, as keywords, ``input_shape``, ``seed`` and ``weights`` as the
other reference networks do.  The networks take any picture that is large enough; of
``input_shape`` only the channels count.  ``weights`` may also be a state dict.

>>> model = resnet18(classes=10, seed=0)
>>> model.fc, tuple(model(torch.zeros(2, 3, 64, 64)).shape)
(Linear(in_features=512, out_features=10, bias=True), (2, 10))
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgap import validation
from rgap.models.build import Plan, Weights, drawn
from rgap.models.weights import fill

__all__ = [
    "IMAGENET",
    "convnext_tiny",
    "densenet121",
    "mobilenet_v2",
    "resnet18",
    "resnet34",
    "resnet50",
    "skeleton",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]

SHAPE = (3, 224, 224)


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


def _resnet(blocks: Sequence[int], deep: bool, channels: int, classes: int) -> nn.Module:
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


def _vgg(convolutions: Sequence[int], norm: bool, channels: int, classes: int) -> nn.Module:
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


def _mobilenet(channels: int, classes: int) -> nn.Module:
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


def _densenet(blocks: Sequence[int], growth: int, channels: int, classes: int) -> nn.Module:
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


def _convnext(
    blocks: Sequence[int], widths: Sequence[int], channels: int, classes: int
) -> nn.Module:
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


# ------------------------------------------------------------------------------- by name


class Factory(Protocol):
    """What builds one of the networks."""

    def __call__(
        self,
        classes: int = 1000,
        *,
        input_shape: Sequence[int] = SHAPE,
        seed: int | None = None,
        weights: Weights | Mapping[str, Tensor] = "default",
    ) -> Any:
        """The network, in eval mode."""


IMAGENET: dict[str, Factory] = {}
"""The factories by name."""

_SKELETONS: dict[str, Callable[[int, int], nn.Module]] = {}


def skeleton(name: str, classes: int = 1000, channels: int = 3) -> nn.Module:
    """The network ``name`` on the device "meta": shapes without numbers, which takes no memory.

    >>> sum(p.numel() for p in skeleton("vgg16").parameters())
    138357544
    """
    with torch.device("meta"):
        return _SKELETONS[name](channels, classes).float()


def _named(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _factory(
    name: str, words: str, source: str, least: int, make: Callable[..., nn.Module], *plan: Any
) -> Factory:
    """Enter the network ``make(*plan, channels, classes)``, for pictures of ``least`` pixels."""

    def build(
        classes: int = 1000,
        *,
        input_shape: Sequence[int] = SHAPE,
        seed: int | None = None,
        weights: Weights | Mapping[str, Tensor] = "default",
    ) -> Any:
        classes = validation.count("classes", classes)
        sample = Plan(input_shape, "relu")
        channels = sample.channels()
        if min(sample.shape[1:]) < least:
            raise ValueError(
                f"input_shape: {tuple(input_shape)} is too small for {name}, which takes pictures "
                f"from {least}×{least} on; write (3, 224, 224)."
            )

        def empty() -> nn.Module:
            model = skeleton(name, classes, channels).to_empty(device="cpu")
            for module in model.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            return model

        if isinstance(weights, str):
            return drawn(empty, seed, weights)
        model = drawn(empty, seed, "default")
        fill(model, weights, "the state dict")
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{words}\n\nSource: {source}."
    IMAGENET[name] = build
    _SKELETONS[name] = lambda channels, classes: make(*plan, channels, classes)
    return build


_HE, _SIMONYAN = "He, Zhang, Ren and Sun 2016", "Simonyan and Zisserman 2015"


def _residual(depth: int, blocks: Sequence[int], deep: bool) -> Factory:
    inside = "1×1, 3×3 and 1×1 convolutions" if deep else "two 3×3 convolutions"
    words = f"A residual network of {depth} layers: {sum(blocks)} blocks of {inside}."
    return _factory(f"resnet{depth}", words, _HE, 1, _resnet, blocks, deep)


def _plain(depth: int, convolutions: Sequence[int], norm: bool) -> Factory:
    words = f"A VGG of {depth} layers: {sum(convolutions)} 3×3 convolutions"
    words += ", each with batch norm." if norm else "."
    name = f"vgg{depth}_bn" if norm else f"vgg{depth}"
    return _factory(name, words, _SIMONYAN, 32, _vgg, convolutions, norm)


resnet18 = _residual(18, (2, 2, 2, 2), False)
resnet34 = _residual(34, (3, 4, 6, 3), False)
resnet50 = _residual(50, (3, 4, 6, 3), True)
vgg11, vgg11_bn = (_plain(11, (1, 1, 2, 2, 2), norm) for norm in (False, True))
vgg13, vgg13_bn = (_plain(13, (2, 2, 2, 2, 2), norm) for norm in (False, True))
vgg16, vgg16_bn = (_plain(16, (2, 2, 3, 3, 3), norm) for norm in (False, True))
vgg19, vgg19_bn = (_plain(19, (2, 2, 4, 4, 4), norm) for norm in (False, True))
mobilenet_v2 = _factory(
    "mobilenet_v2",
    "Seventeen inverted residual blocks with depthwise convolutions and ReLU6.",
    "Sandler, Howard, Zhu, Zhmoginov and Chen 2018",
    1,
    _mobilenet,
)
densenet121 = _factory(
    "densenet121",
    "Four blocks of 6, 12, 24 and 16 layers, each of which reads all before it in its block.",
    "Huang, Liu, van der Maaten and Weinberger 2017",
    29,
    _densenet,
    (6, 12, 24, 16),
    32,
)
convnext_tiny = _factory(
    "convnext_tiny",
    "Four groups of 3, 3, 9 and 3 blocks, without the dropping of whole blocks in training.",
    "Liu, Mao, Wu, Feichtenhofer, Darrell and Xie 2022",
    32,
    _convnext,
    (3, 3, 9, 3),
    (96, 192, 384, 768),
)
