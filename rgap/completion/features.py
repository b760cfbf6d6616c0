"""A picture where no batch that meets the update was found: known features, gradients, a prior.

Gradients of a network with kinks jump, so a search that follows them ends where it began.  With
kinks that are rounded off at first (:mod:`rgap.jacobian.smoothing`), and with û the known features
of a layer and k the cotangents there, L-BFGS goes down

    ‖u(x) − û‖²/‖û‖²  +  mean_j ‖g_j(x) − G_j‖²/‖G_j‖²  +  λ prior(x),   g_j = ∂⟨k, u(x)⟩/∂W_j,

level by level: kinks get sharper while λ falls.  Without known features the g_j are those of the
loss.  Every tensor of the update has the same say, however small its gradient, and none only for
its direction: how large a gradient is says how bright a picture is.  Computed in float32, which is
enough for a picture and half the time.

Source: L-BFGS on gradients is Zhu, Liu and Han's (2019); of the rounded kinks see there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rgap.constraints.known_input import Whole
from rgap.jacobian.module_update import ClientLoss, KnownFeatures, ModuleUpdate
from rgap.network.isolation import convolution_work, small_kernels
from rgap.solvers.lbfgs import lowered
from rgap.solvers.priors import Prior, value_and_gradient

__all__ = ["Suggestion", "coarse"]

STEPS = 400  # of L-BFGS a level at most
HEAVY, LIGHT = 0.1, 1e-3  # weight of the prior at the first level and at the last
NOISE = 0.1  # spread of the start, in widths of the range
STARTS = 4  # where one answer is as good as another: the mean is nearer than each
FEWEST = 300  # calls of the function that a start is worth


class Pass(NamedTuple):
    """Levels of sharpness that are gone through with the gradients of some layers.

    Attributes:
        layers: how many, the highest first; 0 for all.
        blunt: sharpness of the first level.
        sharp: of the last.
        levels: how many.
        share: of the time, in parts.
        heavy: weight of the prior at the first level.
        light: at the last.
    """

    layers: int
    blunt: float
    sharp: float
    levels: int
    share: float = 1.0
    heavy: float = HEAVY
    light: float = LIGHT


# The gradient of the layer next below the features depends on the fewest kinks.
DESCENDING = Pass(1, 2.0, 200.0, 9, 3.0), Pass(3, 60.0, 200.0, 3)
# Features that are not quite right lead near; from there kinks need not be so blunt.
APPROACH = Pass(0, 2.0, 200.0, 9, light=1e-2)
NEARBY = Pass(1, 20.0, 200.0, 5, 3.0, 1e-2), Pass(3, 60.0, 200.0, 3, 1.0, 1e-2)
APPROACHING = 0.25  # share of the time
FULL = 2  # axes of a fully connected layer's weight
# Where no features are known, or only averages: these leave much to the prior, so it stays.
TOGETHER = (Pass(0, 4.0, 30.0, 6, light=1e-2),)


@dataclass(frozen=True)
class Suggestion:
    """What a suggested batch is to be like, and how long it may take.

    Attributes:
        shape: of the batch.
        prior: of the data.
        value_range: of the data, kept; None for none.
        seconds: to spend, about.
        seed: of the start.
    """

    shape: tuple[int, ...]
    prior: Prior
    value_range: tuple[float, float] | None
    seconds: float
    seed: int = 0

    @property
    def width(self) -> float:
        """``high − low`` of the range; 1 where there is none."""
        low, high = self.value_range or (0.0, 1.0)
        return high - low

    def start(self, number: int) -> Tensor:
        """Noise about the middle of the range, float32."""
        low, high = self.value_range or (0.0, 1.0)
        generator = torch.Generator().manual_seed(self.seed + number)
        noise = torch.randn(self.shape, generator=generator)
        return noise * NOISE * (high - low) + (low + high) / 2

    def outside(self, x: Tensor) -> Tensor:
        """Mean square of what lies out of the range, in its widths."""
        if self.value_range is None:
            return x.new_zeros(())
        return ((x - x.clamp(*self.value_range)) / self.width).square().mean()

    def kept(self, x: Tensor) -> Tensor:
        """The nearest data in the range."""
        return x if self.value_range is None else x.clamp(*self.value_range)


def coarse(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    source: KnownFeatures | ClientLoss,
    wanted: Suggestion,
    near: KnownFeatures | None = None,
) -> Tensor:
    """The batch that known features, gradients and a prior suggest; no more.

    Args:
        model: the network.
        gradients: the update.
        source: the loss; or all features of a layer, with the cotangent there.
        wanted: shape, prior and range of the batch, and the time.
        near: features of a lower layer that are not quite right, to begin near: no gradient is
            asked to agree with them.

    Returns:
        [B, *input_shape], float64; certified by nothing.
    """
    deadline = time.perf_counter() + wanted.seconds
    place, entries = next(iter(gradients.values())).device, 0
    if isinstance(source, KnownFeatures):
        source = _rough(source)
        entries = source.cotangent[0].numel()
    update = ModuleUpdate(model, gradients, source, wanted.shape, torch.float32)
    layers = _layers(update.gradients)
    averaged = _averaged(update.gradients, entries)
    passes = (TOGETHER if averaged else DESCENDING if near is None else NEARBY)[
        : max(len(layers), 1)
    ]
    ends, x = list[Tensor](), wanted.start(0).to(place)
    with small_kernels(convolution_work(update.model, x)):
        starts = _starts(update, x, wanted, deadline) if averaged else 1
        for start in range(starts):
            x = wanted.start(start).to(place)
            if near is not None and not averaged:
                own = ModuleUpdate(model, gradients, _rough(near), wanted.shape, torch.float32)
                x = _descended(own.only(()), x, wanted, APPROACH, APPROACHING * wanted.seconds)
            ahead = (starts - start) * sum(made.share for made in passes)
            for made in passes:
                taken = layers[: made.layers or None]
                names = {name for layer in taken for name in layer}
                left = (deadline - time.perf_counter()) * made.share / ahead
                ahead -= made.share
                x = _descended(update.only(names), x, wanted, made, left)
            ends.append(x.double())
    return wanted.kept(torch.stack(ends).mean(0))


def _rough(source: KnownFeatures) -> KnownFeatures:
    """The same in float32."""
    assert isinstance(source.known, Whole)
    known = replace(source.known, value=source.known.value.float())
    return replace(source, known=known, cotangent=source.cotangent.float())


def _starts(update: ModuleUpdate, x: Tensor, wanted: Suggestion, deadline: float) -> int:
    """How many starts there is time for."""
    began = time.perf_counter()
    lowered(x / wanted.width, 1, partial(_value, update, wanted, HEAVY), deadline)
    call = (time.perf_counter() - began) / 2.0
    return min(STARTS, max(int(wanted.seconds / max(FEWEST * call, 1e-9)), 1))


def _layers(gradients: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of tensors by layer, the highest first.

    Norms and biases count to the layer before, and fully connected layers above a convolution to
    it: they say of its output what known features do.
    """
    layers, above = list[list[str]](), False
    for name, gradient in gradients.items():
        above = above or gradient.ndim > FULL
        if (gradient.ndim > 1 and not (above and gradient.ndim == FULL)) or not layers:
            layers.append([])
        layers[-1].append(name)
    return layers[::-1]


