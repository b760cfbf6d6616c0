"""Small networks in the spellings that people use, for ranks: what is read, shared, or averaged.

Every entry says the shape of a sample and, by the name of a layer, how many entries stand ahead of
the step that leads into it, where one discards.  They are written down by hand, not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from written import Written

Forward = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A network, the shape of its input, and what stands ahead of steps that discard."""

    parts: Callable[[], dict[str, object]]
    forward: Forward
    shape: tuple[int, ...]
    ahead: dict[str, int] = field(default_factory=dict)
    steps: dict[str, tuple[int, int]] = field(default_factory=dict)  # rows of kind "step"

    def build(self, seed: int = 0) -> nn.Module:
        """Weights of ``seed``, float64, eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Written(self.forward, **self.parts()).double().eval()
            with torch.no_grad():  # statistics that are no 0 and 1
                for module in model.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                        module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            return model


CASES: dict[str, Case] = {}


def case(name: str, shape: tuple[int, ...], parts: Callable[[], dict[str, object]],
         forward: Forward, ahead: dict[str, int] | None = None,
         steps: dict[str, tuple[int, int]] | None = None) -> None:  # fmt: skip
    """Add a network to the table."""
    CASES[name] = Case(parts, forward, shape, ahead or {}, steps or {})


def conv_head(features: int = 3, **other: Any) -> Callable[[], dict[str, object]]:
    """One convolution 2 → 3 of size 3 that keeps 4×4, and a head."""
    return lambda: {"a": nn.Conv2d(2, 3, 3, padding=1), "fc": nn.Linear(features, 4), **other}


PICTURE = (2, 4, 4)
# ---------------------------------------------------------------- means and pools, any spelling
SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "x.mean((2, 3))": lambda x: x.mean((2, 3)),
    "reshape, mean": lambda x: x.reshape(*x.shape[:2], -1).mean(-1),
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "select": lambda x: x.select(3, 1).select(2, 2),
    "x.amax": lambda x: x.amax((2, 3)),
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
    "max values": lambda x: x.flatten(2).max(2)[0],
    "einsum mean": lambda x: torch.einsum("bchw->bc", x) / 16,
}
for spelled, pool in SPELLINGS.items():
    case(
        spelled, PICTURE, conv_head(), lambda m, x, pool=pool: m.fc(pool(m.a(x).tanh())), {"fc": 48}
    )
for border in ("reflect", "replicate", "circular"):
    case(
        f"a {border} border",
        PICTURE,
        lambda border=border: {
            "a": nn.Conv2d(2, 2, 3, 2, 1, padding_mode=border),
            "b": nn.Conv2d(2, 3, 3, padding=1, padding_mode=border),
            "fc": nn.Linear(12, 4),
        },
        lambda m, x: m.fc(m.b(m.a(x).tanh()).sigmoid().flatten(1)),
    )
case(
    "F.avg_pool2d halves",
    PICTURE,
    conv_head(12),
    lambda m, x: m.fc(F.avg_pool2d(m.a(x).sigmoid(), 2).flatten(1)),
    {"fc": 48},
)
case(
    "blocks by reshape",
    PICTURE,
    conv_head(12),
    lambda m, x: m.fc(m.a(x).tanh().reshape(-1, 3, 2, 2, 2, 2).mean((3, 5)).flatten(1)),
    {"fc": 48},
)
case(
    "every other pixel",
    PICTURE,
    conv_head(12),
    lambda m, x: m.fc(m.a(x).tanh()[:, :, ::2, ::2].flatten(1)),
    {"fc": 48},
)
case(
    "half of the channels",
    PICTURE,
    lambda: {"a": nn.Conv2d(2, 4, 3, padding=1), "fc": nn.Linear(32, 4)},
    lambda m, x: m.fc(m.a(x).tanh()[:, :2].flatten(1)),
    {"fc": 64},
)
case(
    "a pool before the first layer",
    PICTURE,
    lambda: {"a": nn.Conv2d(2, 3, 2), "fc": nn.Linear(3, 4)},
    lambda m, x: m.fc(m.a(F.avg_pool2d(x, 2)).tanh().flatten(1)),
    {"a": 32},
)
case(
    "a mean straight behind a convolution",
    PICTURE,
    conv_head(),
    lambda m, x: m.fc(m.a(x).mean((2, 3)).tanh()),
    {"fc": 48},
)
case(
    "logits averaged over the picture",
    PICTURE,
    lambda: {"a": nn.Conv2d(2, 4, 3)},
    lambda m, x: m.a(x).mean((2, 3)),
    steps={"mean": (16, 4)},
)
case(
    "mean and maximum side by side",
    PICTURE,
    conv_head(6),
    lambda m, x: m.fc(torch.cat([(h := m.a(x).tanh()).mean((2, 3)), h.amax((2, 3))], 1)),
    {"fc": 48},
)
# ---------------------------------------------------------------- tokens
case(
    "class token",
    (3, 4),
    lambda: {"a": nn.Linear(4, 5), "b": nn.Linear(5, 4), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(m.b(m.a(x).tanh()).tanh()[:, 0]),
    {"fc": 12},
)
case(
    "class token appended",
    (3, 4),
    lambda: {
        "token": nn.Parameter(torch.randn(1, 1, 4)),
        "a": nn.Linear(4, 4),
        "fc": nn.Linear(4, 3),
    },
    lambda m, x: m.fc(m.a(torch.cat([m.token.expand(len(x), 1, 4), x], 1)).tanh().mean(1)),
    {"fc": 16},
)
case(
    "last state",
    (3, 4),
    lambda: {"a": nn.Linear(4, 5), "fc": nn.Linear(5, 3)},
    lambda m, x: m.fc(torch.tanh(m.a(x))[:, -1, :]),
    {"fc": 15},
)
case(
    "mean over tokens",
    (3, 4),
    lambda: {"a": nn.Linear(4, 5), "fc": nn.Linear(5, 3)},
    lambda m, x: m.fc(F.gelu(m.a(x)).mean(1)),
    {"fc": 15},
)
case(
    "single-head attention",
    (3, 4),
    lambda: {**{n: nn.Linear(4, 4) for n in "qkvo"}, "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(
        (x + m.o((m.q(x) @ m.k(x).transpose(1, 2) / 2).softmax(-1) @ m.v(x))).mean(1)
    ),
    {"fc": 12},
)
case(
    "attention, one qkv, class token",
    (3, 4),
    lambda: {"qkv": nn.Linear(4, 12), "o": nn.Linear(4, 4), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(m.o(_attention(*m.qkv(x).chunk(3, -1)))[:, 0]),
    {"fc": 12},
)
case(
    "scaled_dot_product_attention",
    (3, 4),
    lambda: {"qkv": nn.Linear(4, 12), "fc": nn.Linear(12, 3)},
    lambda m, x: m.fc(F.scaled_dot_product_attention(*m.qkv(x).chunk(3, -1)).flatten(1)),
)
case(
    "MLP-mixer",
    (3, 4),
    lambda: {"t": nn.Linear(3, 3), "c": nn.Linear(4, 4), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc((h := x + m.t(x.mT).tanh().transpose(1, 2)).add(m.c(h).tanh()).mean(1)),
    {"fc": 12},
)
case(
    "patches",
    PICTURE,
    lambda: {"a": nn.Conv2d(2, 4, 2, 2), "b": nn.Linear(4, 4), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(m.b(m.a(x).flatten(2).transpose(1, 2)).tanh().mean(1)),
    {"fc": 16},
)
# ---------------------------------------------------------------- unread rows and columns
case(
    "last outputs unread",
    (2, 7, 7),
    lambda: {"a": nn.Conv2d(2, 3, 3, 2), "b": nn.Conv2d(3, 3, 2, 2), "fc": nn.Linear(3, 4)},
    lambda m, x: m.fc(m.b(m.a(x).tanh()).tanh().flatten(1)),
)
case(
    "last inputs unread",
    (2, 6, 6),
    lambda: {"a": nn.Conv2d(2, 4, 3, 2), "fc": nn.Linear(16, 4)},
    lambda m, x: m.fc(m.a(x).sigmoid().flatten(1)),
)
case(
    "kernel 1, stride 2",
    PICTURE,
    lambda: {"a": nn.Conv2d(2, 4, 1, 2), "fc": nn.Linear(16, 4)},
    lambda m, x: m.fc(m.a(x).tanh().flatten(1)),
)
case(
    "dilated, padded on one side",
    (2, 5, 5),
    lambda: {"a": nn.Conv2d(2, 3, 2, dilation=2, padding=1, stride=2), "fc": nn.Linear(27, 4)},
    lambda m, x: m.fc(m.a(x).tanh().flatten(1)),
)
case(
    "grouped, unread",
    (4, 5, 5),
    lambda: {"a": nn.Conv2d(4, 4, 2, 2, groups=2), "fc": nn.Linear(16, 4)},
    lambda m, x: m.fc(m.a(x).tanh().flatten(1)),
)
case(
    "depthwise separable",
    (3, 4, 4),
    lambda: {
        "d": nn.Conv2d(3, 3, 3, padding=1, groups=3),
        "p": nn.Conv2d(3, 2, 1),
        "fc": nn.Linear(32, 4),
    },
    lambda m, x: m.fc(m.p(m.d(x).tanh()).tanh().flatten(1)),
)
case(
    "one dimension",
    (2, 9),
    lambda: {"a": nn.Conv1d(2, 3, 3, 2), "b": nn.Conv1d(3, 2, 3, 2), "fc": nn.Linear(2, 3)},
    lambda m, x: m.fc(m.b(m.a(x).tanh())[:, :, 0].tanh()),
)
case(
    "three dimensions",
    (1, 3, 3, 3),
    lambda: {"a": nn.Conv3d(1, 2, 2), "fc": nn.Linear(2, 3)},
    lambda m, x: m.fc(m.a(x).tanh().mean((2, 3, 4))),
    {"fc": 16},
)
case(
    "cropped corner",
    (2, 5, 5),
    lambda: {"a": nn.Conv2d(2, 3, 3, padding=1), "fc": nn.Linear(12, 4)},
    lambda m, x: m.fc(m.a(x).tanh()[:, :, 1:3, 2:4].flatten(1)),
    {"fc": 75},
)
case(
    "transposed convolution above",
    PICTURE,
    lambda: {
        "a": nn.Conv2d(2, 2, 2, 2),
        "up": nn.ConvTranspose2d(2, 2, 2, 2),
        "fc": nn.Linear(32, 4),
    },
    lambda m, x: m.fc(m.up(m.a(x).tanh()).tanh().flatten(1)),
)
# ---------------------------------------------------------------- branches, skips, shared weights
case(
    "projection skip",
    PICTURE,
    lambda: {
        "a": nn.Conv2d(2, 4, 3, 2, 1),
        "b": nn.Conv2d(4, 4, 3, padding=1),
        "skip": nn.Conv2d(2, 4, 1, 2),
        "fc": nn.Linear(4, 3),
    },
    lambda m, x: m.fc((m.b(m.a(x).tanh()) + m.skip(x)).tanh().mean((2, 3))),
    {"fc": 16},
)
case(
    "projection skip, ReLU, batch norm",
    PICTURE,
    lambda: {
        "a": nn.Conv2d(2, 4, 3, 2, 1),
        "n": nn.BatchNorm2d(4),
        "b": nn.Conv2d(4, 4, 3, padding=1),
        "skip": nn.Conv2d(2, 4, 1, 2),
        "fc": nn.Linear(4, 3),
    },
    lambda m, x: m.fc(F.relu(m.b(F.relu(m.n(m.a(x)))) + m.skip(x)).mean((2, 3))),
    {"fc": 16},
)
case(
    "identity skip",
    (6,),
    lambda: {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "fc": nn.Linear(6, 3)},
    lambda m, x: m.fc(x + m.b(m.a(x).tanh())),
)
case(
    "two branches of one geometry",
    PICTURE,
    lambda: {"l": nn.Conv2d(2, 1, 3, 2, 1), "r": nn.Conv2d(2, 2, 3, 2, 1), "fc": nn.Linear(12, 4)},
    lambda m, x: m.fc(torch.cat([m.l(x).tanh(), m.r(x).sigmoid()], 1).flatten(1)),
)
case(
    "inception",
    PICTURE,
    lambda: {
        "one": nn.Conv2d(2, 1, 1),
        "three": nn.Conv2d(2, 1, 3, padding=1),
        "fc": nn.Linear(32, 4),
    },
    lambda m, x: m.fc(torch.cat([m.one(x).tanh(), m.three(x).tanh()], 1).flatten(1)),
)
case(
    "dense block",
    (2, 3, 3),
    lambda: {
        "a": nn.Conv2d(2, 2, 3, padding=1),
        "b": nn.Conv2d(4, 2, 3, padding=1),
        "fc": nn.Linear(6, 4),
    },
    lambda m, x: m.fc(
        torch.cat([h := torch.cat([x, m.a(x).tanh()], 1), m.b(h).tanh()], 1).mean((2, 3))
    ),
    {"fc": 54},
)
case(
    "one layer called twice",
    (5,),
    lambda: {"s": nn.Linear(5, 5), "fc": nn.Linear(5, 3)},
    lambda m, x: m.fc(m.s(m.s(x).tanh()).tanh()),
)
case(
    "one convolution called twice",
    (2, 3, 3),
    lambda: {"s": nn.Conv2d(2, 2, 3, padding=1), "fc": nn.Linear(18, 3)},
    lambda m, x: m.fc(m.s(m.s(x).tanh()).tanh().flatten(1)),
)
case(
    "two heads",
    (6,),
    lambda: {"a": nn.Linear(6, 5), "one": nn.Linear(5, 2), "two": nn.Linear(5, 2)},
    lambda m, x: torch.cat([m.one(h := m.a(x).tanh()), m.two(h)], 1),
)
case(
    "gated",
    (6,),
    lambda: {"a": nn.Linear(6, 5), "g": nn.Linear(6, 5), "fc": nn.Linear(5, 3)},
    lambda m, x: m.fc(m.a(x) * m.g(x).sigmoid()),
)
case(
    "GLU",
    (6,),
    lambda: {"a": nn.Linear(6, 8), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(F.glu(m.a(x))),
    {"fc": 8},
)
case(
    "squeeze and excitation",
    PICTURE,
    lambda: {
        "a": nn.Conv2d(2, 3, 3, padding=1),
        "d": nn.Linear(3, 2),
        "u": nn.Linear(2, 3),
        "fc": nn.Linear(48, 4),
    },
    lambda m, x: m.fc(
        (
            (h := m.a(x).tanh()) * m.u(m.d(h.mean((2, 3))).tanh()).sigmoid()[:, :, None, None]
        ).flatten(1)
    ),
)
case(
    "frozen first layer",
    (6,),
    lambda: {
        "a": nn.Linear(6, 4).requires_grad_(False),
        "b": nn.Linear(4, 4),
        "fc": nn.Linear(4, 3),
    },
    lambda m, x: m.fc(m.b(m.a(x).tanh()).tanh()),
)
# ---------------------------------------------------------------- cotangents with a pattern
case(
    "no activation between",
    (6,),
    lambda: {"a": nn.Linear(6, 5), "b": nn.Linear(5, 4), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(m.b(m.a(x))),
)
case(
    "a convolution behind a mean",
    PICTURE,
    conv_head(),
    lambda m, x: m.fc(m.a(x).mean((2, 3))),
    {"fc": 48},
)
case(
    "LeakyReLU, narrow head",
    (6,),
    lambda: {"a": nn.Linear(6, 5), "fc": nn.Linear(5, 2)},
    lambda m, x: m.fc(F.leaky_relu(m.a(x), 0.2)),
)
case(
    "ReLU",
    (6,),
    lambda: {"a": nn.Linear(6, 5), "b": nn.Linear(5, 5), "fc": nn.Linear(5, 3)},
    lambda m, x: m.fc(F.relu(m.b(torch.relu(m.a(x))))),
)
case(
    "layer norm",
    (6,),
    lambda: {"a": nn.Linear(6, 4), "n": nn.LayerNorm(4), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(m.n(m.a(x)).tanh()),
)
case(
    "sigmoid at the end",
    (6,),
    lambda: {"a": nn.Linear(6, 4), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(m.a(x).tanh()).sigmoid(),
)

# ---------------------------------------------------------------- more than samples in dimension 0
case(
    "sequence first",
    (3, 4),
    lambda: {"a": nn.Linear(4, 4), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(m.a(x.transpose(0, 1)).tanh()[0]),
    {"fc": 12},
)
case(
    "windows as samples",
    PICTURE,
    lambda: {"a": nn.Linear(2, 3), "fc": nn.Linear(3, 3)},
    lambda m, x: m.fc(m.a(_windows(x)).tanh().reshape(len(x), 4, 4, 3)[:, :, 0].mean(1)),
    {"fc": 48},
)
case(
    "channels as samples",
    (2, 6),
    lambda: {"a": nn.Conv1d(1, 2, 3), "fc": nn.Linear(16, 3)},
    lambda m, x: m.fc(m.a(x.reshape(-1, 1, 6)).tanh().reshape(len(x), -1)),
)
case(
    "two views behind one another",
    (2, 2, 3, 3),
    lambda: {"a": nn.Conv2d(2, 2, 2), "fc": nn.Linear(8, 3)},
    lambda m, x: m.fc(m.a(torch.cat([x[:, 0], x[:, 1]])).tanh()[: len(x)].flatten(1)),
    {"fc": 16},
)
# ---------------------------------------------------------------- what is said twice, or constant
case(
    "repeated tokens",
    (6,),
    lambda: {"a": nn.Linear(6, 3), "fc": nn.Linear(3, 3)},
    lambda m, x: m.fc(m.a(x[:, None].expand(-1, 3, -1)).tanh().mean(1)),
    {"fc": 9},
)
case(
    "tokens by index, one twice",
    (3, 4),
    lambda: {"a": nn.Linear(4, 3), "fc": nn.Linear(3, 3)},
    lambda m, x: m.fc(m.a(x[:, [0, 0, 1]]).tanh().mean(1)),
    {"a": 16, "fc": 9},
)
case(
    "constant token is read",
    (2, 6),
    lambda: {"t": torch.ones(1, 1, 6), "a": nn.Linear(6, 3), "fc": nn.Linear(3, 3)},
    lambda m, x: m.fc(m.a(_with(m.t, x)).tanh()[:, 0] + x[:, 0, :3]),
    {"fc": 9},
)
case(
    "padded tokens",
    (2, 6),
    lambda: {"a": nn.Linear(6, 4), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(m.a(F.pad(x, (0, 0, 0, 2))).tanh().mean(1)),
    {"fc": 16},
)
# ---------------------------------------------------------------- switched off further up
case(
    "maximum over the tokens' logits",
    (3, 4),
    lambda: {"a": nn.Linear(4, 4), "fc": nn.Linear(4, 3)},
    lambda m, x: m.fc(m.a(x).tanh()).amax(1),
    steps={"amax": (9, 3)},
)
case(
    "ReLU above a smooth layer",
    (6,),
    lambda: {"a": nn.Linear(6, 5), "b": nn.Linear(5, 1), "fc": nn.Linear(1, 3)},
    lambda m, x: m.fc(F.relu(m.b(m.a(x).tanh()))),
)


def _windows(x: Tensor) -> Tensor:
    """Blocks of 2×2 pixels as samples of four tokens."""
    blocks = x.reshape(len(x), -1, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1)
    return blocks.reshape(-1, 4, x.shape[1])


def _with(token: Tensor, x: Tensor) -> Tensor:
    return torch.cat([token.expand(len(x), -1, -1), x], 1)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2)).softmax(-1) @ v
