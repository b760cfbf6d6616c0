"""Reference networks: those that the literature attacks, with weights that a seed reproduces.

Every factory returns a float32 network on the CPU, in eval mode, and takes three keywords besides
its own arguments:

- ``input_shape``: shape of one sample, [C, H, W] where there are convolutions; the in-features of
  every fully connected layer follow.
- ``seed``: with a number, the weights depend on that number alone and torch's random state is left
  as it was. With None they are drawn from torch's own state, as ``nn.Linear`` does.
- ``weights``: ``"default"`` (as torch initialises each layer) or ``"uniform"`` (every weight and
  bias of the layers from uniform(−0.5, 0.5), as DLG and iDLG draw them).

An ``activation`` is a class (``nn.Tanh``), a function without arguments that returns a module
(``lambda: nn.ELU(0.5)``), or a name (``"leaky_relu"``, slope 0.2).  :data:`BUILTIN` has the
factories by name, :data:`INPUT_SHAPES` and :data:`LOSSES` what each network expects.

>>> lenet(classes=100, seed=0).head
Linear(in_features=768, out_features=100, bias=True)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from torch import nn

from rgap.models.build import Activation, Plan, Weights
from rgap.models.classifiers import lenet5, resnet, vgg
from rgap.models.imagenet import IMAGENET


def lenet(
    classes: int = 10,
    channels: int = 12,
    activation: Activation = nn.Sigmoid,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    seed: int | None = None,
    weights: Weights = "default",
) -> nn.Sequential:
    """The LeNet of DLG and iDLG: three 5×5 convolutions and one fully connected layer.

    Strides 2, 2, 1 and padding 2, with biases: [3, 32, 32] → [12, 16, 16] → [12, 8, 8] →
    [12, 8, 8] → 768 → ``classes``.

    Args:
        classes: number of logits.
        channels: of each convolution.
        activation: after each convolution.
        input_shape: of one sample.
        seed: as above.
        weights: as above.

    Raises:
        TypeError: an ``activation`` that gives no module.
        ValueError: an unknown name, a width below 1, an input too small for the layers.

    Source: Zhu, Liu and Han 2019; Zhao, Mopuri and Bilen 2020.

    Example:
        >>> model = lenet(activation="tanh", seed=0, weights="uniform")
        >>> model.act1, model.head.in_features
        (Tanh(), 768)
    """
    plan = Plan(input_shape, activation)
    for stride in (2, 2, 1):
        plan.conv(channels, 5, stride, 2)
    plan.head(classes)
    return plan.build(seed, weights)


def cnn6(
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    seed: int | None = None,
    weights: Weights = "default",
) -> nn.Sequential:
    """The CNN6 of R-GAP: six convolutions, one logit, LeakyReLU(0.2), no bias anywhere.

    [3, 32, 32] → [12, 17, 17] → [36, 9, 9] → [36, 9, 9] → [36, 9, 9] → [64, 5, 5] →
    [128, 5, 5] → 3200 → 1, for binary cross-entropy with logits.

    Raises:
        ValueError: an unknown ``weights``, an input that is no [C, H, W].

    Source: Zhu and Blaschko 2021.

    Example:
        >>> cnn6(seed=0).head
        Linear(in_features=3200, out_features=1, bias=False)
    """
    return _cnn6((12, 36, 36), input_shape, seed, weights)


def cnn6d(
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    seed: int | None = None,
    weights: Weights = "default",
) -> nn.Sequential:
    """The CNN6-d of R-GAP: :func:`cnn6` with 20 channels after the second convolution, not 36.

    The narrow layer leaves the recursion 280 equations short at B = 1.

    Raises:
        ValueError: an unknown ``weights``, an input that is no [C, H, W].

    Source: Zhu and Blaschko 2021.

    Example:
        >>> cnn6d(seed=0).conv3.weight.shape
        torch.Size([36, 20, 3, 3])
    """
    return _cnn6((12, 20, 36), input_shape, seed, weights)


def fcn3(
    *,
    input_shape: Sequence[int] = (1, 28, 28),
    seed: int | None = None,
    weights: Weights = "default",
) -> nn.Sequential:
    """The FCN3 of R-GAP: fully connected 784 → 1000 → 100 → 1, LeakyReLU(0.2), no bias.

    Raises:
        ValueError: an unknown ``weights``, a dimension below 1.

    Source: Zhu and Blaschko 2021.

    Example:
        >>> fcn3(input_shape=(3, 32, 32), seed=0).fc1
        Linear(in_features=3072, out_features=1000, bias=False)
    """
    plan = Plan(input_shape, "leaky_relu", bias=False)
    for width in (1000, 100):
        plan.linear(width)
    plan.head(1)
    return plan.build(seed, weights)


def mlp(
    widths: Sequence[int] = (512, 512, 512),
    classes: int = 10,
    activation: Activation = nn.Sigmoid,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    seed: int | None = None,
    weights: Weights = "default",
) -> nn.Sequential:
    """Fully connected layers with biases: ``input_shape`` → ``widths`` → ``classes``.

    Args:
        widths: of the hidden layers; empty for a linear classifier.
        classes: number of logits.
        activation: after each hidden layer.
        input_shape: of one sample.
        seed: as above.
        weights: as above.

    Raises:
        TypeError: an ``activation`` that gives no module.
        ValueError: an unknown name, a width below 1.

    Example:
        >>> model = mlp((512, 512), activation="gelu", seed=0)
        >>> [layer.out_features for layer in model if isinstance(layer, nn.Linear)]
        [512, 512, 10]
    """
    plan = Plan(input_shape, activation)
    for width in widths:
        plan.linear(width)
    plan.head(classes)
    return plan.build(seed, weights)


def _cnn6(
    widths: tuple[int, int, int], input_shape: Sequence[int], seed: int | None, weights: Weights
) -> nn.Sequential:
    """CNN6 with ``widths`` channels after its first three convolutions."""
    plan = Plan(input_shape, "leaky_relu", bias=False)
    plan.conv(widths[0], 4, 2, 2)
    for channels, stride in ((widths[1], 2), (widths[2], 1), (36, 1), (64, 2), (128, 1)):
        plan.conv(channels, 3, stride, 1)
    plan.head(1)
    return plan.build(seed, weights)


BUILTIN: dict[str, Callable[..., nn.Module]] = {
    "cnn6": cnn6,
    "cnn6d": cnn6d,
    "fcn3": fcn3,
    "lenet": lenet,
    "lenet5": lenet5,
    "mlp": mlp,
    "resnet": resnet,
    "vgg": vgg,
}
"""The factories by name; each may be called without arguments."""

NAMED: dict[str, Callable[..., nn.Module]] = BUILTIN | IMAGENET
"""These and the networks for ImageNet, which are large."""

INPUT_SHAPES: dict[str, tuple[int, ...]] = {
    name: tuple(inspect.signature(make).parameters["input_shape"].default)
    for name, make in NAMED.items()
}
"""Shape of one sample of each network, if ``input_shape`` is left out."""

_ONE_LOGIT = ("cnn6", "cnn6d", "fcn3")

LOSSES: dict[str, str] = {
    name: "binary_cross_entropy_with_logits" if name in _ONE_LOGIT else "cross_entropy"
    for name in NAMED
}
"""Name of the loss that each network is trained with."""
