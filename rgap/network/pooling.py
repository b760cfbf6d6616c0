"""Pools: averages, which are linear maps of lower rank, and steps that lose more than rank."""

from __future__ import annotations

import copy
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

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


class MaxPool(Pool):
    """The largest entry of each window, without its place.

    Args:
        module: the pool of ``torch.nn``, in one to three dimensions, adaptive or not.
        function: its forward, with shapes checked.
        reason: why it has no inverse, in words.

    >>> import torch
    >>> pool = MaxPool("pool", "max_pool1d", (1, 4), torch.nn.MaxPool1d(2), torch.nn.MaxPool1d(2))
    >>> x = torch.tensor([[[1.0, 3.0, 5.0, 2.0]]])
    >>> places = pool.winners(x)
    >>> places.tolist(), pool.taken(10 * x, places).tolist()
    ([[[1, 2]]], [[[30.0, 50.0]]])
    >>> pool.put(torch.ones(1, 1, 2), places).tolist(), pool.spread(torch.ones(1, 1, 2)).tolist()
    ([[[0.0, 1.0, 1.0, 0.0]]], [[[1.0, 1.0, 1.0, 1.0]]])
    """

    def __init__(
        self,
        name: str,
        kind: str,
        in_shape: tuple[int, ...],
        module: nn.Module,
        function: Function,
        reason: str = "keeps the winner but not its place",
    ) -> None:
        super().__init__(name, kind, in_shape, function, reason)
        self.module = module
        self._places = copy.copy(module)
        self._places.return_indices = True  # type: ignore[assignment]
        self._dims = int(kind[-2])

    @property
    def disjoint(self) -> bool:
        """True if no entry is in two windows and none of them reaches over the border."""
        size, step, pads, dilation = (
            getattr(self.module, what, None)
            for what in ("kernel_size", "stride", "padding", "dilation")
        )
        if size is None or self.module.ceil_mode:
            return False
        every = [_each(what, self._dims) for what in (size, step, pads, dilation)]
        return all(k <= s and not p and d == 1 for k, s, p, d in zip(*every, strict=True))

    def winners(self, x: Tensor) -> Tensor:
        """Flat place of the winner of each window in its channel, whole numbers [B, *out_shape]."""
        places: Tensor = self._places(x)[1]
        return places

    def taken(self, x: Tensor, places: Tensor) -> Tensor:
        """Entries of x at the places of winners, [..., B, *out_shape]; the pool's derivative."""
        flat = x.flatten(-self._dims)
        at = places.flatten(-self._dims).expand(*flat.shape[:-1], -1)
        return flat.gather(-1, at).reshape(*x.shape[: -self._dims], *places.shape[-self._dims :])

    def put(self, k: Tensor, places: Tensor) -> Tensor:
        """What :meth:`taken` is the transpose of: each entry added at its winner's place."""
        flat = k.flatten(-self._dims)
        space = self.in_shape[-self._dims :]
        at = places.flatten(-self._dims).expand_as(flat)
        empty = flat.new_zeros(*flat.shape[:-1], prod(space))
        return empty.scatter_add(-1, at, flat).reshape(*flat.shape[:-1], *space)

    def winning(self, x: Tensor) -> Tensor:
        """True at the winners of all windows, bool [B, *in_shape]."""
        places = self.winners(x)
        return self.put(torch.ones_like(self.taken(x, places)), places) > 0.5

    @cached_property
    def sums(self) -> LinearMap:
        """The sum of each window, where windows are disjoint."""
        return LinearMap(self.name, "sum", self.in_shape, self._summed)

    def spread(self, k: Tensor) -> Tensor:
        """Each entry at every place of its window, where windows are disjoint, [..., *in_shape]."""
        return self.sums.adjoint(k)

    def summed(self, x: Tensor) -> Tensor:
        """The transpose of :meth:`spread`."""
        return self.sums.forward(x)

    def _summed(self, x: Tensor) -> Tensor:
        size = _each(self.module.kernel_size, self._dims)
        step = _each(self.module.stride, self._dims)
        for axis, (k, s) in enumerate(zip(size, step, strict=True)):
            x = x.unfold(axis - self._dims - axis, k, s)
        return x.sum(tuple(range(-self._dims, 0)))


def _each(value: object, dims: int) -> tuple[int, ...]:
    """A size for each dimension."""
    return tuple(value) if isinstance(value, (tuple, list)) else (int(value),) * dims  # type: ignore[call-overload]
