"""Steps between the affine maps of a network: reshapes, pooling, padding, eval batch norm.

An :class:`Op` maps ``[B, *in_shape]`` to ``[B, *out_shape]`` in float64, sample by sample.  It
knows its transpose (``pull``, ``adjoint``), its inverse where there is one, and, where there is
none, the reason in plain words (``barrier``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Function = Callable[[Tensor], Tensor]
_Op = TypeVar("_Op", bound="Op")

ADVICE = (
    "the layers above it can still be inverted, the audit still measures every layer, and "
    "matching the whole update still works"
)


class Op:
    """One step of a chain that has no weight matrix.

    Attributes:
        name: path of the module, or name of the traced call, in the model.
        kind: what it is, in PyTorch's words: ``"sigmoid"``, ``"avg_pool2d"``, ``"flatten"`` …
        in_shape: shape of one input, without the batch dimension.
        out_shape: shape of one output.
        barrier: None if the recursion can go through; else why not, and what still can be done.
        affine: True for y = L x + c.
        elementwise: True if every output depends on the input in the same place alone.
    """

    affine = False
    elementwise = False

    def __init__(
        self,
        name: str,
        kind: str,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...] | None = None,
        barrier: str | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.in_shape = in_shape
        self.out_shape = in_shape if out_shape is None else out_shape
        self.barrier = barrier

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.kind!r}, {self.in_shape})"

    def forward(self, x: Tensor) -> Tensor:
        """The step itself, ``[B, *in_shape]`` → ``[B, *out_shape]``."""
        raise NotImplementedError

    def pull(self, x: Tensor, k: Tensor) -> Tensor:
        """(D forward(x))ᵀ k: the cotangent at the input, from the one at the output.

        Args:
            x: input at which the step is linearised, ``[B, *in_shape]``.
            k: cotangent at the output, ``[B, *out_shape]``.
        """
        if self.affine:
            return self.adjoint(k)
        pulled: Tensor = torch.func.vjp(self.forward, x)[1](k)[0]
        return pulled

    def linear(self, dx: Tensor) -> Tensor:
        """L dx, without the constant (affine steps only)."""
        raise TypeError(f"'{self.name}' ({self.kind}) is not affine: write forward or pull")

    def adjoint(self, k: Tensor) -> Tensor:
        """Lᵀ k (affine steps only)."""
        raise TypeError(f"'{self.name}' ({self.kind}) is not affine: write pull(x, k)")

    def inverse(self, y: Tensor) -> Tensor:
        """The input that makes the output y, where there is exactly one."""
        raise ValueError(
            self.barrier or f"'{self.name}' ({self.kind}) maps {list(self.in_shape)} to "
            f"{list(self.out_shape)} and has no inverse"
        )

    def to(self: _Op, device: torch.device | str) -> _Op:
        """The same step with its tensors on ``device``."""
        moved = copy.copy(self)
        for key, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, key, value.to(device))
        return moved


class Reshape(Op):
    """Another shape for the same values in the same order: flatten, view, reshape, squeeze.

    >>> Reshape("flatten", "flatten", (2, 3), (6,)).inverse(torch.zeros(4, 6)).shape
    torch.Size([4, 2, 3])
    """

    affine = True

    def forward(self, x: Tensor) -> Tensor:
        """x in the output's shape."""
        return x.reshape(*_lead(x, self.in_shape), *self.out_shape)

    linear = forward

    def adjoint(self, k: Tensor) -> Tensor:
        """k in the input's shape."""
        return k.reshape(*_lead(k, self.out_shape), *self.in_shape)

    inverse = adjoint


class Rearrange(Op):
    """y = x[index]: permute, transpose, flip, pixel shuffle, slices.

    Args:
        index: for every output position the flat input position it reads, ``[*out_shape]``.
    """

    affine = True

    def __init__(self, name: str, kind: str, in_shape: tuple[int, ...], index: Tensor) -> None:
        super().__init__(name, kind, in_shape, tuple(index.shape))
        self.index = index.flatten()
        size = prod(in_shape)
        where = torch.full((size,), -1, dtype=torch.long, device=index.device)
        where[self.index] = torch.arange(len(self.index), device=index.device)
        self.where = where  # an output position that shows each input; −1: none does
        lost = int((where < 0).sum())
        if lost and len(self.index) >= size:
            self.barrier = f"'{name}' ({kind}) drops {lost} of {size} values; {ADVICE}"

    def forward(self, x: Tensor) -> Tensor:
        """x[index]."""
        lead = _lead(x, self.in_shape)
        return x.reshape(*lead, -1)[..., self.index].reshape(*lead, *self.out_shape)

    linear = forward

    def adjoint(self, k: Tensor) -> Tensor:
        """Σ of k over the outputs that read each input."""
        lead = _lead(k, self.out_shape)
        zero = k.new_zeros(*lead, prod(self.in_shape))
        out = zero.index_add(len(lead), self.index, k.reshape(*lead, -1))
        return out.reshape(*lead, *self.in_shape)

    def inverse(self, y: Tensor) -> Tensor:
        """The inputs read back from the outputs that show them."""
        if bool((self.where < 0).any()):
            return super().inverse(y)
        lead = _lead(y, self.out_shape)
        return y.reshape(*lead, -1)[..., self.where].reshape(*lead, *self.in_shape)


