"""The formulas of every loss: value, cotangent, curvature and inverse, before the reduction.

With z the outputs, y dense targets, u = k/s the cotangent without the scale s of the reduction,
p = softmax(z) or sigmoid(z), w class weights and t = w ⊙ y (label smoothing put in first):

* ``cross_entropy``                     ``u = (Σt) p − t``
* ``nll_loss`` (z log-probabilities)    ``u = −t``
* ``focal_loss``                        ``u = a F(q)(y − p)``, q = ⟨y, p⟩, a = ⟨y, w⟩,
  ``F(q) = γ(1−q)^{γ−1} q log q − (1−q)^γ``
* ``binary_cross_entropy_with_logits``  ``u = p(1 + (ω−1)y) − ωy``, ω the positive weight
* ``binary_cross_entropy`` (z = p)      ``u = (p − y)/(p(1−p))``
* ``sigmoid_focal_loss``                ``u = α_t(2y−1)H(r)``, r = yp + (1−y)(1−p),
  ``H(r) = γ(1−r)^γ r log r − (1−r)^{γ+1}``
* ``mse_loss``                          ``u = 2(z − y)``

A class-index loss has its classes along dimension 1 and may have positions after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.update.targets import (
    BINARY,
    CROSS_ENTROPY,
    FOCAL,
    LOG_PROBABILITIES,
    PROBABILITIES,
    SIGMOID_FOCAL,
    SQUARED,
)

__all__ = ["FORMS", "Form", "Options", "per_class"]

SMALLEST = 1e-12  # p(1 − p) below which PyTorch's binary_cross_entropy holds its derivative


@dataclass(frozen=True)
class Options:
    """What a formula needs beside outputs and targets.

    Attributes:
        weight: class weights broadcast against the outputs, or None.
        positive: the positive weight ω likewise, or None.
        smoothing: label smoothing ε.
        gamma: focusing exponent γ.
        alpha: balance of the two labels, or None.
    """

    weight: Tensor | None
    positive: Tensor | None
    smoothing: float
    gamma: float
    alpha: float | None


def per_class(values: Sequence[float], outputs: Tensor) -> Tensor:
    """One number a class, or one for all, to be multiplied with outputs [B, C, *positions]."""
    return outputs.new_tensor(values).reshape(-1, *[1] * max(outputs.ndim - 2, 0))


class Form(Protocol):
    """One loss, entry by entry; shapes are those of the outputs."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Kinds of targets that it takes."""

    @property
    def options(self) -> tuple[str, ...]:
        """Options of `rgap.Loss` that it has."""

    def value(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """Σ of the loss over the batch."""

    def cotangent(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """Its derivative u."""

    def curvature(self, z: Tensor, y: Tensor, v: Tensor, o: Options) -> Tensor:
        """(∂u/∂z) v."""

    def target(self, z: Tensor, u: Tensor, o: Options) -> Tensor:
        """The y that u belongs to; for a loss not affine in y, of the admissible one next to it."""


class CrossEntropy:
    """``−Σ t log p``."""

    targets, options = ("index", "probability"), ("weight",)

    def value(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """``−Σ t log p``."""
        return -(self._weighted(y, o) * torch.log_softmax(z, 1)).sum()

    def cotangent(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """``(Σt) p − t``."""
        t = self._weighted(y, o)
        # Σt is 1 for every admissible target; kept so that targets which are only normalised to
        # their own precision give autograd's value.
        return torch.softmax(z, 1) * t.sum(1, keepdim=True) - t

    def curvature(self, z: Tensor, y: Tensor, v: Tensor, o: Options) -> Tensor:
        """``(Σt) p ⊙ (v − ⟨p, v⟩)``."""
        p = torch.softmax(z, 1)
        # Centring the direction first avoids subtracting two nearly equal products.
        out = p * (v - (p * v).sum(1, keepdim=True))
        return out if o.weight is None else out * self._weighted(y, o).sum(1, keepdim=True)

    def target(self, z: Tensor, u: Tensor, o: Options) -> Tensor:
        """``t = a p − u`` with ``Σ t/w = 1``, which fixes a."""
        p = torch.softmax(z, 1)
        if o.weight is None:
            smoothed = p - u
        else:
            a = (1.0 + (u / o.weight).sum(1, keepdim=True)) / (p / o.weight).sum(1, keepdim=True)
            smoothed = (a * p - u) / o.weight
        return (smoothed - o.smoothing / z.shape[1]) / (1.0 - o.smoothing)

    def _weighted(self, y: Tensor, o: Options) -> Tensor:
        if o.smoothing:
            y = (1.0 - o.smoothing) * y + o.smoothing / y.shape[1]
        return y if o.weight is None else o.weight * y


class LogProbabilities:
    """``−Σ t z``."""

    targets, options = ("index",), ("weight",)

    def value(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """``−Σ t z``, only where t is not 0: there −∞ is a log-probability too."""
        return -torch.where(y > 0, z * (y if o.weight is None else o.weight * y), 0.0).sum()

    def cotangent(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """``−t``."""
        return -(y if o.weight is None else o.weight * y)

    def curvature(self, z: Tensor, y: Tensor, v: Tensor, o: Options) -> Tensor:
        """Zero."""
        return torch.zeros_like(v)

    def target(self, z: Tensor, u: Tensor, o: Options) -> Tensor:
        """``−u/w``."""
        return -(u if o.weight is None else u / o.weight)


class Focal:
    """``−a (1 − q)^γ log q``."""

    targets, options = ("index",), ("weight", "gamma")

    def value(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """``−a (1 − q)^γ log q`` over all samples."""
        log_q = (y * torch.log_softmax(z, 1)).sum(1, keepdim=True)
        return -(self._balance(y, o) * (1.0 - log_q.exp()) ** o.gamma * log_q).sum()

    def cotangent(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """``a F(q)(y − p)``."""
        p = torch.softmax(z, 1)
        return self._balance(y, o) * self._factor(z, y, o)[0] * (y - p)

    def curvature(self, z: Tensor, y: Tensor, v: Tensor, o: Options) -> Tensor:
        """``a (F'(q) q ⟨y − p, v⟩ (y − p) − F(q) p ⊙ (v − ⟨p, v⟩))``."""
        p = torch.softmax(z, 1)
        value, slope = self._factor(z, y, o)
        q = (y * p).sum(1, keepdim=True)
        along = ((y - p) * v).sum(1, keepdim=True)
        turned = p * (v - (p * v).sum(1, keepdim=True))
        return self._balance(y, o) * (slope * q * along * (y - p) - value * turned)

    def target(self, z: Tensor, u: Tensor, o: Options) -> Tensor:
        """``p + u/(a F(q))`` of the class that it makes most nearly one."""
        p = torch.softmax(z, 1)
        best, least = torch.zeros_like(z), torch.full_like(z[:, :1], torch.inf)
        for c in range(z.shape[1]):
            y = torch.zeros_like(z)
            y[:, c] = 1.0
            scale = self._balance(y, o) * self._factor(z, y, o)[0]
            trial = p + u / scale
            gap = (trial - y).abs().amax(1, keepdim=True)
            best, least = torch.where(gap < least, trial, best), torch.minimum(gap, least)
        return best

    def _factor(self, z: Tensor, y: Tensor, o: Options) -> tuple[Tensor, Tensor]:
        """F(q) and F'(q)."""
        log_q = (y * torch.log_softmax(z, 1)).sum(1, keepdim=True)
        q, g = log_q.exp(), o.gamma
        rest = (1.0 - q).clamp_min(torch.finfo(q.dtype).tiny)
        value = g * rest ** (g - 1) * q * log_q - rest**g
        slope = g * rest ** (g - 1) * (log_q + 2.0) - g * (g - 1) * rest ** (g - 2) * q * log_q
        return value, slope

    def _balance(self, y: Tensor, o: Options) -> Tensor | float:
        return 1.0 if o.weight is None else (y * o.weight).sum(1, keepdim=True)


class BinaryLogits:
    """``−ω y log p − (1 − y) log(1 − p)``."""

    targets, options = ("index", "probability"), ("pos_weight",)

    def value(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """Σ over all entries."""
        return F.binary_cross_entropy_with_logits(z, y, pos_weight=o.positive, reduction="sum")

    def cotangent(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """``p(1 + (ω − 1)y) − ωy``."""
        p = torch.sigmoid(z)
        if o.positive is None:
            return p - y
        return p * (1.0 + (o.positive - 1.0) * y) - o.positive * y

    def curvature(self, z: Tensor, y: Tensor, v: Tensor, o: Options) -> Tensor:
        """``p(1 − p)(1 + (ω − 1)y) v``."""
        out = torch.sigmoid(z) * torch.sigmoid(-z) * v
        return out if o.positive is None else out * (1.0 + (o.positive - 1.0) * y)

    def target(self, z: Tensor, u: Tensor, o: Options) -> Tensor:
        """``(p − u)/(p + ω(1 − p))``."""
        p = torch.sigmoid(z)
        return p - u if o.positive is None else (p - u) / (p + o.positive * torch.sigmoid(-z))


class BinaryProbabilities:
    """``−y log p − (1 − y) log(1 − p)`` of probabilities p."""

    targets, options = ("index", "probability"), ()

    def value(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """Σ over all entries."""
        return F.binary_cross_entropy(z, y, reduction="sum")

    def cotangent(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """``(p − y)/(p(1 − p))``."""
        return (z - y) / (z * (1.0 - z)).clamp_min(SMALLEST)

    def curvature(self, z: Tensor, y: Tensor, v: Tensor, o: Options) -> Tensor:
        """``(y/p² + (1 − y)/(1 − p)²) v``."""
        return (y / z.square() + (1.0 - y) / (1.0 - z).square()) * v

    def target(self, z: Tensor, u: Tensor, o: Options) -> Tensor:
        """``p − u p(1 − p)``."""
        return z - u * (z * (1.0 - z)).clamp_min(SMALLEST)


class SigmoidFocal:
    """``−α_t (1 − r)^γ log r``."""

    targets, options = ("index",), ("gamma", "alpha")

    def value(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """Σ over all entries."""
        log_r = F.logsigmoid((2.0 * y - 1.0) * z)
        return -(self._balance(y, o) * (1.0 - log_r.exp()) ** o.gamma * log_r).sum()

    def cotangent(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """``α_t (2y − 1) H(r)``."""
        sign = 2.0 * y - 1.0
        log_r, rest = F.logsigmoid(sign * z), torch.sigmoid(-sign * z)
        h = o.gamma * rest**o.gamma * log_r.exp() * log_r - rest ** (o.gamma + 1.0)
        return self._balance(y, o) * sign * h

    def curvature(self, z: Tensor, y: Tensor, v: Tensor, o: Options) -> Tensor:
        """``α_t H'(r) r(1 − r) v``."""
        sign, g = 2.0 * y - 1.0, o.gamma
        log_r, rest = F.logsigmoid(sign * z), torch.sigmoid(-sign * z)
        r = log_r.exp()
        # (1 − r) H'(r), so that nothing is divided by 1 − r
        slope = g * (rest ** (g + 1) * (log_r + 1.0) - g * rest**g * r * log_r)
        slope = slope + (g + 1.0) * rest ** (g + 1)
        return self._balance(y, o) * slope * r * v

    def target(self, z: Tensor, u: Tensor, o: Options) -> Tensor:
        """0 and 1 at the cotangents of the two labels, in a line between them."""
        zero = self.cotangent(z, torch.zeros_like(z), o)
        one = self.cotangent(z, torch.ones_like(z), o)
        return (u - zero) / (one - zero)

    def _balance(self, y: Tensor, o: Options) -> Tensor | float:
        return 1.0 if o.alpha is None else o.alpha * y + (1.0 - o.alpha) * (1.0 - y)


class Squared:
    """``(z − y)²``."""

    targets, options = ("value",), ()

    def value(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """Σ over all entries."""
        return F.mse_loss(z, y, reduction="sum")

    def cotangent(self, z: Tensor, y: Tensor, o: Options) -> Tensor:
        """``2(z − y)``."""
        return 2.0 * (z - y)

    def curvature(self, z: Tensor, y: Tensor, v: Tensor, o: Options) -> Tensor:
        """``2v``."""
        return 2.0 * v

    def target(self, z: Tensor, u: Tensor, o: Options) -> Tensor:
        """``z − u/2``."""
        return z - u / 2.0


FORMS: dict[str, Form] = {
    CROSS_ENTROPY: CrossEntropy(),
    BINARY: BinaryLogits(),
    SQUARED: Squared(),
    LOG_PROBABILITIES: LogProbabilities(),
    PROBABILITIES: BinaryProbabilities(),
    FOCAL: Focal(),
    SIGMOID_FOCAL: SigmoidFocal(),
}
