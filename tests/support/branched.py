"""Random networks whose branches meet, with an update that is theirs or, a third of them, not.

Residual blocks with and without a projection, before or behind their activation, concatenations,
strides, stacks of convolutions and max-pools, widths from too narrow to wide, batch norm with the
statistics of photographs, B = 1 to 4 photographs with distinct, equal or random labels, float64 or
float32.  Mistakes: other running statistics, other weights, the gradient of one layer from another
batch, labels smoothed.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap import Loss, Update

CLASSES = 10
MISTAKES = ("statistics", "weights", "another batch", "smoothing")


class Residual(nn.Module):
    """``a(f(x) + skip(x))``, or ``f(a(x)) + skip(x)`` where the activation comes first."""

    def __init__(self, into: int, out: int, stride: int, activation: nn.Module, first: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(into if first else out)
        self.bn2, self.a, self.first = nn.BatchNorm2d(out), activation, first
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or into != out:
            self.skip = nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of a map."""
        if self.first:
            inner = self.conv2(self.a(self.bn2(self.conv1(self.a(self.bn1(x))))))
            return inner + self.skip(x)
        inner = self.bn2(self.conv2(self.a(self.bn1(self.conv1(x)))))
        return self.a(inner + self.skip(x))


class Dense(nn.Module):
    """``[x, a(f(x))]``."""

    def __init__(self, into: int, growth: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(into, growth, 3, 1, 1, bias=False), nn.BatchNorm2d(growth)
        self.a = activation

    def forward(self, x: Tensor) -> Tensor:
        """Of a map."""
        return torch.cat([x, self.a(self.bn(self.conv(x)))], 1)


@dataclass(frozen=True)
class Case:
    """An update, its true batch, and what it was declared to be."""

    model: nn.Module
    update: Update
    inputs: Tensor
    labels: Tensor
    words: str
    genuine: bool


def drawn(number: int) -> Case:
    """The case of that number."""
    rng = random.Random(number)
    torch.manual_seed(number)
    size, dtype = rng.choice((6, 8, 10)), rng.choice((torch.float64, torch.float32))
    width, batch = rng.choice((6, 12, 24, 40)), rng.choice((1, 1, 2, 3, 4))
    activation: nn.Module = rng.choice((nn.ReLU(), nn.ReLU(), nn.SiLU(), nn.LeakyReLU(0.1)))
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1), copy.deepcopy(activation)]
    for _ in range(rng.choice((1, 2, 3))):
        kind = rng.choice(("residual", "residual", "strided", "first", "dense"))
        if kind == "dense":
            growth = rng.choice((8, 24))
            layers.append(Dense(width, growth, copy.deepcopy(activation)))
            width += growth
        else:
            wider = width * 2 if kind == "strided" else width
            stride = 2 if kind == "strided" else 1
            inside = copy.deepcopy(activation)
            layers.append(Residual(width, wider, stride, inside, kind == "first"))
            width = wider
    more = random.Random(-number - 1)
    if more.random() < 0.4:
        size, layers = more.choice((8, 12, 16)), _stacked(more, activation)
    pooled = rng.random() < 0.8
    layers += [nn.AdaptiveAvgPool2d(1)] if pooled else []
    layers.append(nn.Flatten())
    body = nn.Sequential(*layers)
    x = rgap.photos.load(batch + 17, size, dtype=torch.float32)
    features = body.train()(x).shape[1]
    model = nn.Sequential(body, nn.Linear(features, CLASSES, bias=rng.random() < 0.8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(x[batch:])
    model = model.eval().to(dtype)
    kind = rng.choice(("distinct", "equal", "random"))
    x, labels = x[:batch].to(dtype), _labels(kind, batch)
    mistake = rng.choice(MISTAKES) if rng.random() < 1 / 3 else ""
    update = _sent(model, x, labels, mistake, rng)
    words = f"{size}x{size} width {width} B={batch} {kind} {str(dtype)[6:]} {mistake or 'genuine'}"
    return Case(model, update, x, labels, words, not mistake)


def _stacked(rng: random.Random, activation: nn.Module) -> list[nn.Module]:
    """Convolutions and max-pools one behind the other; the pool before or behind its activation."""
    layers, into, width = list[nn.Module](), 3, rng.choice((12, 32, 48, 64))
    normed, behind = rng.random() < 0.5, rng.random() < 0.8
    for _ in range(rng.choice((1, 2))):
        for last in rng.choice(([True], [False, True])):
            layers.append(nn.Conv2d(into, width, 3, 1, 1))
            layers += [nn.BatchNorm2d(width)] if normed else []
            pool = nn.MaxPool2d(*rng.choice(((2,), (2,), (2,), (3, 2, 1))))
            ends = [copy.deepcopy(activation), pool] if last else [copy.deepcopy(activation)]
            layers += ends if behind else ends[::-1]
            into = width
        width *= 2
    return layers


def _labels(kind: str, batch: int) -> Tensor:
    if kind == "equal":
        return torch.full((batch,), int(torch.randint(CLASSES, ())))
    if kind == "distinct":
        return torch.randperm(CLASSES)[:batch]
    return torch.randint(CLASSES, (batch,))


def _sent(model: nn.Module, x: Tensor, labels: Tensor, mistake: str, rng: random.Random) -> Update:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in other.modules():
            if mistake == "statistics" and isinstance(module, nn.BatchNorm2d):
                module.running_var.mul_(rng.choice((1.001, 1.1)))  # type: ignore[operator]
        if mistake == "weights":
            for parameter in other.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter) * parameter.std())
    if mistake == "smoothing":
        loss = F.cross_entropy(other(x), labels, label_smoothing=0.1)
        sent = torch.autograd.grad(loss, list(other.parameters()))
        names = [name for name, _ in other.named_parameters()]
        plain = replace(rgap.capture(model, x, labels), buffers={})
        return replace(plain, gradients=dict(zip(names, sent, strict=True)), loss=Loss())
    update = replace(rgap.capture(other, x, labels), buffers={})
    if mistake == "another batch":
        name = rng.choice([n for n, p in model.named_parameters() if p.ndim == 4])
        foreign = rgap.capture(model, x.flip(-1) * 0.9, labels)
        return replace(update, gradients={**update.gradients, name: foreign.gradients[name]})
    return update
