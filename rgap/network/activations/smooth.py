"""Smooth activations, with inverses that keep their digits.

Every formula avoids the cancellation of its textbook form: derivatives near saturation from
``sigmoid(z)·sigmoid(−z)``, inverses with ``log1p`` and ``expm1``, slopes from the output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rgap.network.activations.piecewise import Activation

_INF = math.inf
_THRESHOLD = 18.0  # below it softplus's step to the identity is more than 1.5e-8


class Sigmoid(Activation):
    """φ(z) = 1/(1 + e^{−z}).

    >>> op = Sigmoid("act", (1,))
    >>> round(op.inverse(op.forward(torch.tensor([[0.25]], dtype=torch.float64))).item(), 12)
    0.25
    """

    kind_name = "sigmoid"
    domain = (0.0, 1.0)
    slope_from_output = True

    def forward(self, x: Tensor) -> Tensor:
        """σ(z)."""
        return torch.sigmoid(x)

    def derivative(self, z: Tensor) -> Tensor:
        """σ(z) σ(−z)."""
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def second_derivative(self, z: Tensor) -> Tensor:
        """−φ'(z) tanh(z/2)."""
        return -self.derivative(z) * torch.tanh(z / 2)

    def _slope(self, x: Tensor) -> Tensor:
        """X (1 − x)."""
        return x * (1 - x)

    def slope_derivative(self, x: Tensor) -> Tensor:
        """1 − 2x."""
        return 1 - 2 * x

    def _inverse(self, x: Tensor) -> Tensor:
        d = 2 * x - 1  # exact between 1/4 and 1: keeps the digits of a z near 0
        near = torch.log1p(d.clamp(-0.5, 0.5)) - torch.log1p(-d.clamp(-0.5, 0.5))
        return torch.where(d.abs() <= 0.5, near, torch.log(x) - torch.log1p(-x))


class Tanh(Activation):
    """φ(z) = tanh z."""

    kind_name = "tanh"
    domain = (-1.0, 1.0)
    odd = True
    slope_from_output = True

    def forward(self, x: Tensor) -> Tensor:
        """Tanh z."""
        return torch.tanh(x)

    def derivative(self, z: Tensor) -> Tensor:
        """1/cosh² z = 4 σ(2z) σ(−2z)."""
        return 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)

    def second_derivative(self, z: Tensor) -> Tensor:
        """−2 tanh z φ'(z)."""
        return -2 * torch.tanh(z) * self.derivative(z)

    def _slope(self, x: Tensor) -> Tensor:
        """(1 − x)(1 + x)."""
        return (1 - x) * (1 + x)

    def slope_derivative(self, x: Tensor) -> Tensor:
        """−2x."""
        return -2 * x

    def _inverse(self, x: Tensor) -> Tensor:
        return (torch.log1p(x) - torch.log1p(-x)) / 2


class ELU(Activation):
    """φ(z) = p z for z > 0, a (e^{r z} − 1) otherwise: ELU, SELU and CELU.

    Args:
        alpha: a/p.
        scale: p.
        rate: r.
        inplace: z was overwritten: φ' is ``r (x + a)`` of the rounded x, not ``a r e^{r z}``.
    """

    kind_name = "elu"

    def __init__(
        self,
        name: str,
        in_shape: tuple[int, ...],
        alpha: float = 1.0,
        scale: float = 1.0,
        rate: float = 1.0,
        *,
        inplace: bool = False,
    ) -> None:
        ok = alpha > 0 and rate > 0
        barrier = None if ok else f"has alpha = {alpha:g}: it needs alpha > 0 to be invertible"
        super().__init__(name, in_shape, barrier)
        self.scale, self.amplitude, self.rate = scale, scale * alpha, rate
        self.domain = (-self.amplitude, _INF)
        self.slope_from_output = inplace

    def forward(self, x: Tensor) -> Tensor:
        """P z or a (e^{r z} − 1)."""
        low = self.amplitude * torch.expm1(x.clamp_max(0) * self.rate)
        return torch.where(x > 0, self.scale * x, low)

    def derivative(self, z: Tensor) -> Tensor:
        """P or a r e^{r z}."""
        low = self.amplitude * self.rate * torch.exp(z.clamp_max(0) * self.rate)
        return torch.where(z > 0, torch.full_like(z, self.scale), low)

    def second_derivative(self, z: Tensor) -> Tensor:
        """0 or a r² e^{r z}."""
        low = self.amplitude * self.rate**2 * torch.exp(z.clamp_max(0) * self.rate)
        return torch.where(z > 0, torch.zeros_like(z), low)

    def _slope(self, x: Tensor) -> Tensor:
        """P or r (x + a)."""
        return torch.where(x > 0, torch.full_like(x, self.scale), self.rate * (x + self.amplitude))

    def slope_derivative(self, x: Tensor) -> Tensor:
        """0 or r."""
        if self.barrier:
            return super().slope_derivative(x)
        return torch.where(x > 0, torch.zeros_like(x), torch.full_like(x, self.rate))

    def _inverse(self, x: Tensor) -> Tensor:
        low = torch.log1p(x.clamp_max(0) / self.amplitude) / self.rate
        return torch.where(x > 0, x / self.scale, low)


