"""Error carried with every value: an ensemble of perturbations that travels with the estimate.

A client computes in finite precision.  Each of its operations rounds, so every number that the
recursion recovers has an error, and the errors of different numbers are correlated.  They are
represented by S sampled perturbations (a Monte Carlo of linear error propagation): the spread of
the samples weighs the rows of the next stage's equations, and at the end it is the predicted
error of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from rgap.arithmetic.rounding import ABSENT, SMALLEST
from rgap.limits import HEARD, PASSES, SCATTER, SOLVED

UNKNOWN = 1e150  # standard error of a value that no equation fixes
OPEN = 1e100  # above which it is one, whatever scale a normalisation has put on it
ENDS = 3.0  # square of the largest error of a rounding over its variance
# Rounding of a sum of n terms of random sign that is added up one by one, over √n and over its size
# S: each partial sum S_j, of mean square S² j/n, rounds by a variance of u² S_j² times the mean of
# 1/(3 m²) over mantissas m in [1, 2), (1 − 1/4)/(6 ln 2) = 0.18; all of them by 0.18 u² S² n/2.
SEQUENTIAL = 0.3
GROWTH = 2.0  # rounding of an accumulated sum over the rounding of its terms


@dataclass(frozen=True)
class Estimate:
    """A value [B, ...] and the ensemble of its errors [S, B, ...]."""

    value: Tensor
    error: Tensor

    @property
    def std(self) -> Tensor:
        """Standard error of each entry, [B, ...]."""
        return self.error.square().mean(0).sqrt()

    @property
    def known(self) -> Tensor:
        """False where no equation fixes the entry, as for the z of a ReLU that is off, [B, ...]."""
        return self.error.abs().amax(0) < OPEN

    def shaped(self, shape: Sequence[int]) -> Estimate:
        """The same entries of every sample in another shape."""
        value = self.value.reshape(len(self.value), *shape)
        return Estimate(value, self.error.reshape(len(self.error), *value.shape))

    def of(self, rows: Sequence[int]) -> Estimate:
        """Some samples of a batch."""
        return Estimate(self.value[list(rows)], self.error[:, list(rows)])

    @property
    def silent(self) -> Tensor:
        """Channels of a cotangent that are not told from 0 beside their own errors, as bool [C].

        One without any error is what it is, 0 as well.
        """
        value = self.value.transpose(0, 1).flatten(1).norm(dim=1)
        error = self.std.transpose(0, 1).flatten(1).norm(dim=1)
        out: Tensor = (value <= HEARD * error) & (error > 0.0)
        return out


def paired(first: Estimate, second: Estimate) -> tuple[Estimate, Estimate]:
    """Two values with as many errors as the one that has fewer: a full solve carries few."""
    count = min(len(first.error), len(second.error))
    return replace(first, error=first.error[:count]), replace(second, error=second.error[:count])


def smoothed(known: Estimate) -> Tensor:
    """Standard errors that few members cannot leave too small by chance.

    One matrix K serves all channels, so a variance is about one factor for the place times one for
    the channel; each is a mean over many entries.
    """
    if known.value.ndim < 3:
        return known.std
    variance = known.error.square().mean(0).flatten(2)
    over = variance.mean((0, 2), keepdim=True) * variance.mean(1, keepdim=True)
    fitted = over / variance.mean().clamp_min(1e-300)
    return torch.maximum(variance, fitted).sqrt().reshape(known.value.shape)


class Named(Protocol):
    """A layer that knows what its parameters are called in the update."""

    @property
    def weight_name(self) -> str: ...  # noqa: D102

    @property
    def bias_name(self) -> str | None: ...  # noqa: D102


def carried(function: Callable[[Tensor], Tensor], known: Estimate) -> Estimate:
    """A function of what is known, with the ensemble carried along by finite differences.

    Args:
        function: maps [N, ...] sample by sample.
        known: its argument.
    """
    value = function(known.value)
    size = known.error.abs().max().clamp_min(1e-300)
    step = 1e-6 / size  # a small multiple of the error, far above rounding
    moved = function((known.value[None] + step * known.error).flatten(0, 1))
    return Estimate(value, (moved.reshape(len(known.error), *value.shape) - value) / step)


@dataclass(frozen=True)
class Precision:
    """Sampled errors of numbers computed in ``dtype`` and sent with additional noise.

    Noise is read by the name of the gradient, through :meth:`noise_std` and its aggregates
    :meth:`noise_rms` and :meth:`noise_norm`: the two attributes that hold it are halves of it.

    Attributes:
        dtype: precision of the client's arithmetic.
        noise: standard deviation of noise added to every entry of the update, as it was stated.
        samples: size S of the ensemble.
        seed: of the private generator; the global random state is not touched.
        entries: standard deviation of noise that is known entry by entry, by parameter name
            (`rgap.Update.noise`); it adds to ``noise`` in variance.
        generator: the one stream of all draws, so that no two of them are alike; a copy begins it.

    >>> precision = Precision(noise=3.0, entries={"weight": torch.tensor([4.0, 0.0])})
    >>> precision.noise_std("weight", torch.zeros(2)).tolist()
    [5.0, 3.0]
    """

    dtype: torch.dtype = torch.float32
    noise: float = 0.0
    samples: int = 24
    seed: int = 0
    entries: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    @property
    def unit(self) -> float:
        """Unit roundoff u of the client's arithmetic."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def floor(self) -> float:
        """Absolute rounding near zero: half the smallest subnormal number, and what functions lose.

        A sigmoid is ``1/(1 + e^{-z})``, and 0 once the exponential overflows: every result below
        the reciprocal of the largest number is lost, a quarter of the smallest normal one.
        Devices may flush all that is below that one to 0.  Formats of fewer bits are computed with
        in float32, and rounded after it.

        At least ``SMALLEST``, below which variances leave the range of float64.
        """
        info = torch.finfo(self.dtype)
        wide = torch.finfo(torch.promote_types(self.dtype, torch.float32))
        return max(info.smallest_normal * info.eps / 2, wide.smallest_normal, SMALLEST)

    def normal(self, std: Tensor, samples: int | None = None) -> Tensor:
        """S samples with the given standard deviation, [S, *std.shape]; S = 1, say, on request."""
        shape = (self.samples if samples is None else samples, *std.shape)
        draw = torch.randn(shape, generator=self.generator, dtype=torch.float32)  # 3 times as fast
        return draw.to(std.device).double().mul_(std)

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        """Random signs ±1."""
        return torch.randint(0, 2, shape, generator=self.generator).double() * 2.0 - 1.0

    def rounding(self, value: Tensor) -> Tensor:
        """S samples of the error of one rounded operation with result ``value``."""
        return self.normal(value.abs() * self.unit + self.floor)

    def sum_std(self, squares: Tensor, terms: int = 1) -> Tensor:
        """Standard error of a sum whose squared terms add up to ``squares``.

        Args:
            squares: of every sum.
            terms: that may have been added one after the other.
        """
        growth = max(GROWTH, SEQUENTIAL * math.sqrt(terms))
        return squares.clamp_min(0).sqrt() * (growth * self.unit) + self.floor

    @property
    def solved(self) -> float:
        """Change of a solution, as a share of it, at which a solve of ours has ended."""
        return max(1e-15, SOLVED * self.unit)

    def squares(self, value: Tensor) -> Tensor:
        """Squares of recovered values, as :meth:`sum_std` of what is made of them takes them.

        Solved for together, none of them is known better than our own arithmetic tells it from the
        largest: a sum over entries of 0 has that error all the same.  Beside what the client's sum
        over other entries rounds it vanishes.
        """
        own = max(PASSES * torch.finfo(torch.float64).eps / 2, SOLVED * self.unit)
        least = own / (GROWTH * self.unit)
        return value.square() + (least * value.abs().max()) ** 2

    @property
    def noisy(self) -> bool:
        """True if any noise is added to what the client computed."""
        return self.noise > 0.0 or bool(self.entries)

    def sent(self, name: str | None) -> bool:
        """False where the gradient of that name was not sent at all, and for no name."""
        if name is None:
            return False
        own = self.entries.get(name)
        return own is None or bool((own < ABSENT).any())

    def noise_std(self, name: str, like: Tensor, rows: slice | None = None) -> Tensor:
        """Standard deviation of the noise added to each entry of a gradient.

        Args:
            name: of the parameter.
            like: a tensor of its shape, or of the shape of its rows, and of the device and dtype
                that are wanted.
            rows: that are asked for; by default all.
        """
        own = self.entries.get(name)
        if own is None:
            return torch.full_like(like, self.noise)
        own = own if rows is None else own[rows]
        return torch.hypot(own.to(like).reshape(like.shape), like.new_tensor(self.noise))

    def noise_rms(self, name: str, like: Tensor) -> float:
        """Root mean square of :meth:`noise_std`: what one number says of a sum over entries."""
        if name not in self.entries:
            return self.noise
        return float(self.noise_std(name, like).square().mean().sqrt())

    def rms(self, name: str, gradient: Tensor) -> float:
        """Root mean square of the error of an entry of a gradient: its noise and one rounding."""
        rounded = self.unit * float(gradient.square().mean().sqrt())
        return self.noise_rms(name, gradient) + rounded

    def noise_norm(self, name: str, like: Tensor) -> float:
        """Spectral norm that noise of a matrix has: what a cutoff of singular values must exceed.

        The longest row plus the longest column of :meth:`noise_std`, ``σ(√m + √n)`` where all
        entries have one σ.  (Bandeira and van Handel, Ann. Probab. 44, 2016: up to a logarithm
        this is sharp for independent entries of any variances.)
        """
        variance = self.noise_std(name, like).flatten(1).square()
        return float(variance.sum(1).max().sqrt() + variance.sum(0).max().sqrt())

    def noise_length(self, name: str, like: Tensor) -> float:
        """Frobenius norm that the noise of a gradient has at most.

        Normal entries scatter about ``Σσ²`` by ``SCATTER √Σσ⁴``; errors of rounding are no random
        ones, and at the ends of their range all together add up to ``3 Σσ²``.
        """
        variance = self.noise_std(name, like).square()
        total, scatter = float(variance.sum()), float(variance.square().sum()) ** 0.5
        return float(max(ENDS * total, total + SCATTER * scatter) ** 0.5)

    def projected(self, name: str, basis: Tensor) -> Precision:
        """Of an update whose gradient G [m, n] of that name is given as G V, V [n, r] orthonormal.

        One σ stays what it is; entries σ_ij become ``(Σ_j σ_ij² V_jk²)^½``.  They have the shape
        of the parameter, which of a convolution over its whole input is [m, C, ...].
        """
        own = self.entries.get(name)
        if own is None:
            return self
        moved = (own.to(basis).flatten(1).square() @ basis.square()).sqrt()
        return replace(self, entries={**self.entries, name: moved})

    def update_std(self, name: str, squares: Tensor, total: Tensor | None = None) -> Tensor:
        """Standard error of a gradient entry: rounding of its sum, and the noise added to it.

        Args:
            name: of the parameter.
            squares: sum of the squared terms, of the parameter's shape.
            total: the sum itself, of the samples of a batch: where all terms have one sign each
                partial sum is as large as the total, and so is what it rounds.
        """
        variance = self.sum_std(squares).square()
        if self.noisy:
            variance = variance + self.noise_std(name, squares).square()
        if total is not None:
            variance = variance + (self.unit * total).square()
        return variance.sqrt()
