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

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.models import families
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
    return _factory(f"resnet{depth}", words, _HE, 1, families.resnet, blocks, deep)


def _plain(depth: int, convolutions: Sequence[int], norm: bool) -> Factory:
    words = f"A VGG of {depth} layers: {sum(convolutions)} 3×3 convolutions"
    words += ", each with batch norm." if norm else "."
    name = f"vgg{depth}_bn" if norm else f"vgg{depth}"
    return _factory(name, words, _SIMONYAN, 32, families.vgg, convolutions, norm)


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
    families.mobilenet,
)
densenet121 = _factory(
    "densenet121",
    "Four blocks of 6, 12, 24 and 16 layers, each of which reads all before it in its block.",
    "Huang, Liu, van der Maaten and Weinberger 2017",
    29,
    families.densenet,
    (6, 12, 24, 16),
    32,
)
convnext_tiny = _factory(
    "convnext_tiny",
    "Four groups of 3, 3, 9 and 3 blocks, without the dropping of whole blocks in training.",
    "Liu, Mao, Wu, Feichtenhofer, Darrell and Xie 2022",
    32,
    families.convnext,
    (3, 3, 9, 3),
    (96, 192, 384, 768),
)
