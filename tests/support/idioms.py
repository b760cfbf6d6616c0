# ruff: noqa: E501  (a table: one idiom a line)
"""Small networks in the idioms that people write: what every public entry point has to stand.

Each is deterministic in its seed and in eval mode; most have three or four classes.  ``IDIOMS`` maps
a name to a factory, the shape of one sample and the loss.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from written import Written

Lin, Conv, Seq = nn.Linear, nn.Conv2d, nn.Sequential
PICTURE = (2, 6, 6)
FLAT = (8,)
TOKENS = (5,)
LEVELS = 7  # values of a token
CROSS, BINARY, SQUARES = "cross_entropy", "binary_cross_entropy_with_logits", "mse_loss"


@dataclass(frozen=True)
class Idiom:
    """A network as somebody wrote it.

    Attributes:
        build: makes it; call :meth:`network`.
        shape: of one sample.
        loss: by name.
        tokens: True: the inputs are whole numbers.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = FLAT
    loss: str = CROSS
    tokens: bool = False

    def network(self, seed: int = 0) -> nn.Module:
        """The network, in eval mode, with the weights of ``seed``."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            return self.build().eval()

    def inputs(self, count: int, seed: int = 0) -> Tensor:
        """A batch [count, *shape]."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(LEVELS, (count, *self.shape), generator=generator)
        return torch.rand(count, *self.shape, generator=generator, dtype=torch.float64)


class Pair(NamedTuple):
    """Two outputs with names."""

    logits: Tensor
    hidden: Tensor


@dataclass
class Output:
    """The output of many a language model."""

    logits: Tensor


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a forward returned."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, dict):
        return next(iter(outputs.values()))
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def w(forward: Callable[[Any, Tensor], Any], **modules: Any) -> Callable[[], nn.Module]:
    """A factory of a module written by hand; modules are factories."""
    return lambda: Written(forward, **{name: make() for name, make in modules.items()})


def lin(n: int, m: int, **options: Any) -> Callable[[], nn.Module]:
    """Factory of a linear layer."""
    return lambda: Lin(n, m, **options)


def conv(n: int, m: int, *options: Any, **named: Any) -> Callable[[], nn.Module]:
    """Factory of a convolution."""
    return lambda: Conv(n, m, *options, **named)


def par(*shape: int) -> Callable[[], nn.Parameter]:
    """Factory of a parameter."""
    return lambda: nn.Parameter(torch.randn(*shape) / 3)


def mlp(*between: Callable[[], nn.Module], width: int = 6) -> Callable[[], nn.Module]:
    """Factory of Linear → … → Linear."""
    return lambda: Seq(Lin(8, width), *(make() for make in between), Lin(width, 3))


def pictures(*layers: Callable[[], nn.Module], width: int) -> Callable[[], nn.Module]:
    """Factory of layers on pictures with a linear head."""
    return lambda: Seq(*(make() for make in layers), nn.Flatten(), Lin(width, 3))


def tied() -> nn.Module:
    first, last = Lin(8, 8), Lin(8, 8)
    last.weight = first.weight
    return Seq(first, nn.Tanh(), last)


def with_hook() -> nn.Module:
    model = Seq(Lin(8, 6), nn.Tanh(), Lin(6, 3))
    model[0].register_forward_hook(lambda module, args, out: 2.0 * out)
    return model


def with_raising_hook() -> nn.Module:
    def refuse(module: nn.Module, args: object) -> None:
        raise KeyError("no such key")

    model = Seq(Lin(8, 6), nn.Tanh(), Lin(6, 3))
    model[1].register_forward_pre_hook(refuse)
    return model


def frozen() -> nn.Module:
    model = Seq(Lin(8, 6), nn.Tanh(), Lin(6, 3))
    model[0].requires_grad_(False)
    return model


def mixed() -> nn.Module:
    model = Seq(Lin(8, 6), nn.Tanh(), Lin(6, 3))
    model[2].double()
    return model


