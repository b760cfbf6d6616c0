"""Priors by name: a function each, from the shape and the range of the data to a penalty on them.

>>> from rgap.priors import PRIORS
>>> list(PRIORS)
['natural', 'patches', 'tv', 'anisotropic', 'squares']
>>> PRIORS["squares"]((3, 32, 32), (0.0, 1.0))
Squares(weight=1.0, centre=0.5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rgap.plugins import Registry
from rgap.priors.patches import photographic, shipped
from rgap.solvers.priors import Prior, Squares, TotalVariation, natural

__all__ = ["PRIORS", "prior_of"]

Range = tuple[float, float]
Made = Callable[[Sequence[int], Range], Prior]

PRIORS: Registry[Made] = Registry(
    "rgap.priors", "prior", "a function of (input_shape, value_range)", callable
)
"""Every prior by its name, those of installed distributions among them."""


def prior_of(prior: Prior | str, shape: Sequence[int], value_range: Range | None) -> Prior:
    """The prior that a name stands for; a prior as it is.

    Args:
        prior: itself, or a name of :data:`PRIORS`.
        shape: of one sample.
        value_range: of the data in the units that the prior is taken of; None for (0, 1).

    Raises:
        TypeError: neither a name nor a prior.
        ValueError: no prior has that name, or what a distribution offers under it does not load.
    """
    if not isinstance(prior, str):
        if not isinstance(prior, Prior):
            raise TypeError(
                f"prior: expected one of {', '.join(map(repr, PRIORS))} or an object with value, "
                f"gradient, curvature and smoothed, got {prior!r}; write prior='natural'"
            )
        return prior
    return PRIORS.chosen("prior", prior)(tuple(shape), value_range or (0.0, 1.0))


def _natural(shape: Sequence[int], value_range: Range) -> Prior:
    """That of pictures where entries have neighbours, else the distance from the middle."""
    width = value_range[1] - value_range[0]
    if len(shape) > 1:
        return natural(shape[0], width)
    return Squares(width**-2, sum(value_range) / 2)


def _patches(shape: Sequence[int], value_range: Range) -> Prior:
    """That of differences and patches, of pictures."""
    if len(shape) != 3:
        raise ValueError(
            f"the prior 'patches' is of pictures, [channels, height, width], got samples of "
            f"{list(shape)}; write prior='natural'"
        )
    if min(shape[1:]) < shipped().side:
        raise ValueError(
            f"the prior 'patches' is of pictures of at least {shipped().side} pixels a side, got "
            f"samples of {list(shape)}; write prior='natural'"
        )
    return photographic(shape[0], value_range[1] - value_range[0])


PRIORS.register("natural", _natural)
PRIORS.register("patches", _patches)
PRIORS.register("tv", lambda shape, value_range: TotalVariation())
PRIORS.register("anisotropic", lambda shape, value_range: TotalVariation(isotropic=False))
PRIORS.register("squares", lambda shape, value_range: Squares())
