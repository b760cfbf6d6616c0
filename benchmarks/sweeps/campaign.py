"""Random networks, losses, batches and mistakes against every certificate of ``invert``.

    OMP_NUM_THREADS=1 python -m benchmarks.sweeps.campaign --cases 500 --first 0

Every case follows from its number alone.  A network (fully connected, convolutions in 1 to 3
dimensions, residual, gated, attention, norms, pools, steps before the first and after the last
layer), a loss, a batch (equal labels, copies, near copies, symmetric, black, two labels for one)
and an update (as captured, a weight difference, noise, scaled, clipped, pruned, of other weights,
one layer changed, every other layer missing ...) are drawn, inverted and judged on
the true batch:

* certified inputs lie within ``error_bound`` of the truth, certified targets are right beside them,
  soft and real-valued ones within ``targets_error_bound``;
* ``EXACT`` says both, and nothing else does; ``determined`` entries lie within the bound;
* a stated ``scale`` is the true one; a genuine update is never ``INCONSISTENT``;
* nothing raises anything but ``ValueError`` and ``TypeError`` with a sentence of the library's; a
  genuine update is refused only where it underflowed to zeros.

Exits with 1 on a wrong certificate.  ``--case N`` prints one case in full.  ``--genuine`` draws
updates that are what they declare, of up to eight samples and through every format they may be
sent in: each ``INCONSISTENT`` is a fault, and counts for the exit code.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import itertools
import json
import math
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from residual import Residual
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from rgap import Loss, Update

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Sigmoid, nn.Tanh, nn.ReLU, lambda: nn.LeakyReLU(0.2), nn.ELU, nn.SELU, nn.Softplus,
    nn.GELU, nn.SiLU, nn.Softsign, nn.PReLU, nn.Hardtanh, nn.ReLU6, nn.CELU, nn.LogSigmoid,
    nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink, nn.Softshrink, nn.Identity,
]  # fmt: skip


FEW = 5  # samples of which every order is tried


class Step(nn.Module):
    """A function as a module, with its name for the reader."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        """One pass."""
        return self.function(x)

    def extra_repr(self) -> str:
        """Name of the step."""
        return self.name


class Gated(nn.Module):
    """a(x) * sigmoid(b(x))."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.value = nn.Linear(inputs, outputs, bias=bias)
        self.gate = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """One pass."""
        return self.value(x) * torch.sigmoid(self.gate(x))


class Beside(nn.Module):
    """x and f(x) one beside the other, along the channels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """One pass."""
        return torch.cat((x, self.inner(x)), 1)


class Attention(nn.Module):
    """Self-attention over tokens of width d, mean over tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """One pass."""
        return x + self.inner(x, x, x, need_weights=False)[0]


BEFORE: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("x*2-1", lambda x: x * 2 - 1),
    ("(x-.5)/.25", lambda x: (x - 0.5) / 0.25),
    ("-x", lambda x: -x),
    ("x*x", lambda x: x * x),
    ("tanh", torch.tanh),
    ("flip", lambda x: x.flip(-1)),
    ("roll", lambda x: x.roll(1, -1)),
    ("drop last", lambda x: x[..., :-1]),
    ("clamp", lambda x: x.clamp(0.2, 0.8)),
    ("relu(x-.3)", lambda x: F.relu(x - 0.3)),
    ("abs(x-.5)", lambda x: (x - 0.5).abs()),
    ("layer_norm", lambda x: F.layer_norm(x, x.shape[1:])),
    ("minus mean", lambda x: x - x.mean(-1, keepdim=True)),
    ("normalize", lambda x: F.normalize(x.flatten(1), dim=1).reshape(x.shape)),
    ("sqrt", lambda x: (x + 0.1).sqrt()),
    ("exp", torch.exp),
    ("sin 6x", lambda x: torch.sin(6 * x)),
]
AFTER: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("softmax", lambda z: z.softmax(1)),
    ("z/0.07", lambda z: z / 0.07),
    ("-z", lambda z: -z),
    ("z+mask", lambda z: z + torch.tensor([0.0] * (z.shape[1] - 1) + [-1e9]).to(z)),
    ("2sigmoid", lambda z: 2 * torch.sigmoid(z)),
    ("tanh", torch.tanh),
    ("5tanh(z/5)", lambda z: 5 * torch.tanh(z / 5)),
    ("flip", lambda z: z.flip(1)),
    ("drop first", lambda z: z[:, 1:]),
    ("z - mean", lambda z: z - z.mean(1, keepdim=True)),
    ("log_softmax", lambda z: z.log_softmax(1)),
    ("normalize", lambda z: F.normalize(z, dim=1)),
    ("relu", F.relu),
    ("clamp", lambda z: z.clamp(-0.3, 0.3)),
    ("abs", torch.abs),
    ("cat", lambda z: torch.cat((z, z.sum(1, keepdim=True)), 1)),
    ("pad", lambda z: F.pad(z, (0, 1))),
    ("z*z", lambda z: z * z),
    ("cube", lambda z: z**3),
    ("cumsum", lambda z: z.cumsum(1)),
    ("layer_norm", lambda z: F.layer_norm(z, z.shape[1:])),
]


