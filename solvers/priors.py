"""Priors of pictures: what is likely where no equation decides.

Each has a value, its gradient, and the curvature of a quadratic that touches the value from above
at x (iteratively re-weighted least squares), which is what Gauss–Newton needs.  All are per entry
of x, so that a weight means the same for every size and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


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


@dataclass(frozen=True)
class TotalVariation:
    """``mean √(|∇x|² + ε²)`` over pixels, or ``mean |∂_i x| + |∂_j x|``, rounded alike.

    Attributes:
        weight: a factor.
        smoothing: ε, in units of x; below it differences count as noise.
        isotropic: one root over all channels and both directions, so that edges of a picture lie
            at one place; else one for each.

    Source: Rudin, Osher and Fatemi (1992); re-weighting: Vogel and Oman (1996).

    >>> flat, step = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    >>> step[..., 2:] = 1.0
    >>> prior = TotalVariation(smoothing=1e-6)
    >>> bool(prior.value(flat) < 1e-5), round(float(prior.value(step)), 3)
    (True, 0.25)
    """

    weight: float = 1.0
    smoothing: float = 0.01
    isotropic: bool = True

    def value(self, x: Tensor) -> Tensor:
        """The total variation, per entry."""
        return self.weight * self._lengths(x).sum(0).mean()

    def gradient(self, x: Tensor) -> Tensor:
        """∇ᵀ(∇x / length)."""
        return self.curvature(x)(x)

    def curvature(self, x: Tensor) -> Operator:
        """The lagged diffusivity, v ↦ ∇ᵀ(∇v / length(x))."""
        lengths = self._lengths(x)
        inverse = self.weight / lengths / lengths[0].numel()

        def apply(v: Tensor) -> Tensor:
            return _divergence(_differences(v) * inverse)

        return apply

    def smoothed(self, size: float) -> TotalVariation:
        """The same with differences below ``size`` rounded off."""
        return replace(self, smoothing=max(size, self.smoothing))

    def _lengths(self, x: Tensor) -> Tensor:
        """Lengths of the differences, [axes or 1, B, C or 1, *space]."""
        squares = _differences(x).square()
        if self.isotropic:
            squares = squares.sum((0, 2), keepdim=True)
        return (squares + self.smoothing**2).sqrt()


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


def _differences(x: Tensor) -> Tensor:
    """Forward differences along each axis of space, 0 at the border, [axes, B, C, *space]."""
    if x.ndim < 3:
        raise ValueError(
            f"TotalVariation: expected samples with channels and space, [B, C, H, W], got "
            f"{list(x.shape)}: their entries have no neighbours; write prior=Squares()"
        )
    out = []
    for axis in range(2, x.ndim):
        d = torch.zeros_like(x)
        d.narrow(axis, 0, x.shape[axis] - 1).copy_(x.diff(dim=axis))
        out.append(d)
    return torch.stack(out)


def _divergence(d: Tensor) -> Tensor:
    """The transpose of :func:`_differences`."""
    out = torch.zeros_like(d[0])
    for axis in range(2, d[0].ndim):
        own = d[axis - 2].narrow(axis, 0, d[0].shape[axis] - 1)
        out.narrow(axis, 1, own.shape[axis]).add_(own)
        out.narrow(axis, 0, own.shape[axis]).sub_(own)
    return out
