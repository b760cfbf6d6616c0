"""A prior of photographs that was learned as a denoiser.

A small network f gives an energy whose gradient step takes white noise of size σ away:

    E_σ(x) = ½ ‖f((x − mean)/σ, σ)‖²,      D_σ(x) = x − σ² ∇E_σ(x).

The best D_σ in the mean square is that of ``E_σ = −log p_σ``, the density of pictures with such
noise (Tweedie's formula); f is learned by nothing but what D_σ gets wrong.  So there is a value
beside the gradient, and Gauss–Newton's ``JᵀJ`` of f is a curvature that is never negative: what a
plug-and-play denoiser has to be given by assumptions.

σ is the rounding that a search asks for: it falls with the weight of the prior, and both stop where
the misfit is what errors explain.

Source: denoisers as priors are Venkatakrishnan, Bouman and Wohlberg's (2013) and Romano, Elad and
Milanfar's (RED, 2017); that of a gradient step is Hurault, Leclaire and Papadakis's (2022).
Gauss–Newton's curvature of it, and σ by the weight, are ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

import torch
from safetensors.torch import load as parsed
from torch import Tensor
from torch.nn.functional import conv2d, elu
from torch.nn.grad import conv2d_input

from rgap.solvers.priors import Operator, Prior, Sum, natural

__all__ = ["DenoiserPrior", "Features", "denoising", "shipped"]

FILE = "denoiser.safetensors"
WEIGHTS = 10.0, 1.0  # of differences, where they alone have 1, and of it: photographs 0 to 3
STRIDE = 2  # of the first layer
SIGMAS = 0.01, 0.3  # that it was learned for, in widths of the range
MIDDLE = math.log(0.05)  # of log σ, as the network is told of it
LEAST = 4  # pixels a side of a picture


@dataclass(frozen=True, eq=False)
class Features:
    """The network f: convolutions with ELU between, the first at every second pixel.

    Attributes:
        kernels: of the layers, [out, in, k, k].
        biases: of the layers, [out].
        tilts: what log σ adds to them, [out].
        alike: channels of the pictures that it was learned on, which are one here: noise of size σ
            in each of them is ``σ/√alike`` in their mean.
    """

    kernels: Sequence[Tensor]
    biases: Sequence[Tensor]
    tilts: Sequence[Tensor]
    alike: int = 1

    def __post_init__(self) -> None:
        if not len(self.kernels) == len(self.biases) == len(self.tilts) > 0:
            raise ValueError(
                f"Features: expected as many kernels as biases and tilts, got "
                f"{len(self.kernels)}, {len(self.biases)} and {len(self.tilts)}"
            )

    @property
    def channels(self) -> int:
        """Of a picture."""
        return self.kernels[0].shape[1]

    def layers(self, u: Tensor, sigma: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features of u [B, C, H, W] with noise σ [B], and the slopes of the activations."""
        told, slopes, last = sigma.log()[:, None] - MIDDLE, [], len(self.kernels) - 1
        for number, kernel in enumerate(self.kernels):
            bias = self.biases[number].to(u) + told * self.tilts[number].to(u)
            u = conv2d(u, kernel.to(u), None, *_geometry(number, kernel)) + bias[:, :, None, None]
            if number < last:
                slopes.append(u.detach().clamp_max(0.0).exp())
                u = elu(u)
        return u, slopes

    def push(self, v: Tensor, slopes: Sequence[Tensor]) -> Tensor:
        """J v, by slopes that :meth:`layers` gave."""
        for number, kernel in enumerate(self.kernels):
            v = conv2d(v, kernel.to(v), None, *_geometry(number, kernel))
            if number < len(slopes):
                v = v * slopes[number]
        return v

    def pull(self, w: Tensor, slopes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Jᵀ w, for pictures of this shape."""
        for number, kernel in reversed(list(enumerate(self.kernels))):
            if number < len(slopes):
                w = w * slopes[number]
            below = slopes[number - 1].shape if number else torch.Size(shape)
            stride, padding = _geometry(number, kernel)
            w = conv2d_input(below, kernel.to(w), w, stride, padding)  # type: ignore[no-untyped-call]
        return w

    def grey(self) -> Features:
        """The same of the mean of the channels: of pictures in which these are alike."""
        first = self.kernels[0].sum(1, keepdim=True)
        return replace(self, kernels=[first, *self.kernels[1:]], alike=self.channels)

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        parts = {"kernel": self.kernels, "bias": self.biases, "tilt": self.tilts}
        return {
            f"{name}.{number}": tensor.detach()
            for name, of in parts.items()
            for number, tensor in enumerate(of)
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Features:
        """From what :meth:`tensors` gave."""
        depth = sum(name.startswith("kernel.") for name in tensors)
        kernels, biases, tilts = (
            [tensors[f"{name}.{number}"] for number in range(depth)]
            for name in ("kernel", "bias", "tilt")
        )
        return cls(kernels, biases, tilts)


def _geometry(number: int, kernel: Tensor) -> tuple[int, int]:
    """Stride and padding of a layer."""
    return STRIDE if number == 0 else 1, (kernel.shape[-1] - 1) // 2


def centred(x: Tensor, unit: Tensor | float) -> Tensor:
    """Pictures less their means, in units; a symmetric map of each picture."""
    return (x - x.mean((1, 2, 3), keepdim=True)) / unit


@dataclass(frozen=True, eq=False)
class DenoiserPrior:
    """``E_σ(x)``, x [B, C, H, W], in the mean over entries.

    Attributes:
        features: f.
        weight: a factor.
        width: of the range of values.
        smoothing: σ, in units of x; kept where f was learned.

    Raises:
        ValueError: x has other channels, or is too small.

    >>> from rgap.photos import load
    >>> prior, photo = DenoiserPrior(shipped()), load(1)
    >>> shuffled = photo.flatten(2)[..., torch.randperm(1024)].view_as(photo)
    >>> bool(prior.value(photo) < prior.value(shuffled))
    True
    """

    features: Features
    weight: float = 1.0
    width: float = 1.0
    smoothing: float = 0.0

    @property
    def sigma(self) -> float:
        """σ of the pictures that f was learned on, in widths of the range."""
        wanted = self.smoothing / self.width * math.sqrt(self.features.alike)
        return min(max(wanted, SIGMAS[0]), SIGMAS[1])

    def value(self, x: Tensor) -> Tensor:
        """The energy."""
        seen, _ = self._seen(x)
        return 0.5 * self._factor(x) * seen.square().sum()

    def gradient(self, x: Tensor) -> Tensor:
        """``Jᵀ f``."""
        return self.value_and_gradient(x)[1]

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from features that are taken once."""
        seen, slopes = self._seen(x)
        factor = self._factor(x)
        pulled = centred(self.features.pull(seen, slopes, x.shape), self._unit)
        return 0.5 * factor * seen.square().sum(), factor * pulled

    def curvature(self, x: Tensor) -> Operator:
        """``v ↦ Jᵀ J v``, Gauss–Newton's."""
        _, slopes = self._seen(x)
        factor = self._factor(x)

        def apply(v: Tensor) -> Tensor:
            bent = self.features.push(centred(v, self._unit), slopes)
            return factor * centred(self.features.pull(bent, slopes, v.shape), self._unit)

        return apply

    def denoised(self, x: Tensor) -> Tensor:
        """``D_σ(x)``, the pictures without white noise of size σ."""
        step = self._unit**2 / self.features.alike / self._factor(x)
        return x - step * self.gradient(x)

    def smoothed(self, size: float) -> DenoiserPrior:
        """The density of pictures with noise of this size."""
        return replace(self, smoothing=max(size, self.smoothing))

    @property
    def _unit(self) -> float:
        """σ in units of x."""
        return self.sigma * self.width

    def _factor(self, x: Tensor) -> float:
        return self.weight / x.numel()

    def _seen(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """f(x) and the slopes of its activations."""
        channels = self.features.channels
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < LEAST:
            raise ValueError(
                f"DenoiserPrior: expected pictures [B, {channels}, H, W] of at least "
                f"{LEAST}×{LEAST} pixels, got {list(x.shape)}; write prior='natural'"
            )
        return self.features.layers(centred(x, self._unit), x.new_full((len(x),), self.sigma))


@functools.cache
def shipped(channels: int = 3) -> Features:
    """That which comes with the package; ``rgap/data/LEARNED.md`` says what it was learned on.

    Args:
        channels: 3, or 1 for three that are alike.

    Raises:
        ValueError: other channels.
    """
    if channels == 1:
        return shipped().grey()
    if channels != 3:
        raise ValueError(
            f"the prior 'denoiser' is of pictures with 1 or 3 channels, got {channels}; write "
            "prior='natural'"
        )
    stored = parsed((resources.files("rgap.data") / FILE).read_bytes())
    return Features.of(stored)


def denoising(channels: int, width: float = 1.0) -> Prior:
    """The prior of differences with ten times its weight, and that of the denoiser.

    Args:
        channels: of the data, 1 or 3.
        width: of the range of their values.
    """
    differences, learned = WEIGHTS
    own = DenoiserPrior(shipped(channels), learned, width)
    return Sum([natural(channels, width, differences), own])
