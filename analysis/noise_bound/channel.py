"""What defences make of one update: rows kept, their noise, and what clipping takes away."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rgap.analysis.noise_bound.defences import Defence, Sending
from rgap.analysis.probe import ProbePoint
from rgap.jacobian.update_map import UpdateMap
from rgap.solvers.limits import EQUAL

__all__ = ["Channel", "channel"]


@dataclass(frozen=True)
class Channel:
    """What the defences do to the rows of the Jacobian.

    Attributes:
        weights: information of every entry of the update in units of ``1/variance``, [equations];
            0 where nothing is sent.
        variance: of an entry with weight 1; 0 where there is no noise at all.
        uniform: True if every weight is 0 or 1, so that the error is proportional to the variance.
        scales: factor of the gradient of every part [P]: P = B with per-sample clipping, else 1.
        units: u of every clipped part [P, equations], zero where clipping does not act; None where
            no part is clipped.
        notes: what the reader should know.
    """

    weights: Tensor
    variance: float
    uniform: bool
    scales: Tensor
    units: Tensor | None
    notes: tuple[str, ...]

    @property
    def parts(self) -> int:
        """1, or B where every sample is clipped by itself."""
        return len(self.scales)

    def clipped(self, rows: Tensor, part: int) -> Tensor:
        """``s (I − u uᵀ) r`` for rows [S, equations]; it is its own transpose."""
        if self.units is None:
            return rows
        unit = self.units[part]
        return self.scales[part] * (rows - (rows @ unit)[:, None] * unit)


def channel(point: ProbePoint, sigma: float, chain: tuple[Defence, ...]) -> Channel:
    """The defences at this batch: rows kept, their variance, what clipping takes away.

    Args:
        point: the network at the batch.
        sigma: standard deviation of the stated noise in every entry of the update.
        chain: the defences in the order in which they act.
    """
    g = point.update.value(point.inputs)
    sent = Sending(
        g,
        variance=torch.full_like(g, sigma**2),
        kept=torch.ones_like(g, dtype=torch.bool),
        scales=g.new_ones(1),
        units=None,
        information=None,
        notes=(),
        sizes=point.update.sizes,
        mean=point.loss.reduction == "mean",
        by_sample=partial(_by_sample, point),
    )
    for one in chain:
        sent = one.act(sent)
    kept, variance, weights = sent.kept, sent.variance, sent.information
    if weights is None:
        noisy = variance[kept]
        level = float(noisy.amax()) if len(noisy) else 0.0
        uniform = level == 0 or bool((noisy >= level * (1 - EQUAL)).all())
        weights = torch.where(kept, level / variance if level else 1.0, 0.0)
        if uniform:
            weights = kept.double()
        elif not bool((noisy > 0).all()):  # tensors of zeros have no step and no error
            weights = torch.where(kept & (variance > 0), level / variance, 0.0)
    else:
        level, uniform = float(variance[kept].amax()), False
        weights = torch.where(kept, weights * level, 0.0)
    return Channel(weights, level, uniform, sent.scales, sent.units, sent.notes)


def _by_sample(point: ProbePoint) -> Tensor:
    """The gradient of every sample by itself, [B, equations]."""
    gradients = []
    for b in range(len(point.inputs)):
        x = point.inputs[b : b + 1]
        alone = UpdateMap(point.model, x, point.targets[b : b + 1], point.loss)
        gradients.append(alone.value(x))
    return torch.stack(gradients)
