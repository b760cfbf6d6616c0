"""Classifiers as they are trained today, with max-pooling or skip connections.

No equation passes those backwards: a recursion stops there, and the audit is what they are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from rgap.models.build import Activation, Plan, Weights

__all__ = ["lenet5", "resnet", "vgg"]


def lenet5(
    classes: int = 10,
    activation: Activation = nn.ReLU,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    seed: int | None = None,
    weights: Weights = "default",
) -> nn.Sequential:
    """LeNet-5 as it is trained today: ReLU, and max-pooling, which no equation passes backwards.

    [3, 32, 32] → [6, 28, 28] → pool → [16, 10, 10] → pool → 400 → 120 → 84 → ``classes``.

    Args:
        classes: number of logits.
        activation: after each layer but the last.
        input_shape: of one sample.
        seed: as in `rgap.models`.
        weights: as in `rgap.models`.

    Raises:
        TypeError: an ``activation`` that gives no module.
        ValueError: an unknown name, a width below 1, an input too small for the layers.

    Source: LeCun, Bottou, Bengio and Haffner 1998, but for the two choices above.

    Example:
        >>> lenet5(seed=0).fc1.in_features
        400
    """
    plan = Plan(input_shape, activation)
    for channels in (6, 16):
        plan.conv(channels, 5, 1, 0)
        plan.max_pool(2)
    for width in (120, 84):
        plan.linear(width)
    plan.head(classes)
    return plan.build(seed, weights)


def vgg(
    classes: int = 10,
    channels: Sequence[int] = (16, 32, 64),
    width: int = 256,
    activation: Activation = nn.ReLU,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    seed: int | None = None,
    weights: Weights = "default",
) -> nn.Sequential:
    """A small VGG: pairs of 3×3 convolutions, max-pooling, two fully connected layers.

    [3, 32, 32] → [16, 16, 16] → [32, 8, 8] → [64, 4, 4] → 1024 → ``width`` → ``classes``.

    Args:
        classes: number of logits.
        channels: of the two convolutions before each pooling.
        width: of the first fully connected layer.
        activation: after each layer but the last.
        input_shape: of one sample.
        seed: as in `rgap.models`.
        weights: as in `rgap.models`.

    Raises:
        TypeError: an ``activation`` that gives no module.
        ValueError: an unknown name, a width below 1, an input too small for the layers.

    Source: the plan of Simonyan and Zisserman 2015, at the size of a 32×32 picture.

    Example:
        >>> vgg(seed=0).fc1
        Linear(in_features=1024, out_features=256, bias=True)
    """
    plan = Plan(input_shape, activation)
    for count in channels:
        plan.conv(count, 3, 1, 1)
        plan.conv(count, 3, 1, 1)
        plan.max_pool(2)
    plan.linear(width)
    plan.head(classes)
    return plan.build(seed, weights)


def resnet(
    classes: int = 10,
    channels: Sequence[int] = (16, 32, 64),
    activation: Activation = nn.ReLU,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    seed: int | None = None,
    weights: Weights = "default",
) -> nn.Sequential:
    """A residual network: one block per width, batch norm, average over the picture.

    [3, 32, 32] → [16, 32, 32] → [16, 32, 32] → [32, 16, 16] → [64, 8, 8] → 64 → ``classes``.

    Args:
        classes: number of logits.
        channels: of each block; the first is the stem's too, a block that is as wide as the one
            before keeps the size of the picture, every other one halves it.
        activation: in the stem and twice in each block.
        input_shape: of one sample.
        seed: as in `rgap.models`.
        weights: as in `rgap.models`.

    Raises:
        TypeError: an ``activation`` that gives no module.
        ValueError: an unknown name, a width below 1, no channels, an input that is no [C, H, W].

    Source: the plan of He, Zhang, Ren and Sun 2016 for CIFAR-10; two blocks of 64, 128, 256 and 512
    channels each are the ResNet-18 that is usual there.

    Example:
        >>> resnet(seed=0).head
        Linear(in_features=64, out_features=10, bias=True)
    """
    if len(channels) == 0:
        raise ValueError("channels: expected one number per block, got none; write (16, 32, 64).")
    plan = Plan(input_shape, activation)
    plan.conv(channels[0], 3, 1, 1, norm=True)
    for before, count in pairwise((channels[0], *channels)):
        plan.residual(count, 1 if count == before else 2)
    plan.average()
    plan.head(classes)
    return plan.build(seed, weights)
