"""First-order minimisation of many starts at once: Adam and L-BFGS, a row a start.

A rule holds no state of its own: it gets and returns tensors, so that a run can be written down
after any step and goes on to the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import cos, pi
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
FLAT = 1e-10  # curvature ⟨y, s⟩ below which L-BFGS forgets a pair, as torch.optim.LBFGS does


class Rule(Protocol):
    """How x moves along a gradient."""

    def begin(self, x: Tensor) -> State:
        """The state before the first step at x [R, n]."""

    def length(self, number: int, total: int) -> float:
        """Rate of step ``number`` of ``total``, counted from 0."""

    def step(self, x: Tensor, gradient: Tensor, state: State, rate: float) -> tuple[Tensor, State]:
        """The next x and state."""


class Pace(Protocol):
    """How a rate falls along the way."""

    def __call__(self, number: int, total: int) -> float:
        """Factor of step ``number`` of ``total``, counted from 0."""


@dataclass(frozen=True)
class Drops:
    """A factor after each of several shares of the way.

    >>> [round(Drops()(n, 8), 3) for n in (0, 3, 5, 7)]
    [1.0, 0.1, 0.01, 0.001]
    """

    shares: Sequence[float] = (3 / 8, 5 / 8, 7 / 8)
    factor: float = 0.1

    def __call__(self, number: int, total: int) -> float:
        """factor^(shares that are behind)."""
        return float(self.factor ** sum(number >= share * total for share in self.shares))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 to 0, after a linear rise over the first ``warmup`` steps.

    >>> [round(Cosine(warmup=2)(n, 6), 3) for n in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """

    warmup: int = 50

    def __call__(self, number: int, total: int) -> float:
        """(n + 1)/warmup, then ½(1 + cos(π·share of the rest))."""
        rise = min(self.warmup, total // 2)
        if number < rise:
            return (number + 1) / rise
        return 0.5 * (1.0 + cos(pi * (number - rise) / max(total - rise, 1)))


@dataclass(frozen=True)
class Adam:
    """Adam, on the gradient or on its sign.

    Attributes:
        rate: length of a step.
        pace: how the rate falls.
        signed: take the sign of every entry of the gradient first, as Geiping et al. (2020) do.
        betas: decay of the first and the second moment.

    Source: Kingma and Ba (2015).  Like ``torch.optim.Adam``.

    >>> rule, x = Adam(signed=True), torch.tensor([[1.0, -2.0]])
    >>> x, state = rule.step(x, torch.tensor([[5.0, -0.1]]), rule.begin(x), 0.1)
    >>> x
    tensor([[ 0.9000, -1.9000]])
    """

    rate: float = 0.1
    pace: Pace = field(default_factory=Drops)
    signed: bool = False
    betas: tuple[float, float] = (0.9, 0.999)

    def begin(self, x: Tensor) -> State:
        """Moments 0."""
        return {
            "first": torch.zeros_like(x),
            "second": torch.zeros_like(x),
            "count": x.new_zeros(()),
        }

    def length(self, number: int, total: int) -> float:
        """The rate, as far as it has fallen."""
        return self.rate * self.pace(number, total)

    def step(self, x: Tensor, gradient: Tensor, state: State, rate: float) -> tuple[Tensor, State]:
        """``x − rate · m̂ / (√v̂ + 1e-8)``."""
        slope, (a, b) = gradient.sign() if self.signed else gradient, self.betas
        count = float(state["count"]) + 1.0
        first = torch.lerp(state["first"], slope, 1 - a)
        second = torch.addcmul(b * state["second"], slope, slope, value=1 - b)
        scale = second.sqrt().div_((1 - b**count) ** 0.5).add_(1e-8)
        moved = x - (first / scale).mul_(rate / (1 - a**count))
        return moved, {"first": first, "second": second, "count": state["count"] + 1}


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS without a line search, every row with its own pairs.

    Attributes:
        rate: step length; the first step is shortened to 1/‖g‖₁ as ``torch.optim.LBFGS`` does.
        history: pairs kept.

    Source: Nocedal (1980); Liu and Nocedal (1989).

    >>> rule, x = LBFGS(), torch.tensor([[1.0, -2.0], [3.0, 1.0]], dtype=torch.float64)
    >>> state, slope = rule.begin(x), torch.tensor([1.0, 5.0], dtype=torch.float64)
    >>> for _ in range(12):
    ...     x, state = rule.step(x, slope * x, state, 1.0)
    >>> bool(x.abs().max() < 1e-6)
    True
    """

    rate: float = 1.0
    history: int = 100

    def begin(self, x: Tensor) -> State:
        """No pairs, no step yet."""
        return {
            "s": x.new_zeros(0, *x.shape),
            "y": x.new_zeros(0, *x.shape),
            "rho": x.new_zeros(0, len(x)),
            "scale": x.new_ones(len(x)),
            "x": x.clone(),
            "g": torch.zeros_like(x),
            "count": x.new_zeros(()),
        }

    def length(self, number: int, total: int) -> float:
        """The rate, which does not fall."""
        return self.rate

    def step(self, x: Tensor, gradient: Tensor, state: State, rate: float) -> tuple[Tensor, State]:
        """``x − rate · H ∇f``, H from the last steps and slopes by the two-loop recursion."""
        s, y, rho, scale = state["s"], state["y"], state["rho"], state["scale"]
        begun = float(state["count"]) > 0
        if begun:
            ds, dy = x - state["x"], gradient - state["g"]
            bend = (ds * dy).sum(1)
            kept = bend > FLAT
            inverse = torch.where(kept, 1.0 / bend.where(kept, torch.ones_like(bend)), 0.0)
            s, y = (torch.cat([old, new[None]])[-self.history :] for old, new in ((s, ds), (y, dy)))
            rho = torch.cat([rho, inverse[None]])[-self.history :]
            size = dy.square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
            scale = torch.where(kept, bend / size, scale)
        q, alphas = -gradient, []
        for i in reversed(range(len(s))):
            alphas.append(rho[i] * (s[i] * q).sum(1))
            q = q - alphas[-1][:, None] * y[i]
        r = scale[:, None] * q
        for i, alpha in zip(range(len(s)), reversed(alphas), strict=True):
            r = r + s[i] * (alpha - rho[i] * (y[i] * r).sum(1))[:, None]
        length = torch.full_like(scale, rate)
        if not begun:
            length = length * (1.0 / gradient.abs().sum(1).clamp_min(1e-30)).clamp_max(1.0)
        fresh = {"s": s, "y": y, "rho": rho, "scale": scale, "x": x, "g": gradient}
        return x + length[:, None] * r, {**fresh, "count": state["count"] + 1}