def _averaged(gradients: Mapping[str, Tensor], entries: int) -> bool:
    """True if a convolution's output is averaged over its places before it is taken in or known.

    Such averages say little of where in a picture something is.  True without a convolution too.

    Args:
        gradients: of the layers below what is known, in forward order.
        entries: of known features of one sample; 0 for none.
    """
    last: Tensor | None = None
    for gradient in gradients.values():
        if gradient.ndim > FULL:
            last = gradient
        elif gradient.ndim == FULL and last is not None:
            return gradient.shape[1] == last.shape[0]
    return last is None or entries == last.shape[0]


def _descended(
    update: ModuleUpdate, x: Tensor, wanted: Suggestion, made: Pass, seconds: float
) -> Tensor:
    """Where one pass leads; L-BFGS has the data in widths of their range."""
    deadline, levels = time.perf_counter() + seconds, made.levels if update.sharpness else 1
    width = wanted.width
    for level in range(levels):
        along = level / max(levels - 1, 1)
        weight = made.heavy * (made.light / made.heavy) ** along
        sharpness = made.blunt * (made.sharp / made.blunt) ** along if update.sharpness else None
        now = time.perf_counter()
        update.settle(x, made.blunt if sharpness is None else sharpness)
        with update.softened(sharpness):
            value = partial(_value, update, wanted, weight)
            until = now + max(deadline - now, 0.0) / (levels - level)
            x = width * lowered(x / width, STEPS, value, until)
    return x


def _value(update: ModuleUpdate, wanted: Suggestion, weight: float, unit: Tensor) -> Tensor:
    """What is lowered, in the graph of the data in widths; the prior with its slope alone."""
    x = wanted.width * unit
    penalty, slope = value_and_gradient(wanted.prior, x.detach())
    prior = penalty + (slope * (x - x.detach())).sum()
    return update.apart(x) + weight * prior + wanted.outside(x)
