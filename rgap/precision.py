"""Error carried with every value: an ensemble of perturbations that travels with the estimate.

A client computes in finite precision.  Each of its operations rounds, so every number that the
recursion recovers has an error, and the errors of different numbers are correlated.  They are
represented by S sampled perturbations (a Monte Carlo of linear error propagation): the spread of
the samples weighs the rows of the next stage's equations, and at the end it is the predicted
error of the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

UNKNOWN = 1e150  # standard error of a value that no equation fixes
GROWTH = 2.0  # rounding of an accumulated sum over the rounding of its terms


@dataclass(frozen=True)
class Known:
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
        return self.error.abs().amax(0) < UNKNOWN


def carried(function: Callable[[Tensor], Tensor], known: Known) -> Known:
    """A function of what is known, with the ensemble carried along by finite differences.

    Args:
        function: maps [N, ...] sample by sample.
        known: its argument.
    """
    value = function(known.value)
    size = known.error.abs().max().clamp_min(1e-300)
    step = 1e-6 / size  # a small multiple of the error, far above rounding
    moved = function((known.value[None] + step * known.error).flatten(0, 1))
    return Known(value, (moved.reshape(len(known.error), *value.shape) - value) / step)


@dataclass
class Precision:
    """Sampled errors of numbers computed in ``dtype`` and sent with additional noise.

    Attributes:
        dtype: precision of the client's arithmetic.
        noise: standard deviation of noise added to every entry of the update.
        samples: size S of the ensemble.
        seed: of the private generator; the global random state is not touched.
    """

    dtype: torch.dtype = torch.float32
    noise: float = 0.0
    samples: int = 24
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def unit(self) -> float:
        """Unit roundoff u of the client's arithmetic."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def floor(self) -> float:
        """Half the smallest subnormal number: the absolute rounding near zero.

        At least 1e-140, below which variances leave the range of float64: a softmax that is sure
        of itself sends cotangents down to 1e-300, and they say nothing.
        """
        info = torch.finfo(self.dtype)
        return max(info.smallest_normal * info.eps / 2, 1e-140)

    def normal(self, std: Tensor, samples: int | None = None) -> Tensor:
        """S samples with the given standard deviation, [S, *std.shape]; S = 1, say, on request."""
        shape = (self.samples if samples is None else samples, *std.shape)
        draw = torch.randn(shape, generator=self.generator, dtype=torch.float32)  # 3 times as fast
        return draw.to(std.device).double().mul_(std)

    def rounding(self, value: Tensor) -> Tensor:
        """S samples of the error of one rounded operation with result ``value``."""
        return self.normal(value.abs() * self.unit + self.floor)

    def sum_std(self, squares: Tensor) -> Tensor:
        """Standard error of a sum whose squared terms add up to ``squares``."""
        return squares.clamp_min(0).sqrt() * (GROWTH * self.unit) + self.floor

    def update_std(self, squares: Tensor, total: Tensor | None = None) -> Tensor:
        """Standard error of a gradient entry: rounding of its sum, and the stated noise.

        Args:
            squares: sum of the squared terms.
            total: the sum itself, of the samples of a batch: where all terms have one sign each
                partial sum is as large as the total, and so is what it rounds.
        """
        variance = self.sum_std(squares).square() + self.noise**2
        if total is not None:
            variance = variance + (self.unit * total).square()
        return variance.sqrt()
