"""A picture where no batch that meets the update was found: known features first, then gradients.

Gradients of a network with kinks jump, so a search that follows them ends where it began.  The
features u of a layer are continuous in the data, and closed forms often know them.  Adam on signs
goes down

    mean((u(x) − û)²/s²) + λ prior(x),   then   1 − cos(G(x), G) + ε·(the same with a smaller λ),

s the spread of every channel of û over its places: a bias that all places share says nothing.
Computed in float32, which is enough for a picture and half the time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rgap.constraints.known_input import Standardised
from rgap.jacobian.module_update import ClientLoss, KnownFeatures, ModuleUpdate
from rgap.network.isolation import convolution_work, small_kernels
from rgap.solvers.first_order import Adam
from rgap.solvers.priors import Prior

RULE = Adam(0.025, signed=True)  # in widths of the range
STEPS = (300, 200)  # at most, on features and on gradients
FINER = 0.4  # rate of the second part over that of the first
WEIGHTS = (0.1, 0.01)  # of the prior, in the first part and in the second
POOLED = 0.003  # the latter where features are averages over the picture: gradients decide
NEARLY = 0.2  # of the prior where features are not known but nearly so
BRIEF = 0.2  # share of the time for features that are averages, of which few numbers are left
STARTS = 2  # where one answer is as good as another: the mean is nearer than each
FEATURES = 0.1  # ε: weight of known features beside the cosine
NOISE = 0.25  # spread of the start, in widths of the range
LATE = 1.05  # share of its time after which a part ends, wherever it is
PROBE = 5  # steps after which their number is fitted to the time


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


def coarse(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    source: KnownFeatures | ClientLoss,
    wanted: Suggestion,
    *,
    follow: bool = True,
) -> Tensor:
    """The batch that known features, the directions of gradients and a prior suggest; no more.

    Args:
        model: the network.
        gradients: the update.
        source: the loss; or features, :class:`Standardised`, with the cotangent there.
        wanted: shape, prior and range of the batch, and the time.
        follow: False where the features are not certain and the cotangent is not known: they alone.

    Returns:
        [B, *input_shape], float64; certified by nothing.
    """
    deadline = time.perf_counter() + wanted.seconds
    parts: tuple[int, ...] = (1,)
    vague = True
    if isinstance(source, KnownFeatures):
        assert isinstance(source.known, Standardised)
        vague, parts = source.known.places == 1, (0, 1) if follow else (0,)
        known, cotangent = source.known.to(torch.float32), source.cotangent.float()
        source = replace(source, known=known, cotangent=cotangent)
    update = ModuleUpdate(model, gradients, source, wanted.shape, torch.float32)
    starts, ends = STARTS if vague or not follow else 1, list[Tensor]()
    for start in range(starts):
        x = wanted.start(start)
        x = x.to(next(iter(update.gradients.values()))) if update.gradients else x
        with small_kernels(convolution_work(update.model, x)):
            for part in parts:
                left = (deadline - time.perf_counter()) / (starts - start)
                rate = FINER if part and not vague else 1.0
                first = WEIGHTS[0] if follow else NEARLY
                weight = (first, POOLED if vague else WEIGHTS[1])[part]
                share = left if part == parts[-1] else (BRIEF if vague else 0.5) * left
                x = _descended(update, x, replace(wanted, seconds=share), part, rate, weight)
        ends.append(x.double())
    return torch.stack(ends).mean(0)


def _descended(
    update: ModuleUpdate, x: Tensor, wanted: Suggestion, part: int, rate: float, weight: float
) -> Tensor:
    """One part of the way; its steps are fitted to the time."""
    began, total, shape = time.perf_counter(), STEPS[part], x.shape
    rate *= wanted.width
    state, row, number = RULE.begin(x.reshape(1, -1)), x.reshape(1, -1), 0
    while number < total:
        at = row.reshape(shape).requires_grad_()
        with torch.enable_grad():
            value = update.direction(at, FEATURES) if part else update.features(at)
            slope = torch.autograd.grad(value, at)[0]
        slope = slope + weight * wanted.prior.gradient(at.detach())
        row, state = RULE.step(
            row.detach(), slope.reshape(1, -1), state, rate * RULE.length(number, total)
        )
        row = row if wanted.value_range is None else row.clamp(*wanted.value_range)
        number += 1
        spent = time.perf_counter() - began
        if number == PROBE:
            total = max(PROBE + 1, min(total, int(PROBE * wanted.seconds / max(spent, 1e-9))))
        if spent > LATE * wanted.seconds:
            break
    return row.detach().reshape(shape)
