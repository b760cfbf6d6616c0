"""Affine maps z = W u + b of a network: linear layers and convolutions of any dimension.

A convolution of any number of spatial dimensions goes through the same code: explicit padding per
side (so that even kernels with ``'same'`` fit), stride, dilation and groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from rgap.arithmetic.doubles import row_blocks
from rgap.network.geometry import Geometry

__all__ = ["Affine", "Geometry", "convolution", "linear"]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_WEIGHT: dict[int, Callable[..., Tensor]] = {
    1: nn_grad.conv1d_weight,
    2: nn_grad.conv2d_weight,
    3: nn_grad.conv3d_weight,
}


@dataclass(frozen=True, eq=False)
class Affine:
    """z = W u + b with W a matrix or a convolution, in float64.

    Every method takes a batch of any size, ``[B, *in_shape]`` or ``[B, *out_shape]``, changes no
    argument and can be differentiated and mapped by :mod:`torch.func`.

    Attributes:
        name: path of the layer in the model.
        kind: ``"linear"``, ``"conv1d"``, ``"conv2d"`` or ``"conv3d"``.
        weight: W, ``[m, n]`` or ``[F, C/groups, *kernel]``.
        bias: b, ``[m]`` or ``[F]``, or None.
        weight_name: name of W in ``model.named_parameters()``.
        bias_name: name of b there, or None.
        in_shape: shape of one u, without the batch dimension.
        out_shape: shape of one z.
        geometry: of a convolution; None for a linear layer.

    >>> w = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    >>> layer = Affine("fc", "linear", w, None, "fc.weight", None, (2,), (1,), None)
    >>> layer.forward(torch.tensor([[3.0, 4.0]], dtype=torch.float64)).item()
    11.0
    >>> layer.adjoint(torch.tensor([[5.0]], dtype=torch.float64)).tolist()
    [[5.0, 10.0]]
    """

    name: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    weight_name: str
    bias_name: str | None
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    geometry: Geometry | None

    @cached_property
    def reads(self) -> Tensor:
        """True where some output is computed with the entry of u, bool ``[*in_shape]``.

        By the geometry alone: an entry that is not read has a column of zeros in the weight
        constraint and, whatever k is, in the gradient constraint.  A weight that happens to be 0
        does not count: the gradient of that weight still sees its input.

        >>> w = torch.zeros(1, 1, 3, dtype=torch.float64)
        >>> third = Geometry.of((3,), stride=3)
        >>> conv = convolution("c", w, None, ("c.weight", None), (1, 6), third)
        >>> conv.reads.int().tolist()
        [[1, 1, 1, 1, 1, 1]]
        >>> short = convolution("c", w, None, ("c.weight", None), (1, 5), third)
        >>> short.reads.int().tolist()
        [[1, 1, 1, 0, 0]]
        """
        mask = torch.ones(self.in_shape, dtype=torch.bool, device=self.weight.device)
        if self.geometry is None:
            return mask
        for axis, line in enumerate(self.geometry.reads(self.in_shape[1:]), start=1):
            along = torch.tensor(line, device=mask.device)
            mask = mask & along.reshape(-1, *[1] * (mask.ndim - axis - 1))
        return mask

    def forward(self, x: Tensor) -> Tensor:
        """W u + b, ``[B, *in_shape]`` → ``[B, *out_shape]``."""
        out = self.linear(x)
        if self.bias is None:
            return out
        return out + self.bias.reshape(-1, *(1 for _ in self.out_shape[1:]))

    def linear(self, dx: Tensor) -> Tensor:
        """W du, without the bias."""
        self._check("linear", dx, self.in_shape)
        geometry = self.geometry
        if geometry is None:
            return dx @ self.weight.T
        dx, padding = self._padded(dx, geometry)
        return _CONV[len(geometry.kernel)](
            dx, self.weight, None, geometry.stride, padding, geometry.dilation, geometry.groups
        )

    def adjoint(self, k: Tensor) -> Tensor:
        """Wᵀ k, ``[B, *out_shape]`` → ``[B, *in_shape]``: the cotangent at u."""
        self._check("adjoint", k, self.out_shape)
        geometry = self.geometry
        if geometry is None:
            return k @ self.weight
        symmetric = geometry.symmetric()
        out = _TRANSPOSE[len(geometry.kernel)](
            k,
            self.weight,
            None,
            stride=geometry.stride,
            padding=tuple(low for low, _ in geometry.padding) if symmetric else 0,
            output_padding=geometry.leftover(self.in_shape[1:]),
            groups=geometry.groups,
            dilation=geometry.dilation,
        )
        if geometry.border != "zeros":
            return _gathered(out, geometry, self.in_shape[1:])
        return out if symmetric else F.pad(out, geometry.pad_list(-1))

    def weight_gradient(self, x: Tensor, k: Tensor) -> Tensor:
        """G = Σ_b k_b u_bᵀ (for a convolution: correlated), the shape of ``weight``.

        Args:
            x: inputs u, ``[B, *in_shape]``.
            k: cotangents ∂L/∂z, ``[B, *out_shape]``.
        """
        self._check("weight_gradient", x, self.in_shape)
        self._check("weight_gradient", k, self.out_shape)
        geometry = self.geometry
        if geometry is None:
            return k.T @ x
        x, padding = self._padded(x, geometry)
        return _WEIGHT[len(geometry.kernel)](
            x,
            self.weight.shape,
            k,
            geometry.stride,
            padding,
            geometry.dilation,
            geometry.groups,
        )

    def bias_gradient(self, k: Tensor) -> Tensor:
        """∂L/∂b = Σ k over samples and positions, ``[m]`` or ``[F]``."""
        self._check("bias_gradient", k, self.out_shape)
        return k.sum((0, *range(2, k.ndim)))

    def sent(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """∂L/∂W as an update has it, in the shape that W has here.

        Args:
            gradients: by parameter name; those of a convolution that is read as a matrix (see
                :mod:`rgap.network.connected`) come in the shape of its kernels.
        """
        return gradients[self.weight_name].reshape(self.weight.shape)

    def bordered(self, sides: tuple[int, ...], border: str = "zeros") -> Affine:
        """The convolution of what a border was put around: the border as its padding.

        Args:
            sides: of the border, as for ``torch.nn.functional.pad``, last dimension first.
            border: what it shows, as :class:`~rgap.network.geometry.Geometry` has it.
        """
        geometry = self.geometry
        if geometry is None or len(sides) > 2 * len(geometry.kernel) or min(sides) < 0:
            raise ValueError(
                f"'{self.name}' ({self.kind}): expected a border along the dimensions of a "
                f"convolution, got sides {sides}"
            )
        wider = replace(geometry.bordered(sides), border=border)
        channels, *space = self.in_shape
        added = [
            sum(new) - sum(old) for new, old in zip(wider.padding, geometry.padding, strict=True)
        ]
        inner = tuple(n - more for n, more in zip(space, added, strict=True))
        return replace(self, in_shape=(channels, *inner), geometry=wider)

    def squared(self) -> Affine:
        """The map with squared weights and no bias: it adds up variances of terms."""
        return replace(self, weight=self.weight.square(), bias=None)

    def linear_of_squares(self, u: Tensor) -> Tensor:
        """(W∘W) u, as ``squared().linear(u)``; a matrix is squared block of rows by block."""
        if self.geometry is not None:
            return self.squared().linear(u)
        self._check("linear", u, self.in_shape)
        blocks = row_blocks(self.weight, self.weight)
        return torch.cat([u @ block.square().T for _, block in blocks], 1)

    def adjoint_of_squares(self, k: Tensor) -> Tensor:
        """(W∘W)ᵀ k, as ``squared().adjoint(k)``; a matrix is squared block of rows by block."""
        if self.geometry is not None:
            return self.squared().adjoint(k)
        self._check("adjoint", k, self.out_shape)
        total = k.new_zeros(len(k), *self.in_shape)
        for rows, block in row_blocks(self.weight, self.weight):
            total += k[:, rows] @ block.square()
        return total

    def to(self, device: torch.device | str | torch.dtype) -> Affine:
        """The same map with its tensors on ``device``, or in other arithmetic."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    @staticmethod
    def _padded(x: Tensor, geometry: Geometry) -> tuple[Tensor, int | tuple[int, ...]]:
        if geometry.symmetric():
            return x, tuple(low for low, _ in geometry.padding)
        mode = "constant" if geometry.border == "zeros" else geometry.border
        return F.pad(x, geometry.pad_list(), mode=mode), 0

    def _check(self, what: str, x: Tensor, shape: tuple[int, ...]) -> None:
        if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != shape:
            raise ValueError(
                f"'{self.name}' ({self.kind}) {what}: expected [B, {', '.join(map(str, shape))}], "
                f"got {list(x.shape)}"
            )


