"""The target of one sample, read off its cotangent at the last affine map, and a factor on it.

At the features x of the last affine map the cotangent is ``k = λ κ(z, y)``, z = W x + b, with
λ = 1 for an update as it was declared.  A factor on the loss or on the whole update (a loss scale,
clipping, a sum for a mean, the batch size that an accountant expects) is λ: every equation below
the head is as it was, and for class indices the head fixes λ and the label together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from rgap.head.target_error import standard_error
from rgap.limits import APART, ENSEMBLE, FREE, LOGIT, NORMALISED
from rgap.network.chain import Stage
from rgap.precision import Estimate, Precision, paired
from rgap.update.losses import Loss
from rgap.update.targets import BINARY, CLASSES

__all__ = ["Reading", "logits_of", "read_target", "read_weighed"]

LISTED = 4096  # targets that are tried one by one
BLOCK = 512  # of them that are compared to all others at a time
READ = 4  # targets of which a reading is made whether they fit or not


@dataclass(frozen=True)
class Reading:
    """What a cotangent says of its target.

    Attributes:
        target: dense, before label smoothing, [1, C].
        labels: the nearest admissible target.
        distance: of the two (largest entry); where steps follow the head, in units of what tells
            the label from the next one.
        tolerance: the distance that rounding and noise explain.
        scale: λ.
        open: why the target is not certain whatever the distance, or "".
        spread: standard error of λ, where it was fitted.
        tested: False where the cotangents of all targets have one direction, of which λ is the
            length, so that nothing but another sample tests it.
        error: largest standard error of a target that may be any numbers; 0 for others.
        unseen: what no cotangent says of it: κ = p Σt − t sums to 0 whatever Σt is.
    """

    target: Tensor
    labels: Tensor
    distance: float
    tolerance: float
    scale: float = 1.0
    open: str = ""
    spread: float = 0.0
    tested: bool = True
    error: float = 0.0
    unseen: float = 0.0

    @property
    def fits(self) -> bool:
        """True if the target is one that the loss allows, within the precision of the update."""
        return self.distance <= self.tolerance


def read_target(
    stage: Stage, x: Estimate, k: Estimate, loss: Loss, precision: Precision
) -> Reading:
    """The target that explains k at the features x, and the factor λ where λ = 1 does not.

    A factor is only taken where something tests it: the cotangents of all targets span d
    dimensions, λ uses up one, and every other label has to be refuted with a factor of its own.

    Args:
        stage: the last stage, fully connected.
        x: input of its affine map, [1, n], with its errors.
        k: cotangent at its output, [1, m], with its errors.
        loss: of that output.
        precision: of the update.
    """
    z, k = paired(logits_of(stage, x), k)
    first = _declared(z, k, loss, precision)
    if first.fits or first.open or loss.targets != "index":
        return first
    scaled = [r for r in _scaled(z, k, loss, precision) if r.fits and r.tested]
    if len(scaled) != 1:
        return first
    return scaled[0]


def read_weighed(
    stage: Stage, x: Estimate, k: Estimate, loss: Loss, precision: Precision
) -> Reading:
    """The same of one sample of a batch, whose λ is unknown: never taken to be 1.

    Args:
        stage: the last stage, fully connected.
        x: input of its affine map, [1, n], with its errors.
        k: cotangent of the sample at its output, [1, m], with its errors.
        loss: of that output, as a sum over the samples, with index targets.
        precision: of the update.
    """
    z, k = paired(logits_of(stage, x), k)
    readings = sorted(_scaled(z, k, loss, precision), key=lambda reading: reading.distance)
    fitting = [reading for reading in readings if reading.fits]
    if len(fitting) == 1:
        return replace(fitting[0], open=loss.open_at(z.value))
    if fitting:
        twins = " and ".join(str(reading.labels.flatten().tolist()) for reading in fitting[:2])
        return replace(fitting[0], open=f"targets {twins}, each with a factor of its own, send it")
    return readings[0] if readings else replace(_declared(z, k, loss, precision), distance=inf)


def logits_of(stage: Stage, x: Estimate) -> Estimate:
    """``z = W x + b`` with the errors that x brings along."""
    error = torch.stack([stage.affine.linear(e) for e in x.error])
    return Estimate(stage.affine.forward(x.value), error)


def _declared(z: Estimate, k: Estimate, loss: Loss, precision: Precision) -> Reading:
    """With λ = 1."""
    if not loss.plain and loss.targets == "index":
        return _nearest(z, k, loss, precision)
    target = loss.targets_from(z.value, k.value)
    labels, distance = loss.read(target)
    tolerance = _tolerance(z, k, loss, target, precision)
    if loss.targets == "probability":
        tolerance = max(tolerance, NORMALISED)
    error = standard_error(loss, z, k, precision) if loss.targets != "index" else 0.0
    opened, unseen = loss.open_at(z.value), unseen_of(loss)
    return Reading(
        target, labels, float(distance), tolerance, open=opened, error=error, unseen=unseen
    )


def unseen_of(loss: Loss) -> float:
    """What soft targets of classes may be off by for summing to 1 only as a client stored them."""
    return NORMALISED if loss.targets == "probability" and loss.name in CLASSES else 0.0


def _tolerance(z: Estimate, k: Estimate, loss: Loss, target: Tensor, precision: Precision) -> float:
    """Distance of a dense target from an admissible one that the errors of z and k explain.

    The client's softmax rounds in absolute terms (p − 1), its logits relatively.
    """
    back = loss.targets_from(z.value, k.value + 1.0) - loss.targets_from(z.value, k.value)
    scale = float(back.abs().max())
    own = float(k.error.abs().max()) * scale
    width = float(z.error.abs().max()) + float(z.value.abs().max()) * precision.unit * LOGIT
    return ENSEMBLE * (own + width + LOGIT * precision.unit * max(1.0, scale * precision.unit))


@dataclass(frozen=True)
class _Heard:
    """What one sample sent, and what would have sent it.

    Attributes:
        z: logits, [1, C].
        k: cotangent, [1, m], whose errors are of the same draws as those of z.
        loss: of the client.
        precision: of the update.
        options: targets that come in question, dense [options, C].
        many: κ of each, [options, m].
    """

    z: Estimate
    k: Estimate
    loss: Loss
    precision: Precision
    options: Tensor
    many: Tensor

    @classmethod
    def of(
        cls, z: Estimate, k: Estimate, loss: Loss, precision: Precision, options: Tensor
    ) -> _Heard:
        """With the cotangents of all options at z."""
        return cls(z, k, loss, precision, options, _cotangents(loss, z.value, options))

    def compared(self, place: int | None = None, scale: float = 1.0) -> tuple[Reading, float]:
        """One option against k/λ: how far it is in units of the next option, and its error.

        Args:
            place: of the option; None for the nearest.
            scale: λ.
        """
        at, options, loss = self.k.value / scale, self.options, self.loss
        best = int((self.many - at).square().sum(1).argmin()) if place is None else place
        target = options[best : best + 1]
        others = (self.many - self.many[best]).abs().amax(1)
        others[best] = inf
        apart = float(others.min()) if len(options) > 1 else inf
        error = self.error(target, Estimate(at, self.k.error / scale))
        labels = loss.read(target)[0]
        if not apart > APART * error:
            twin = int(others.argmin())
            words = (
                f"targets {_named(loss, options[best])} and {_named(loss, options[twin])} send the "
                f"same within what rounding and noise explain ({getattr(loss, 'words', str)()} "
                "does not tell them apart)"
            )
            return Reading(target, labels, 0.0, inf, scale, words), error
        distance = float((self.many[best] - at).abs().max()) / apart
        return Reading(target, labels, distance, error / apart, scale), error

    def error(self, target: Tensor, k: Estimate) -> float:
        """The largest that ENSEMBLE errors of k and z make of k and of what the loss gives at z.

        To first order, and at z moved by that much: a kink of a step may lie between.
        """
        z, loss, precision = self.z, self.loss, self.precision
        kappa, own = loss.cotangent(z.value, target), loss.rounding(z.value, target)
        bent = torch.stack([loss.cotangent_jvp(z.value, e, target) for e in z.error])
        there = torch.cat([loss.cotangent(z.value + ENSEMBLE * e, target) for e in z.error])
        moved = there.reshape(bent.shape) - kappa - ENSEMBLE * k.error
        carried = max(ENSEMBLE * float((bent - k.error).abs().max()), float(moved.abs().max()))
        size = 1.0 + float(z.value.abs().max())
        rounded = precision.unit * (LOGIT * kappa.abs() * size + own) + precision.floor
        return carried + ENSEMBLE * float(rounded.max())

    def gaps(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Of every target with its factor: how far it is from k/λ, and from the nearest other.

        Others have factors too, so what tells one from them is the angle between their cotangents,
        not their difference.
        """
        sizes = self.many.norm(dim=1)
        unit = self.many / sizes[:, None].clamp_min(1e-300)
        nearest = []
        for first in range(0, len(unit), BLOCK):
            cosines = unit[first : first + BLOCK] @ unit.T
            cosines[:, first : first + BLOCK].fill_diagonal_(-inf)
            nearest.append(cosines.amax(1))
        cosine = torch.cat(nearest)
        away = (1.0 - cosine.clamp_min(0.0).square()).clamp_min(0.0).sqrt()
        apart = torch.where(cosine == -inf, inf, away) * sizes
        off = self.many - self.k.value[0] / factors[:, None].clamp_min(1e-300)
        return off.abs().amax(1), apart

    def along(self, place: int, factor: float, gap: float, apart: float) -> Reading:
        """A target with its factor; ``gap`` and ``apart`` as of :meth:`gaps`."""
        reading, error = self.compared(place, factor)
        if not apart > APART * error:
            return replace(reading, distance=inf, tolerance=0.0)
        return replace(reading, distance=gap / apart, tolerance=error / apart, open="")

    def spread(self, place: int, factor: float) -> float:
        """Standard error of λ = ⟨m, k⟩/⟨m, m⟩, m the cotangent of a target at z."""
        target, m = self.options[place : place + 1], self.many[place]
        bent = [self.loss.cotangent_jvp(self.z.value, e, target)[0] for e in self.z.error]
        off = (self.k.error[:, 0] - factor * torch.stack(bent)) @ m
        return float((off / m.square().sum().clamp_min(1e-300)).square().mean().sqrt())


