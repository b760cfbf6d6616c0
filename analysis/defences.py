"""Defences as changes of the equations: what of the update is sent, and how exactly.

A client computes g(x) and sends ``compress(clip(g) + σ e)``.  To first order every step is a change
of the linear system ``J dx = dg``: clipping takes one direction of the update away, pruning takes
rows away, rounding adds an error to the rows that are left, signs leave a little of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, log, pi

import torch
from torch import Tensor

from rgap.analysis.update_jacobian import UpdateMap
from rgap.losses import Loss

__all__ = ["Clip", "Defence", "DifferentialPrivacy", "Prune", "Quantise", "Sign"]


@dataclass(frozen=True)
class Clip:
    """The update scaled down to a norm, ``g ↦ g·min(1, C/‖g‖)``, as one vector.

    Where it acts the length of g is lost: ``d clip(g) = (C/‖g‖)(I − u uᵀ) dg`` with ``u = g/‖g‖``,
    at most one equation less, and the others that much smaller against the noise.

    Args:
        norm: C > 0.

    >>> Clip(1.0)
    Clip(norm=1.0)
    """

    norm: float

    def __post_init__(self) -> None:
        _positive("Clip", "norm", self.norm, "Clip(1.0)")


@dataclass(frozen=True)
class DifferentialPrivacy:
    """Clipping to C and Gaussian noise of standard deviation z·C on the clipped sum.

    Whole updates are clipped (privacy of a client), or the gradient of every sample (privacy of a
    sample, DP-SGD).  Under a batch mean the sum, its noise with it, is divided by B.

    Args:
        clip: C > 0.
        multiplier: z >= 0.
        per_sample: clip the gradient of every sample, not their mean.

    Source: Abadi et al. (2016); McMahan et al. (2018) for whole updates.
    """

    clip: float
    multiplier: float
    per_sample: bool = False

    def __post_init__(self) -> None:
        _positive("DifferentialPrivacy", "clip", self.clip, "DifferentialPrivacy(1.0, 0.1)")
        if not (isfinite(self.multiplier) and self.multiplier >= 0):
            raise ValueError(
                f"DifferentialPrivacy.multiplier: expected a finite number >= 0, got "
                f"{self.multiplier}; write DifferentialPrivacy(clip=1.0, multiplier=0.1)"
            )


@dataclass(frozen=True)
class Prune:
    """Only the largest entries of the update are sent; the others arrive as zeros.

    Rows that survive are equations as before.  Those that do not say that an entry is small, an
    inequality: nothing to first order.

    Args:
        keep: share of the entries that are sent, in (0, 1].
    """

    keep: float

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"Prune.keep: expected a share in (0, 1], got {self.keep}; write Prune(0.1) to "
                "keep the largest tenth"
            )


@dataclass(frozen=True)
class Quantise:
    """Every tensor rounded to 2^bits equally spaced values between −max|g| and max|g|.

    Assumption: rounding errors are uniform in ± half a step, independent of each other and of the
    data (Bennett 1948), so they count as Gaussian noise of standard deviation ``step/√12``.  That
    fails for entries below half a step, whose error is their own value.  And it makes the
    prediction that of least squares, not a bound: exact intervals hold more than their variance.

    Args:
        bits: 1 to 32.
    """

    bits: int

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in range(1, 33):
            raise ValueError(
                f"Quantise.bits: expected a whole number from 1 to 32, got {self.bits!r}; write "
                "Quantise(8)"
            )


@dataclass(frozen=True)
class Sign:
    """Only the signs are sent, of the update with its noise.

    Without noise signs are inequalities and fix nothing to first order.  With noise σ added before,
    each sign is a coin whose odds depend on g/σ: its Fisher information about g is
    ``φ(a)²/(σ² Φ(a) Φ(−a))`` at ``a = g/σ``, at most 2/π of what the entry itself would say.
    """


Defence = Clip | DifferentialPrivacy | Prune | Quantise | Sign
_ORDER = {Clip: 0, DifferentialPrivacy: 0, Prune: 1, Quantise: 2, Sign: 2}


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


def check(defence: Defence | Sequence[Defence] | None) -> tuple[Defence, ...]:
    """The defences in the order in which a client applies them.

    Raises:
        TypeError: something that is no defence.
        ValueError: an order that is not clip, prune, then quantise or sign; one kind twice.
    """
    if defence is None:
        return ()
    chain = tuple(defence) if isinstance(defence, list | tuple) else (defence,)
    for one in chain:
        if type(one) not in _ORDER:
            raise TypeError(
                f"defence: expected Clip, DifferentialPrivacy, Prune, Quantise or Sign, got "
                f"{one!r}; write defence=rgap.analysis.Clip(1.0), or a tuple of several"
            )
    places = [_ORDER[type(one)] for one in chain]
    if places != sorted(set(places)):
        names = [type(one).__name__ for one in chain]
        raise ValueError(
            f"defence: expected clipping first, then pruning, then quantising or signs, each once, "
            f"got {names}; write defence=(Clip(1.0), Prune(0.1), Quantise(8))"
        )
    return chain


def channel(
    update: UpdateMap,
    targets: Tensor,
    model: torch.nn.Module,
    loss: Loss,
    sigma: float,
    chain: tuple[Defence, ...],
) -> Channel:
    """The defences at this batch: rows kept, their variance, what clipping takes away."""
    g = stacked(update, update.gradient(update.inputs))
    scales, units, notes = torch.ones(1, dtype=torch.float64), None, []
    variance = torch.full_like(g, sigma**2)
    kept = torch.ones_like(g, dtype=torch.bool)
    weights: Tensor | None = None
    for one in chain:
        if isinstance(one, Clip | DifferentialPrivacy):
            dp = isinstance(one, DifferentialPrivacy)
            norm = one.clip if isinstance(one, DifferentialPrivacy) else one.norm
            parts, share = g[None], 1.0
            if isinstance(one, DifferentialPrivacy) and one.per_sample:
                parts = _by_sample(update, targets, model, loss)
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
        uniform = level == 0 or bool((noisy >= level * (1 - 1e-12)).all())
        weights = torch.where(kept, level / variance if level else 1.0, 0.0)
        if uniform:
            weights = kept.double()
        elif not bool((noisy > 0).all()):  # tensors of zeros have no step and no error
            weights = torch.where(kept & (variance > 0), level / variance, 0.0)
    else:
        level, uniform = float(variance[kept].amax()), False
        weights = torch.where(kept, weights * level, 0.0)
    return Channel(weights, level, uniform, scales, units, tuple(notes))


def stacked(update: UpdateMap, found: dict[str, Tensor]) -> Tensor:
    """An update by name as one vector, in the order of ``update.blocks``."""
    return torch.cat([found[name].flatten() for block in update.blocks for name in block.names])


def _by_sample(update: UpdateMap, targets: Tensor, model: torch.nn.Module, loss: Loss) -> Tensor:
    """The gradient of every sample by itself, [B, equations]."""
    found = []
    for b in range(len(update.inputs)):
        alone = UpdateMap(model, update.inputs[b : b + 1], targets[b : b + 1], loss)
        own = alone.gradient(alone.inputs)
        found.append(stacked(update, own))
    return torch.stack(found)


def _steps(update: UpdateMap, g: Tensor, bits: int) -> Tensor:
    """Distance of neighbouring values for every entry: one for each tensor."""
    found = update.gradient(update.inputs)
    sizes = [found[name].numel() for block in update.blocks for name in block.names]
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


def _positive(kind: str, name: str, value: float, write: str) -> None:
    if not (0 < value < inf):
        raise ValueError(f"{kind}.{name}: expected a finite number > 0, got {value}; write {write}")