def channels_last() -> nn.Module:
    return Seq(Conv(2, 4, 3), nn.Tanh(), nn.Flatten(), Lin(64, 3)).to(
        memory_format=torch.channels_last
    )


def scripted() -> nn.Module:
    made: nn.Module = torch.jit.script(Seq(Lin(8, 6), nn.Tanh(), Lin(6, 3)))
    return made


def jit_traced() -> nn.Module:
    made: nn.Module = torch.jit.trace(Seq(Lin(8, 6), nn.Tanh(), Lin(6, 3)), torch.rand(2, 8))
    return made


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


def parametrised() -> nn.Module:
    model = Seq(Lin(8, 6), nn.Tanh(), Lin(6, 3))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    return model


def masked(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(F.linear(x, m.a.weight * m.mask, m.a.bias)))


def with_mask() -> nn.Module:
    model = Written(masked, a=Lin(8, 6), b=Lin(6, 3))
    model.register_buffer("mask", (torch.rand(6, 8) > 0.5).float())
    return model


def embeddings(
    forward: Callable[[Any, Tensor], Any], width: int = 6, **modules: Any
) -> Callable[[], nn.Module]:
    """Factory of a model of tokens."""
    return w(forward, e=lambda: nn.Embedding(LEVELS, width), **modules)


