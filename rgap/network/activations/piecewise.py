"""Element-wise activations x = φ(z): what they share, and the piecewise linear ones.

Besides the function and its two derivatives an activation knows its inverse and the slope
φ'(φ^{-1}(x)) straight from the output x: what the recursion needs on the way down.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from rgap.arithmetic.reverse import pulled
from rgap.network.reshape import ADVICE, Function, Op

_INF = math.inf
# Their second derivative is 0, and PyTorch has none for hardsigmoid.
_PIECEWISE = ("hardsigmoid", "hardtanh", "relu6", "hardshrink", "softshrink", "threshold")
# From there on mish is the identity, φ'' < 1e-80; PyTorch's φ'' is NaN where e^z overflows, at 710.
_LINE = 100.0


class Activation(Op):
    """x = φ(z), the same φ in every place.

    A class of one's own writes φ (``forward``), its two derivatives, and ``_inverse`` or a barrier.

    Args:
        name: path of the module, or name of the traced call, in the model.
        in_shape: shape of one input, without the batch dimension.
        barrier: why φ has no inverse, as in "'name' (kind) has no element-wise inverse".
        kind: what it is, by default the class's ``kind_name``.

    Raises:
        TypeError: a class that writes no ``_inverse`` and passes no barrier.

    Attributes:
        domain: open interval of the outputs that φ attains.
        one_sided: True for ReLU: x > 0 is an equality, x = 0 only says z ≤ 0.
        odd: φ(−z) = −φ(z).
        homogeneous: φ(c z) = c φ(z) for c > 0.
        slope_from_output: autograd computes φ' from the rounded output, not from the input.
    """

    elementwise = True
    kind_name: ClassVar[str] = ""
    one_sided: bool = False
    odd: bool = False
    homogeneous: bool = False
    slope_from_output: bool = False
    domain: tuple[float, float] = (-_INF, _INF)

    def __init__(
        self,
        name: str,
        in_shape: tuple[int, ...],
        barrier: str | None = None,
        kind: str | None = None,
    ) -> None:
        if barrier is None and type(self)._inverse is Activation._inverse:
            raise TypeError(
                f"{type(self).__name__}: expected an inverse or the reason why there is none, got "
                "neither; write the method _inverse(self, x), φ^{-1} of outputs inside domain, or "
                "super().__init__(name, in_shape, barrier='has no element-wise inverse')"
            )
        kind = self.kind_name if kind is None else kind
        reason = None if barrier is None else f"'{name}' ({kind}) {barrier}; {ADVICE}"
        super().__init__(name, kind, in_shape, barrier=reason)

    def pull(self, x: Tensor, k: Tensor) -> Tensor:
        """K ⊙ φ'(z) at the input z = ``x``."""
        return k * self.derivative(x)

    @abstractmethod
    def derivative(self, z: Tensor) -> Tensor:
        """φ'(z); at a kink, PyTorch's choice."""

    @abstractmethod
    def second_derivative(self, z: Tensor) -> Tensor:
        """φ''(z)."""

    def slope_terms(self, z: Tensor) -> Tensor | None:
        """Size of the terms whose difference autograd makes φ'(z) of; None where it is a product.

        Where they cancel, what they round is what is left: φ' is known to their precision only.
        """
        return None

    def inverse(self, y: Tensor) -> Tensor:
        """Z with φ(z) = y; a y that rounding moved out of :attr:`domain` is moved back inside."""
        return self._inverse(self._inside(y))

    def slope(self, x: Tensor) -> Tensor:
        """φ'(φ^{-1}(x)) from the output x, at least 0; x outside :attr:`domain` as in ``inverse``.

        The polynomials below know nothing of the domain: x (1 − x) is negative beyond 1, where
        rounding or noise moves a saturated sigmoid, and would turn the sign of its cotangent.
        """
        return self._slope(self._inside(x))

    def slope_derivative(self, x: Tensor) -> Tensor:
        """D slope / dx from the output x, ``φ''(z)/φ'(z)``."""
        z = self.inverse(x)
        return self.second_derivative(z) / self.derivative(z)

    def _inverse(self, x: Tensor) -> Tensor:
        """φ^{-1}(x), where there is no barrier."""
        raise ValueError(self.barrier)

    def _slope(self, x: Tensor) -> Tensor:
        """φ'(φ^{-1}(x)); overridden where it is exact from the output."""
        return self.derivative(self._inverse(x))

    def _inside(self, x: Tensor) -> Tensor:
        """The output x as the inverse takes it."""
        if self.barrier is not None:
            raise ValueError(self.barrier)
        low, high = self.domain
        if low > -_INF:
            x = x.clamp_min(math.nextafter(low, _INF))
        if high < _INF:
            x = x.clamp_max(math.nextafter(high, -_INF))
        return x


