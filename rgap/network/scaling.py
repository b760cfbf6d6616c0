"""y = scale ⊙ x + shift: batch norm in eval mode, and arithmetic with constants."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.network.reshape import ADVICE, Op


class Scale(Op):
    """y = scale ⊙ x + shift: eval-mode batch norm, or arithmetic with constants.

    Args:
        scale: broadcasts against ``[B, *in_shape]``.
        shift: likewise.

    >>> op = Scale("norm", "scale", (2,), torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]))
    >>> op.inverse(op.forward(torch.tensor([[3.0, 5.0]]))).tolist()
    [[3.0, 5.0]]
    """

    affine = True
    elementwise = True

    def __init__(
        self, name: str, kind: str, in_shape: tuple[int, ...], scale: Tensor, shift: Tensor
    ) -> None:
        super().__init__(name, kind, in_shape)
        self.scale = scale
        self.shift = shift
        dead = (
            torch.nonzero(scale.reshape(scale.shape[0] if scale.ndim else 1, -1).eq(0).any(1))
            .flatten()
            .tolist()
        )
        if dead:
            self.barrier = (
                f"'{name}' ({kind}) has scale 0 in channel {dead[0]}"
                + (f" and {len(dead) - 1} more" if len(dead) > 1 else "")
                + f": that channel does not depend on its input; {ADVICE}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Scale ⊙ x + shift."""
        return x * self.scale + self.shift

    def linear(self, dx: Tensor) -> Tensor:
        """Scale ⊙ dx."""
        return dx * self.scale

    def adjoint(self, k: Tensor) -> Tensor:
        """Scale ⊙ k."""
        return k * self.scale

    def inverse(self, y: Tensor) -> Tensor:
        """(y − shift) / scale."""
        return super().inverse(y) if self.barrier else (y - self.shift) / self.scale

    def inverse_linear(self, dy: Tensor) -> Tensor:
        """Dy / scale: a difference of two inverses loses what is small beside the shift."""
        return super().inverse(dy) if self.barrier else dy / self.scale

    def terms(self, x: Tensor) -> Tensor:
        """(scale ⊙ x)² + shift²: where the two cancel, their rounding is what is left."""
        return self.linear(x).square() + self.shift.square()


class BatchNorm(Scale):
    """Batch norm with running statistics: γ (x − mean)/√(var + ε) + β.

    Attributes:
        weight_name: name of γ in ``model.named_parameters()``, or None.
        bias_name: name of β there, or None.
        mean, deviation: running mean and √(var + ε), ``[C, 1, …]``.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        in_shape: tuple[int, ...],
        mean: Tensor,
        deviation: Tensor,
        weight: tuple[str, Tensor] | None = None,
        bias: tuple[str, Tensor] | None = None,
    ) -> None:
        column = (-1, *(1 for _ in in_shape[1:]))
        self.mean = mean.reshape(column)
        self.deviation = deviation.reshape(column)
        self.weight_name = weight[0] if weight else None
        self.bias_name = bias[0] if bias else None
        gamma = weight[1].reshape(column) if weight else torch.ones_like(self.mean)
        beta = bias[1].reshape(column) if bias else torch.zeros_like(self.mean)
        scale = gamma / self.deviation
        super().__init__(name, kind, in_shape, scale, beta - self.mean * scale)

    def terms(self, x: Tensor) -> Tensor:
        """The same with the shift as the client adds it up, β − mean ⊙ scale."""
        centred = (self.mean * self.scale).square()
        return self.linear(x).square() + centred + (self.shift + self.mean * self.scale).square()

    def normalised(self, x: Tensor) -> Tensor:
        """(x − mean)/√(var + ε): what γ multiplies."""
        return (x - self.mean) / self.deviation

    def weight_gradient(self, x: Tensor, k: Tensor) -> Tensor:
        """∂L/∂γ = Σ k ⊙ normalised(x), ``[C]``."""
        return (k * self.normalised(x)).sum((0, *range(2, k.ndim)))

    def bias_gradient(self, k: Tensor) -> Tensor:
        """∂L/∂β = Σ k, ``[C]``."""
        return k.sum((0, *range(2, k.ndim)))
