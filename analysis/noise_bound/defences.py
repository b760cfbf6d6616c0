"""Defences as changes of the equations: what of the update is sent, and how exactly.

A client computes g(x) and sends ``compress(clip(g) + σ e)``.  To first order every step is a change
of the linear system ``J dx = dg``: clipping takes one direction of the update away, pruning takes
rows away, rounding adds an error to the rows that are left, signs leave a little of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

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
# In which a client applies them; two of one number exclude each other.
_ORDER = {Clip: 0, DifferentialPrivacy: 0, Prune: 1, Quantise: 2, Sign: 2}


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


def _positive(kind: str, name: str, value: float, write: str) -> None:
    if not (0 < value < inf):
        raise ValueError(f"{kind}.{name}: expected a finite number > 0, got {value}; write {write}")
