"""Defences as changes of the equations: what of the update is sent, and how exactly.

A client computes g(x) and sends ``compress(clip(g) + σ e)``.  To first order every step is a change
of the linear system ``J dx = dg``: clipping takes one direction of the update away, pruning takes
rows away, rounding adds an error to the rows that are left, signs leave a little of each.

A defence of your own is a frozen dataclass that inherits from :class:`Defence`, registered in
``DEFENCES`` or offered by an entry point of the group ``rgap.defences``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, isfinite, log, pi
from typing import ClassVar

import torch
from torch import Tensor

from rgap.plugins import Registry

__all__ = [
    "DEFENCES", "Clip", "Defence", "DifferentialPrivacy", "Prune", "Quantise", "Sending", "Sign",
]  # fmt: skip

CLIPPING, PRUNING, CODING = range(3)  # the order in which a client applies them


@dataclass(frozen=True, eq=False)
class Sending:
    """One update on its way from g to what is sent, and what of it arrives.

    Attributes:
        update: g, all parameters as one vector [equations].
        variance: of every entry, [equations].
        kept: True where an entry is sent, bool [equations].
        scales: factor of the gradient of every part [P]: P = B with per-sample clipping, else 1.
        units: u of every clipped part [P, equations], zero where clipping does not act; None where
            no part is clipped.
        information: of every entry where it is not 1/variance, [equations]; else None.
        notes: what the reader should know.
        sizes: entries of each tensor of the update, in order.
        mean: the loss is the mean over the samples.
        by_sample: the gradient of every sample by itself, [B, equations].
    """

    update: Tensor
    variance: Tensor
    kept: Tensor
    scales: Tensor
    units: Tensor | None
    information: Tensor | None
    notes: tuple[str, ...]
    sizes: tuple[int, ...]
    mean: bool
    by_sample: Callable[[], Tensor]

    def noted(self, note: str, **changes: object) -> Sending:
        """The same with changes and one more note."""
        return replace(self, notes=(*self.notes, note), **changes)  # type: ignore[arg-type]


class Defence(ABC):
    """A step between the update that a client computes and the one that it sends.

    Attributes:
        stage: when it is applied: ``CLIPPING``, ``PRUNING`` or ``CODING``; each once.
        idle: the strength at which it changes nothing, for reports.
    """

    stage: ClassVar[int] = CODING
    idle: ClassVar[float] = 0.0

    @abstractmethod
    def act(self, sent: Sending) -> Sending:
        """What is sent after this step."""

    @classmethod
    def levels(cls) -> Sequence[Defence]:
        """From weak to strong, for :func:`rgap.analysis.harden`; none where there is no order."""
        return ()

    @property
    def strength(self) -> float:
        """The number that says how strong it is: its first field."""
        named = fields(self)  # type: ignore[arg-type]
        return float(getattr(self, named[0].name)) if named else 1.0


DEFENCES: Registry[type[Defence]] = Registry(
    "rgap.defences",
    "defence",
    "a class that inherits from rgap.analysis.noise_bound.defences.Defence",
    lambda value: isinstance(value, type) and issubclass(value, Defence),
)
"""Every defence by its name, those of installed distributions among them."""


@dataclass(frozen=True)
class Clip(Defence):
    """The update scaled down to a norm, ``g ↦ g·min(1, C/‖g‖)``, as one vector.

    Where it acts the length of g is lost: ``d clip(g) = (C/‖g‖)(I − u uᵀ) dg`` with ``u = g/‖g‖``,
    at most one equation less, and the others that much smaller against the noise.

    Args:
        norm: C > 0.

    >>> Clip(1.0)
    Clip(norm=1.0)
    """

    norm: float
    stage: ClassVar[int] = CLIPPING
    idle: ClassVar[float] = inf

    def __post_init__(self) -> None:
        _positive("Clip", "norm", self.norm, "Clip(1.0)")

    def act(self, sent: Sending) -> Sending:
        """The whole update, scaled."""
        return _clipped(sent, sent.update[None], self.norm, 1.0)


@dataclass(frozen=True)
class DifferentialPrivacy(Defence):
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
    stage: ClassVar[int] = CLIPPING
    idle: ClassVar[float] = inf

    def __post_init__(self) -> None:
        _positive("DifferentialPrivacy", "clip", self.clip, "DifferentialPrivacy(1.0, 0.1)")
        if not (isfinite(self.multiplier) and self.multiplier >= 0):
            raise ValueError(
                f"DifferentialPrivacy.multiplier: expected a finite number >= 0, got "
                f"{self.multiplier}; write DifferentialPrivacy(clip=1.0, multiplier=0.1)"
            )

    def act(self, sent: Sending) -> Sending:
        """The whole update, or every sample's, scaled; then its noise."""
        parts, share = sent.update[None], 1.0
        if self.per_sample:
            parts = sent.by_sample()
            share = 1 / len(parts) if sent.mean else 1.0
        sent = _clipped(sent, parts, self.clip, share)
        return replace(sent, variance=sent.variance + (self.multiplier * self.clip * share) ** 2)


@dataclass(frozen=True)
class Prune(Defence):
    """Only the largest entries of the update are sent; the others arrive as zeros.

    Rows that survive are equations as before.  Those that do not say that an entry is small, an
    inequality: nothing to first order.

    Args:
        keep: share of the entries that are sent, in (0, 1].
    """

    keep: float
    stage: ClassVar[int] = PRUNING
    idle: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"Prune.keep: expected a share in (0, 1], got {self.keep}; write Prune(0.1) to "
                "keep the largest tenth"
            )

    @classmethod
    def levels(cls) -> Sequence[Prune]:
        """From a half to a thousandth."""
        return [cls(keep) for keep in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)]

    def act(self, sent: Sending) -> Sending:
        """The largest entries."""
        size = len(sent.update)
        count = max(1, round(self.keep * size))
        largest = sent.update.abs().topk(count).indices
        return sent.noted(
            f"Pruning sends {count:,} of {size:,} entries; the zeros of the others are "
            "inequalities and count as nothing.",
            kept=torch.zeros_like(sent.kept).index_fill_(0, largest, True),
        )


