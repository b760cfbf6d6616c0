r"""Up to which batch size a layer's own gradient determines its input, before any is seen.

Two counts, of the layer's sizes alone:

* *gradient constraints alone*: ``K x = g`` has F T_r equations a channel for the U_r pixels of
  residue class r, and K full column rank only if ``B U_r ≤ F T_r`` for every r.  k has to be known.
* *shifts*: nothing has to be known.  For a kernel 3×3 with padding 1 they ask for ``B HW ≤ F`` and
  ``B HW (1 + 1/H) < 6 C``, or the same with F and C exchanged; for any other see
  :meth:`rgap.separation.shifts.arrangement.Arrangement.largest_batch`.

In a network whose maps shrink and widen both grow with depth: a table of them says from which layer
up a batch gives its features away.
"""

from __future__ import annotations

from math import prod

from rgap.analysis.calls.uses import Use
from rgap.analysis.closed_forms.residue_classes import axis, crossed
from rgap.network.geometry import Geometry
from rgap.separation.shifts.arrangement import arrangements

__all__ = ["alone", "by_gradient", "by_shifts"]


def alone(use: Use, head: bool = False) -> tuple[int | None, int | None]:
    """B up to which gradient constraints alone, and shifts alone, can determine a layer's input.

    Args:
        use: of the layer in a forward.
        head: True for a last layer whose cotangents sum to zero over classes.

    Returns:
        Both, None where they are not counted: behind a border that repeats values of its input, and
        for shifts of layers that have none.
    """
    assert use.weight is not None
    if use.shown:
        return None, None
    if use.geometry is None:
        return (use.weight.shape[0] - head) // max(1, use.repeats), None
    filters, space, channels = use.weight.shape[0], tuple(use.inputs.shape[2:]), use.inputs.shape[1]
    if use.geometry.border != "zeros":
        return None, None
    told = by_shifts(use.geometry, filters, channels, space)
    return by_gradient(use.geometry, filters, space), told


def by_gradient(geometry: Geometry, filters: int, space: tuple[int, ...]) -> int:
    """Largest B with ``B U_r ≤ F T_r`` in every residue class; 0 where a pixel is read by no tap.

    Args:
        geometry: of a convolution.
        filters: F, of all groups.
        space: sizes of its input.

    >>> by_gradient(Geometry.of((3, 3), padding=1), 512, (4, 4))
    288
    """
    sizes = zip(space, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation,
                strict=True)  # fmt: skip
    classes = crossed([axis(*one).classes for one in sizes])
    if sum(pixels for _, pixels in classes) < prod(space):
        return 0
    own = filters // geometry.groups
    return min(int(own * taps // pixels) for taps, pixels in classes)


def by_shifts(
    geometry: Geometry, filters: int, channels: int, space: tuple[int, ...]
) -> int | None:
    """Largest B at which shifts of the kernel tell all positions of all samples apart.

    Args:
        geometry: of a convolution.
        filters: F.
        channels: C.
        space: sizes of its input.

    Returns:
        The largest of all arrangements of the taps, 0 where none bears a sample; None for groups,
        and for kernels that no step of the output moves by a tap.

    >>> by_shifts(Geometry.of((3, 3), padding=1), 512, 512, (4, 4))
    32
    """
    if geometry.groups != 1:
        return None
    most = [one.largest_batch(filters, channels) for one in arrangements(geometry, space)]
    return max(0, *most) if most else None
