"""Pools: averages, which are linear maps of lower rank, and steps that lose more than rank."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from rgap.arithmetic.reverse import pulled
from rgap.network.reshape import ADVICE, Function, Op, leading


class LinearMap(Op):
    """A linear map without parameters, given as a function: average pools and means.

    Args:
        function: linear in its argument, ``[N, *in_shape]`` → ``[N, *out_shape]``.
    """

    affine = True

    def __init__(self, name: str, kind: str, in_shape: tuple[int, ...], function: Function) -> None:
        self.function = function
        probe = function(torch.zeros(1, *in_shape, dtype=torch.float64))
        super().__init__(name, kind, in_shape, tuple(probe.shape[1:]))
        self._inverse: Tensor | None = None
        if prod(self.out_shape) >= prod(in_shape):
            self._inverse = self._pseudo_inverse()

    def forward(self, x: Tensor) -> Tensor:
        """L x."""
        lead = leading(x, self.in_shape)
        out = self.function(x.reshape(-1, *self.in_shape))
        return out.reshape(*lead, *self.out_shape)

    def linear(self, dx: Tensor) -> Tensor:
        """L dx."""
        return self.forward(dx)

    def adjoint(self, k: Tensor) -> Tensor:
        """Lᵀ k, by one reverse pass."""
        lead = leading(k, self.out_shape)
        zero = k.new_zeros(prod(lead), *self.in_shape)
        out = pulled(self.function, zero, k.reshape(-1, *self.out_shape))
        return out.reshape(*lead, *self.in_shape)

    def inverse(self, y: Tensor) -> Tensor:
        """X from L x where L has full column rank (a pool with as many outputs as inputs)."""
        if self._inverse is None:
            return super().inverse(y)
        lead = leading(y, self.out_shape)
        rows = y.reshape(*lead, self.out_shape[0], -1)
        return (rows @ self._inverse.T).reshape(*lead, *self.in_shape)

    def _pseudo_inverse(self) -> Tensor | None:
        """Pinv of the map of one channel; pools treat channels alike."""
        size = prod(self.in_shape[1:])
        too_large = size > 4096  # a dense inverse of 128 MB; larger pools are named instead
        if len(self.in_shape) < 2 or self.out_shape[0] != self.in_shape[0] or too_large:
            self.barrier = f"'{self.name}' ({self.kind}) is not inverted; {ADVICE}"
            return None
        unit = torch.eye(size, dtype=torch.float64).reshape(size, 1, *self.in_shape[1:])
        matrix = self.function(unit).reshape(size, -1).T
        if int(torch.linalg.matrix_rank(matrix)) < size:
            self.barrier = f"'{self.name}' ({self.kind}) has no full column rank; {ADVICE}"
            return None
        inverse: Tensor = torch.linalg.pinv(matrix)
        return inverse


class Opaque(Op):
    """A step that can be computed and differentiated but not inverted: softmax, a pool."""

    def __init__(
        self, name: str, kind: str, in_shape: tuple[int, ...], function: Function, reason: str
    ) -> None:
        probe = function(torch.zeros(1, *in_shape, dtype=torch.float64))
        super().__init__(
            name, kind, in_shape, tuple(probe.shape[1:]), f"'{name}' ({kind}) {reason}; {ADVICE}"
        )
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The step itself."""
        lead = leading(x, self.in_shape)
        out = self.function(x.reshape(-1, *self.in_shape))
        return out.reshape(*lead, *self.out_shape)


class Pool(Opaque):
    """A pool that keeps less than its windows: the winner without its place, or a norm."""
