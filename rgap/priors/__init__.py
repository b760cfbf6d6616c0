"""Priors by name: a function each, from the shape and the range of the data to a penalty on them.

>>> from rgap.priors import PRIORS
>>> list(PRIORS)
['natural', 'patches', 'denoiser', 'tv', 'anisotropic', 'squares']
>>> PRIORS["squares"]((3, 32, 32), (0.0, 1.0))
Squares(weight=1.0, centre=0.5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import nn

from rgap.machine import memory
from rgap.plugins import Registry
from rgap.priors import denoiser, patches
from rgap.priors.drawn import Drawn
from rgap.priors.generator import Generator
from rgap.solvers.priors import Prior, Squares, Sum, TotalVariation, cold, natural

__all__ = ["PRIORS", "Drawn", "Generator", "Likely", "identity", "named", "prior_of", "require"]

Range = tuple[float, float]
Made = Callable[[Sequence[int], Range], Prior]
Likely = Prior | str | nn.Module | Generator
"""What a caller may take for likely: a prior, its name, or a generator."""
SPREAD = 0.05  # of data around what a generator draws, in widths of the range

PRIORS: Registry[Made] = Registry(
    "rgap.priors", "prior", "a function of (input_shape, value_range)", callable
)
"""Every prior by its name, those of installed distributions among them."""


def prior_of(
    prior: Likely, shape: Sequence[int], value_range: Range | None, deadline: float = inf
) -> Prior:
    """The prior that a name or a generator stands for; a prior as it is, without its memories.

    Args:
        prior: itself, a name of :data:`PRIORS`, or a generator: the distance from what it draws
            (:class:`~rgap.priors.drawn.Drawn`) with ``natural`` added.
        shape: of one sample.
        value_range: of the data in the units that the prior is taken of; None for (0, 1).
        deadline: of ``time.perf_counter``, after which a prior's own search ends where it is.

    Raises:
        TypeError: none of these.
        ValueError: no prior has that name, or what a distribution offers under it does not load; a
            generator of data of another shape.
    """
    bounds = value_range or (0.0, 1.0)
    if isinstance(prior, str):
        return PRIORS.chosen("prior", prior)(tuple(shape), bounds)
    if isinstance(prior, Prior):
        return cold(prior, deadline)
    if not isinstance(prior, nn.Module | Generator):
        raise TypeError(
            f"prior: expected one of {', '.join(map(repr, PRIORS))}, a generator, or an object "
            f"with value, gradient, curvature and smoothed, got {prior!r}; write prior='natural'"
        )
    own = Generator.of(prior)
    if value_range is None:  # what it draws is taken as it is
        bounds = own.value_range
    like = own.like if own.like.dtype in (torch.float32, torch.float64) else own.like.float()
    drawn = Drawn(own.fitted(shape, value_range, like), SPREAD * (bounds[1] - bounds[0]))
    return Sum([_natural(shape, bounds), drawn.cold(deadline)])


def named(prior: Likely) -> str:
    """What a report calls it.

    >>> named("natural"), named(Squares())
    ("the prior 'natural'", 'a prior of the class Squares')
    """
    if isinstance(prior, str):
        return f"the prior {prior!r}"
    if isinstance(prior, nn.Module | Generator):
        return "the distance from what a generator draws"
    return f"a prior of the class {type(prior).__name__}"


def identity(prior: Prior) -> str:
    """A line that tells a prior from others, for a checkpoint: of a generator its fingerprint.

    >>> identity(Sum([Squares()]))
    'Squares(weight=1.0, centre=0.5)'
    """
    return ", ".join(
        f"drawn({part.generator.identity}, {part.spread}, {part.weight}, {part.seed})"
        if isinstance(part, Drawn)
        else repr(part)
        for part in (prior.parts if isinstance(prior, Sum) else (prior,))
    )


def require(prior: Prior, batch: int, budget: float) -> None:
    """Refuse a prior that needs more memory than there is.

    Args:
        prior: of a search that is about to begin.
        batch: samples.
        budget: bytes.

    Raises:
        OutOfMemory: it needs more.
    """
    for part in prior.parts if isinstance(prior, Sum) else (prior,):
        if isinstance(part, Drawn):
            memory.require("the prior of a generator", part.bytes(batch), budget)


def _natural(shape: Sequence[int], value_range: Range) -> Prior:
    """That of pictures where entries have neighbours, else the distance from the middle."""
    width = value_range[1] - value_range[0]
    if len(shape) > 1:
        return natural(shape[0], width)
    return Squares(width**-2, sum(value_range) / 2)


def _of_pictures(name: str, least: int, made: Callable[[int, float], Prior]) -> Made:
    """One that needs pictures of so many pixels a side; ``made`` takes channels and the width."""

    def of(shape: Sequence[int], value_range: Range) -> Prior:
        if len(shape) != 3:
            raise ValueError(
                f"the prior {name!r} is of pictures, [channels, height, width], got samples of "
                f"{list(shape)}; write prior='natural'"
            )
        if min(shape[1:]) < least:
            raise ValueError(
                f"the prior {name!r} is of pictures of at least {least} pixels a side, got "
                f"samples of {list(shape)}; write prior='natural'"
            )
        return made(shape[0], value_range[1] - value_range[0])

    return of


PRIORS.register("natural", _natural)
PRIORS.register("patches", _of_pictures("patches", patches.LEAST, patches.photographic))
PRIORS.register("denoiser", _of_pictures("denoiser", denoiser.LEAST, denoiser.denoising))
PRIORS.register("tv", lambda shape, value_range: TotalVariation())
PRIORS.register("anisotropic", lambda shape, value_range: TotalVariation(isotropic=False))
PRIORS.register("squares", lambda shape, value_range: Squares())
