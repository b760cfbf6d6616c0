"""Networks that are no plain chains of convolutions, or chains of odd geometry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from written import Written


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Built with weights drawn from ``seed``, in float64 and eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double().eval()


def residual() -> nn.Module:
    """A skip connection on [2, 5, 5] pictures."""
    parts = {"a": nn.Conv2d(2, 3, 3, 2, 1), "b": nn.Conv2d(3, 3, 3, padding=1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.a(x))
        return m.fc((x + m.b(x).relu()).flatten(1))  # type: ignore[no-any-return]

    return Written(forward, **parts, fc=nn.Linear(27, 5))


def concatenated() -> nn.Module:
    """Two branches side by side on [2, 5, 5] pictures."""
    parts = {"left": nn.Conv2d(2, 2, 3, padding=1), "right": nn.Conv2d(2, 1, 3, padding=1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        both = torch.cat([m.left(x).sigmoid(), m.right(x).relu()], 1)
        return m.fc(m.under(both).flatten(1))  # type: ignore[no-any-return]

    return Written(forward, **parts, under=nn.Conv2d(3, 2, 3, 2), fc=nn.Linear(8, 5))


def pooled() -> nn.Module:
    """Max-pool and GELU on [2, 4, 4] pictures."""
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
    below = nn.Sequential(first, nn.MaxPool2d(2), second, nn.GELU())
    return nn.Sequential(below, nn.Flatten(), nn.Linear(8, 5))


def odd_geometry() -> nn.Module:
    """Stride, groups, wide padding, dilation, no bias; too few filters to determine its input."""
    first, second = nn.Conv2d(2, 4, 3, 2, 2, groups=2), nn.Conv2d(4, 2, 2, dilation=2, bias=False)
    below = nn.Sequential(first, nn.ELU(), second, nn.Softsign())
    return nn.Sequential(below, nn.Flatten(), nn.Linear(8, 5))


def attention() -> nn.Module:
    """One head of self-attention over four tokens of width 6, and a mean over the tokens."""

    def forward(m: Any, x: Tensor) -> Tensor:
        mixed, _ = m.mix(x, x, x, need_weights=False)
        return m.fc((x + mixed).mean(1))  # type: ignore[no-any-return]

    return Written(forward, mix=nn.MultiheadAttention(6, 2, batch_first=True), fc=nn.Linear(6, 4))


def called_twice() -> nn.Module:
    """A layer that is applied to its own output, on vectors of length 6."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.same(m.same(x).tanh()).tanh())  # type: ignore[no-any-return]

    return Written(forward, same=nn.Linear(6, 6), fc=nn.Linear(6, 3))


def tied() -> nn.Module:
    """A chain whose two hidden layers are one parameter, on vectors of length 6."""
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, 3))