def _nearest(z: Estimate, k: Estimate, loss: Loss, precision: Precision) -> Reading:
    """Index targets behind steps: the one whose k comes nearest, and how near the next comes."""
    options = _options(loss, z.value)
    if options is None:
        target = loss.targets_from(z.value, k.value)
        labels, distance = loss.read(target)
        tolerance = _tolerance(z, k, loss, target, precision)
        return Reading(target, labels, float(distance), tolerance, open=loss.open_at(z.value))
    return _Heard.of(z, k, loss, precision, options).compared()[0]


def _scaled(z: Estimate, k: Estimate, loss: Loss, precision: Precision) -> Iterator[Reading]:
    """Targets with the positive factor that fits best, and whether anything tests it.

    All that can fit, which none does from so far that its error hides the others, and the nearest.
    """
    options = _options(loss, z.value)
    if options is None:
        options = _around(loss, z.value, k.value)
    if options is None:
        return
    heard = _Heard.of(z, k, loss, precision, options)
    values = torch.linalg.svdvals(heard.many)
    tested = int((values > FREE * values[0].clamp_min(1e-300)).sum()) > 1
    sizes = heard.many.square().sum(1)
    factors = (heard.many @ k.value[0]) / sizes.clamp_min(1e-300)
    gaps, apart = heard.gaps(factors)
    distances = torch.where((factors > 0) & (sizes > 0), gaps / apart.clamp_min(1e-300), inf)
    for number, place in enumerate(distances.argsort().tolist()):
        distance, factor = float(distances[place]), float(factors[place])
        if distance == inf or (number >= READ and APART * distance > 1.0):
            return
        reading = heard.along(place, factor, float(gaps[place]), float(apart[place]))
        yield replace(reading, tested=tested, spread=heard.spread(place, factor))