class Pad(Op):
    """A constant border: ``ZeroPad2d``, ``ConstantPad2d``, ``F.pad``.

    Args:
        sides: as for ``torch.nn.functional.pad``, last dimension first; negative sides crop.
        value: of the border.

    >>> Pad("pad", (1, 2), (1, 0)).forward(torch.ones(1, 1, 2)).tolist()
    [[[0.0, 1.0, 1.0]]]
    """

    affine = True

    def __init__(
        self, name: str, in_shape: tuple[int, ...], sides: tuple[int, ...], value: float = 0.0
    ) -> None:
        out = list(in_shape)
        for place, side in enumerate(sides):
            out[-1 - place // 2] += side
        super().__init__(name, "pad", in_shape, tuple(out))
        self.sides = tuple(sides)
        self.value = value
        if any(side < 0 for side in sides):
            self.barrier = f"'{name}' (pad) cuts values away; {ADVICE}"

    def forward(self, x: Tensor) -> Tensor:
        """x with its border."""
        return F.pad(x, self.sides, value=self.value)

    def linear(self, dx: Tensor) -> Tensor:
        """dx with a border of zeros."""
        return F.pad(dx, self.sides)

    def adjoint(self, k: Tensor) -> Tensor:
        """k without the border."""
        return F.pad(k, [-side for side in self.sides])

    def inverse(self, y: Tensor) -> Tensor:
        """y without the border."""
        return super().inverse(y) if self.barrier else self.adjoint(y)


class LinearMap(Op):
    """A linear map without parameters, given as a function: average pools and means.

    Args:
        function: linear in its argument, ``[N, *in_shape]`` → ``[N, *out_shape]``.
    """

    affine = True

    def __init__(
        self, name: str, kind: str, in_shape: tuple[int, ...], function: Function
    ) -> None:
        self.function = function
        probe = function(torch.zeros(1, *in_shape, dtype=torch.float64))
        super().__init__(name, kind, in_shape, tuple(probe.shape[1:]))
        self._inverse: Tensor | None = None
        if prod(self.out_shape) >= prod(in_shape):
            self._inverse = self._pseudo_inverse()

    def forward(self, x: Tensor) -> Tensor:
        """L x."""
        lead = _lead(x, self.in_shape)
        out = self.function(x.reshape(-1, *self.in_shape))
        return out.reshape(*lead, *self.out_shape)

    linear = forward

    def adjoint(self, k: Tensor) -> Tensor:
        """Lᵀ k, by one reverse pass."""
        lead = _lead(k, self.out_shape)
        zero = k.new_zeros(prod(lead), *self.in_shape)
        pulled = torch.func.vjp(self.function, zero)[1](k.reshape(-1, *self.out_shape))[0]
        return pulled.reshape(*lead, *self.in_shape)

    def inverse(self, y: Tensor) -> Tensor:
        """x from L x where L has full column rank (a pool with as many outputs as inputs)."""
        if self._inverse is None:
            return super().inverse(y)
        lead = _lead(y, self.out_shape)
        rows = y.reshape(*lead, self.out_shape[0], -1)
        return (rows @ self._inverse.T).reshape(*lead, *self.in_shape)

    def _pseudo_inverse(self) -> Tensor | None:
        """pinv of the map of one channel; pools treat channels alike."""
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
        return torch.linalg.pinv(matrix)


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
        dead = torch.nonzero(scale.reshape(scale.shape[0], -1).eq(0).any(1)).flatten().tolist()
        if dead:
            self.barrier = (
                f"'{name}' ({kind}) has scale 0 in channel {dead[0]}"
                + (f" and {len(dead) - 1} more" if len(dead) > 1 else "")
                + f": that channel does not depend on its input; {ADVICE}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """scale ⊙ x + shift."""
        return x * self.scale + self.shift

    def linear(self, dx: Tensor) -> Tensor:
        """scale ⊙ dx."""
        return dx * self.scale

    adjoint = linear

    def inverse(self, y: Tensor) -> Tensor:
        """(y − shift) / scale."""
        return super().inverse(y) if self.barrier else (y - self.shift) / self.scale


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

    def normalised(self, x: Tensor) -> Tensor:
        """(x − mean)/√(var + ε): what γ multiplies."""
        return (x - self.mean) / self.deviation

    def weight_gradient(self, x: Tensor, k: Tensor) -> Tensor:
        """∂L/∂γ = Σ k ⊙ normalised(x), ``[C]``."""
        return (k * self.normalised(x)).sum((0, *range(2, k.ndim)))

    def bias_gradient(self, k: Tensor) -> Tensor:
        """∂L/∂β = Σ k, ``[C]``."""
        return k.sum((0, *range(2, k.ndim)))


class Opaque(Op):
    """A step that can be computed and differentiated but not inverted: max-pool, softmax."""

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
        lead = _lead(x, self.in_shape)
        out = self.function(x.reshape(-1, *self.in_shape))
        return out.reshape(*lead, *self.out_shape)


def _lead(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Leading dimensions of x, whose trailing ones must be ``shape``."""
    cut = x.ndim - len(shape)
    if cut < 0 or tuple(x.shape[cut:]) != shape:
        raise ValueError(f"expected [..., {', '.join(map(str, shape))}], got {list(x.shape)}")
    return tuple(x.shape[:cut])
