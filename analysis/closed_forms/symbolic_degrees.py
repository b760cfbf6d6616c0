"""Degrees for the unknowns of a layer, drawn so that one term of a minor stands out."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from rgap.analysis.closed_forms.matching import SCALE
from rgap.analysis.closed_forms.pattern import Ints, Reads

__all__ = ["STYLES", "degrees"]

# (concave in the position, lift of the row left out, lift of the cotangents over the weights)
STYLES: tuple[tuple[bool, float, float], ...] = (
    (True, 0.0, 0.0),
    (True, 8.0, 0.0),
    (True, 0.0, -5.0),
    (True, 8.0, -5.0),
    (True, 0.0, 5.0),
    (False, 0.0, 0.0),
    (True, 8.0, 5.0),
    (False, 8.0, 0.0),
    (True, 2.0, 0.0),
    (False, 30.0, 0.0),
    (False, 300.0, 0.0),
    (False, 2.0, 0.0),
)


def degrees(
    found: Reads,
    size: tuple[int, int, int],
    lead: Ints,
    style: tuple[bool, float, float],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Degree of every unknown: k[b, f, p] first, then w[f, c, t].

    Strictly concave degrees in p and in t make heaviest matchings monotone and so nearly always
    unique, as in the mixed subdivisions of sparse resultants; a lift of w[f, lead(f)] lets the
    weight rows take the pixels of the gradient rows that were left out.

    Args:
        found: reads of the layer.
        size: batch, filters and channels of the group.
        lead: pair c·taps + t per filter, of ``left_out``.
        style: one of :data:`STYLES`.
        rng: draws them.
    """
    batch, filters, channels = size
    concave, lift, over = style
    if concave:
        cotangents = _concave(found.positions, batch * filters, rng) + over
        weights = _concave(found.taps, filters * channels, rng)
    else:
        cotangents = rng.normal(size=(batch * filters, prod(found.positions)))
        weights = rng.normal(size=(filters * channels, prod(found.taps)))
    weights.reshape(filters, -1)[np.arange(filters), lead] += lift
    joined = np.concatenate([cotangents.ravel(), weights.ravel()])
    joined += 1e-3 * rng.normal(size=joined.shape)
    joined -= joined.mean()
    scaled: NDArray[np.int64] = np.rint(joined * (SCALE / np.abs(joined).max())).astype(np.int64)
    return scaled


def _concave(size: tuple[int, ...], count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """``count`` random concave quadratics on a grid, [count, points]."""
    points = np.stack(np.unravel_index(np.arange(prod(size)), size), axis=1).astype(np.float64)
    dims = len(size)
    mixed = rng.normal(size=(count, dims, dims))
    form = mixed @ mixed.transpose(0, 2, 1) + 0.1 * np.eye(dims)
    steep = 2.0 ** rng.uniform(-2, 2, size=count) / max(size) ** 2
    form *= (steep / np.trace(form, axis1=1, axis2=2))[:, None, None]
    away = points - rng.uniform(-0.5, 1.5, size=(count, 1, dims)) * np.array(size)
    values: NDArray[np.float64] = -np.einsum("npd,nde,npe->np", away, form, away)
    return values + rng.normal(size=(count, 1))