class PiecewiseLinear(Activation, ABC):
    """Straight lines that meet at 0: φ'' = 0, and an output is on its input's side of the kink."""

    def second_derivative(self, z: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(z)

    def _slope(self, x: Tensor) -> Tensor:
        """φ' on the side of x."""
        return self.derivative(x)

    def slope_derivative(self, x: Tensor) -> Tensor:
        """0."""
        return super().slope_derivative(x) if self.barrier else torch.zeros_like(x)


class Identity(PiecewiseLinear):
    """φ(z) = z."""

    kind_name = "identity"
    odd = True
    homogeneous = True

    def forward(self, x: Tensor) -> Tensor:
        """Z."""
        return x

    def derivative(self, z: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(z)

    def _inverse(self, x: Tensor) -> Tensor:
        return x


class ReLU(PiecewiseLinear):
    """φ(z) = max(z, 0): an equality where x > 0, an inequality where x = 0."""

    kind_name = "relu"
    one_sided = True
    homogeneous = True
    domain = (0.0, _INF)

    def forward(self, x: Tensor) -> Tensor:
        """max(z, 0)."""
        return torch.relu(x)

    def derivative(self, z: Tensor) -> Tensor:
        """1 where z > 0, else 0."""
        return (z > 0).to(z)

    def _inverse(self, x: Tensor) -> Tensor:
        """X itself: z where x > 0; at 0 it only says z ≤ 0."""
        return x

    def _inside(self, x: Tensor) -> Tensor:
        """X itself: the 0 is an output too."""
        return x


class LeakyReLU(PiecewiseLinear):
    """φ(z) = z for z > 0, s z otherwise; invertible for s > 0."""

    kind_name = "leaky_relu"
    homogeneous = True

    def __init__(
        self, name: str, in_shape: tuple[int, ...], negative_slope: float | Tensor = 0.01
    ) -> None:
        slope = torch.as_tensor(negative_slope, dtype=torch.float64)
        barrier = None
        if bool((slope <= 0).any()):
            at = int(torch.nonzero(slope.flatten() <= 0)[0])
            where = f" in channel {at}" if slope.numel() > 1 else ""
            barrier = (
                f"has slope {float(slope.flatten()[at]):g}{where} for negative inputs: two inputs "
                "share one output (it needs a slope > 0)"
            )
        super().__init__(name, in_shape, barrier)
        self.negative_slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """Z or s z."""
        return torch.where(x > 0, x, x * self.negative_slope)

    def derivative(self, z: Tensor) -> Tensor:
        """1 or s."""
        return torch.where(z > 0, torch.ones_like(z), self.negative_slope.to(z))

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x / self.negative_slope)


class PReLU(LeakyReLU):
    """LeakyReLU with learned slopes, one or one per channel.

    Attributes:
        weight_name: name of the slopes in ``model.named_parameters()``.
    """

    kind_name = "prelu"

    def __init__(
        self, name: str, in_shape: tuple[int, ...], weight: Tensor, weight_name: str
    ) -> None:
        if weight.numel() not in (1, in_shape[0]):
            raise ValueError(
                f"'{name}' (prelu) expects {weight.numel()} channels, got [B, "
                f"{', '.join(map(str, in_shape))}]; write the input_shape the model was built for"
            )
        ones = (1,) * (len(in_shape) - 1)
        column = weight.detach().to(torch.float64, copy=True).reshape(-1, *ones)
        super().__init__(name, in_shape, column)
        self.weight_name = weight_name

    def weight_gradient(self, z: Tensor, k: Tensor) -> Tensor:
        """∂L/∂slopes = Σ over z ≤ 0 of z k, with k the cotangent at the output."""
        part = torch.where(z > 0, torch.zeros_like(z), z * k)
        if self.negative_slope.numel() == 1:
            return part.sum().reshape(1)
        return part.sum((0, *range(2, part.ndim)))


class Opaque(Activation):
    """An activation without an element-wise inverse (GELU, SiLU, Hardtanh): autograd does the rest.

    Args:
        function: element-wise.
        kind: its name in ``torch.nn.functional``.
    """

    def __init__(self, name: str, in_shape: tuple[int, ...], function: Function, kind: str) -> None:
        reason = "has no element-wise inverse: several inputs share one output"
        super().__init__(name, in_shape, reason, kind)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """φ(z)."""
        return self.function(x)

    def derivative(self, z: Tensor) -> Tensor:
        """φ'(z) by reverse differentiation."""
        return pulled(self.function, z, torch.ones_like(z))

    def slope_terms(self, z: Tensor) -> Tensor:
        """1, as of GELU: Φ(z) + z φ(z), which nearly vanishes for negative z."""
        return torch.ones_like(z)

    def second_derivative(self, z: Tensor) -> Tensor:
        """φ''(z), by differentiating twice."""
        if self.kind in _PIECEWISE:
            return torch.zeros_like(z)
        if self.kind == "mish":
            z = z.clamp_max(_LINE)
        return pulled(self.derivative, z, torch.ones_like(z))
