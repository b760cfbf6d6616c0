"""Priors of pictures: what is likely where no equation decides.

Each has a value, its gradient, and the curvature of a quadratic that touches the value from above
at x (iteratively re-weighted least squares), which is what Gauss–Newton needs.  All are per entry
of x, so that a weight means the same for every size and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
STENCILS = {1: (-1.0, 1.0), 2: (1.0, -2.0, 1.0)}  # of differences, by order
POWER, CHROMA = 0.5, 3.0  # of natural pictures: chosen on the photographs 0 to 7


@runtime_checkable
class Prior(Protocol):
    """A penalty on x ``[B, C, *space]`` (or ``[B, n]``)."""

    def value(self, x: Tensor) -> Tensor:
        """The penalty, a scalar."""

    def gradient(self, x: Tensor) -> Tensor:
        """Its gradient, like x."""

    def curvature(self, x: Tensor) -> Operator:
        """A positive semidefinite operator that bounds its second derivative at x."""

    def smoothed(self, size: float) -> Prior:
        """The same with its kinks rounded off at ``size``."""


@runtime_checkable
class _Together(Protocol):
    """A prior whose value and gradient share work."""

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once."""


@runtime_checkable
class Warm(Protocol):
    """A prior that keeps where its own search ended, for the next; that belongs to one descent."""

    def cold(self, deadline: float = inf) -> Prior:
        """The same, that remembers nothing and searches no longer than that."""

    def held(self) -> dict[str, Tensor]:
        """What it remembers."""

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what :meth:`held` gave."""


def cold(prior: Prior, deadline: float = inf) -> Prior:
    """A prior as a search begins with it, which ends at a time of ``time.perf_counter``.

    >>> cold(Squares())
    Squares(weight=1.0, centre=0.5)
    """
    return prior.cold(deadline) if isinstance(prior, Warm) else prior


REMEMBERED = "prior."  # before the names of what a prior remembers, in a checkpoint


def remembered(prior: object) -> dict[str, Tensor]:
    """What a prior remembers, for a checkpoint; nothing for most, and for None."""
    if not isinstance(prior, Warm):
        return {}
    return {REMEMBERED + name: tensor for name, tensor in prior.held().items()}


def remember(prior: object, checkpoint: Mapping[str, Tensor]) -> None:
    """Take back what :func:`remembered` gave."""
    if isinstance(prior, Warm):
        prior.hold(_of(checkpoint, REMEMBERED))


def value_and_gradient(prior: Prior, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient at x; together, where the prior has a ``value_and_gradient``.

    >>> value, slope = value_and_gradient(Squares(centre=1.0), torch.zeros(1, 2))
    >>> float(value), slope.tolist()
    (0.5, [[-0.5, -0.5]])
    """
    if isinstance(prior, _Together):
        return prior.value_and_gradient(x)
    return prior.value(x), prior.gradient(x)


