"""Units in doubt without whose filters the others leave a value open.

A filter with a unit that may be on or off says nothing until it is settled, and where equations
are hardly more than unknowns the other filters may not determine the value below.  With all of
them they do, and contradict each other unless the units are as they were: of all patterns of on
and off one agrees.  Where several do, equations are too few to tell, and nothing is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from rgap.limits import OFF, OFF_LEAST, SURELY_ON
from rgap.precision import Estimate, smoothed
from rgap.recursion.readers import Reader

__all__ = ["agreeing", "likely", "shares_of"]

MOST = 4  # units that are asked for: 2^4 solutions


def shares_of(known: Estimate) -> tuple[Tensor, float]:
    """A rectifier's output in standard errors, and how far above 0 those that are off may lie."""
    share = known.value / smoothed(known).clamp_min(1e-300)
    return share, max(OFF_LEAST, float(-share.min()))  # of those that are off, half lie below 0


def likely(shares: Tensor, off: float) -> Iterator[Tensor]:
    """Which units are on, as bool [n], the likeliest first.

    >>> [p.tolist() for p in likely(torch.tensor([9.0, 2.0]), 1.0)][:2]
    [[True, False], [True, True]]

    Args:
        shares: what the rectifier gives there, in standard errors, [n].
        off: how many of these those that are off may lie above 0.
    """
    beside = (shares - (OFF + SURELY_ON) * off / 2.0).tolist()
    patterns = product((False, True), repeat=len(beside))

    def unlikely(pattern: Sequence[bool]) -> float:
        pairs = zip(pattern, beside, strict=True)
        return sum((abs(gap) for on, gap in pairs if on != (gap > 0)), 0.0)

    for pattern in sorted(patterns, key=unlikely):
        yield torch.tensor(pattern)


def agreeing(
    readers: Sequence[Reader],
    places: Sequence[int],
    shares: Mapping[int, tuple[Tensor, float]],
    solved: Callable[[Sequence[Reader]], object],
) -> dict[int, Tensor]:
    """By place of a rectifier, which of its units in doubt are on, as 0 and 1; empty if not told.

    Args:
        readers: of the value, with their units in doubt.
        places: of the rectifier that each of them has its doubts from; -1 for none.
        shares: by place, what the rectifier gives in standard errors, and of those that are off.
        solved: the value from readers without doubts: an estimate where all rows agree.
    """
    unsure = {
        place: reader.unsure
        for place, reader in zip(places, readers, strict=True)
        if place in shares and reader.unsure is not None
    }
    counts = [int(units.sum()) for units in unsure.values()]
    if not 0 < sum(counts) <= MOST:
        return {}
    given = torch.cat([shares[p][0].reshape(u.shape)[u] for p, u in unsure.items()])
    told = list[dict[int, Tensor]]()
    for pattern in likely(given, max(shares[place][1] for place in unsure)):
        parts = torch.split(pattern.to(given), counts)
        on = dict(zip(unsure, parts, strict=True))
        tried = [
            _with(reader, on[place]) if place in on else reader
            for place, reader in zip(places, readers, strict=True)
        ]
        if isinstance(solved(tried), Estimate):
            told.append(on)
        if len(told) > 1:
            return {}
    return told[0] if told else {}


def _with(reader: Reader, on: Tensor) -> Reader:
    """Without doubts: 0 where a unit is off."""
    assert reader.unsure is not None
    passes = torch.ones_like(reader.k.value)
    passes[reader.unsure] = on
    k = Estimate(reader.k.value * passes, reader.k.error * passes)
    return replace(reader, k=k, unsure=None)