@dataclass(frozen=True)
class Quantise(Defence):
    """Every tensor rounded to 2^bits equally spaced values between −max|g| and max|g|.

    Assumption: rounding errors are uniform in ± half a step, independent of each other and of the
    data (Bennett 1948), so they count as Gaussian noise of standard deviation ``step/√12``.  That
    fails for entries below half a step, whose error is their own value.  And it makes the
    prediction that of least squares, not a bound: exact intervals hold more than their variance.

    Args:
        bits: 1 to 32.
    """

    bits: int
    idle: ClassVar[float] = 32

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in range(1, 33):
            raise ValueError(
                f"Quantise.bits: expected a whole number from 1 to 32, got {self.bits!r}; write "
                "Quantise(8)"
            )

    @classmethod
    def levels(cls) -> Sequence[Quantise]:
        """From 16 bits to one."""
        return [cls(bits) for bits in range(16, 0, -1)]

    def act(self, sent: Sending) -> Sending:
        """Uniform noise of one step a tensor."""
        tensors = torch.split(sent.update, list(sent.sizes))
        sizes = torch.cat([part.abs().amax().expand(len(part)) for part in tensors])
        steps = 2 * sizes / (2.0**self.bits - 1)
        small = float((sent.update[sent.kept].abs() < steps[sent.kept] / 2).double().mean())
        return sent.noted(
            f"Rounding to {self.bits} bits counts as Gaussian noise of step/√12. "
            f"{small:.0%} of the entries are below half a step, where that does not hold: "
            "the prediction is that of least squares under this assumption, not a bound.",
            variance=sent.variance + steps.square() / 12,
        )


@dataclass(frozen=True)
class Sign(Defence):
    """Only the signs are sent, of the update with its noise.

    Without noise signs are inequalities and fix nothing to first order.  With noise σ added before,
    each sign is a coin whose odds depend on g/σ: its Fisher information about g is
    ``φ(a)²/(σ² Φ(a) Φ(−a))`` at ``a = g/σ``, at most 2/π of what the entry itself would say.
    """

    @classmethod
    def levels(cls) -> Sequence[Sign]:
        """There is one."""
        return [cls()]

    def act(self, sent: Sending) -> Sending:
        """One bit an entry."""
        noisy = bool((sent.variance > 0).any())
        return sent.noted(
            "Signs of a noisy update: Fisher information of one bit an entry."
            if noisy
            else "Signs without noise are inequalities: to first order they fix nothing.",
            information=_sign_information(sent.update, sent.variance),
        )


DEFENCES.register("clip", Clip)
DEFENCES.register("dp", DifferentialPrivacy)
DEFENCES.register("prune", Prune)
DEFENCES.register("quantise", Quantise)
DEFENCES.register("sign", Sign)


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
        if not isinstance(one, Defence):
            raise TypeError(
                "defence: expected Clip, DifferentialPrivacy, Prune, Quantise, Sign or another "
                f"Defence, got {one!r}; write defence=rgap.analysis.Clip(1.0), or a tuple"
            )
    places = [one.stage for one in chain]
    if places != sorted(set(places)):
        names = [type(one).__name__ for one in chain]
        raise ValueError(
            f"defence: expected clipping first, then pruning, then quantising or signs, each once, "
            f"got {names}; write defence=(Clip(1.0), Prune(0.1), Quantise(8))"
        )
    return chain


def _positive(kind: str, name: str, value: float, write: str) -> None:
    if not (0 < value < inf):
        raise ValueError(f"{kind}.{name}: expected a finite number > 0, got {value}; write {write}")


def _clipped(sent: Sending, parts: Tensor, norm: float, share: float) -> Sending:
    """``share·Σ_p g_p min(1, C/‖g_p‖)`` of the parts [P, equations]."""
    lengths = parts.norm(dim=1)
    acts = lengths > norm
    scales = torch.where(acts, norm / lengths.clamp_min(1e-300), 1.0)
    units = torch.where(acts[:, None], parts / lengths.clamp_min(1e-300)[:, None], 0.0)
    return sent.noted(
        _clip_note(acts, lengths, norm),
        update=share * (scales[:, None] * parts).sum(0),
        scales=scales,
        units=units,
    )


def _sign_information(g: Tensor, variance: Tensor) -> Tensor:
    """``φ(a)²/(σ² Φ(a) Φ(−a))``, by logarithms: far from zero both are tiny."""
    sigma = variance.sqrt()
    a = g / sigma.clamp_min(1e-300)
    tails = torch.special.log_ndtr(a) + torch.special.log_ndtr(-a)
    odds = torch.exp(-a.square() - log(2 * pi) - tails)
    return torch.where(sigma > 0, odds / variance.clamp_min(1e-300), 0.0)


def _clip_note(acts: Tensor, lengths: Tensor, norm: float) -> str:
    longest = float(lengths.amax())
    if not bool(acts.any()):
        return f"Clipping at {norm:g} does not act: the largest norm is {longest:.3g}."
    if len(acts) == 1:
        return (
            f"Clipping scales the update by {norm / longest:.3g}; its length, one equation, is "
            "lost."
        )
    return (
        f"Clipping scales {int(acts.sum())} of the {len(acts)} samples' gradients, by "
        f"{norm / longest:.3g} at most; their lengths are lost."
    )