@dataclass(frozen=True)
class TotalVariation:
    """``mean (|∇x|² + ε²)^{p/2}`` over pixels, or each difference by itself, rounded alike.

    Attributes:
        weight: a factor.
        smoothing: ε, in units of x; below it differences count as noise.
        isotropic: one length over all channels and directions, so that edges of a picture lie at
            one place; else one for each.
        power: p; 1 is the total variation, below it a few large differences cost less than many
            small ones, as in pictures.
        order: 1, or 2 for second differences: slopes cost nothing.
        chroma: factor κ on differences that the channels do not share, taken of
            ``κ x + (1 − κ) mean_c x``: in pictures they are smaller than those of brightness.

    Raises:
        ValueError: a power that is not in (0, 2], another order, samples without neighbours.

    Source: Rudin, Osher and Fatemi (1992); re-weighting: Vogel and Oman (1996); powers below 1:
    Krishnan and Fergus (2009).

    >>> flat, step = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    >>> step[..., 2:] = 1.0
    >>> prior = TotalVariation(smoothing=1e-6)
    >>> bool(prior.value(flat) < 1e-5), round(float(prior.value(step)), 3)
    (True, 0.25)
    >>> grey, red = step.expand(1, 3, 4, 4), torch.cat([step, flat, flat], 1)
    >>> prior = TotalVariation(chroma=3.0)
    >>> bool(prior.value(red) > prior.value(grey))
    True
    """

    weight: float = 1.0
    smoothing: float = 0.01
    isotropic: bool = True
    power: float = 1.0
    order: int = 1
    chroma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.power <= 2:
            raise ValueError(
                f"power: expected a number in (0, 2], got {self.power!r}; write power=1.0"
            )
        if self.order not in (1, 2):
            raise ValueError(f"order: expected 1 or 2, got {self.order!r}; write order=1")

    def value(self, x: Tensor) -> Tensor:
        """The total variation, per entry."""
        return self._mean(self._squares(self._bends(x)))

    def gradient(self, x: Tensor) -> Tensor:
        """``p ∇ᵀ(∇x · length^{p−2})``."""
        return self.value_and_gradient(x)[1]

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from differences that are taken once."""
        differences = self._bends(x)
        squares = self._squares(differences)
        pulled = _divergence(differences * self._factor(squares), self.order)
        return self._mean(squares), self._shared(pulled)

    def curvature(self, x: Tensor) -> Operator:
        """The lagged diffusivity, ``v ↦ p ∇ᵀ(∇v · length(x)^{p−2})``."""
        factor = self._factor(self._squares(self._bends(x)))

        def apply(v: Tensor) -> Tensor:
            return self._shared(_divergence(self._bends(v) * factor, self.order))

        return apply

    def smoothed(self, size: float) -> TotalVariation:
        """The same with differences below ``size`` rounded off."""
        return replace(self, smoothing=max(size, self.smoothing))

    def _shared(self, x: Tensor) -> Tensor:
        """κ x + (1 − κ) mean_c x, a symmetric map."""
        if self.chroma == 1:
            return x
        return self.chroma * x + (1 - self.chroma) * x.mean(1, keepdim=True)

    def _bends(self, x: Tensor) -> Tensor:
        """The differences that are measured, [axes, B, C, *space]."""
        return _differences(self._shared(x), self.order)

    def _mean(self, squares: Tensor) -> Tensor:
        """``length^p`` over pixels."""
        return squares.pow(self.power / 2).sum() * (self.weight / squares[0].numel())

    def _factor(self, squares: Tensor) -> Tensor:
        """``p length^{p−2}``, per pixel."""
        return squares.pow(self.power / 2 - 1) * (self.weight * self.power / squares[0].numel())

    def _squares(self, differences: Tensor) -> Tensor:
        """Their squared lengths, rounded, [axes or 1, B, C or 1, *space]."""
        squares = differences.square()
        if self.isotropic:
            squares = squares.sum((0, 2), keepdim=True)
        return squares + self.smoothing**2


@dataclass(frozen=True)
class Squares:
    """``½ mean (x − centre)²``.

    Attributes:
        weight: a factor.
        centre: where the penalty is 0; a number, or a tensor like x.

    >>> float(Squares(centre=1.0).value(torch.zeros(2, 3)))
    0.5
    """

    weight: float = 1.0
    centre: float | Tensor = 0.5

    def value(self, x: Tensor) -> Tensor:
        """Half the mean squared distance from the centre."""
        return 0.5 * self.weight * (x - self.centre).square().mean()

    def gradient(self, x: Tensor) -> Tensor:
        """(x − centre)/n."""
        return self.weight * (x - self.centre) / x.numel()

    def curvature(self, x: Tensor) -> Operator:
        """1/n."""
        factor = self.weight / x.numel()
        return lambda v: factor * v

    def smoothed(self, size: float) -> Squares:
        """Smooth as it is."""
        return self


@dataclass(frozen=True)
class Sum:
    """Several priors added up."""

    parts: Sequence[Prior]

    def value(self, x: Tensor) -> Tensor:
        """The sum of the values."""
        return torch.stack([part.value(x) for part in self.parts]).sum()

    def gradient(self, x: Tensor) -> Tensor:
        """The sum of the gradients."""
        return torch.stack([part.gradient(x) for part in self.parts]).sum(0)

    def curvature(self, x: Tensor) -> Operator:
        """The sum of the curvatures."""
        operators = [part.curvature(x) for part in self.parts]
        return lambda v: torch.stack([operator(v) for operator in operators]).sum(0)

    def smoothed(self, size: float) -> Sum:
        """Each of them smoothed."""
        return Sum([part.smoothed(size) for part in self.parts])

    def cold(self, deadline: float = inf) -> Sum:
        """Each of them without what it remembers."""
        return Sum([cold(part, deadline) for part in self.parts])

    def held(self) -> dict[str, Tensor]:
        """What its parts remember, by their number."""
        return {
            f"{number}.{name}": tensor
            for number, part in enumerate(self.parts)
            if isinstance(part, Warm)
            for name, tensor in part.held().items()
        }

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what :meth:`held` gave."""
        for number, part in enumerate(self.parts):
            if isinstance(part, Warm):
                part.hold(_of(tensors, f"{number}."))


def _of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def natural(channels: int, width: float = 1.0, weight: float = 1.0) -> Prior:
    """The prior of photographs: first and second differences, few and large, mostly of brightness.

    ``Σ_k mean (|∇ᵏx|² + ε²)^{1/4}`` in units of the range of values, k = 1, 2; with three channels
    differences of colour count three times.  The constants were chosen on the photographs 0 to 7
    of :mod:`rgap.photos`.

    Args:
        channels: of the data.
        width: of the range of their values.
        weight: a factor.
    """
    chroma = CHROMA if channels == 3 else 1.0
    first = TotalVariation(weight * width**-POWER, 0.01 * width, power=POWER, chroma=chroma)
    return Sum([first, replace(first, order=2)])


def _differences(x: Tensor, order: int) -> Tensor:
    """Differences along each axis of space, 0 at the border, [axes, B, C, *space].

    Order 1: of an entry and the next one; order 2: of both neighbours and twice the entry.
    """
    if x.ndim < 3:
        raise ValueError(
            f"TotalVariation: expected samples with channels and space, [B, C, H, W], got "
            f"{list(x.shape)}: their entries have no neighbours; write prior=Squares()"
        )
    out = x.new_zeros(x.ndim - 2, *x.shape)
    for axis in range(2, x.ndim):
        size = x.shape[axis] - order
        if size > 0:
            out[axis - 2].narrow(axis, order - 1, size).copy_(x.diff(order, dim=axis))
    return out


def _divergence(d: Tensor, order: int) -> Tensor:
    """The transpose of :func:`_differences`."""
    out = torch.zeros_like(d[0])
    for axis in range(2, d[0].ndim):
        size = out.shape[axis] - order
        if size > 0:
            own = d[axis - 2].narrow(axis, order - 1, size)
            for place, factor in enumerate(STENCILS[order]):
                out.narrow(axis, place, size).add_(own, alpha=factor)
    return out
