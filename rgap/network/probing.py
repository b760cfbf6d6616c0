"""What a function does to the places and samples of a batch, found by trying it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rgap.network.pooling import LinearMap
from rgap.network.reshape import Op, Pad, Rearrange, Reshape

Shape = tuple[int, ...]

PROBE = 7  # batch size of every trial: samples that mix show, and x[:3] is not the whole batch


class Unsupported(Exception):  # noqa: N818  (a signal inside the package, never seen by users)
    """A layer that no chain can hold; ``reason`` says why in plain words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnreadyError(ValueError):
    """A module draws random numbers or mixes the batch because it is in train mode.

    Attributes:
        state: which one, and what it does.
    """

    def __init__(self, state: str, instead: str) -> None:
        super().__init__(f"{state}; write {instead}")
        self.state = state


def rearrangement(
    function: Callable[[Tensor], Tensor], name: str, kind: str, in_shape: Shape
) -> Op | None:
    """The step that moves values without changing them, found by moving their indices.

    Raises:
        Unsupported: if the samples do not stay apart.
    """
    size = torch.Size(in_shape).numel()
    index = torch.arange(size, dtype=torch.float64)
    probe = torch.stack([index + size * sample for sample in range(PROBE)]).reshape(
        PROBE, *in_shape
    )
    out = fitting(function, name, kind, in_shape)(probe)
    apart = out.ndim >= 1 and out.shape[0] == PROBE
    if not apart or any(not torch.equal(out[i], out[0] + size * i) for i in range(1, PROBE)):
        raise Unsupported(
            f"{kind} of [B, {', '.join(map(str, in_shape))}] mixes the batch dimension with others"
        )
    places = out[0].long()
    if torch.equal(places.flatten(), torch.arange(size)):
        same = tuple(places.shape) == in_shape
        return None if same else Reshape(name, kind, in_shape, tuple(places.shape))
    return Rearrange(name, kind, in_shape, places)


def moves_only(function: Callable[[Tensor], Tensor], in_shape: Shape) -> bool:
    """True if every output of a pool is one input, whatever these are: one entry a window.

    The largest of several entries turns into the smallest where their signs are turned, and a mean
    of several distinct ones is none of them.

    >>> import torch
    >>> pools = torch.nn.AdaptiveMaxPool1d(1), torch.nn.AvgPool1d(1, stride=2)
    >>> moves_only(pools[0], (3, 1)), moves_only(pools[0], (3, 2)), moves_only(pools[1], (3, 4))
    (True, False, True)
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, *in_shape, dtype=torch.float64, generator=generator)
    out = function(probe)
    return torch.equal(function(-probe), -out) and bool(torch.isin(out, probe).all())


def repeated(name: str, in_shape: Shape, sides: tuple[int, ...], mode: str) -> Op | None:
    """A border that shows the picture again; arguments as for ``torch.nn.functional.pad``."""
    step = rearrangement(partial(F.pad, pad=sides, mode=mode), name, "pad", in_shape)
    if isinstance(step, Rearrange):
        step.border, step.sides = mode, sides
    return step


def padded(name: str, in_shape: Shape, sides: tuple[int, ...], value: float) -> Op:
    """A constant border; ``sides`` as for ``torch.nn.functional.pad``."""
    if len(sides) > 2 * len(in_shape):
        raise Unsupported("pad along the batch dimension")
    piece = Pad(name, in_shape, sides, value)
    if min(piece.out_shape) < 1:
        raise ValueError(
            f"'{name}' (pad) cuts [B, {', '.join(map(str, in_shape))}] down to nothing; write a "
            "larger input_shape"
        )
    return piece


def linear_function(
    function: Callable[[Tensor], Tensor], name: str, kind: str, in_shape: Shape
) -> Op | None:
    """A function that is linear in every sample, such as a mean over positions.

    Raises:
        Unsupported: if the samples do not stay apart.
    """
    size = torch.Size(in_shape).numel()
    probe = torch.arange(PROBE * size, dtype=torch.float64).square().reshape(PROBE, *in_shape)
    out = fitting(function, name, kind, in_shape)(probe)
    if out.ndim < 1 or out.shape[0] != PROBE or not torch.allclose(function(probe[1:2]), out[1:2]):
        raise Unsupported(f"{kind} mixes the samples of the batch")
    if moves_only(function, in_shape):
        return rearrangement(function, name, kind, in_shape)
    return LinearMap(name, kind, in_shape, function)


def fitting(
    function: Callable[[Tensor], Tensor], name: str, kind: str, in_shape: Shape
) -> Callable[[Tensor], Tensor]:
    """``function`` if inputs ``[B, *in_shape]`` fit it, else a ValueError that names the layer."""
    try:
        function(torch.zeros(PROBE, *in_shape, dtype=torch.float64))
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(
            f"'{name}' ({kind}) does not accept [B, {', '.join(map(str, in_shape))}]: "
            f"{str(error).splitlines()[0]}; write the input_shape the model was built for"
        ) from error
    return function