def guarded(m: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 8, "eight numbers"
    return m.b(torch.tanh(m.a(x)))


def branching(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    if x.sum() > 0:
        return m.b(torch.tanh(x))
    return m.b(torch.sigmoid(x))


def by_shape(m: Any, x: Tensor) -> Tensor:
    x = x.flatten(1) if x.ndim > 2 else x
    if x.shape[-1] != 8:
        raise RuntimeError("wrong width")
    return m.b(torch.tanh(m.a(x)))


def by_mode(m: Any, x: Tensor) -> Tensor:
    x = torch.tanh(m.a(x))
    if m.training:
        x = x + torch.randn_like(x)
    return m.b(x)


def inplace(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    x += 1
    x.mul_(0.5).tanh_()
    return m.b(x)


def experts(m: Any, x: Tensor) -> Tensor:
    gate = torch.softmax(m.gate(x), 1)
    each = torch.stack([torch.tanh(e(x)) for e in m.all], 1)
    return m.b((gate[:, :, None] * each).sum(1))


def rnn(kind: type[nn.RNNBase]) -> Callable[[], nn.Module]:
    return w(
        lambda m, x: m.b(m.a(x)[0][:, -1]), a=lambda: kind(4, 6, batch_first=True), b=lin(6, 3)
    )


def unet(m: Any, x: Tensor) -> Tensor:
    a = torch.relu(m.down(x))
    b = torch.relu(m.mid(F.max_pool2d(a, 2)))
    up = F.interpolate(b, scale_factor=2, mode="nearest")
    return m.out(torch.cat([a, up], 1)).mean((2, 3))


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.b(F.scaled_dot_product_attention(q, k, v).mean(1))


def vit(m: Any, x: Tensor) -> Tensor:
    t = m.patch(x).flatten(2).transpose(1, 2)
    t = torch.cat([m.token.expand(len(t), -1, -1), t], 1) + m.place
    t = t + m.mix(m.norm(t), m.norm(t), m.norm(t), need_weights=False)[0]
    return m.b(t[:, 0])


def two_inputs(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)) - torch.tanh(m.a(y)))


class Siamese(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Lin(8, 6), Lin(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return two_inputs(self, x, y)


class NoForward(nn.Module):
    """Forgot its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Lin(8, 3)


def broken(m: Any, x: Tensor) -> Tensor:
    return m.a(x)["logits"]


def ae(m: Any, x: Tensor) -> Tensor:
    return m.up(torch.tanh(m.down(x)))


IDIOMS: dict[str, Idiom] = {
    "mlp": Idiom(mlp(nn.Tanh)),
    "mlp relu": Idiom(mlp(nn.ReLU, width=12)),
    "linear alone": Idiom(lin(8, 3)),
    "no bias": Idiom(lambda: Seq(Lin(8, 6, bias=False), nn.Tanh(), Lin(6, 3, bias=False))),
    "nested": Idiom(lambda: Seq(Seq(Lin(8, 6), Seq(nn.Tanh())), Seq(OrderedDict(fc=Lin(6, 3))))),
    "functional": Idiom(w(lambda m, x: m.b(F.silu(m.a(x))), a=lin(8, 6), b=lin(6, 3))),
    "tied": Idiom(tied),
    "shared": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=lin(8, 8), b=lin(8, 3))),
    "residual": Idiom(w(lambda m, x: m.b(x + torch.tanh(m.a(x))), a=lin(8, 8), b=lin(8, 3))),
    "dense": Idiom(w(lambda m, x: m.b(torch.cat([x, torch.tanh(m.a(x))], 1)), a=lin(8, 6), b=lin(14, 3))),
    "squeeze-excite": Idiom(
        w(
            lambda m, x: m.b((m.c(x) * torch.sigmoid(m.s(x.mean((2, 3)))).unflatten(1, (4, 1, 1))).flatten(1)),
            c=conv(2, 4, 3), s=lin(2, 4), b=lin(64, 3),
        ), PICTURE,
    ),
    "convnext": Idiom(
        w(
            lambda m, x: m.b((x + m.o(F.gelu(m.i(m.n(m.d(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)).mean((2, 3))),
            d=conv(2, 2, 3, padding=1, groups=2), n=lambda: nn.LayerNorm(2), i=lin(2, 8), o=lin(8, 2), b=lin(2, 3),
        ), PICTURE,
    ),
    "inverted residual": Idiom(
        w(
            lambda m, x: m.b((x + m.p(F.relu6(m.d(F.relu6(m.e(x)))))).flatten(1)),
            e=conv(2, 6, 1), d=conv(6, 6, 3, padding=1, groups=6), p=conv(6, 2, 1), b=lin(72, 3),
        ), PICTURE,
    ),
    "vit": Idiom(
        w(vit, patch=conv(2, 4, 2, 2), token=par(1, 1, 4), place=par(1, 10, 4),
          norm=lambda: nn.LayerNorm(4), mix=lambda: nn.MultiheadAttention(4, 2, batch_first=True), b=lin(4, 3)),
        PICTURE,
    ),
    "multihead": Idiom(
        w(lambda m, x: m.b(m.a(x, x, x)[0].mean(1)), a=lambda: nn.MultiheadAttention(4, 2, batch_first=True), b=lin(4, 3)),
        (3, 4),
    ),
    "dot product": Idiom(w(attention, qkv=lin(4, 12), b=lin(4, 3)), (3, 4)),
    "transformer layer": Idiom(
        w(lambda m, x: m.b(m.a(x).mean(1)), a=lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), b=lin(4, 3)),
        (3, 4),
    ),
    "lstm": Idiom(rnn(nn.LSTM), (3, 4)),
    "gru": Idiom(rnn(nn.GRU), (3, 4)),
    "tokens": Idiom(embeddings(lambda m, x: m.b(m.e(x).mean(1)), b=lin(6, 3)), TOKENS, tokens=True),
    "bag": Idiom(w(lambda m, x: m.b(m.e(x)), e=lambda: nn.EmbeddingBag(LEVELS, 6), b=lin(6, 3)), TOKENS, tokens=True),
    "positions": Idiom(
        embeddings(lambda m, x: m.b((m.e(x) + m.p(torch.arange(x.shape[1]))).flatten(1)), p=lambda: nn.Embedding(5, 6), b=lin(30, 3)),
        TOKENS, tokens=True,
    ),
    "language model": Idiom(
        embeddings(lambda m, x: Output(m.b(m.l(m.e(x))[:, -1])),
                   l=lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), b=lin(6, 3)),
        TOKENS, tokens=True,
    ),
    "group norm": Idiom(pictures(conv(2, 4, 3), lambda: nn.GroupNorm(2, 4), nn.Tanh, width=64), PICTURE),
    "layer norm": Idiom(mlp(lambda: nn.LayerNorm(6), nn.Tanh)),
    "instance norm": Idiom(pictures(conv(2, 4, 3), lambda: nn.InstanceNorm2d(4, affine=True), nn.Tanh, width=64), PICTURE),
    "batch norm 1d": Idiom(mlp(lambda: nn.BatchNorm1d(6), nn.Tanh)),
    "batch norm 2d": Idiom(pictures(conv(2, 4, 3), lambda: nn.BatchNorm2d(4), nn.Tanh, width=64), PICTURE),
    "weight norm": Idiom(lambda: Seq(parametrizations.weight_norm(Lin(8, 6)), nn.Tanh(), Lin(6, 3))),
    "spectral norm": Idiom(lambda: Seq(parametrizations.spectral_norm(Lin(8, 6)), nn.Tanh(), Lin(6, 3))),
    "parametrised": Idiom(parametrised),
    "dropout": Idiom(mlp(nn.Tanh, nn.Dropout)),
    "checkpoint": Idiom(
        w(lambda m, x: m.b(checkpoint(lambda t: torch.tanh(m.a(t)), x, use_reentrant=False)), a=lin(8, 6), b=lin(6, 3))
    ),
    "reentrant checkpoint": Idiom(
        w(lambda m, x: m.b(checkpoint(lambda t: torch.tanh(m.a(t)), x, use_reentrant=True)), a=lin(8, 6), b=lin(6, 3))
    ),
    "scripted": Idiom(scripted),
    "jit trace": Idiom(jit_traced),
    "einsum": Idiom(w(lambda m, x: m.b(torch.tanh(torch.einsum("bi,oi->bo", x, m.a))), a=par(6, 8), b=lin(6, 3))),
    "matmul": Idiom(w(lambda m, x: torch.tanh(x @ m.a + m.c) @ m.b + m.d, a=par(8, 6), b=par(6, 3), c=par(6), d=par(3))),
    "own linear": Idiom(w(lambda m, x: F.linear(torch.tanh(F.linear(x, m.a, m.c)), m.b, m.d), a=par(6, 8), b=par(3, 6), c=par(6), d=par(3))),
    "own convolution": Idiom(w(lambda m, x: m.b(torch.tanh(F.conv2d(x, m.a, m.c)).flatten(1)), a=par(4, 2, 3, 3), c=par(4), b=lin(64, 3)), PICTURE),
    "fourier": Idiom(w(lambda m, x: m.b(torch.tanh(torch.fft.rfft(m.a(x)).abs())), a=lin(8, 6), b=lin(4, 3))),
    "grid sample": Idiom(
        w(
            lambda m, x: m.b(F.grid_sample(x, F.affine_grid(m.l(x.flatten(1)).reshape(-1, 2, 3), list(x.shape), False), align_corners=False).flatten(1)),
            l=lin(72, 6), b=lin(72, 3),
        ), PICTURE,
    ),
    "interpolate": Idiom(w(lambda m, x: m.b(F.interpolate(torch.tanh(m.a(x)), size=3, mode="bilinear").flatten(1)), a=conv(2, 4, 3), b=lin(36, 3)), PICTURE),
    "unfold": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(F.unfold(x, 3, stride=3).transpose(1, 2))).flatten(1)), a=lin(18, 6), b=lin(24, 3)), PICTURE),
    "fold": Idiom(w(lambda m, x: m.b(torch.tanh(F.fold(F.unfold(m.a(x), 2), 6, 2)).flatten(1)), a=conv(2, 2, 1), b=lin(72, 3)), PICTURE),
    "pixel shuffle": Idiom(pictures(conv(2, 4, 3), lambda: nn.PixelShuffle(2), nn.Tanh, width=64), PICTURE),
    "transposed": Idiom(pictures(lambda: nn.ConvTranspose2d(2, 3, 3), nn.Tanh, width=192), PICTURE),
    "bilinear": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(x, x))), a=lambda: nn.Bilinear(8, 8, 6), b=lin(6, 3))),
    "maxout": Idiom(w(lambda m, x: m.b(m.a(x).unflatten(1, (6, 2)).amax(2)), a=lin(8, 12), b=lin(6, 3))),
    "glu": Idiom(w(lambda m, x: m.b(F.glu(m.a(x), 1)), a=lin(8, 12), b=lin(6, 3))),
    "gated": Idiom(w(lambda m, x: m.b(torch.softmax(m.g(x), 1) * torch.tanh(m.a(x))), g=lin(8, 6), a=lin(8, 6), b=lin(6, 3))),
    "experts": Idiom(w(experts, gate=lin(8, 2), all=lambda: nn.ModuleList([Lin(8, 6), Lin(8, 6)]), b=lin(6, 3))),
    "cosine head": Idiom(w(lambda m, x: 5.0 * F.linear(F.normalize(torch.tanh(m.a(x))), F.normalize(m.b)), a=lin(8, 6), b=par(3, 6))),
    "temperature": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(x))) / 0.07, a=lin(8, 6), b=lin(6, 3))),
    "learned temperature": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(x))) * m.t.exp(), a=lin(8, 6), b=lin(6, 3), t=par(1))),
    "arcface": Idiom(w(lambda m, x: 8.0 * torch.cos(torch.acos(F.linear(F.normalize(m.a(x)), F.normalize(m.b)).clamp(-0.99, 0.99)) + 0.1), a=lin(8, 6), b=par(3, 6))),
    "siamese": Idiom(Siamese),
    "tuple": Idiom(w(lambda m, x: (m.b(torch.tanh(m.a(x))), m.a(x)), a=lin(8, 6), b=lin(6, 3))),
    "named tuple": Idiom(w(lambda m, x: Pair(m.b(torch.tanh(m.a(x))), m.a(x)), a=lin(8, 6), b=lin(6, 3))),
    "dict": Idiom(w(lambda m, x: {"logits": m.b(torch.tanh(m.a(x)))}, a=lin(8, 6), b=lin(6, 3))),
    "dataclass": Idiom(w(lambda m, x: Output(m.b(torch.tanh(m.a(x)))), a=lin(8, 6), b=lin(6, 3))),
    "heads": Idiom(w(lambda m, x: [h(torch.tanh(m.a(x))) for h in m.h], a=lin(8, 6), h=lambda: nn.ModuleList([Lin(6, 3), Lin(6, 2)]))),
    "auxiliary": Idiom(w(lambda m, x: {"out": m.b(torch.tanh(m.a(x))), "aux": m.c(m.a(x))}, a=lin(8, 6), b=lin(6, 3), c=lin(6, 3))),
    "in place": Idiom(w(inplace, a=lin(8, 6), b=lin(6, 3))),
    "len": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(x).reshape(len(x), -1))), a=lin(8, 6), b=lin(6, 3))),
    "by shape": Idiom(w(by_shape, a=lin(8, 6), b=lin(6, 3))),
    "by mode": Idiom(w(by_mode, a=lin(8, 6), b=lin(6, 3))),
    "assert": Idiom(w(guarded, a=lin(8, 6), b=lin(6, 3))),
    "branching": Idiom(w(branching, a=lin(8, 6), b=lin(6, 3))),
    "float": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(x.float()))), a=lin(8, 6), b=lin(6, 3))),
    "item": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(x)) * float(x.abs().max().item())), a=lin(8, 6), b=lin(6, 3))),
    "hook": Idiom(with_hook),
    "raising hook": Idiom(with_raising_hook),
    "mask": Idiom(with_mask),
    "module list": Idiom(w(lambda m, x: m.l[2](torch.tanh(m.l[1](torch.tanh(m.l[0](x))))), l=lambda: nn.ModuleList([Lin(8, 6), Lin(6, 6), Lin(6, 3)]))),
    "parameter list": Idiom(w(lambda m, x: torch.tanh(x @ m.l[0]) @ m.l[1], l=lambda: nn.ParameterList([torch.randn(8, 6), torch.randn(6, 3)]))),
    "parameter dict": Idiom(w(lambda m, x: torch.tanh(x @ m.d["a"]) @ m.d["b"], d=lambda: nn.ParameterDict({"a": torch.randn(8, 6), "b": torch.randn(6, 3)}))),
    "lazy": Idiom(lambda: Seq(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(3))),
    "meta": Idiom(lambda: Seq(Lin(8, 6, device="meta"), nn.Tanh(), Lin(6, 3, device="meta"))),
    "no parameters": Idiom(lambda: Seq(nn.Tanh(), nn.Flatten())),
    "frozen": Idiom(frozen),
    "double": Idiom(lambda: mlp(nn.Tanh)().double()),
    "half": Idiom(lambda: mlp(nn.Tanh)().half()),
    "bfloat16": Idiom(lambda: mlp(nn.Tanh)().bfloat16()),
    "mixed precision": Idiom(mixed),
    "non-contiguous": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(x.transpose(1, 2))).transpose(1, 2).reshape(len(x), -1)), a=lin(4, 6), b=lin(18, 3)), (4, 3)),
    "channels last": Idiom(channels_last, PICTURE),
    "nonzero": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(x[x.sum(1) > 0]))), a=lin(8, 6), b=lin(6, 3))),
    "random": Idiom(w(lambda m, x: m.b(torch.tanh(m.a(x)) + 0.1 * torch.randn(len(x), 6).to(x)), a=lin(8, 6), b=lin(6, 3))),
    "u-net": Idiom(w(unet, down=conv(2, 4, 3, padding=1), mid=conv(4, 4, 3, padding=1), out=conv(8, 3, 1)), PICTURE),
    "autoencoder": Idiom(w(ae, down=conv(2, 4, 2, 2), up=lambda: nn.ConvTranspose2d(4, 2, 2, 2)), PICTURE, SQUARES),
    "segmentation": Idiom(lambda: Seq(Conv(2, 4, 3, padding=1), nn.Tanh(), Conv(4, 3, 1)), PICTURE),
    "one dimension": Idiom(lambda: Seq(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), Lin(16, 3)), (2, 6)),
    "three dimensions": Idiom(lambda: Seq(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), Lin(16, 3)), (1, 3, 3, 3)),
    "stubs": Idiom(lambda: Seq(torch.ao.quantization.QuantStub(), Lin(8, 6), nn.Tanh(), Lin(6, 3), torch.ao.quantization.DeQuantStub())),
    "data parallel": Idiom(lambda: nn.DataParallel(mlp(nn.Tanh)())),
    "multi-label": Idiom(lambda: Seq(Lin(8, 6), nn.Tanh(), Lin(6, 4)), FLAT, BINARY),
    "one logit": Idiom(lambda: Seq(Lin(8, 6), nn.Tanh(), Lin(6, 1)), FLAT, BINARY),
    "regression": Idiom(mlp(nn.Tanh), FLAT, SQUARES),
    "sigmoid head": Idiom(lambda: Seq(Lin(8, 6), nn.Tanh(), Lin(6, 3), nn.Sigmoid()), FLAT, SQUARES),
    "log-softmax head": Idiom(mlp(nn.Tanh, lambda: Lin(6, 6), lambda: nn.LogSoftmax(1))),
    "no forward": Idiom(NoForward),
    "broken": Idiom(w(broken, a=lin(8, 3))),
}  # fmt: skip