class SELU(ELU):
    """ELU with the two constants of self-normalising networks (Klambauer et al. 2017)."""

    kind_name = "selu"

    def __init__(self, name: str, in_shape: tuple[int, ...], inplace: bool = False) -> None:
        super().__init__(name, in_shape, 1.6732632423543772, 1.0507009873554805, inplace=inplace)


class CELU(ELU):
    """φ(z) = z for z > 0, α (e^{z/α} − 1) otherwise: ELU with a continuous derivative."""

    kind_name = "celu"

    def __init__(
        self, name: str, in_shape: tuple[int, ...], alpha: float = 1.0, inplace: bool = False
    ) -> None:
        super().__init__(name, in_shape, alpha, 1.0, 1 / alpha, inplace=inplace)
        # PyTorch rounds α to float32 in the derivative, and only there: the gradients it sends
        # are those of this rate, 4e-8 off for α = 0.7.
        self.backward_rate = 1 / float(torch.tensor(alpha, dtype=torch.float32))
        self.exponent = self.rate if inplace else self.backward_rate  # x has the rate of forward

    def derivative(self, z: Tensor) -> Tensor:
        """1 or e^{z/α}, with PyTorch's α."""
        low = self.amplitude * self.backward_rate * torch.exp(z.clamp_max(0) * self.exponent)
        return torch.where(z > 0, torch.ones_like(z), low)

    def second_derivative(self, z: Tensor) -> Tensor:
        """0 or e^{z/α}/α, with PyTorch's α."""
        return torch.where(z > 0, torch.zeros_like(z), self.derivative(z) * self.exponent)

    def _slope(self, x: Tensor) -> Tensor:
        """1 or (1 + x/α)^q, with q = α over PyTorch's α; q = 1 in place."""
        power = self.exponent / self.rate
        low = (1 + x.clamp_max(0) / self.amplitude).clamp_min(0).pow(power)
        return torch.where(x > 0, torch.ones_like(x), self.amplitude * self.backward_rate * low)

    def slope_derivative(self, x: Tensor) -> Tensor:
        """0 or 1/α, to the precision of PyTorch's α."""
        if self.barrier:
            return super().slope_derivative(x)
        power = self.exponent / self.rate
        low = (1 + x.clamp_max(0) / self.amplitude).clamp_min(1e-300).pow(power - 1)
        return torch.where(x > 0, torch.zeros_like(x), self.backward_rate * power * low)


