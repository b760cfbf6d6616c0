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

from rgap.diagnosis.evidence import Evidence
from rgap.diagnosis.samples import LOOSEST, SAFETY, Samples
from rgap.head.mapped import Mapped
from rgap.jacobian.batch_loss import loss_scale
from rgap.update.losses import Loss
from rgap.update.targets import BINARIES, CLASSES, SQUARED

FEW = 64  # classes up to which a function of one's own is tried
LISTED = 512  # classes up to which every target is tried
EQUAL = 1e-3  # relative difference of factors that are the same


@dataclass(frozen=True)
class Fit:
    """One target of one sample.

    Attributes:
        factor: λ.
        target: a class [1] of a loss of one's own, 0/1 labels [1, C], else one-hot [1, C]; or the
            stated one.
        misfit: ‖k − λ r‖/‖k‖.
        tolerance: of the misfit, and relative of λ.
    """

    factor: float
    target: Tensor
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
        targets: that were chosen, as in :class:`Fit`.
        either: of every sample the λ of all targets that fit.
    """

    values: tuple[float, ...]
    tolerance: float
    misfit: float
    unique: bool
    targets: tuple[Tensor, ...] = ()
    either: tuple[tuple[float, ...], ...] = ()

    def label(self, row: int) -> str:
        """The target of a sample in words: its class, or its 0/1 labels."""
        target = self.targets[row]
        one_hot = target.is_floating_point() and target.ndim > 1
        return ",".join(
            str(n) for n in (target.argmax(1) if one_hot else target.flatten()).tolist()
        )

    @property
    def common(self) -> float | None:
        """λ where all samples have the same, or None."""
        first = self.values[0]
        near = max(EQUAL, self.tolerance) * abs(first)
        return first if all(abs(v - first) <= near for v in self.values) else None


def fits_of(evidence: Evidence, samples: Samples, loss: Loss) -> list[list[Fit]] | None:
    """Targets that fit each sample, best first; None where the loss admits any."""
    outputs = loss.outputs(samples.logits.shape[1])
    if not loss.known or (loss.own and len(samples.logits) > 1):
        return None  # a loss of one's own is one of the whole batch
    scale = 1.0 if loss.own or _weighed(loss) else loss_scale(loss, evidence.batch or 1, outputs)
    known = evidence.labels
    if known is not None and len(known) == len(samples.logits) == 1:
        return [[_fit(evidence, samples, 0, loss, scale, known.to(samples.logits.device))]]
    if isinstance(loss, Mapped):
        return None  # a target at every place: there are too many to list
    if not (loss.own or loss.name in BINARIES):
        if loss.targets == "probability" or outputs > LISTED:
            return None
        if outputs < (3 if loss.name == SQUARED else 2):
            return None
    if loss.name in BINARIES and not loss.plain:
        return None  # behind other steps the sign of k_j says nothing of y_j
    if (loss.own and not 3 <= outputs <= FEW) or loss.targets == "probability":
        return None
    ranked = []
    for row in range(len(samples.logits)):
        targets = _targets(samples, row, loss, outputs)
        try:
            fits = [_fit(evidence, samples, row, loss, scale, target) for target in targets]
        except Exception:  # a function of one's own that wants other targets
            if loss.own:
                return None
            raise
        ranked.append(sorted(fits, key=lambda fit: fit.misfit))
    return ranked


def _weighed(loss: Loss) -> bool:
    """True where the classes of the whole batch weigh each sample."""
    classes = loss.name in CLASSES and loss.targets == "index" and loss.weight is not None
    return classes and loss.reduction == "mean"


def _targets(samples: Samples, row: int, loss: Loss, outputs: int) -> list[Tensor]:
    """Admissible targets of one sample, each [1, ...]."""
    place = samples.logits.device
    if loss.own:
        return [torch.tensor([c], device=place) for c in range(outputs)]
    if loss.name in BINARIES:
        return _binary(samples, row)
    return list(torch.eye(outputs, dtype=torch.float64, device=place)[:, None])


def _binary(samples: Samples, row: int) -> list[Tensor]:
    """The two 0/1 targets that λ > 0 and λ < 0 leave: y_j = 1 where k_j/λ < 0.

    Where nothing is left of k_j, the logit is sure and its target right.
    """
    k = samples.cotangents[row]
    gone = k.abs() <= max(SAFETY * samples.unit, samples.tolerance) * k.abs().max()
    sure = samples.logits[row] > 0
    return [torch.where(gone, sure, side)[None].long() for side in (k < 0, k > 0)]


def _fit(
    evidence: Evidence,
    samples: Samples,
    row: int,
    loss: Loss,
    scale: float,
    target: Tensor,
) -> Fit:
    """λ = ⟨k, r⟩/‖r‖², and how far it leaves the sample's equations."""
    k, z = samples.cotangents[row], samples.logits[row][None]
    summed = loss if loss.own else replace(loss, reduction="sum")

    def residual(outputs: Tensor) -> Tensor:
        return scale * summed.cotangent(outputs, target)[0]

    r = residual(z)
    size = float(r.norm())
    if size == 0.0:
        return Fit(0.0, target, 1.0, inf)
    factor = float(k @ r) / size**2
    misfit = float((k - factor * r).norm() / k.norm())
    signs = [*_signs(z), torch.where(r < 0, -1.0, 1.0).to(z)]  # the last makes all of r longer
    moved = max(float((residual(z + samples.width * s) - r).norm()) for s in signs)
    # A softmax rounds p − 1 in absolute terms, so that little is left of a sure one.
    rounding = 1.0
    if loss.equations:
        rounding = float(summed.rounding(z, target).norm().clamp_min(1.0))
    own = (2 * moved + SAFETY * rounding * scale * evidence.unit) / size + samples.tolerance
    return Fit(factor, target, misfit, own)


def _signs(z: Tensor) -> list[Tensor]:
    """Directions in which the logits may be off: all up, alternating, and opposite halves."""
    places = torch.arange(z.shape[1], device=z.device)
    halves = (places < z.shape[1] / 2).double() * 2 - 1
    return [torch.ones_like(z), (1.0 - 2.0 * (places % 2))[None].to(z), halves[None].to(z)]


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
    weigh = 1.0
    if _weighed(loss):
        if evidence.batch != len(chosen):
            return None  # copies, of which nobody knows how many
        dense = loss.dense(torch.cat([f.target for f in chosen]), samples.logits)
        weigh = loss.divisor(dense, torch.ones_like(dense[:, 0]))
    return Factors(
        tuple(weigh * f.factor for f in chosen),
        tolerance,
        max(f.misfit for f in chosen),
        unique,
        tuple(f.target for f in chosen),
        tuple(tuple(weigh * f.factor for f in own) for own in good),
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
    free = loss.own and evidence.labels is None  # nobody knows which targets it takes
    if fits is None or free or any(f.tolerance > LOOSEST for own in fits for f in own):
        return None
    best = [min(own, key=lambda f: f.misfit / f.tolerance) for own in fits]
    worst = max(best, key=lambda f: f.misfit / f.tolerance)
    return worst.misfit, worst.tolerance
