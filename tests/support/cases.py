"""What tests share: small networks, batches, labels, and one table of them.

The table is network × batch × labels × dtype (:data:`CASES`); every case follows from its seed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "selu": nn.SELU,
    "softsign": nn.Softsign,
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
}
SHAPE = (3, 4, 4)
KINDS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    **{name: ACTIVATIONS[name] for name in ("relu", "leaky_relu", "tanh", "sigmoid")},
}


def dense(
    *widths: int,
    act: Callable[[], nn.Module] = nn.Tanh,
    seed: int = 0,
    bias: bool = True,
    flat: bool = False,
) -> nn.Sequential:
    """Fully connected layers, after a Flatten unless the data is ``flat``.

    The global generator is left where the weights leave it, so that data drawn next follows from
    the seed as well.  ``bias`` is the first layer's.
    """
    torch.manual_seed(seed)
    parts: list[nn.Module] = [] if flat else [nn.Flatten()]
    for i, (width, out) in enumerate(pairwise(widths)):
        parts += [nn.Linear(width, out, bias=bias or i > 0), act()]
    return nn.Sequential(*parts[:-1]).eval()


def redrawn(*layers: nn.Module) -> nn.Sequential:
    """The layers with weights from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return nn.Sequential(*layers).eval()


def normed(*, dropout: bool = False) -> nn.Sequential:
    """Convolution, batch norm, sigmoid, head; for 4×4 pictures, with ``dropout`` for 6×6 ones."""
    stop = [nn.Dropout(0.5)] if dropout else []
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=1 + dropout), nn.BatchNorm2d(4), nn.Sigmoid(), *stop,
        nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def small_conv(
    activation: str,
    *,
    channels: int = 6,
    classes: int = 5,
    bias: bool = True,
    depth: int = 2,
    size: int = 8,
    stride: int = 1,
    seed: int = 0,
    scale: float = 0.0,
    norm: bool = False,
) -> nn.Module:
    """A convolutional chain on [2, size, size] pictures; ``scale`` > 0: uniform weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        width, space = 2, size
        for i in range(depth):
            parts[f"conv{i}"] = nn.Conv2d(width, channels, 3, stride, 1, bias=bias)
            width, space = channels, (space + 2 - 3) // stride + 1
            if norm:
                parts[f"norm{i}"] = nn.BatchNorm2d(width)
            parts[f"act{i}"] = ACTIVATIONS[activation]()
        parts["flatten"] = nn.Flatten()
        parts["fc"] = nn.Linear(width * space * space, classes, bias=bias)
        model = nn.Sequential(parts)
        if scale:
            for parameter in model.parameters():
                nn.init.uniform_(parameter, -scale, scale)
    return model.eval()


def small_mlp(
    activation: str,
    *,
    classes: int = 5,
    bias: bool = True,
    seed: int = 0,
    widths: tuple[int, ...] = (24, 16),
    inputs: int = 32,
) -> nn.Module:
    """A fully connected chain on [2, 4, 4] inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        width = inputs
        for i, out in enumerate(widths):
            parts[f"fc{i}"] = nn.Linear(width, out, bias=bias)
            parts[f"act{i}"] = ACTIVATIONS[activation]()
            width = out
        parts["head"] = nn.Linear(width, classes, bias=bias)
        model = nn.Sequential(parts)
    return model.eval()


def picture(shape: tuple[int, ...], seed: int, batch: int = 1) -> Tensor:
    """Random pictures in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, *shape, generator=generator)


def mlp(
    activation: str,
    seed: int,
    *,
    widths: tuple[int, ...] = (32, 32),
    classes: int = 5,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    gain: float = 1.0,
) -> nn.Module:
    """``[3, 4, 4]`` → widths → classes; ``bias`` is the first layer's."""
    with torch.random.fork_rng(devices=[]):
        model = dense(48, *widths, classes, act=KINDS[activation], seed=seed, bias=bias).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model


def pictures(
    count: int, seed: int, dtype: torch.dtype = torch.float64, apart: float = 1.0
) -> Tensor:
    """Random pictures in [0, 1]; ``apart`` below 1 makes them alike."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)
    common = torch.rand(1, *SHAPE, generator=generator, dtype=torch.float64)
    return (apart * own + (1.0 - apart) * common).to(dtype)


def labels(kind: str, count: int, classes: int, seed: int) -> Tensor:
    """Distinct (as far as they go), equal or random labels."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "equal":
        return torch.full((count,), seed % classes)
    if kind == "distinct":
        return torch.randperm(classes, generator=generator)[torch.arange(count) % classes]
    return torch.randint(0, classes, (count,), generator=generator)


@dataclass(frozen=True)
class Case:
    """A batch of pictures at a fully connected network."""

    activation: str
    labels: str
    batch: int
    dtype: torch.dtype
    seed: int

    def draw(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Network, pictures and labels."""
        x = pictures(self.batch, self.seed, self.dtype)
        y = labels(self.labels, self.batch, 5, self.seed)
        return mlp(self.activation, self.seed, dtype=self.dtype), x, y


CASES = [
    Case(act, kind, size, dtype, 1000 * a + 100 * i + 10 * size + (dtype == torch.float32))
    for a, act in enumerate(KINDS)
    for dtype in (torch.float64, torch.float32)
    for i, kind in enumerate(("distinct", "equal", "random"))
    for size in ((2, 3, 5) if kind == "distinct" else (2, 5, 8))
]


def state(model: nn.Module) -> list[Any]:
    """Everything about a model that reading it could disturb."""
    tensors = [*model.parameters(), *model.buffers()]
    modules = list(model.modules())
    return [
        [id(t) for t in tensors],
        [t.dtype for t in tensors],
        [t.requires_grad for t in tensors],
        [t._version for t in tensors],
        [t.detach().clone().numpy().tobytes() for t in tensors],
        [None if p.grad is None else p.grad.clone().numpy().tobytes() for p in model.parameters()],
        [m.training for m in modules],
        [list(m.__dict__) for m in modules],
        [list(v) for m in modules for k, v in m.__dict__.items() if k.endswith("_hooks")],
    ]