def _around(loss: Loss, z: Tensor, k: Tensor) -> Tensor | None:
    """Of 2^C label vectors the one that the signs of k say, and those that differ in one label.

    σ(z_j) − y_j is negative exactly where y_j = 1, whatever the positive factor.
    """
    if loss.name != BINARY or not loss.plain:
        return None
    signs = (k[0] < 0).to(z)
    return torch.cat([signs[None], (signs - torch.eye(len(signs)).to(z)).abs()])


def _options(loss: Loss, z: Tensor) -> Tensor | None:
    """Every admissible target, dense [options, C]; None where they are too many to list."""
    count = loss.outputs(z.shape[1])
    if loss.name not in CLASSES and 2**count > LISTED:
        return None
    listed = loss.admissible(count)
    if listed is None or len(listed) > LISTED:
        return None
    labels = torch.tensor(listed, device=z.device)
    many = z[:1].expand(len(labels), -1)
    return loss.dense(labels if loss.name in CLASSES else labels.to(z), many)


def _cotangents(loss: Loss, z: Tensor, options: Tensor) -> Tensor:
    """κ of every target at one z, as a batch of one has it, [options, m]."""
    many = loss.cotangent(z.expand(len(options), -1), options)
    return many * len(options) if loss.reduction == "mean" else many


def _named(loss: Loss, target: Tensor) -> object:
    return loss.read(target[None])[0].flatten().tolist()
