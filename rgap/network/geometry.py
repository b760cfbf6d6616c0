"""Where the taps of a convolution fall, in any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

Padding = str | int | tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Where the taps of an N-d convolution fall; one entry per spatial dimension.

    Attributes:
        kernel: kernel size.
        stride: step between outputs.
        padding: places added before and after the picture, ``(low, high)`` per dimension.
        dilation: step between taps.
        groups: number of independent channel groups.
        border: what the padding shows: "zeros", or the picture again, "reflect", "replicate" or
            "circular", as ``padding_mode`` of ``torch.nn.Conv2d``.

    >>> Geometry((3,), (2,), ((1, 1),), (1,), 1).out_space((8,))
    (4,)
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    border: str = "zeros"

    @classmethod
    def of(
        cls,
        kernel: tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        border: str = "zeros",
    ) -> Geometry:
        """From options as ``torch.nn.Conv2d`` has them, ``border`` its ``padding_mode``.

        >>> Geometry.of((3, 3), padding=1).padding
        ((1, 1), (1, 1))
        """
        dims = len(kernel)
        steps = per_dimension(dilation, dims)
        sides = sides_of(padding, kernel, steps)
        shows = border if any(map(any, sides)) else "zeros"
        return cls(kernel, per_dimension(stride, dims), sides, steps, groups, shows)

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
        lines = []
        for axis, (n, out) in enumerate(zip(space, self.out_space(space), strict=True)):
            shown = self.shown(axis, n)
            s, d = self.stride[axis], self.dilation[axis]
            read = {shown[s * o + d * tap] for o in range(out) for tap in range(self.kernel[axis])}
            lines.append(tuple(position in read for position in range(n)))
        return tuple(lines)

    def shown(self, axis: int, size: int) -> list[int]:
        """Position of the picture that each position of the padded one shows; −1: a zero.

        >>> Geometry((3,), (1,), ((2, 1),), (1,), 1, "reflect").shown(0, 4)
        [2, 1, 0, 1, 2, 3, 2]
        """
        low, high = self.padding[axis]
        return [_shown(place, size, self.border) for place in range(-low, size + high)]

    def symmetric(self) -> bool:
        """True if every dimension is padded with as many zeros on both sides."""
        return self.border == "zeros" and all(low == high for low, high in self.padding)

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
    padding: Padding, kernel: tuple[int, ...], dilation: tuple[int, ...]
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


def _shown(place: int, size: int, border: str) -> int:
    if 0 <= place < size:
        return place
    if border == "zeros":
        return -1
    if border == "replicate":
        return min(max(place, 0), size - 1)
    if border == "circular":
        return place % size
    return -place if place < 0 else 2 * (size - 1) - place
