"""Minima of lines in the batch size, with the lines that never matter left out."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from typing import Any

import sympy

__all__ = ["tidy"]

Line = tuple[Fraction, Fraction]  # value at B = 0, slope
MOST = 400


def tidy(expression: Any, batch: Any) -> Any:
    """The same function of B = 1, 2, …, as one minimum of the fewest lines.

    Args:
        expression: sums, positive multiples and minima of lines in ``batch``; anything else
            comes back as it is.
        batch: the symbol B.

    >>> b = sympy.Symbol("B", positive=True, integer=True)
    >>> tidy(24 * sympy.Min(72, 64 * b) + 12 * sympy.Min(108, 64 * b) + 576, b)
    Min(3600, 2304*B + 576)
    """
    if not isinstance(batch, sympy.Symbol) or expression.free_symbols != {batch}:
        return expression
    lines = _lines(expression, batch)
    if lines is None:
        return expression
    return sympy.Min(*(sympy.Rational(a) + sympy.Rational(s) * batch for a, s in lines))


def _lines(expression: Any, batch: Any) -> list[Line] | None:
    if expression == batch:
        return [(Fraction(0), Fraction(1))]
    if expression.is_Rational:
        return [(Fraction(int(expression.p), int(expression.q)), Fraction(0))]
    parts = [_lines(part, batch) for part in expression.args]
    if isinstance(expression, sympy.Min) and None not in parts:
        return _needed([line for part in parts if part for line in part])
    if isinstance(expression, sympy.Add) and None not in parts:
        total: list[Line] = [(Fraction(0), Fraction(0))]
        for part in parts:
            if part is None or len(total) * len(part) > MOST:
                return None
            total = _needed([(a + c, s + t) for a, s in total for c, t in part])
        return total
    if isinstance(expression, sympy.Mul):
        factor, rest = expression.as_coeff_Mul()
        if factor.is_Rational and factor > 0 and factor != 1:
            scale = Fraction(int(factor.p), int(factor.q))
            inner = _lines(rest, batch)
            return None if inner is None else [(scale * a, scale * s) for a, s in inner]
    return None


def _needed(lines: list[Line]) -> list[Line]:
    """Fewest lines with the same minimum at every whole B ≥ 1."""
    lines = sorted(set(lines))
    points = {1}
    for (a, s), (c, t) in combinations(lines, 2):
        if s != t and (meet := (c - a) / (s - t)) > 0:
            points |= {max(1, int(meet)), int(meet) + 1}
    points.add(max(points) + 1)
    lowest = {b: min(a + s * b for a, s in lines) for b in points}
    touched = {line: {b for b in points if line[0] + line[1] * b == lowest[b]} for line in lines}
    kept: list[Line] = []
    while points:
        best = max(lines, key=lambda line: (len(touched[line] & points), line[0] == 0))
        kept.append(best)
        points = points - touched[best]
    return sorted(kept, key=lambda line: -line[1])