class Softplus(Activation):
    """φ(z) = log(1 + e^{βz})/β, and z itself above β z = threshold, as PyTorch computes it."""

    kind_name = "softplus"
    domain = (0.0, _INF)

    def __init__(
        self, name: str, in_shape: tuple[int, ...], beta: float = 1.0, threshold: float = 20.0
    ) -> None:
        reason = None
        if beta <= 0:
            reason = f"has beta = {beta:g}: it needs beta > 0"
        # At the threshold φ drops by log(1 + e^{−threshold})/β, 2e-9 at PyTorch's 20.
        elif threshold < _THRESHOLD:
            reason = f"has threshold = {threshold:g}: φ drops there, so outputs occur twice"
        super().__init__(name, in_shape, reason)
        self.beta, self.threshold = beta, threshold

    def forward(self, x: Tensor) -> Tensor:
        """log(1 + e^{βz})/β, or z."""
        return F.softplus(x, self.beta, self.threshold)

    def derivative(self, z: Tensor) -> Tensor:
        """σ(βz), or 1."""
        t = z * self.beta
        return torch.where(t > self.threshold, torch.ones_like(z), torch.sigmoid(t))

    def second_derivative(self, z: Tensor) -> Tensor:
        """β σ(βz) σ(−βz), or 0."""
        t = z * self.beta
        bend = self.beta * torch.sigmoid(t) * torch.sigmoid(-t)
        return torch.where(t > self.threshold, torch.zeros_like(z), bend)

    def _slope(self, x: Tensor) -> Tensor:
        """1 − e^{−βx}, or 1."""
        t = x * self.beta
        return torch.where(t > self.threshold, torch.ones_like(x), -torch.expm1(-t))

    def slope_derivative(self, x: Tensor) -> Tensor:
        """β e^{−βx}, or 0."""
        if self.barrier:
            return super().slope_derivative(x)
        t = x * self.beta
        return torch.where(t > self.threshold, torch.zeros_like(x), self.beta * torch.exp(-t))

    def _inverse(self, x: Tensor) -> Tensor:
        t = x * self.beta
        # βx + log(1 − e^{−βx}), with log(e^{βx} − 1) where the two terms would cancel.
        curved = torch.where(
            t < 1, torch.log(torch.expm1(t.clamp_max(1))), t + torch.log1p(-torch.exp(-t))
        )
        return torch.where(t > self.threshold, x, curved / self.beta)


class Softsign(Activation):
    """φ(z) = z/(1 + |z|)."""

    kind_name = "softsign"
    domain = (-1.0, 1.0)
    odd = True

    def forward(self, x: Tensor) -> Tensor:
        """z/(1 + |z|)."""
        return F.softsign(x)

    def derivative(self, z: Tensor) -> Tensor:
        """1/(1 + |z|)²."""
        return (1 + z.abs()).pow(-2)

    def second_derivative(self, z: Tensor) -> Tensor:
        """−2 sign(z)/(1 + |z|)³."""
        return -2 * z.sign() * (1 + z.abs()).pow(-3)

    def slope_terms(self, z: Tensor) -> Tensor:
        """1/(1 + |z|): the quotient is differentiated as ``1/(1 + |z|) − |z|/(1 + |z|)²``."""
        return 1 / (1 + z.abs())

    def _slope(self, x: Tensor) -> Tensor:
        """(1 − |x|)²."""
        return (1 - x.abs()).square()

    def slope_derivative(self, x: Tensor) -> Tensor:
        """−2 sign(x)(1 − |x|)."""
        return -2 * x.sign() * (1 - x.abs())

    def _inverse(self, x: Tensor) -> Tensor:
        return x / (1 - x.abs())


class LogSigmoid(Activation):
    """φ(z) = log σ(z)."""

    kind_name = "logsigmoid"
    domain = (-_INF, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Log σ(z)."""
        return F.logsigmoid(x)

    def derivative(self, z: Tensor) -> Tensor:
        """σ(−z)."""
        return torch.sigmoid(-z)

    def second_derivative(self, z: Tensor) -> Tensor:
        """−σ(z) σ(−z)."""
        return -torch.sigmoid(z) * torch.sigmoid(-z)

    def _slope(self, x: Tensor) -> Tensor:
        """1 − e^x."""
        return -torch.expm1(x)

    def slope_derivative(self, x: Tensor) -> Tensor:
        """−e^x."""
        return -torch.exp(x)

    def _inverse(self, x: Tensor) -> Tensor:
        # −log(e^{−x} − 1): one of its two forms where x − log(1 − e^x) would cancel.
        far = x - torch.log1p(-torch.exp(x.clamp_max(-1)))
        return torch.where(x > -1, -torch.log(torch.expm1(-x.clamp_min(-1))), far)
