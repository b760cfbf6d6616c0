"""The factor λ between the cotangents that were sent and those of the declared loss.

``k_i = λ_i s ∂ℓ/∂z(z_i, y_i)`` with the loss's own scale s (1/B for a mean).  Each admissible
target y gives one least-squares λ, and C equations for it: with C ≥ 3 classes only the client's
own target fits to rounding.  With two (C = 2, or one logit) one target fits with λ > 0 and the
other with λ < 0; that with |λ| = 1 is meant, else the positive one.

A squared error takes any target, so that λ is only seen where targets are known or one-hot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from rgap.batchloss import loss_scale
from rgap.losses import Loss
from rgap.targets import BINARY, CROSS_ENTROPY, SQUARED

from .evidence import Evidence
from .samples import LOOSEST, SAFETY, Samples

LISTED = 512  # classes up to which every target is tried
EQUAL = 1e-4  # relative difference of factors that are the same


@dataclass(frozen=True)
class Fit:
    """One target of one sample.

    Attributes:
        factor: λ.
        target: index of the class, or the bits of a binary target.
        misfit: ‖k − λ r‖/‖k‖.
        tolerance: of the misfit, and relative of λ.
    """

    factor: float
    target: int
    misfit: float
    tolerance: float


@dataclass(frozen=True)
class Factors:
    """λ of every sample.

    Attributes:
        values: λ_i.
        tolerance: relative, of the worst.
        misfit: of the worst sample's own equations.
        unique: False where two targets of other signs fit.
    """

    values: tuple[float, ...]
    tolerance: float
    misfit: float
    unique: bool

    @property
    def common(self) -> float | None:
        """λ where all samples have the same, or None."""
        first = self.values[0]
        near = max(EQUAL, self.tolerance) * abs(first)
        return first if all(abs(v - first) <= near for v in self.values) else None


def fits_of(evidence: Evidence, samples: Samples, loss: Loss) -> list[list[Fit]] | None:
    """Targets that fit each sample, best first; None where the loss admits any."""
    outputs = samples.logits.shape[1]
    if not loss.equations:
        return None  # no table of residuals of targets that are one-hot
    size = evidence.batch or 1
    scale = loss_scale(loss, size, outputs)
    known = evidence.labels
    if known is not None and len(known) == len(samples.logits) == 1:
        summed = replace(loss, reduction="sum")
        table = scale * summed.cotangent(samples.logits, known.to(samples.logits.device))
        return [[_fit(samples, 0, table[0], scale * evidence.unit, -1)]]
    options = _options(loss, outputs, samples.logits)
    if options is None:
        return None
    found = []
    for row, z in enumerate(samples.logits):
        targets = _binary(samples, row) if loss.name == BINARY else options
        residuals = scale * _residuals(loss, z, targets)
        rounding = scale * evidence.unit
        fits = [_fit(samples, row, r, rounding, i) for i, r in enumerate(residuals)]
        found.append(sorted(fits, key=lambda fit: fit.misfit))
    return found


def _options(loss: Loss, outputs: int, like: Tensor) -> Tensor | None:
    """Dense admissible targets [options, C] of the kind of ``like``, or None."""
    if loss.name == BINARY:
        return like.new_zeros(0) if loss.targets == "index" else None
    if loss.name == CROSS_ENTROPY and loss.targets != "index":
        return None
    if outputs > LISTED or outputs < (3 if loss.name == SQUARED else 2):
        return None
    return torch.eye(outputs, dtype=torch.float64, device=like.device)


def _binary(samples: Samples, row: int) -> Tensor:
    """The two 0/1 targets that λ > 0 and λ < 0 leave, [2, C]: y_j = 1 where k_j/λ < 0."""
    negative = (samples.cotangents[row] < 0).double()
    return torch.stack([negative, 1.0 - negative])


def _residuals(loss: Loss, z: Tensor, targets: Tensor) -> Tensor:
    """∂ℓ/∂z for every target, with the loss's scale left out, [options, C]."""
    summed = replace(
        loss, reduction="sum", targets="value" if loss.name == SQUARED else "probability"
    )
    rows = z.expand(len(targets), -1)
    return summed.cotangent(rows, targets.to(z))


def _fit(samples: Samples, row: int, r: Tensor, rounding: float, index: int) -> Fit:
    """λ = ⟨k, r⟩/‖r‖², and how far it leaves the sample's equations."""
    k = samples.cotangents[row]
    size = float(r.norm())
    if size == 0.0:
        return Fit(0.0, index, 1.0, inf)
    factor = float(k @ r) / size**2
    misfit = float((k - factor * r).norm() / k.norm())
    # A softmax rounds p − 1 in absolute terms, so that little is left of a sure one.
    own = 2 * samples.width + samples.tolerance + SAFETY * rounding / size
    return Fit(factor, index, misfit, own)


def measured(evidence: Evidence, samples: Samples, loss: Loss) -> Factors | None:
    """λ of every sample under a loss; None where no target fits, or any does."""
    fits = fits_of(evidence, samples, loss)
    if fits is None:
        return None
    good = []
    for own in fits:
        if any(f.tolerance > LOOSEST for f in own):
            return None  # a target that the client's rounding hides may be the true one
        right = [f for f in own if f.misfit <= f.tolerance <= LOOSEST and f.factor != 0.0]
        if not right:
            return None
        good.append(right)
    unique = all(len({f.factor > 0 for f in own}) == 1 for own in good)
    chosen = _together(good)
    tolerance = max(f.tolerance for f in chosen)
    return Factors(
        tuple(f.factor for f in chosen), tolerance, max(f.misfit for f in chosen), unique
    )


def _together(good: list[list[Fit]]) -> list[Fit]:
    """One fit a sample: the same λ for all, ±1 first, where there is one."""

    def order(fit: Fit) -> tuple[bool, bool, float]:
        one = abs(abs(fit.factor) - 1.0) <= max(EQUAL, fit.tolerance)
        return (not one, fit.factor < 0, fit.misfit)

    for first in sorted(good[0], key=order):
        chosen = []
        for own in good:
            near = min(own, key=lambda f: abs(f.factor - first.factor))
            if abs(near.factor - first.factor) > max(EQUAL, near.tolerance) * abs(first.factor):
                break
            chosen.append(near)
        else:
            return chosen
    return [min(own, key=order) for own in good]


def smallest_misfit(evidence: Evidence, samples: Samples, loss: Loss) -> tuple[float, float] | None:
    """Misfit and tolerance of the sample that fits worst, whatever its target and λ."""
    fits = fits_of(evidence, samples, loss)
    if fits is None:
        return None
    best = [min(own, key=lambda f: f.misfit) for own in fits]
    worst = max(best, key=lambda f: f.misfit)
    return worst.misfit, worst.tolerance
