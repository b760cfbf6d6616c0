"""How the reference networks are put together: shapes followed, weights drawn in private.

A :class:`Plan` collects layers and follows the shape of one sample, so that no in-features or
in-channels are ever written down; nothing is drawn until :meth:`Plan.build`.

>>> plan = Plan((1, 28, 28), "tanh")
>>> plan.conv(4, 5, 2, 2)
>>> plan.shape
(4, 14, 14)
>>> plan.head(10)
>>> plan.build(seed=0).head
Linear(in_features=784, out_features=10, bias=True)
"""

from __future__ import annotations

import difflib
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from rgap import validation

__all__ = ["ACTIVATIONS", "Activation", "Plan", "Residual", "Weights", "drawn"]

Activation = str | Callable[[], nn.Module]
Weights = Literal["default", "uniform"]
Shape = tuple[int, ...]
Net = TypeVar("Net", bound=nn.Module)

# A global default device or dtype must not change the numbers that a seed stands for.
_PLACE: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
_WEIGHTS = ("default", "uniform")


def _leaky_relu() -> nn.Module:
    return nn.LeakyReLU(0.2)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardtanh": nn.Hardtanh,
    "identity": nn.Identity,
    "leaky_relu": _leaky_relu,
    "logsigmoid": nn.LogSigmoid,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
}
"""Activations by the name of their function in ``torch.nn.functional``."""


def _activation(activation: Activation) -> Callable[[], nn.Module]:
    """A function that makes one activation, or says why it cannot."""
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            close = difflib.get_close_matches(activation.lower(), ACTIVATIONS, n=1)
            advice = f"write {close[0]!r}" if close else "or pass a class such as torch.nn.Sigmoid"
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}; "
                f"{advice}."
            )
        return ACTIVATIONS[activation]
    wanted = "activation: expected a class or a function without arguments that returns a module"
    if isinstance(activation, nn.Module):
        raise TypeError(
            f"{wanted}, got the module {activation}, which every layer would share; write "
            f"lambda: torch.nn.{activation}."
        )
    if not callable(activation):
        raise TypeError(f"{wanted}, got {activation!r}; write torch.nn.Sigmoid or 'sigmoid'.")

    def make() -> nn.Module:
        try:
            made: object = activation()
        except TypeError as error:
            raise TypeError(
                f"{wanted}, but calling {activation!r} without arguments failed ({error}); write "
                "lambda: torch.nn.LeakyReLU(0.2) to fix its arguments."
            ) from error
        if not isinstance(made, nn.Module):
            kind = type(made).__name__
            raise TypeError(f"{wanted}, but {activation!r} returned {kind}; write nn.Sigmoid.")
        return made

    return make


@contextmanager
def _private_state(seed: int | None) -> Iterator[None]:
    """The CPU generator at ``seed``, put back afterwards; untouched if ``seed`` is None."""
    if seed is None:
        yield
        return
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed: expected a whole number or None, got {seed!r}.") from None
    # fork_rng and torch.manual_seed would reach the accelerators' generators as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)
        yield


def drawn(make: Callable[[], Net], seed: int | None, weights: Weights) -> Net:
    """The network that ``make`` gives, its weights drawn as asked, in eval mode.

    Args:
        make: builds the network; called once.
        seed: of the weights; None draws them from torch's random state, and so advances it.
        weights: ``"default"``, or ``"uniform"`` for uniform(−0.5, 0.5) in every weight and bias of
            convolutions, fully connected layers and batch norms (not in a PReLU's slope, which
            must stay positive).

    Returns:
        The network.

    Raises:
        ValueError: unknown ``weights``.
        TypeError: a ``seed`` that is no whole number.

    Example:
        >>> layer = drawn(lambda: nn.Linear(3, 2), 0, "uniform")
        >>> bool((layer.weight.abs() <= 0.5).all())
        True
    """
    if weights not in _WEIGHTS:
        raise ValueError(
            f"weights: expected 'default' or 'uniform', got {weights!r}; to use your own, write "
            "model.load_state_dict(state)."
        )
    with _private_state(seed):
        model = make()
        if weights == "uniform":
            for module in model.modules():
                if isinstance(module, _LAYERS):
                    for parameter in module.parameters():
                        nn.init.uniform_(parameter, -0.5, 0.5)
    # A PReLU follows torch's default device and dtype, whatever the layers around it do.
    return model.to(**_PLACE).eval()


