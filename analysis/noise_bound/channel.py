"""What defences make of one update: rows kept, their noise, and what clipping takes away."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor

from rgap.analysis.noise_bound.defences import Clip, Defence, DifferentialPrivacy, Prune, Quantise
from rgap.analysis.probe import ProbePoint
from rgap.jacobian.update_map import UpdateMap
from rgap.solvers.limits import EQUAL

__all__ = ["Channel", "channel", "stacked"]


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
    update, loss = point.update, point.loss
    g = stacked(update, update.gradient(update.inputs))
    scales, units, notes = g.new_ones(1), None, []
    variance = torch.full_like(g, sigma**2)
    kept = torch.ones_like(g, dtype=torch.bool)
    weights: Tensor | None = None
    for one in chain:
        if isinstance(one, Clip | DifferentialPrivacy):
            dp = isinstance(one, DifferentialPrivacy)
            norm = one.clip if isinstance(one, DifferentialPrivacy) else one.norm
            parts, share = g[None], 1.0
            if isinstance(one, DifferentialPrivacy) and one.per_sample:
                parts = _by_sample(point)
                share = 1 / len(parts) if loss.reduction == "mean" else 1.0
            lengths = parts.norm(dim=1)
            acts = lengths > norm
            scales = torch.where(acts, norm / lengths.clamp_min(1e-300), 1.0)
            units = torch.where(acts[:, None], parts / lengths.clamp_min(1e-300)[:, None], 0.0)
            g = share * (scales[:, None] * parts).sum(0)
            if isinstance(one, DifferentialPrivacy):
                variance = variance + (one.multiplier * norm * share) ** 2
            what = "samples' gradients" if dp and len(parts) > 1 else "update"
            notes.append(_clip_note(what, acts, lengths, norm))
        elif isinstance(one, Prune):
            count = max(1, round(one.keep * len(g)))
            kept = torch.zeros_like(kept).index_fill_(0, g.abs().topk(count).indices, True)
            notes.append(
                f"Pruning sends {count:,} of {len(g):,} entries; the zeros of the others are "
                "inequalities and count as nothing."
            )
        elif isinstance(one, Quantise):
            steps = _steps(update, g, one.bits)
            small = float((g[kept].abs() < steps[kept] / 2).double().mean())
            variance = variance + steps.square() / 12
            notes.append(
                f"Rounding to {one.bits} bits counts as Gaussian noise of step/√12. "
                f"{small:.0%} of the entries are below half a step, where that does not hold: "
                "the prediction is that of least squares under this assumption, not a bound."
            )
        else:
            weights = _sign_information(g, variance)
            notes.append(
                "Signs without noise are inequalities: to first order they fix nothing."
                if not bool((variance > 0).any())
                else "Signs of a noisy update: Fisher information of one bit an entry."
            )
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
    return Channel(weights, level, uniform, scales, units, tuple(notes))


def stacked(update: UpdateMap, gradients: dict[str, Tensor]) -> Tensor:
    """An update by name as one vector [equations].

    Args:
        update: whose blocks give the order.
        gradients: by parameter name.
    """
    return torch.cat([gradients[name].flatten() for block in update.blocks for name in block.names])


def _by_sample(point: ProbePoint) -> Tensor:
    """The gradient of every sample by itself, [B, equations]."""
    gradients = []
    for b in range(len(point.inputs)):
        x = point.inputs[b : b + 1]
        alone = UpdateMap(point.model, x, point.targets[b : b + 1], point.loss)
        gradients.append(stacked(point.update, alone.gradient(x)))
    return torch.stack(gradients)


def _steps(update: UpdateMap, g: Tensor, bits: int) -> Tensor:
    """Distance of neighbouring values for every entry: one for each tensor."""
    gradients = update.gradient(update.inputs)
    sizes = [gradients[name].numel() for block in update.blocks for name in block.names]
    parts = [part.abs().amax().expand(len(part)) for part in torch.split(g, sizes)]
    return 2 * torch.cat(parts) / (2.0**bits - 1)


def _sign_information(g: Tensor, variance: Tensor) -> Tensor:
    """``φ(a)²/(σ² Φ(a) Φ(−a))``, by logarithms: far from zero both are tiny."""
    sigma = variance.sqrt()
    a = g / sigma.clamp_min(1e-300)
    tails = torch.special.log_ndtr(a) + torch.special.log_ndtr(-a)
    odds = torch.exp(-a.square() - log(2 * pi) - tails)
    return torch.where(sigma > 0, odds / variance.clamp_min(1e-300), 0.0)


def _clip_note(what: str, acts: Tensor, lengths: Tensor, norm: float) -> str:
    longest = float(lengths.amax())
    if not bool(acts.any()):
        return f"Clipping at {norm:g} does not act: the largest norm is {longest:.3g}."
    if len(acts) == 1:
        return (
            f"Clipping scales the update by {norm / longest:.3g}; its length, one equation, is "
            "lost."
        )
    return (
        f"Clipping scales {int(acts.sum())} of the {len(acts)} {what}, by "
        f"{norm / longest:.3g} at most; their lengths are lost."
    )
