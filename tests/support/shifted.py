"""Random convolutions with an input and a cotangent, and how near K and X come up to Γ."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap import photos
from rgap.network.affine import Affine, convolution
from rgap.network.geometry import Geometry
from rgap.separation.shifts.arrangement import arrangements

F64 = torch.float64
SIDES = {1: range(2, 25), 2: range(2, 9), 3: range(2, 5)}


@dataclass(frozen=True)
class Convolution:
    """A convolution, its input, its cotangent, and the precision that its gradient is sent in."""

    affine: Affine
    inputs: Tensor
    cotangents: Tensor
    dtype: torch.dtype = F64

    @property
    def gradient(self) -> Tensor:
        """As sent, in float64."""
        exact = self.affine.weight_gradient(self.inputs, self.cotangents)
        return exact.to(self.dtype).to(F64)

    @property
    def noise(self) -> float:
        """Standard error of an entry."""
        exact = self.affine.weight_gradient(self.inputs, self.cotangents)
        return float((self.gradient - exact).square().mean().sqrt())

    @property
    def within(self) -> bool:
        """True if some arrangement of the taps bears the batch."""
        assert self.affine.geometry is not None
        filters, channels = self.affine.weight.shape[:2]
        return any(
            one.largest_batch(filters, channels) >= len(self.inputs)
            for one in arrangements(self.affine.geometry, self.affine.in_shape[1:])
        )

    def error(self, cotangents: Tensor, inputs: Tensor) -> float:
        """The larger relative distance of K and of X, where read, after the best Γ of either."""
        read = self.inputs * self.affine.reads
        return max(_apart(cotangents, self.cotangents), _apart(inputs, read))


def random_convolution(number: int, largest: int = 160) -> Convolution:
    """That of the number; sizes at which about half bear their batch.

    Args:
        number: seed.
        largest: number of filters; channels are fewer.
    """
    draw, generator = random.Random(number), torch.Generator().manual_seed(number)
    while True:
        dims = draw.choice([1, 2, 2, 2, 2, 3])
        kernel = tuple(draw.choice([2, 3, 3, 3, 3, 5]) for _ in range(dims))
        stride = tuple(draw.choice([1, 1, 1, 2]) for _ in range(dims))
        steps = tuple(s if draw.random() < 0.2 else 1 for s in stride)
        sides = zip(kernel, steps, strict=True)
        padding = tuple(draw.choice([0, d * (k - 1) // 2]) for k, d in sides)
        geometry = Geometry.of(kernel, stride=stride, padding=padding, dilation=steps)
        space = tuple(draw.choice(SIDES[dims]) for _ in range(dims))
        if min(geometry.out_space(space)) >= 1:
            break
    batch = draw.choice([1, 1, 2, 3, 4, 8])
    filters, channels = draw.randint(8, largest), draw.randint(4, largest * 3 // 4)
    weight = torch.zeros(filters, channels, *kernel, dtype=F64)
    affine = convolution("conv", weight, None, ("w", None), (channels, *space), geometry)
    x = torch.randn(batch, channels, *space, generator=generator, dtype=F64)
    if dims == 2 and draw.random() < 0.5:  # of photographs, as a first layer sees them
        places = torch.tensor(draw.sample(range(20), batch))
        pictures = photos.load(20, max(space))[places].to(F64)
        filtered = torch.randn(channels, 3, 3, 3, generator=generator, dtype=F64)
        x = torch.nn.functional.conv2d(pictures, filtered, padding=1)[..., : space[0], : space[1]]
        deviation, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
        x = (x - mean) / deviation + torch.randn(channels, 1, 1, generator=generator, dtype=F64) / 4
    k = torch.randn(batch, *affine.out_shape, generator=generator, dtype=F64)
    k = k * (torch.rand(k.shape, generator=generator) < 0.5)
    return Convolution(affine, x.relu(), k, draw.choice([F64, F64, torch.float32]))


def _apart(told: Tensor, true: Tensor) -> float:
    own, target = told.flatten(1).T, true.flatten(1).T
    mixed = own @ torch.linalg.lstsq(own, target).solution
    return float((mixed - target).norm() / target.norm())
