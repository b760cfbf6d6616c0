"""Networks and batches of ``studies.batches``: trained ones, and batches at an edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.networks import adam
from benchmarks.common.pictures import pictures

PHOTOGRAPHS = 32
MINIBATCH, RATE, POOL = 32, 1e-3, 240
SOFT = rgap.Loss("cross_entropy", targets="probability")


def split(seed: int) -> tuple[list[int], list[int]]:
    """Places of the photographs that are attacked and of those that are learned, 16 each."""
    order = torch.randperm(PHOTOGRAPHS, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[: PHOTOGRAPHS // 2], order[PHOTOGRAPHS // 2 :]


def trained(activation: str, steps: int, seed: int) -> nn.Module:
    """The network 3072-512-512-10 after Adam steps on windows of photographs nobody attacks.

    Their labels are drawn at random: what is learned is to tell pictures apart.
    """
    model = rgap.models.mlp((512, 512), 10, activation, seed=seed)
    if steps == 0:
        return model
    generator = torch.Generator().manual_seed(seed)
    pool = pictures(POOL, seed, split(seed)[1]).float()
    labels = torch.randint(10, (len(pool),), generator=generator)
    drawn = (torch.randperm(POOL, generator=generator)[:MINIBATCH] for _ in range(steps))
    return adam(model, ((pool[batch], labels[batch]) for batch in drawn), RATE)


@dataclass(frozen=True)
class Case:
    """A batch at an edge, and what is to be expected of it.

    Attributes:
        title: in words.
        model: the network.
        x: the batch, [B, 3, 32, 32].
        y: its targets.
        loss: the client's.
        solved: whether the equations determine it after all.
    """

    title: str
    model: nn.Module
    x: Tensor
    y: Tensor
    loss: str | rgap.Loss = "cross_entropy"
    solved: bool = False


def edges(seed: int) -> list[Case]:
    """Batches where the method ends or nearly does."""
    return [make(seed) for make in _EDGES]


def _mlp(activation: str = "gelu", width: int = 512, seed: int = 0) -> nn.Module:
    return rgap.models.mlp((width, width), 10, activation, seed=seed)


def _head(seed: int) -> nn.Module:
    return rgap.models.mlp((), 10, seed=seed)


def _soft(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(count, 10, generator=generator, dtype=torch.float64), 1)


def _one_pattern(seed: int) -> Case:
    """Two samples on one piece of a piecewise-linear network: near enough, and checked."""
    model, x = _mlp("relu", seed=seed), 0.9 * pictures(4, seed)
    factor = 1e-3
    while True:
        x[1] = (1.0 + factor) * x[0]
        z = x[:2].flatten(1)
        same = True
        for layer in [m for m in model if isinstance(m, nn.Linear)][:-1]:
            z = nn.functional.linear(z, layer.weight.double(), layer.bias.double()).detach()
            same = same and bool(((z[0] > 0) == (z[1] > 0)).all())
            z = z.relu()
        if same:
            break
        factor /= 2.0
    title = f"ReLU, B = 4, two samples with one sign pattern (x and {1.0 + factor:.6g} x)"
    return Case(title, model, x, torch.tensor([1, 1, 2, 3]))


def _near(seed: int) -> Case:
    x = 0.9 * pictures(4, seed)
    x[1] = 1.001 * x[0]
    title = "GELU, B = 4, x and 1.001 x, linearly dependent"
    return Case(title, _mlp(seed=seed), x, torch.tensor([1, 1, 2, 3]))


def _no_bias(seed: int) -> Case:
    model = _mlp(seed=seed)
    first = next(i for i, m in enumerate(model) if isinstance(m, nn.Linear))
    bare = nn.Linear(3072, 512, bias=False)
    bare.weight = model[first].weight
    layers = list(model)
    layers[first] = bare
    return Case(
        "GELU, B = 4, first layer without a bias",
        nn.Sequential(*layers).eval(),
        pictures(4, seed),
        torch.arange(4),
    )


def _twice(seed: int) -> Case:
    x = pictures(6, seed)[[0, 0, 1, 2, 3, 4, 5, 5]]
    y = torch.tensor([3, 3, 1, 2, 3, 4, 5, 5])
    return Case("GELU, B = 8, two pictures twice, one label each", _mlp(seed=seed), x, y)


def _two_labels(seed: int) -> Case:
    x = pictures(7, seed)[[0, 0, 1, 2, 3, 4, 5, 6]]
    y = torch.tensor([3, 7, 1, 2, 3, 4, 5, 6])
    return Case("GELU, B = 8, one picture with two labels", _mlp(seed=seed), x, y)


def _width(batch: int, solved: bool) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        title = f"GELU, width 32, B = {batch}"
        x, y = pictures(batch, seed), torch.arange(batch) % 10
        return Case(title, _mlp(width=32, seed=seed), x, y, solved=solved)

    return make


def _bare(batch: int, solved: bool) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        title = f"bare softmax head, C = 10, B = {batch}"
        x, y = pictures(batch, seed), torch.arange(batch) % 10
        return Case(title, _head(seed), x, y, solved=solved)

    return make


def _bare_loss(loss: str) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        dense = _soft(2, seed)
        kind = "mse_loss" if loss == "mse" else SOFT
        words = "squared error" if loss == "mse" else "soft targets"
        return Case(f"bare head, {words}, B = 2", _head(seed), pictures(2, seed), dense, kind)

    return make


def _pair_loss(loss: str) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        dense = _soft(4, seed)
        kind = "mse_loss" if loss == "mse" else SOFT
        words = "squared error" if loss == "mse" else "soft targets"
        title = f"GELU pair, {words}, B = 4"
        return Case(title, _mlp(seed=seed), pictures(4, seed), dense, kind, solved=True)

    return make


_EDGES: list[Callable[[int], Case]] = [
    _one_pattern,
    _near,
    _no_bias,
    _twice,
    _two_labels,
    _width(16, True),
    _width(17, False),
    _width(32, False),
    _width(40, False),
    _bare(9, True),
    _bare(10, False),
    _bare(12, False),
    _bare_loss("mse"),
    _bare_loss("soft"),
    _pair_loss("mse"),
    _pair_loss("soft"),
]