class Plan:
    """Layers to build in a row, and the shape of one sample after them.

    Layers are named ``conv1``, ``act1``, ``pool1``, ``flatten``, ``fc1`` ... and ``head``.

    Args:
        input_shape: of one sample.
        activation: after every layer but the head.
        bias: whether layers have one.

    Raises:
        TypeError: an ``activation`` that gives no module, an ``input_shape`` of other things than
            whole numbers.
        ValueError: an unknown activation name, a dimension below 1.
    """

    def __init__(
        self, input_shape: Sequence[int], activation: Activation, *, bias: bool = True
    ) -> None:
        if not isinstance(input_shape, Sequence) or not input_shape:
            raise TypeError(
                f"input_shape: expected the shape of one sample such as (3, 32, 32), got "
                f"{input_shape!r}."
            )
        self.shape: Shape = tuple(validation.count("input_shape", n) for n in input_shape)
        self.input_shape = self.shape
        self.activation = _activation(activation)
        self.bias = bias
        self._parts: OrderedDict[str, Callable[[], nn.Module]] = OrderedDict()

    def conv(
        self, channels: int, kernel: int, stride: int, padding: int, *, norm: bool = False
    ) -> None:
        """Add a convolution to [channels, ·, ·], a batch norm for its bias, an activation."""
        before, after = self.channels(), validation.count("channels", channels)
        self._slide("convolution", kernel, stride, padding, after)
        bias = self.bias and not norm
        self._add(
            "conv", lambda: nn.Conv2d(before, after, kernel, stride, padding, bias=bias, **_PLACE)
        )
        if norm:
            self._add("norm", lambda: nn.BatchNorm2d(after, **_PLACE))
        self._add("act", self.activation)

    def residual(self, channels: int, stride: int) -> None:
        """Add a :class:`Residual` block to [channels, ·, ·]."""
        before, after = self.channels(), validation.count("channels", channels)
        self._slide("convolution", 3, stride, 1, after)
        self._add("block", lambda: Residual(before, after, stride, self.activation))

    def average(self) -> None:
        """Add the average over the whole picture."""
        self.shape = (self.channels(), 1, 1)
        self._add("pool", lambda: nn.AdaptiveAvgPool2d(1))

    def max_pool(self, kernel: int) -> None:
        """Add a max-pooling of stride ``kernel``."""
        self._slide("max-pool", kernel, kernel, 0, self.channels())
        self._add("pool", lambda: nn.MaxPool2d(kernel))

    def linear(self, width: int) -> None:
        """Add a fully connected layer and an activation."""
        self._linear("fc", width)
        self._add("act", self.activation)

    def head(self, classes: int) -> None:
        """Add the last fully connected layer."""
        self._linear("head", classes)

    def build(self, seed: int | None = None, weights: Weights = "default") -> nn.Sequential:
        """The network, in eval mode; see :func:`drawn`."""
        return drawn(
            lambda: nn.Sequential(OrderedDict((k, make()) for k, make in self._parts.items())),
            seed,
            weights,
        )

    def _linear(self, kind: str, width: int) -> None:
        if "flatten" not in self._parts:
            self._parts["flatten"] = nn.Flatten
            self.shape = (math.prod(self.shape),)
        before = self.shape[0]
        after = validation.count("classes" if kind == "head" else "widths", width)
        self.shape = (after,)
        self._add(kind, lambda: nn.Linear(before, after, bias=self.bias, **_PLACE))

    def channels(self) -> int:
        """Of one sample so far, where it is a picture."""
        if len(self.shape) != 3:
            raise ValueError(
                f"input_shape: expected [C, H, W] for a convolutional network, got "
                f"{self.input_shape}; write (1, 28, 28) for grey pictures, or use models.mlp."
            )
        return self.shape[0]

    def _slide(self, what: str, kernel: int, stride: int, padding: int, channels: int) -> None:
        """Shrink the height and width as a window of ``kernel`` does; set the channels."""
        space = [(n + 2 * padding - kernel) // stride + 1 for n in self.shape[1:]]
        if min(space) < 1:
            raise ValueError(
                f"input_shape: {self.input_shape} is too small for this network: a {what} of "
                f"{kernel}×{kernel} finds only {self.shape[1]}×{self.shape[2]}; write (3, 32, 32)."
            )
        self.shape = (channels, *space)

    def _add(self, kind: str, make: Callable[[], nn.Module]) -> None:
        number = 1 + sum(name.rstrip("0123456789") == kind for name in self._parts)
        self._parts["head" if kind == "head" else f"{kind}{number}"] = make


class Residual(nn.Module):
    """Two 3×3 convolutions with batch norm, added to their own input: act(f(x) + s(x)).

    Args:
        before: channels of x, ``[B, before, H, W]``.
        after: channels of the output, ``[B, after, ⌈H/stride⌉, ⌈W/stride⌉]``.
        stride: of the first convolution.
        activation: makes one activation.

    Where the shapes differ the shortcut s is a 1×1 convolution with batch norm, else the identity.
    """

    def __init__(
        self, before: int, after: int, stride: int, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False, **_PLACE)
        self.norm1 = nn.BatchNorm2d(after, **_PLACE)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False, **_PLACE)
        self.norm2 = nn.BatchNorm2d(after, **_PLACE)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False, **_PLACE),
                nn.BatchNorm2d(after, **_PLACE),
            )
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, before, H, W]`` to ``[B, after, ⌈H/stride⌉, ⌈W/stride⌉]``."""
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        out: Tensor = self.act2(y + self.shortcut(x))
        return out
