"""What would give a layer the equations that it lacks, counted: fewer samples, more channels.

Every suggestion is a recount of the changed layer at random weights and cotangents, not a rule of
thumb: the rank of its gradient and weight constraints together.  For large layers the rank of the
gradient constraints is measured and the rest is counted: ``joint ≤ rank K + rank W − g (F/g)²`` for
F filters in g groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from rgap.analysis.calls.layers import calls_of, sizes_of
from rgap.constraints import gradient_constraint
from rgap.constraints.ranks import stage_joint_rank, weight_row_spaces
from rgap.network.affine import Affine, Geometry, convolution, linear

MEASURED = 1024  # inputs of a layer up to which its joint rank is measured
LARGEST = 65536  # up to which it is counted
MOST = 8  # times the channels that are there
__all__ = ["remedies"]


def remedies(
    model: nn.Module,
    input_shape: Sequence[int],
    batch: int,
    layer: str,
    loss: str = "cross_entropy",
) -> tuple[str, ...]:
    """Changes after which the layer's own equations determine its input, the smallest of a kind.

    Args:
        model: the network; only the sizes of its layers are used.
        input_shape: of one sample.
        batch: B at which equations are missing.
        layer: module path.
        loss: of the client; under "cross_entropy" the cotangents of the last layer add up to 0.

    Returns:
        One clause a change: smaller batch, smaller stride, more output channels or features.
        Above 1024 inputs they are counted, a bound on the rank, and say "at least".  Empty where
        the layer is no plain convolution or linear layer, is called more than once, where its
        equations suffice already by this count, or where no change of that kind is enough.

    >>> import rgap
    >>> net = rgap.models.lenet(channels=4, input_shape=(3, 16, 16), seed=0)
    >>> remedies(net, (3, 16, 16), 1, "conv1")
    ('stride 1 (now 2×2)', '6 output channels (now 4)')
    """
    try:
        calls = calls_of(model, tuple(input_shape))
        mine = [call for call in calls if call.name == layer]
        if len(mine) != 1 or prod(mine[0].in_shape) > LARGEST:
            return ()
        head = loss == "cross_entropy" and mine[0] is calls[-1]
        kind, sizes, repeats = sizes_of(mine[0], head=False)
    except ValueError:
        return ()
    if repeats != 1 or not (kind == "linear" or kind.startswith("conv")):
        return ()

    def determined(changed: dict[str, Any], samples: int = batch) -> bool:
        return _nullity(kind, changed, samples, head) == 0

    if determined(sizes):
        return ()
    most = "" if prod(mine[0].in_shape) <= MEASURED else " at most"
    least = "" if prod(mine[0].in_shape) <= MEASURED else " at least"
    advice = []
    fewer = _largest(batch - 1, lambda b: determined(sizes, b))
    if fewer:
        advice.append(f"a batch of {fewer}{most}")
    if kind.startswith("conv") and prod(sizes["stride"]) > 1:
        old = "×".join(str(n) for n in sizes["stride"])
        if determined(sizes | {"stride": tuple(1 for _ in sizes["stride"])}):
            advice.append(f"stride 1 (now {old})")
    name, word = ("out_features", "output features")
    if kind.startswith("conv"):
        name, word = "out_channels", "output channels"
    now, groups = sizes[name], sizes.get("groups", 1)
    more = _smallest(now // groups, lambda n: determined(sizes | {name: n * groups}))
    if more:
        advice.append(f"{more * groups} {word}{least} (now {now})")
    return tuple(advice)


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest n ≤ most for which a property that ends somewhere holds, 0 if none."""
    if most < 1 or not holds(1):
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _smallest(now: int, holds: Callable[[int], bool]) -> int:
    """The smallest n > now for which a property that begins somewhere holds, 0 up to MOST·now."""
    low, high = now, now + 1
    while not holds(high):
        low = high
        if high >= MOST * now:
            return 0
        high = min(2 * high, MOST * now)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _nullity(kind: str, sizes: dict[str, Any], samples: int, head: bool) -> int:
    affine = _random(kind, sizes)
    generator = torch.Generator().manual_seed(1)
    shape = (samples, *affine.out_shape)
    cotangents = torch.randn(shape, generator=generator, dtype=torch.float64)
    if head:
        cotangents = cotangents - cotangents.mean(1, keepdim=True)
    gradient = gradient_constraint(affine, cotangents)
    size = prod(affine.in_shape)
    if size <= MEASURED:
        spaces = weight_row_spaces(affine, torch.ones_like(cotangents, dtype=torch.bool))
        return stage_joint_rank(affine, gradient, spaces, cotangent=cotangents).nullity
    groups = 1 if affine.geometry is None else affine.geometry.groups
    shared = affine.out_shape[0] ** 2 // groups
    weight = samples * min(size, prod(affine.out_shape))
    return max(
        0, samples * size - max(gradient.rank().rank, gradient.rank().rank + weight - shared)
    )


def _random(kind: str, sizes: dict[str, Any]) -> Affine:
    """The layer at random weights."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind == "linear":
        weight = drawn(sizes["out_features"], sizes["in_features"])
        return linear("", weight, None, ("", None), (sizes["in_features"],))
    channels, groups = sizes["in_channels"], sizes["groups"]
    geometry = Geometry(
        sizes["kernel_size"],
        sizes["stride"],
        sizes["padding"],
        sizes["dilation"],
        groups,
        sizes["padding_mode"],
    )
    return convolution(
        "",
        drawn(sizes["out_channels"], channels // groups, *sizes["kernel_size"]),
        None,
        ("", None),
        (channels, *sizes["input_size"]),
        geometry,
    )
