"""Networks that are no chain above their first fully connected layer, as people write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 12


class Layered(nn.Module):
    """A body, something that no equation covers, and a head."""

    shape: tuple[int, ...] = (WIDTH,)
    train_on = False
    above = ""

    def __init__(self, wide: int = 20) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, wide)
        self.head = nn.Linear(wide, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.first(x)))


class LayerNorm(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(20)

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(self.norm(h))


class GroupNorm(LayerNorm):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 20)


class Residual(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(20, 20)

    def middle(self, h: Tensor) -> Tensor:
        return h + torch.relu(self.inner(h))


class Shared(Residual):
    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.tanh(self.inner(torch.tanh(h)))))


class Gated(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.gate(x)) * self.first(x))


class Concatenated(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(20 + WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.relu(self.first(x)), x], 1))


class Softmaxed(Layered):
    def middle(self, h: Tensor) -> Tensor:
        return torch.softmax(h, 1)


class Maxout(Layered):
    def __init__(self) -> None:
        super().__init__(24)
        self.head = nn.Linear(12, 4)

    def middle(self, h: Tensor) -> Tensor:
        return h.view(-1, 12, 2).max(2).values


class Attention(Layered):
    def __init__(self) -> None:
        super().__init__(24)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        t = h.view(-1, 4, 6)
        return self.attend(t, t, t)[0].reshape(-1, 24)


class ControlFlow(Layered):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h if h.sum() > -1e9 else -h
        for _ in range(2 if len(x) else 0):
            h = torch.tanh(h)
        return self.head(F.gelu(h))


class Dropped(Layered):
    train_on = True

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def middle(self, h: Tensor) -> Tensor:
        return self.drop(torch.tanh(h))


class Functional(nn.Module):
    shape: tuple[int, ...] = (WIDTH,)
    train_on = False

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.3 * torch.randn(20, WIDTH))
        self.v = nn.Parameter(0.1 * torch.randn(20))
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(F.linear(x * 2 - 1, self.w, self.v), (20,)).sin())


class Permuted(LayerNorm):
    shape = (3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1).reshape(len(x), -1).flip(1))


class Convolved(nn.Module):
    shape: tuple[int, ...] = (1, 4, 4)
    train_on = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.first = nn.Linear(256, 30)
        self.norm = nn.LayerNorm(30)
        self.head = nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.conv((x - 0.5) / 0.25))
        return self.head(F.silu(self.norm(self.first(h.view(h.size(0), -1)))))


class ConvolvedResidual(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(30, 30)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(torch.tanh(self.conv(x)).reshape(x.shape[0], -1))
        return self.head(h + torch.tanh(self.inner(h)))


class OnePlace(LayerNorm):
    """A kernel as large as the picture falls on one place: a fully connected layer."""

    shape = (3, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 20, 2)

    def middle(self, h: Tensor) -> Tensor:
        return super().middle(h.flatten(1))


class OneLine(OnePlace):
    shape = (2, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 20, 6, stride=3)


class OneToken(LayerNorm):
    """Fully connected layers along [B, 1, n], once for every sample."""

    shape = (1, 12)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


class OneTokenInside(OneToken):
    shape = (1, 1, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(F.linear(x, self.first.weight, self.first.bias))).mean((1, 2))


class TwoHeads(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(20, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.first(x))
        return self.head(h), self.other(h)


class Dictionary(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits, other = super().forward(x)
        return {"logits": logits, "other": other}


class TwoInputs(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 20)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x) + self.embed(extra)))


REPLAYED = [
    LayerNorm, GroupNorm, Residual, Shared, Gated, Concatenated, Softmaxed, Maxout, Attention,
    ControlFlow, Functional, Permuted, Convolved, ConvolvedResidual, OnePlace, OneLine, OneToken,
    OneTokenInside,
]  # fmt: skip
INPUTS_ONLY = [Dropped, TwoHeads, Dictionary, TwoInputs]


def sent(network: nn.Module, x: Tensor, label: Tensor) -> dict[str, Tensor]:
    """The gradient of a cross-entropy of all that the network returns, by plain autograd."""
    extra = (torch.rand(len(x), 3, dtype=x.dtype),) if isinstance(network, TwoInputs) else ()
    out = network(x, *extra)
    if isinstance(out, dict):
        out = tuple(out.values())
    if isinstance(out, tuple):
        out = torch.cat(out, 1)
    value = F.cross_entropy(out, label)
    found = torch.autograd.grad(value, list(network.parameters()), materialize_grads=True)
    return dict(zip(dict(network.named_parameters()), found, strict=True))