@dataclasses.dataclass
class Case:
    """One drawn case: what the client has, what it sends and what it says."""

    number: int
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Loss
    update: Update
    options: dict[str, Any]
    mistake: str
    genuine: bool
    scale: float | None
    words: str


def network(r: random.Random) -> tuple[nn.Module, tuple[int, ...], int]:
    """A random network, the shape of a sample and the number of outputs."""
    kind = r.choice(["mlp"] * 4 + ["conv2"] * 4 + ["conv1", "conv3", "res", "gated", "attention"])
    act = r.choice(ACTIVATIONS)
    bias = r.random() < 0.8
    classes = r.choice([1, 2, 3, 5, 8, 10])
    parts: list[nn.Module] = []
    if r.random() < 0.2:
        parts.append(Step(*r.choice(BEFORE)))
    if kind in ("mlp", "res", "gated"):
        shape: tuple[int, ...] = r.choice([(r.randint(3, 20),), (2, 3, 3), (1, 4, 4)])
        parts.append(nn.Flatten())
    elif kind == "attention":
        shape = (r.randint(2, 4), 8)
    else:
        d = int(kind[-1])
        channels = r.randint(1, 3)
        shape = (channels, *(r.randint(4, 6 if d == 3 else 9) for _ in range(d)))
        groups = 1
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[d - 1]
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1]
        pools: list[Callable[[], nn.Module]] = [
            lambda: (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[d - 1](2),
            lambda: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[d - 1](2),
        ]
        width = channels
        for layer in range(r.randint(1, 2)):
            out = width * r.randint(1, 6) if r.random() < 0.3 else r.randint(2, 12)
            groups = width if r.random() < 0.2 and out % width == 0 else 1
            parts.append(
                conv(
                    width, out, r.choice([1, 2, 3, 3]), r.choice([1, 1, 2, 3]), r.choice([0, 1, 1]),
                    r.choice([1, 1, 2]), groups, bias,
                    padding_mode=r.choice(["zeros"] * 4 + ["circular", "reflect", "replicate"]),
                )
            )  # fmt: skip
            width = out
            if r.random() < 0.1:
                parts.append(up(width, width, 2, r.choice([1, 2]), bias=bias))
            if r.random() < 0.1:
                parts.append(Beside(nn.Sequential(conv(width, 4, 1, bias=bias), act())))
                width += 4
            if r.random() < 0.2:
                parts.append(r.choice([norm, norm, partial(nn.GroupNorm, 1)])(width))
            parts.append(act())
            if layer == 0 and r.random() < 0.2:
                parts.append(r.choice(pools)())
        parts.append(nn.Flatten())
    probe = torch.rand(2, *shape)
    with torch.no_grad():
        got = nn.Sequential(*parts).eval()(probe) if parts else probe
    width = got.shape[-1]
    if kind == "attention":
        parts += [nn.Linear(width, 8), Attention(8, r.choice([1, 2]))]
        if r.random() < 0.5:
            parts.append(nn.LayerNorm(8))
        parts.append(Step("mean tokens", lambda x: x.mean(1)) if r.random() < 0.5 else nn.Flatten())
        width = 8 if isinstance(parts[-1], Step) else 8 * shape[0]
    for _ in range(r.randint(0, 3)):
        out = r.randint(2, 30)
        if kind == "gated":
            parts.append(Gated(width, out, bias))
        else:
            parts.append(nn.Linear(width, out, bias=bias))
            if kind == "res" and r.random() < 0.7:
                parts.append(Residual(nn.Sequential(nn.Linear(out, out, bias=bias), act())))
            if r.random() < 0.15:
                parts.append(r.choice([nn.LayerNorm, nn.BatchNorm1d])(out))
            parts.append(act())
        if r.random() < 0.1:
            parts.append(nn.Dropout(0.3))
        width = out
    parts.append(nn.Linear(width, classes, bias=bias or r.random() < 0.5))
    if r.random() < 0.25 and classes > 2:
        parts.append(Step(*r.choice(AFTER)))
    model = nn.Sequential(*parts).eval()
    style = r.choice(["default"] * 4 + ["wide", "saturated", "dead", "uniform"])
    with torch.no_grad():
        for p in model.parameters():
            if style == "wide":
                p.mul_(3)
            elif style == "saturated":
                p.mul_(15)
            elif style == "uniform":
                p.uniform_(-0.5, 0.5)
            elif style == "dead" and p.ndim == 1:
                p.sub_(0.5)
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
                m.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    with torch.no_grad():
        outputs = model(torch.rand(2, *shape)).shape[1]
    return model, shape, outputs


def draw_loss(r: random.Random, outputs: int, last: str) -> tuple[Loss, str]:
    """A loss and the kind of its targets."""
    if last == "log_softmax" and r.random() < 0.6:
        return Loss("nll_loss", r.choice(["mean", "sum"])), "index"
    if last in ("softmax",) and r.random() < 0.4:
        return Loss("binary_cross_entropy", targets="probability"), "unit"
    reduction = r.choice(["mean", "mean", "mean", "sum"])
    if outputs == 1:
        name = r.choice(["binary_cross_entropy_with_logits", "mse_loss", "sigmoid_focal_loss"])
    else:
        name = r.choice(
            ["cross_entropy"] * 6
            + ["mse_loss", "binary_cross_entropy_with_logits", "focal_loss", "sigmoid_focal_loss"]
            + ["own", "soft", "smooth", "weight", "own"]
        )
    if name == "own":
        own: list[Callable[[Any, Any], Tensor]] = [
            lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean(),
            lambda z, y: 0.5 * F.cross_entropy(z, y),
            lambda z, y: F.multi_margin_loss(z, y),
        ]
        return Loss("own", function=r.choice(own)), "index"
    if name == "soft":
        return Loss("cross_entropy", reduction, targets="probability"), "soft"
    if name == "smooth":
        return Loss("cross_entropy", reduction, 0.1), "index"
    if name == "weight":
        weight = tuple(r.uniform(0.3, 3) for _ in range(outputs))
        return Loss(r.choice(["cross_entropy", "focal_loss"]), reduction, weight=weight), "index"
    if name == "mse_loss":
        return Loss(name, reduction), "value"
    if name == "binary_cross_entropy_with_logits":
        pos = (r.uniform(0.5, 4),) if r.random() < 0.2 else None
        if r.random() < 0.2:
            return Loss(name, reduction, targets="probability", pos_weight=pos), "unit"
        return Loss(name, reduction, pos_weight=pos), "binary"
    if name == "sigmoid_focal_loss":
        return Loss(name, reduction, alpha=r.choice([None, 0.25])), "binary"
    return Loss(name, reduction), "index"


def draw_targets(r: random.Random, kind: str, batch: int, outputs: int) -> Tensor:
    """Admissible targets; equal labels and one-hot values more often than by chance."""
    if kind == "index":
        if r.random() < 0.3:
            return torch.full((batch,), r.randrange(outputs))
        return torch.randint(outputs, (batch,))
    if kind == "soft":
        return torch.rand(batch, outputs).softmax(1)
    if kind == "unit":
        return torch.rand(batch, outputs)
    if kind == "binary":
        return torch.randint(2, (batch, outputs)).float()
    if r.random() < 0.5:
        return F.one_hot(torch.randint(outputs, (batch,)), outputs).float()
    return torch.randn(batch, outputs)


STYLES = [
    "copies", "near", "binary", "zero", "wide", "two labels", "symmetric", "black", "saturated",
    "one colour",
]  # fmt: skip
MISTAKES = [
    "none", "none", "none", "none", "none", "delta", "delta", "noise stated", "noise unstated",
    "noise understated", "scale", "scale", "clip", "per-sample clip", "sum for mean", "wrong B",
    "B unknown", "other weights", "wrong labels", "right labels", "pruned", "quantised", "prefix",
    "arrays", "cast half", "sign", "decay", "two steps", "frozen", "other loss", "unknown loss",
    "train", "one weight off", "int8", "noise uneven", "layer changed", "layer changed",
    "entry changed", "layer of another", "even frozen", "underflow",
]  # fmt: skip
CHANGED = {"layer changed", "entry changed", "layer of another", "even frozen", "underflow"}


def draw(number: int) -> Case:
    """The case of a number."""
    r = random.Random(number)
    torch.manual_seed(number)
    while True:
        try:
            model, shape, outputs = network(r)
            break
        except (RuntimeError, ValueError):
            continue
    last = model[-1].name if isinstance(model[-1], Step) else ""  # type: ignore[index]
    dtype = r.choice([torch.float64, torch.float32, torch.float32, torch.float32])
    batch = r.choice([1, 1, 1, 2, 2, 3, 4, 5])
    loss, kind = draw_loss(r, outputs, last)
    inputs = torch.rand(batch, *shape, dtype=torch.float64)
    style = r.choice(["plain"] * 5 + STYLES)
    if style == "copies" and batch > 1:
        inputs[1] = inputs[0]
    elif style == "near" and batch > 1:
        inputs[1] = inputs[0] + 10 ** r.uniform(-9, -2) * torch.rand(shape, dtype=torch.float64)
    elif style == "binary":
        inputs = (inputs > 0.5).double()
    elif style == "zero":
        inputs = inputs * (inputs > 0.7)
    elif style == "wide":
        inputs = inputs * 20 - 10
    elif style == "symmetric":
        inputs = (inputs + inputs.flip(-1)) / 2
    elif style == "black":
        inputs[0] = 0
    elif style == "saturated":
        inputs = (inputs * 3 - 1).clamp(0, 1)
    elif style == "one colour":
        inputs[:] = inputs.flatten(1)[:, :1].reshape(-1, *[1] * len(shape))
    elif style == "two labels" and batch > 1:
        inputs[1] = inputs[0]
    model = model.to(dtype)
    inputs = inputs.to(dtype)
    targets = draw_targets(r, kind, batch, outputs)
    if style == "copies" and batch > 1 and r.random() < 0.6:
        targets[1] = targets[0]
    if style == "two labels" and kind == "index" and batch > 1:
        targets[1] = (targets[0] + 1) % outputs
    if targets.is_floating_point():
        targets = targets.to(dtype)
    trained = r.random() < 0.2
    if trained:
        descent = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(30):
            descent.zero_grad()
            loss(model(inputs), targets).backward()
            descent.step()
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            return draw(number + 10**6)
    model.zero_grad()
    span = None if r.random() < 0.3 else ((-10.0, 10.0) if style == "wide" else (0.0, 1.0))
    mistake = r.choice(MISTAKES)
    try:
        sent = rgap.capture(model, inputs, targets, loss, value_range=span)
    except ValueError:
        return draw(number + 10**6)
    if not any(bool(g.any()) for g in sent.gradients.values()):
        return draw(number + 10**6)
    case = Case(number, model, inputs, targets, loss, sent, {}, mistake, True, 1.0, "")
    spoil(case, r)
    case.words = (
        f"{mistake} | B={batch} {style} | {loss.name} {loss.reduction} {kind} "
        f"{str(dtype)[6:]}{' trained' if trained else ''} | shape {shape} | {case.words}"
    )
    return case


def plain_network(r: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A network without norms: fully connected, convolutions, skips, pools; small to middle."""
    kind = r.choice(["mlp", "skip", "conv", "conv", "conv skip", "pooled"])
    act, classes = r.choice(ACTIVATIONS), r.choice([1, 2, 3, 5, 10, 10])
    bias = r.random() < 0.8
    parts: list[nn.Module] = []
    if kind in ("mlp", "skip"):
        shape: tuple[int, ...] = (r.choice([4, 8, 16, 30, 64]),)
    else:
        shape = (r.randint(1, 3), *([r.choice([6, 8, 9, 12])] * 2))
        width = shape[0]
        for layer in range(r.randint(1, 2)):
            out, size = r.choice([4, 8, 12, 16]), r.choice([1, 3, 3, 5])
            stride = r.choice([1, 1, 2, 3])
            parts += [nn.Conv2d(width, out, size, stride, size // 2, bias=bias), act()]
            width = out
            if kind == "conv skip" and r.random() < 0.7:
                parts.append(Residual(nn.Sequential(nn.Conv2d(out, out, 3, padding=1), act())))
            if kind == "pooled" and layer == 0:
                parts.append(r.choice([nn.AvgPool2d, nn.MaxPool2d])(2))
        parts.append(nn.Flatten())
    width = nn.Sequential(*parts)(torch.rand(2, *shape)).shape[1]
    for _ in range(r.randint(0 if parts else 1, 2)):
        out = r.choice([6, 12, 24, 40, 80])
        parts += [nn.Linear(width, out, bias=bias), act()]
        if kind == "skip" and r.random() < 0.8:
            parts.append(Residual(nn.Sequential(nn.Linear(out, out, bias=bias), act())))
        width = out
    parts.append(nn.Linear(width, classes, bias=bias or r.random() < 0.5))
    model = nn.Sequential(*parts).eval()
    gain = r.choice([1.0, 1.0, 1.0, 3.0, 10.0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model, shape


def draw_genuine(number: int) -> Case:
    """The genuine case of a number: no mistake, but any format, batch and stated labels."""
    r = random.Random(f"genuine {number}")
    torch.manual_seed(number)
    while True:
        try:
            model, shape = plain_network(r)
            break
        except (RuntimeError, ValueError):
            continue
    dtype = r.choice([torch.float64, torch.float32, torch.float32])
    batch, outputs = r.randint(1, 8), model[-1].out_features  # type: ignore[index]
    loss, kind = draw_loss(r, outputs, "")
    model = model.to(dtype)
    inputs = torch.rand(batch, *shape, dtype=dtype)
    targets = draw_targets(r, kind, batch, outputs)
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    sent = rgap.capture(model, inputs, targets, loss, value_range=(0.0, 1.0))
    if not any(bool(g.any()) for g in sent.gradients.values()):
        return draw_genuine(number + 10**6)
    way = r.choice(["none", "none", "cast half", "int8", "noise stated", "delta", "B unknown"])
    case = Case(number, model, inputs, targets, loss, sent, {}, way, True, 1.0, "")
    spoil(case, r)
    if r.random() < 0.3:
        case.options["labels"] = case.targets
    case.words = (
        f"{way} | B={batch} | {loss.name} {loss.reduction} {kind} {str(dtype)[6:]}"
        f"{' labels' * ('labels' in case.options)} | shape {shape} | {case.words}"
    )
    return case


def spoil(case: Case, r: random.Random) -> None:
    """The mistake of a case, on its update, options and truth."""
    update, model, mistake = case.update, case.model, case.mistake
    gradients = {n: g.clone() for n, g in update.gradients.items()}
    batch = len(case.inputs)

    def become(**fields: Any) -> None:
        case.update = dataclasses.replace(update, **fields)

    size = math.sqrt(
        sum(float(g.double().square().sum()) for g in gradients.values())
        / sum(g.numel() for g in gradients.values())
    )
    if mistake in CHANGED:
        _change(case, gradients, r)
    elif mistake == "noise uneven":
        sigmas = {n: float(g.square().mean()) ** 0.5 * 10 ** r.uniform(-7, -1) * (r.random() < 0.7)
                  for n, g in gradients.items()}  # fmt: skip
        become(
            gradients={n: g + sigmas[n] * torch.randn_like(g) for n, g in gradients.items()},
            noise={n: torch.full_like(g, sigmas[n]) for n, g in gradients.items()},
        )
    elif mistake in ("delta", "decay"):
        lr = 10 ** r.uniform(-5, 0)
        decay = r.choice([0.0, 1e-2]) if mistake == "decay" else 0.0
        lied = mistake == "decay" and decay and r.random() < 0.5
        after = {
            n: p.detach() - lr * (gradients[n] + decay * p.detach())
            for n, p in model.named_parameters()
        }
        before = {n: p.detach() for n, p in model.named_parameters()}
        case.update = Update.from_delta(
            before, after, lr, weight_decay=0.0 if lied else decay, loss=update.loss,
            batch_size=batch, input_shape=update.input_shape, value_range=update.value_range,
        )  # fmt: skip
        case.genuine = not lied
        case.words += f"lr={lr:.1e} decay={decay} lied={bool(lied)} "
    elif mistake.startswith("noise"):
        sigma = size * 10 ** r.uniform(-7, -1)
        become(gradients={n: g + sigma * torch.randn_like(g) for n, g in gradients.items()})
        if mistake == "noise stated":
            case.options["noise"] = sigma
        elif mistake == "noise understated":
            case.options["noise"] = sigma / r.choice([3, 10, 100])
        case.genuine = mistake == "noise stated"
        case.words += f"sigma={sigma:.1e} "
    elif mistake in ("scale", "clip"):
        factor = r.choice([0.5, 2.0**16, 2.0**-10, 3.7, 0.1])
        if mistake == "clip":
            factor = min(1.0, r.random() / (size + 1e-30))
        become(gradients={n: g * factor for n, g in gradients.items()})
        case.genuine, case.scale = False, factor
    elif mistake == "sum for mean" and case.loss.reduction == "mean" and not case.loss.own:
        other = dataclasses.replace(case.loss, reduction="sum")
        become(gradients=_sent(case, other).gradients)
        case.genuine, case.scale = False, None
    elif mistake == "per-sample clip" and case.loss.reduction == "mean":
        norms = [r.uniform(0.1, 1) for _ in range(batch)]
        total = {n: torch.zeros_like(g) for n, g in gradients.items()}
        for row, norm in enumerate(norms):
            one = rgap.capture(
                model, case.inputs[row : row + 1], case.targets[row : row + 1], case.loss,
                value_range=None,
            ).gradients  # fmt: skip
            for n in total:
                total[n] += norm * one[n] / batch
        become(gradients=total)
        case.genuine, case.scale = False, None
    elif mistake == "wrong B":
        become(batch_size=max(1, batch + r.choice([-1, 1, 2])))
        case.genuine, case.scale = batch == case.update.batch_size, None
    elif mistake == "B unknown":
        become(batch_size=None)
    elif mistake == "other weights":
        torch.manual_seed(case.number + 1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(10 ** r.uniform(-7, 0) * torch.randn_like(p))
        case.genuine, case.scale = False, None
    elif mistake == "one weight off":
        with torch.no_grad():
            p = r.choice(list(model.parameters()))
            p.view(-1)[0] += 10 ** r.uniform(-4, 0)
        case.genuine, case.scale = False, None
    elif mistake in ("wrong labels", "right labels"):
        wrong = case.targets.clone()
        if mistake == "wrong labels":
            if wrong.is_floating_point():
                wrong = 1 - wrong
            else:
                wrong = (wrong + 1) % max(2, case.update.gradients[list(gradients)[-1]].shape[0])
            case.genuine, case.scale = False, None
        case.options["labels"] = wrong
    elif mistake == "pruned":
        share = r.choice([0.1, 0.5, 0.9])
        for n, g in gradients.items():
            k = int(share * g.numel())
            if k:
                gradients[n] = g * (g.abs() > g.abs().flatten().kthvalue(k).values)
        become(gradients=gradients)
        case.genuine, case.scale = False, None
    elif mistake in ("quantised", "int8"):
        for n, g in gradients.items():
            step = float(g.abs().max()) / 127 or 1.0
            gradients[n] = (g / step).round() * step
        become(gradients=gradients)
        case.genuine = case.genuine and mistake == "int8"
    elif mistake == "prefix":
        prefix = r.choice(["module.", "_orig_mod.", "_module.", "net."])
        become(gradients={prefix + n: g for n, g in gradients.items()})
    elif mistake == "arrays":
        arrays = [g.numpy() for g in gradients.values()]
        shapes = [a.shape for a in arrays]
        if r.random() < 0.5 and len(set(shapes)) == len(shapes):
            r.shuffle(arrays)
        case.update = Update.from_ndarrays(
            model, arrays, loss=update.loss, batch_size=batch, input_shape=update.input_shape,
            value_range=update.value_range,
        )  # fmt: skip
        case.genuine = False
    elif mistake == "cast half":
        half = r.choice([torch.float16, torch.bfloat16])
        become(gradients={n: g.to(half).to(g.dtype) for n, g in gradients.items()})
        case.words += f"{half} "
    elif mistake == "sign":
        become(gradients={n: -g for n, g in gradients.items()})
        case.genuine, case.scale = False, None
    elif mistake == "two steps":
        lr = 10 ** r.uniform(-3, -0.5)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        steps = 2
        with torch.no_grad():
            for _ in range(steps):
                g = _sent(case, case.loss).gradients
                for n, p in model.named_parameters():
                    p.sub_(lr * g[n])
            after = {n: p.detach().clone() for n, p in model.named_parameters()}
            for n, p in model.named_parameters():
                p.copy_(before[n])
        case.update = Update.from_delta(
            before, after, lr, 1 if r.random() < 0.7 else 2, loss=update.loss, batch_size=batch,
            input_shape=update.input_shape, value_range=update.value_range,
        )  # fmt: skip
        case.genuine, case.scale = False, None
    elif mistake == "frozen":
        names = list(gradients)
        for n in r.sample(names, r.randint(1, max(1, len(names) // 2))):
            dict(model.named_parameters())[n].requires_grad_(False)
            gradients.pop(n)
        if gradients:
            become(gradients=gradients)
        else:
            case.mistake = "none"
            model.requires_grad_(True)
    elif mistake == "other loss":
        become(loss=r.choice([Loss(), Loss("mse_loss"), Loss("cross_entropy", label_smoothing=0.1),
                              Loss("binary_cross_entropy_with_logits")]))  # fmt: skip
        case.genuine, case.scale = False, None
    elif mistake == "unknown loss":
        become(loss=Loss("unknown"))
        case.scale = None
    elif mistake == "train":
        model.train()
        case.genuine = False


def _change(case: Case, gradients: dict[str, Tensor], r: random.Random) -> None:
    """Gradients of one layer that are not those of the client's batch, or are missing."""
    layers = sorted({name.rpartition(".")[0] for name in gradients})
    which, mistake = r.choice(layers), case.mistake
    if len(layers) == 1 and mistake != "underflow":
        return  # what one layer sends is another batch's then
    if mistake == "even frozen":
        for name in [n for n in gradients if layers.index(n.rpartition(".")[0]) % 2]:
            gradients.pop(name)
            case.model.get_parameter(name).requires_grad_(False)
    elif mistake == "underflow":
        tiny = torch.finfo(case.inputs.dtype).tiny
        gradients = {n: g * (r.choice([1.0, 1e4]) * tiny) / (g.abs().max() + tiny)
                     for n, g in gradients.items()}  # fmt: skip
        case.genuine, case.scale = False, None
    else:
        of_layer = [n for n in gradients if n.rpartition(".")[0] == which]
        if mistake == "layer of another":
            inputs = case.inputs.flip(-1) * 0.9 + 0.03
            other = rgap.capture(case.model, inputs, case.targets, case.loss, value_range=None)
            gradients.update({n: other.gradients[n] for n in of_layer})
        elif mistake != "entry changed":
            factor = 1 + r.choice([-1, 1]) * 10 ** r.uniform(-6, 0)
            some = of_layer if r.random() < 0.5 else [r.choice(of_layer)]
            gradients.update({n: gradients[n] * factor for n in some})
            case.words += f"{some} times {factor:.8g} "
        else:
            name = r.choice(of_layer)
            flat = gradients[name].view(-1)
            flat[r.randrange(len(flat))] += float(flat.abs().max()) * 10 ** r.uniform(-6, 1)
        case.genuine, case.scale = False, None
    case.update = dataclasses.replace(case.update, gradients=gradients)


def _sent(case: Case, loss: Loss) -> Update:
    return rgap.capture(case.model, case.inputs, case.targets, loss, value_range=None)


def judge(case: Case, found: rgap.Recovery) -> list[str]:
    """What is wrong with a recovery, beside the truth; "wrong ..." for certificates."""
    faults: list[str] = []
    both = found.certified == {"inputs", "targets"}
    if (found.status is rgap.Status.EXACT) != both:
        faults.append(f"status {found.status.name} with certified {sorted(found.certified)}")
    bound = found.error_bound
    truth, size = case.inputs.double(), len(case.inputs)
    rounding = 4 * torch.finfo(case.inputs.dtype).eps * float(truth.abs().max())
    if found.certified and (found.inputs is None or bound is None) and "inputs" in found.certified:
        faults.append("wrong inputs: certified without inputs or bound")
    elif "inputs" in found.certified:
        assert found.inputs is not None and bound is not None
        rows, labels = found.inputs.double(), found.labels
        if found.multiplicities is not None:
            rows = rows.repeat_interleave(found.multiplicities, 0)
            if labels is not None:
                labels = labels.repeat_interleave(found.multiplicities, 0)
        stated = case.update.batch_size
        if stated != size and "labels" not in case.options and len(rows) != size:
            faults += stands_for(case, rows, labels, bound + rounding)
        elif len(rows) != size:
            faults.append(f"wrong inputs: {len(rows)} rows for {size}")
        else:
            best, _ = nearest(rows, truth)
            if best > bound + rounding:
                faults.append(f"wrong inputs: off by {best:.2g}, bound {bound:.2g}")
            elif "targets" in found.certified:
                if labels is None:
                    faults.append("wrong targets: certified, but none")
                elif case.update.loss == case.loss and (
                    case.genuine or case.loss.targets == "index"
                ):  # a soft or real-valued target takes up what was misstated
                    own = found.targets_error_bound
                    faults += targets_wrong(case, labels, rows, truth, bound + rounding, own)
    elif "targets" in found.certified and found.labels is None:
        faults.append("wrong targets: certified, but none")
    if found.partial is not None and found.determined is not None:
        if bound is None:
            faults.append("partial without a bound")
        elif len(found.partial) == size <= FEW:
            worst = min(
                _partly(found.partial[list(p)].double(), found.determined[list(p)], truth)
                for p in itertools.permutations(range(size))
            )
            if worst > bound + rounding:
                faults.append(f"wrong partial: off by {worst:.2g}, bound {bound:.2g}")
        if not bool((found.partial.isnan() == ~found.determined).all()):
            faults.append("partial is not NaN where open")
    free = case.loss.targets != "index" and "labels" not in case.options
    judged = isinstance(found.scale, float) and not free and bool(found.certified)
    if judged and case.scale is not None and abs(found.scale / case.scale - 1) > 0.05:
        faults.append(f"wrong scale {found.scale:.4g}, true {case.scale:.4g}")
    if case.genuine and found.status is rgap.Status.INCONSISTENT:
        faults.append(f"inconsistent: {found.reason[:260]}")
    return faults


def stands_for(case: Case, rows: Tensor, labels: Tensor | None, bound: float) -> list[str]:
    """Faults of fewer rows than a batch has: each stands for those near it.

    Of a batch that was stated too small, the rows have to be samples of it, not all of them.
    """
    truth, wanted = case.inputs.double().flatten(1), case.targets.double()
    gaps = (rows.flatten(1)[:, None] - truth[None]).abs().amax(2)
    if labels is not None:
        given = labels.double().reshape(len(rows), -1)
        same = (given[:, None] - wanted.reshape(len(truth), -1)[None]).abs().amax(2) < 1e-3
        gaps = torch.where(same, gaps, math.inf)
    worst = float(gaps.amin(1).max())
    if case.update.batch_size is None:
        worst = max(worst, float(gaps.amin(0).max()))
    return [f"wrong inputs: {worst:.2g} from the nearest, bound {bound:.2g}"] * (worst > bound)


def nearest(rows: Tensor, truth: Tensor) -> tuple[float, list[int]]:
    """Smallest largest error over the orders of a batch, and the order."""
    best, which = math.inf, list(range(len(rows)))
    if len(rows) > FEW:
        gaps = (rows.reshape(truth.shape)[:, None] - truth[None]).abs().flatten(2).amax(2)
        which = linear_sum_assignment(gaps.T.numpy())[1].tolist()
        return float((rows[which].reshape(truth.shape) - truth).abs().max()), which
    for order in itertools.permutations(range(len(rows))):
        error = float((rows[list(order)].reshape(truth.shape) - truth).abs().max())
        if error < best:
            best, which = error, list(order)
    return best, which


def targets_wrong(
    case: Case, labels: Tensor, rows: Tensor, truth: Tensor, bound: float, own: float | None
) -> list[str]:
    """Faults of certified targets in any order that the inputs' bound allows, beyond their own."""
    wanted = case.targets.double()
    if labels.numel() != wanted.numel():
        return [f"wrong targets: shape {tuple(labels.shape)}"]
    given = labels.double().reshape(wanted.shape)
    worst = math.inf
    orders = itertools.permutations(range(len(rows)))
    for order in orders if len(rows) <= FEW else [nearest(rows, truth)[1]]:
        if float((rows[list(order)].reshape(truth.shape) - truth).abs().max()) <= bound:
            worst = min(worst, float((given[list(order)] - wanted).abs().max()))
    near = (own or 0.0) + 4 * torch.finfo(case.inputs.dtype).eps * (1 + float(wanted.abs().max()))
    return [f"wrong targets: off by {worst:.2g}, bound {own}"] if worst > near else []


def _partly(partial: Tensor, determined: Tensor, truth: Tensor) -> float:
    gap = (partial - truth)[determined]
    return float(gap.abs().max()) if gap.numel() else 0.0


class LateError(Exception):
    """A case took longer than it may."""


def _late(*_: object) -> None:
    raise LateError


def run(case: Case, limit: int, checked: bool) -> tuple[str, list[str]]:
    """Status and faults of one case."""
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(limit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = rgap.invert(case.model, case.update, **case.options)
                status, faults = found.status.name, judge(case, found)
                if found.certified and status != "EXACT":
                    status += "+" + "+".join(sorted(found.certified))
                if found.partial is not None:
                    status += "+partial"
                found.explain()
                json.dumps(found.summary())
            except (ValueError, TypeError) as error:
                status, faults = "REFUSED", refusal(error)
                silent = not any(bool(g.any()) for g in case.update.gradients.values())
                if case.genuine and not silent:
                    faults.append(f"refused: {str(error)[:200]}")
            if checked:
                extra = {k: v for k, v in case.options.items() if k in ("noise", "labels")}
                try:
                    seen = rgap.check(case.model, case.update, **extra)
                    seen.explain()
                    if (
                        case.genuine
                        and not seen.ok
                        and case.mistake
                        in (
                            "none",
                            "delta",
                            "noise stated",
                            "right labels",
                            "decay",
                            "unknown loss",
                            "frozen",
                        )
                    ):
                        faults.append(f"check: {seen.best.sentence[:300] if seen.best else ''}")
                except (ValueError, TypeError) as error:
                    faults += refusal(error)
    except LateError:
        return "LATE", ["late"]
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = next(
            (f"{Path(f.filename).name}:{f.lineno}" for f in
             reversed(traceback.extract_tb(error.__traceback__)) if "/rgap/" in f.filename), "?",
        )  # fmt: skip
        return "TRACEBACK", [f"traceback {type(error).__name__} at {where} ({last.name}): {error}"]
    finally:
        signal.alarm(0)
    return status, faults


def refusal(error: Exception) -> list[str]:
    """A fault if a ValueError was not raised by a line of ours, or has no sentence."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    roots = ("/rgap/", "/analysis/", "/solvers/")
    if not any(root in last.filename for root in roots) or "site-packages" in last.filename:
        return [f"traceback {type(error).__name__} from {last.filename}:{last.lineno}: {error}"]
    if len(str(error)) < 20:
        return [f"traceback {type(error).__name__} without a sentence: {error}"]
    return []


def main() -> int:
    """Run the campaign; 1 if a certificate is wrong."""
    parser = Arguments(__doc__, cases=4)
    parser.add_argument("--cases", type=int, default=500, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="one case, in full")
    parser.add_argument("--limit", type=int, default=20, help="seconds a case may take")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--mistake", help="only cases of this kind")
    parser.add_argument("--genuine", action="store_true", help="updates without any mistake")
    parser.add_argument("--check", action="store_true", help="also run rgap.check on each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    importlib.import_module("torch.utils._sympy.functions")  # loaded late; no alarm may cut that
    drawn = draw_genuine if arguments.genuine else draw
    if arguments.case is not None:
        case = drawn(arguments.case)
        print(case.model, case.words, case.options, sep="\n")
        print("truth", case.inputs.flatten(1)[:, :8], case.targets, sep="\n")
        status, faults = run(case, 600, True)
        print(status, *faults, sep="\n  ")
        try:
            found = rgap.invert(case.model, case.update, **case.options)
            print(found.explain(), found.scale, found.certified, found.labels, sep="\n")
        except Exception:
            traceback.print_exc()
        return 0
    began, counts, kinds = time.perf_counter(), collections.Counter[str](), collections.Counter()
    done = 0
    for number in range(arguments.first, arguments.first + arguments.cases):
        if time.perf_counter() - began > arguments.seconds:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                case = drawn(number)
            except Exception as error:
                if isinstance(error, ValueError) and "NaN or infinity" in str(error):
                    counts["OVERFLOWED"] += 1  # the case's format cannot hold its gradient
                    continue
                print(f"DRAW {number}: {type(error).__name__}: {error}", flush=True)
                kinds["draw"] += 1
                continue
        if arguments.mistake and case.mistake != arguments.mistake:
            continue
        status, faults = run(case, arguments.limit, arguments.check)
        done += 1
        counts[status] += 1
        for fault in faults:
            kinds[" ".join(fault.split()[:2]).rstrip(":")] += 1
            print(f"{number} {status} [{case.words}] {fault}", flush=True)
    print(f"{done} cases in {time.perf_counter() - began:.0f} s")
    for title, table in (("statuses", counts), ("faults", kinds)):
        print(title + ": " + ", ".join(f"{k} {v}" for k, v in table.most_common()))
    wrong = ("wrong", "inconsistent") if arguments.genuine else ("wrong",)
    return int(any(k.startswith(wrong) for k in kinds))


if __name__ == "__main__":
    sys.exit(main())
