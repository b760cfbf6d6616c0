"""Steps between the affine maps of a network: reshapes, slices and padding.

An :class:`Op` maps ``[B, *in_shape]`` to ``[B, *out_shape]`` in float64, sample by sample.  It
knows its transpose (``pull``, ``adjoint``), its inverse where there is one, and, where there is
none, the reason in plain words (``barrier``).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rgap.arithmetic.reverse import pulled

Function = Callable[[Tensor], Tensor]
_Op = TypeVar("_Op", bound="Op")

ADVICE = (
    "the layers above it can still be inverted, the audit still measures every layer, and "
    "matching the whole update still works"
)


class Op(ABC):
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

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The step itself, ``[B, *in_shape]`` → ``[B, *out_shape]``."""

    def pull(self, x: Tensor, k: Tensor) -> Tensor:
        """(D forward(x))ᵀ k: the cotangent at the input, from the one at the output.

        Args:
            x: input at which the step is linearised, ``[B, *in_shape]``.
            k: cotangent at the output, ``[B, *out_shape]``.
        """
        if self.affine:
            return self.adjoint(k)
        return pulled(self.forward, x, k)

    def linear(self, dx: Tensor) -> Tensor:
        """L dx, without the constant (affine steps only)."""
        raise TypeError(f"'{self.name}' ({self.kind}) is not affine: write forward or pull")

    def adjoint(self, k: Tensor) -> Tensor:
        """Lᵀ k (affine steps only)."""
        raise TypeError(f"'{self.name}' ({self.kind}) is not affine: write pull(x, k)")

    def inverse(self, y: Tensor) -> Tensor:
        """The input that makes the output y, where there is exactly one."""
        raise ValueError(
            self.barrier
            or f"'{self.name}' ({self.kind}) maps {list(self.in_shape)} to "
            f"{list(self.out_shape)} and has no inverse"
        )

    def inverse_linear(self, dy: Tensor) -> Tensor:
        """L⁻¹ dy, without the constant (affine steps only)."""
        return self.inverse(dy) - self.inverse(torch.zeros_like(dy))

    def terms(self, x: Tensor) -> Tensor | None:
        """Sum of the squared terms that the client adds up to the output; None for no sum."""
        return None

    def to(self: _Op, device: torch.device | str | torch.dtype) -> _Op:
        """The same step with its tensors on ``device``, or in other arithmetic."""
        moved = copy.copy(self)
        for key, value in vars(self).items():
            if isinstance(value, Tensor):
                whole = isinstance(device, torch.dtype) and not value.is_floating_point()
                setattr(moved, key, value if whole else value.to(device))
        return moved


class Reshape(Op):
    """Another shape for the same values in the same order: flatten, view, reshape, squeeze.

    >>> Reshape("flatten", "flatten", (2, 3), (6,)).inverse(torch.zeros(4, 6)).shape
    torch.Size([4, 2, 3])
    """

    affine = True

    def forward(self, x: Tensor) -> Tensor:
        """X in the output's shape."""
        return x.reshape(*leading(x, self.in_shape), *self.out_shape)

    def linear(self, dx: Tensor) -> Tensor:
        """Dx in the output's shape."""
        return self.forward(dx)

    def adjoint(self, k: Tensor) -> Tensor:
        """K in the input's shape."""
        return k.reshape(*leading(k, self.out_shape), *self.in_shape)

    def inverse(self, y: Tensor) -> Tensor:
        """Y in the input's shape."""
        return self.adjoint(y)


class Rearrange(Op):
    """y = x[index]: permute, transpose, flip, pixel shuffle, slices, borders that repeat.

    Args:
        index: for every output position the flat input position it reads, ``[*out_shape]``.

    Attributes:
        border: of a picture with a border that shows it again, the ``mode`` of
            ``torch.nn.functional.pad``; else "".
        sides: of the border, as there.
    """

    affine = True
    border = ""
    sides: tuple[int, ...] = ()

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
        lead = leading(x, self.in_shape)
        return x.reshape(*lead, prod(self.in_shape))[..., self.index].reshape(
            *lead, *self.out_shape
        )

    def linear(self, dx: Tensor) -> Tensor:
        """dx[index]."""
        return self.forward(dx)

    def adjoint(self, k: Tensor) -> Tensor:
        """Σ of k over the outputs that read each input."""
        lead = leading(k, self.out_shape)
        zero = k.new_zeros(*lead, prod(self.in_shape))
        out = zero.index_add(len(lead), self.index, k.reshape(*lead, prod(self.out_shape)))
        return out.reshape(*lead, *self.in_shape)

    def inverse(self, y: Tensor) -> Tensor:
        """The inputs read back from the outputs that show them."""
        if bool((self.where < 0).any()):
            return super().inverse(y)
        lead = leading(y, self.out_shape)
        return y.reshape(*lead, prod(self.out_shape))[..., self.where].reshape(
            *lead, *self.in_shape
        )


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
        """X with its border."""
        return F.pad(x, self.sides, value=self.value)

    def linear(self, dx: Tensor) -> Tensor:
        """Dx with a border of zeros."""
        return F.pad(dx, self.sides)

    def adjoint(self, k: Tensor) -> Tensor:
        """K without the border."""
        return F.pad(k, [-side for side in self.sides])

    def inverse(self, y: Tensor) -> Tensor:
        """Y without the border."""
        return super().inverse(y) if self.barrier else self.adjoint(y)


def leading(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Leading dimensions of x, whose trailing ones must be ``shape``."""
    cut = x.ndim - len(shape)
    if cut < 0 or tuple(x.shape[cut:]) != shape:
        raise ValueError(f"expected [..., {', '.join(map(str, shape))}], got {list(x.shape)}")
    return tuple(x.shape[:cut])