def _gathered(k: Tensor, geometry: Geometry, space: tuple[int, ...]) -> Tensor:
    """Transpose of a border that shows the picture again: its cotangents go where they came from.

    Args:
        k: [B, C, *padded].
        geometry: of the convolution.
        space: of the picture.
    """
    for axis, size in enumerate(space):
        shown = torch.tensor(geometry.shown(axis, size), device=k.device)
        shape = [*k.shape[: axis + 2], size, *k.shape[axis + 3 :]]
        k = k.new_zeros(shape).index_add(axis + 2, shown, k)
    return k


def linear(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str, str | None],
    in_shape: tuple[int, ...],
    copy: bool = True,
) -> Affine:
    """A linear layer ``[B, n]`` → ``[B, m]``; copies the parameters in float64.

    Without ``copy`` it takes those that are in float64 as they are: nobody may write to them.

    Raises:
        ValueError: if ``in_shape`` is not ``(n,)``.
    """
    out, width = weight.shape
    if in_shape != (width,):
        hint = (
            "put a flatten before it"
            if prod(in_shape) == width
            else ("write the input_shape that the model was built for")
        )
        raise ValueError(
            f"'{name}' (linear) expects [B, {width}], got [B, {', '.join(map(str, in_shape))}]; "
            f"{hint}"
        )
    return Affine(
        name,
        "linear",
        _double(weight, copy),
        None if bias is None else _double(bias, copy),
        names[0],
        names[1],
        in_shape,
        (out,),
        None,
    )


