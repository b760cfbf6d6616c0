"""Where the taps of a convolution fall, in any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Geometry:
    """Where the taps of an N-d convolution fall; one entry per spatial dimension.

    Attributes:
        kernel: kernel size.
        stride: step between outputs.
        padding: zeros added before and after the picture, ``(low, high)`` per dimension.
        dilation: step between taps.
        groups: number of independent channel groups.

    >>> Geometry((3,), (2,), ((1, 1),), (1,), 1).out_space((8,))
    (4,)
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def out_space(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Output size ⌊(n + low + high − d(k − 1) − 1)/s⌋ + 1 per dimension; < 1: does not fit."""
        return tuple(
            (n + low + high - d * (k - 1) - 1) // s + 1
            for n, (low, high), d, k, s in zip(
                space, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    def leftover(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Padded positions at the far end that no tap reads, because the stride skips them."""
        return tuple(
            (n + low + high - d * (k - 1) - 1) % s
            for n, (low, high), d, k, s in zip(
                space, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    def reads(self, space: tuple[int, ...]) -> tuple[tuple[bool, ...], ...]:
        """Per dimension, whether some tap of some output falls on the position.

        A position of the picture is read where every dimension says so.  Strides leave out the
        far end, strides and dilations above the kernel size what lies between taps.

        >>> Geometry((2,), (3,), ((0, 0),), (1,), 1).reads((6,))
        ((True, True, False, True, True, False),)
        """
        found = []
        for n, out, (low, _), d, k, s in zip(
            space,
            self.out_space(space),
            self.padding,
            self.dilation,
            self.kernel,
            self.stride,
            strict=True,
        ):
            read = {s * o + d * tap - low for o in range(out) for tap in range(k)}
            found.append(tuple(position in read for position in range(n)))
        return tuple(found)

    def symmetric(self) -> bool:
        """True if every dimension is padded alike on both sides."""
        return all(low == high for low, high in self.padding)

    def pad_list(self, sign: int = 1) -> list[int]:
        """Padding in the order of ``torch.nn.functional.pad``: last dimension first."""
        return [sign * side for pair in reversed(self.padding) for side in pair]

    def bordered(self, sides: Sequence[int]) -> Geometry:
        """The geometry on what a border was put around, ``sides`` as ``pad_list`` has them.

        >>> Geometry((3,), (1,), ((1, 1),), (1,), 1).bordered((2, 0)).padding
        ((3, 1),)
        """
        wide = (*sides, *(0,) * (2 * len(self.kernel) - len(sides)))
        pairs = reversed(list(zip(wide[::2], wide[1::2], strict=True)))
        padding = tuple(
            (low + before, high + after)
            for (low, high), (before, after) in zip(self.padding, pairs, strict=True)
        )
        return replace(self, padding=padding)


def per_dimension(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """``3`` → ``(3, 3)``, as PyTorch reads sizes.

    >>> per_dimension(3, 2)
    (3, 3)
    """
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


def sides_of(
    padding: str | int | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """PyTorch's ``padding`` as ``(low, high)`` per dimension.

    >>> sides_of("same", (4,), (1,)), sides_of(2, (3,), (1,))
    (((1, 2),), ((2, 2),))
    """
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if isinstance(padding, str):  # 'same': PyTorch puts the odd zero at the far end
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((span // 2, span - span // 2) for span in spans)
    return tuple((p, p) for p in per_dimension(padding, len(kernel)))
