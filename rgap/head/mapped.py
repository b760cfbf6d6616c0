"""A loss over the positions of a map that a fully connected head gives in one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rgap.update.losses import Loss

__all__ = ["Mapped"]


@dataclass(frozen=True)
class Mapped(Loss):
    """The loss of z [N, m] that ``ℓ`` of the map [N, C, *positions] of the same entries is.

    A pixelwise cross-entropy behind ``Unflatten`` is one; κ is that of all positions in a row.

    Attributes:
        shape: (C, *positions).

    >>> import torch
    >>> loss = Mapped("cross_entropy", shape=(3, 2))
    >>> z, y = torch.randn(1, 6, dtype=torch.float64), torch.tensor([[2, 0]])
    >>> loss.read(loss.targets_from(z, loss.cotangent(z, y)))[0].tolist()
    [[2, 0]]
    """

    shape: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """False: the classes are not the entries of z."""
        return False

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """``ℓ`` of the map."""
        return super().__call__(self._map(outputs), targets)

    def cotangent(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """κ in one row, [N, m]."""
        return super().cotangent(self._map(outputs), targets).flatten(1)

    def cotangent_jvp(
        self, outputs: Tensor, direction: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        """``∂κ/∂z v``, [N, m]."""
        bent = super().cotangent_jvp(self._map(outputs), self._map(direction), targets)
        return bent.flatten(1)

    def targets_from(self, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Dense targets [N, C, *positions]."""
        return super().targets_from(self._map(outputs), self._map(cotangent))

    def rounding(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """In one row, [N, m]."""
        return super().rounding(self._map(outputs), targets).flatten(1)

    def magnitude(self, outputs: Tensor) -> float:
        """As for the map."""
        return super().magnitude(self._map(outputs))

    def longest(self, outputs: Tensor) -> float:
        """As for the map."""
        return super().longest(self._map(outputs))

    def dense(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """In the shape of the map."""
        return super().dense(targets, self._map(outputs))

    def admissible(self, classes: int) -> None:
        """None: C to the power of the number of positions."""
        return

    def _map(self, z: Tensor) -> Tensor:
        return z.reshape(len(z), *self.shape)