def convolution(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str, str | None],
    in_shape: tuple[int, ...],
    geometry: Geometry | None = None,
    copy: bool = True,
) -> Affine:
    """A convolution of ``weight.ndim − 2`` dimensions.

    Args:
        name: path of the layer.
        weight: W, [F, C/groups, *kernel].
        bias: b, [F], or None.
        names: of W and b in ``model.named_parameters()``.
        in_shape: [C, *space].
        geometry: where its taps fall, see :meth:`Geometry.of`; None: stride 1, no padding.
        copy: as in :func:`linear`.

    Raises:
        ValueError: if ``in_shape`` has other channels or is smaller than the kernel.
    """
    dims = weight.ndim - 2
    kind = f"conv{dims}d"
    geometry = geometry or Geometry.of(tuple(weight.shape[2:]))
    channels = weight.shape[1] * geometry.groups
    got = ", ".join(map(str, in_shape))
    axes = ("length",) if dims == 1 else ("depth", "height", "width")[-dims:]
    if len(in_shape) != dims + 1 or in_shape[0] != channels:
        hint = ""
        if len(in_shape) == dims + 2:
            hint = "; write input_shape without the batch dimension"
        raise ValueError(
            f"'{name}' ({kind}) expects [B, {channels}, {', '.join(axes)}], got [B, {got}]{hint}"
        )
    space = geometry.out_space(in_shape[1:])
    if min(space) < 1:
        raise ValueError(
            f"'{name}' ({kind}) expects at least one position of its kernel {geometry.kernel} "
            f"(dilation {geometry.dilation}, padding {geometry.padding}), got [B, {got}]; "
            "write a larger input_shape"
        )
    return Affine(
        name,
        kind,
        _double(weight, copy),
        None if bias is None else _double(bias, copy),
        names[0],
        names[1],
        in_shape,
        (weight.shape[0], *space),
        geometry,
    )


def _double(tensor: Tensor, copy: bool) -> Tensor:
    return tensor.detach().to(torch.float64, copy=copy)
