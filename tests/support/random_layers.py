"""Five hundred random layers, the same ones at every run: what rank formulas are judged on.

Fully connected layers and convolutions of one, two and three dimensions, with every option that a
layer has: strides (larger than the kernel too), symmetric and asymmetric padding (as wide as the
kernel too), dilation, groups, depthwise and 1×1 kernels, kernels as large as their input, up to
four samples, and units that are off: by chance, by the sign of a pre-activation, whole filters,
whole samples.  Layers stay below ``LARGEST`` unknowns, so a dense reference takes a second.

Every layer has its own generator, made from the seed and its index: the first 60 of 500 are the 60
that a test takes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rgap.network.affine import Affine, Geometry, convolution, linear

LARGEST = 1500  # unknowns of a layer with its batch
ROWS = 6000  # equations of a layer with its batch
Draw = Callable[[random.Random, torch.Generator], Affine]


@dataclass(frozen=True)
class RandomLayer:
    """One layer with its batch size and the units that are on.

    Attributes:
        index: place in the sample.
        affine: the layer, with standard normal weights and no bias.
        batch: number of samples B.
        active: True where a unit is on, [B, *out_shape].
        title: what it is, in one line.
    """

    index: int
    affine: Affine
    batch: int
    active: Tensor
    title: str


def layers(count: int = 500, seed: int = 0) -> list[RandomLayer]:
    """The first ``count`` layers of the sample.

    >>> [layer.batch for layer in layers(3)] == [layer.batch for layer in layers(5)][:3]
    True
    """
    return [_layer(index, seed) for index in range(count)]


def true_joint_rank(layer: RandomLayer) -> tuple[int, int, int]:
    """Generic ranks (gradient block, weight block, both), modulo two random primes."""
    from rgap.analysis.generic_rank.modular import modular_ranks

    found = modular_ranks(layer.affine, layer.batch, layer.active, seed=layer.index)
    return found.gradient, found.weight, found.joint


def _layer(index: int, seed: int) -> RandomLayer:
    rng = random.Random(f"{seed}/{index}")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    draw, mask = KINDS[index % len(KINDS)]
    while True:
        affine = draw(rng, generator)
        batch = rng.randint(1, 4)
        unknowns = batch * prod(affine.in_shape)
        rows = prod(affine.weight.shape) + batch * prod(affine.out_shape)
        if unknowns <= LARGEST and rows <= ROWS:
            break
    active, what = MASKS[mask](affine, batch, rng, generator)
    return RandomLayer(index, affine, batch, active, f"{_words(affine)} B={batch}{what}")


def _linear(rng: random.Random, generator: torch.Generator) -> Affine:
    width, out = rng.randint(1, 60), rng.randint(1, 60)
    return linear("fc", _normal((out, width), generator), None, ("fc.weight", None), (width,))


def _general(
    dims: int,
    *,
    kernels: tuple[int, int] = (1, 5),
    strides: tuple[int, int] = (1, 3),
    dilations: tuple[int, int] = (1, 1),
    groups: tuple[int, ...] = (1,),
    padding: str = "within",
    kernel_is_input: bool = False,
    depthwise: bool = False,
) -> Draw:
    """A sampler of convolutions in ``dims`` dimensions; ranges include both ends."""

    def draw(rng: random.Random, generator: torch.Generator) -> Affine:
        while True:
            kernel = tuple(rng.randint(*kernels) for _ in range(dims))
            if rng.random() < 0.7:  # as networks have them: the same along every axis
                kernel = kernel[:1] * dims
            stride = tuple(rng.randint(*strides) for _ in range(dims))
            if rng.random() < 0.7:
                stride = stride[:1] * dims
            dilation = (rng.randint(*dilations),) * dims
            reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
            space = tuple(rng.randint(1, (40, 12, 6)[dims - 1]) for _ in range(dims))
            if kernel_is_input:
                space = reach
            sides = _sides(padding, reach, rng)
            wide = tuple(n + a + b for n, (a, b) in zip(space, sides, strict=True))
            if any(n < r for n, r in zip(wide, reach, strict=True)):
                continue
            blocks = rng.choice(groups)
            inner = rng.randint(1, 6 if blocks == 1 else 3)
            outer = rng.randint(1, 10 if blocks == 1 else 4)
            if depthwise:
                blocks, inner, outer = rng.randint(2, 8), 1, rng.randint(1, 3)
            weight = _normal((blocks * outer, inner, *kernel), generator)
            affine = convolution(
                "conv",
                weight,
                None,
                ("conv.weight", None),
                (blocks * inner, *wide),
                Geometry.of(kernel, stride=stride, dilation=dilation, groups=blocks),
            )
            flat = tuple(side for pair in reversed(sides) for side in pair)
            return affine.bordered(flat) if any(flat) else affine

    return draw


def _sides(how: str, reach: tuple[int, ...], rng: random.Random) -> tuple[tuple[int, int], ...]:
    if how == "none":
        return tuple((0, 0) for _ in reach)
    if how == "same":  # even reach: the odd zero at the far end
        return tuple(((r - 1) // 2, r // 2) for r in reach)
    if how == "uneven":
        return tuple((rng.randint(0, r // 2), rng.randint(0, r // 2)) for r in reach)
    if how == "wide":  # some outputs see nothing but padding
        return tuple((r, r) for r in reach)
    return tuple((p, p) for p in (rng.randint(0, r // 2) for r in reach))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _all(affine: Affine, batch: int, *_: object) -> tuple[Tensor, str]:
    return torch.ones(batch, *affine.out_shape, dtype=torch.bool), ""


def _chance(
    affine: Affine, batch: int, rng: random.Random, generator: torch.Generator
) -> tuple[Tensor, str]:
    share = rng.choice((0.2, 0.5, 0.8))
    drawn = torch.rand(batch, *affine.out_shape, generator=generator)
    return drawn < share, f", {share:.0%} of the units on by chance"


def _sign(
    affine: Affine, batch: int, rng: random.Random, generator: torch.Generator
) -> tuple[Tensor, str]:
    return affine.forward(_normal((batch, *affine.in_shape), generator)) > 0, ", ReLU"


def _dead_filter(
    affine: Affine, batch: int, rng: random.Random, generator: torch.Generator
) -> tuple[Tensor, str]:
    active, what = (_all, _sign)[rng.randint(0, 1)](affine, batch, rng, generator)
    active = active.clone()
    active[:, rng.randrange(affine.out_shape[0])] = False
    return active, f"{what}, one filter off"


def _dead_sample(
    affine: Affine, batch: int, rng: random.Random, generator: torch.Generator
) -> tuple[Tensor, str]:
    active, what = (_all, _sign)[rng.randint(0, 1)](affine, batch, rng, generator)
    active = active.clone()
    active[rng.randrange(batch)] = False
    return active, f"{what}, one sample off"


def _words(affine: Affine) -> str:
    geometry = affine.geometry
    if geometry is None:
        return f"linear {affine.in_shape[0]}→{affine.out_shape[0]}"
    size = "×".join(map(str, affine.in_shape[1:]))
    parts = [f"{affine.kind} {affine.in_shape[0]}→{affine.out_shape[0]} on {size}"]
    parts.append("k" + "×".join(map(str, geometry.kernel)))
    parts.append("s" + "×".join(map(str, geometry.stride)))
    if any(side for pair in geometry.padding for side in pair):
        parts.append("p" + "×".join(f"{a}+{b}" for a, b in geometry.padding))
    if any(d > 1 for d in geometry.dilation):
        parts.append("d" + "×".join(map(str, geometry.dilation)))
    if geometry.groups > 1:
        parts.append(f"{geometry.groups} groups")
    return " ".join(parts)


MASKS = {
    "all": _all,
    "chance": _chance,
    "relu": _sign,
    "filter": _dead_filter,
    "sample": _dead_sample,
}

# One round of kinds; the sample goes round after round.
KINDS: tuple[tuple[Draw, str], ...] = (
    (_general(2), "all"),
    (_general(2), "relu"),
    (_general(2, padding="uneven"), "all"),
    (_general(2, dilations=(1, 3)), "all"),
    (_general(2, groups=(2, 3, 4)), "all"),
    (_general(2, groups=(2, 3), dilations=(1, 2)), "relu"),
    (_general(2, depthwise=True), "all"),
    (_general(2, kernels=(1, 1)), "all"),
    (_general(2, kernels=(1, 3), kernel_is_input=True, padding="none"), "all"),
    (_general(2, kernels=(1, 2), strides=(3, 4)), "all"),
    (_general(2), "filter"),
    (_general(2), "sample"),
    (_general(2), "chance"),
    (_general(2, padding="same", strides=(1, 1)), "all"),
    (_general(2, kernels=(1, 3), padding="wide"), "all"),
    (_general(1, kernels=(1, 7)), "all"),
    (_general(1, kernels=(1, 7), dilations=(1, 3), groups=(1, 2)), "relu"),
    (_general(1, kernels=(1, 5), strides=(1, 6), padding="uneven"), "chance"),
    (_general(3, kernels=(1, 3), strides=(1, 2)), "all"),
    (_general(3, kernels=(1, 3), strides=(1, 2), padding="uneven"), "relu"),
    (_general(3, kernels=(2, 3), padding="same", strides=(1, 1), groups=(1, 2)), "all"),
    (_linear, "all"),
    (_linear, "relu"),
    (_linear, "filter"),
    (_linear, "sample"),
)
