"""A layer of which only some outputs are read: the same equations on a smaller layer.

Where k is zero whatever the data, an output gives no equation: the class token is read and the
other tokens are not, a strided convolution skips the last column, a slice takes every other row.
The gradient constraints have zeros there and z is not known.  If what is read is a box of outputs,
or every s-th of one, the equations are those of a layer on the part of the input that the box
reads; the other unknowns stay open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rgap.analysis.calls.uses import Use

__all__ = ["Reached", "reached"]


@dataclass(frozen=True)
class Reached:
    """The part of a layer that the loss reads.

    Attributes:
        sizes: of a layer with the same equations, for ``layer_form``; None if nothing is read.
        places: of one sample, at which a fully connected layer is read; pictures of one sample
            that a convolution takes.
        plain: False if the outputs that are read are no such part: ``sizes`` are those of the
            smallest part that holds them, and its ranks are bounds.
        outputs: of one sample that are read, over all places.
    """

    sizes: dict[str, Any] | None
    places: int
    plain: bool
    outputs: int

    @property
    def rows(self) -> int:
        """Outputs of one sample (at all places) of the layer that ``sizes`` describes."""
        return self.outputs


def reached(use: Use, read: Tensor) -> Reached:
    """The part of a layer behind the outputs that are read.

    Args:
        use: of the weight.
        read: True where an output is read, :meth:`Use.read_outputs`.
    """
    mask = read.cpu().numpy()
    sizes, count = use.sizes(), int(mask.sum())
    if not mask.any():
        return Reached(None, 0, True, 0)
    if use.kind == "linear":
        rows = mask.reshape(-1, mask.shape[-1])
        rows = rows[rows.any(1)]
        features = int(rows.any(0).sum())
        plain = bool((rows == rows[0]).all())
        return Reached(sizes | {"out_features": features}, len(rows), plain, count)
    pictures = len(mask)
    plain = bool((mask == mask[:1]).all())
    mask = np.any(mask, axis=0)
    filters = mask.reshape(len(mask), -1).any(1)
    boxes: NDArray[np.bool_] = np.any(mask, axis=0)
    plain = plain and bool((mask[filters] == boxes).all())
    groups = sizes["groups"]
    per_group = filters.reshape(groups, -1).sum(1)
    if (per_group == per_group[0]).all():
        sizes["out_channels"] = int(filters.sum())
    else:
        plain = False
        sizes["out_channels"] = groups * int(per_group.max())
    if sizes["padding_mode"] != "zeros":  # a part of it would show what is outside of it
        return Reached(sizes, pictures, plain and bool(boxes.all()), count)
    for dim in range(boxes.ndim):
        others = tuple(d for d in range(boxes.ndim) if d != dim)
        at = np.flatnonzero(np.any(boxes, axis=others))
        part, exact = _cropped(sizes, dim, at)
        sizes, plain = part, plain and exact
    inside = np.ones((), dtype=bool)
    for dim in range(boxes.ndim):
        others = tuple(d for d in range(boxes.ndim) if d != dim)
        inside = np.multiply.outer(inside, np.any(boxes, axis=others))
    return Reached(sizes, pictures, plain and bool((inside == boxes).all()), count)


def _cropped(sizes: dict[str, Any], dim: int, at: Any) -> tuple[dict[str, Any], bool]:
    """Sizes for the positions ``at`` along one dimension; False if they are not evenly spaced."""
    first, last, plain = int(at[0]), int(at[-1]), True
    step = int(at[1] - at[0]) if len(at) > 1 else 1
    if len(at) > 1 and not bool((np.diff(at) == step).all()):
        step, plain = 1, False
    if len(at) == 1:
        step = 1
    size, stride = sizes["input_size"][dim], sizes["stride"][dim]
    low, _ = sizes["padding"][dim]
    start = stride * first - low
    end = stride * last - low + sizes["dilation"][dim] * (sizes["kernel_size"][dim] - 1)
    begin, stop = max(0, start), min(size - 1, end)
    if stop < begin:
        return sizes, False
    changed = {
        "input_size": stop - begin + 1,
        "stride": stride * step,
        "padding": (begin - start, end - stop),
    }
    return sizes | {k: _put(sizes[k], dim, v) for k, v in changed.items()}, plain


def _put(values: tuple[Any, ...], dim: int, value: Any) -> tuple[Any, ...]:
    return (*values[:dim], value, *values[dim + 1 :])
