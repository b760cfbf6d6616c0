"""Concave functions of the batch size: minima of lines, and the batch sizes at which they turn."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise
from math import ceil, floor
from typing import Any

import sympy

__all__ = ["Line", "lines_of", "lowest", "open_part", "stepwise", "tidy", "turns"]

Line = tuple[Fraction, Fraction]  # value at B = 0, slope
MOST = 400
STEPS = 4  # cases of an expression that is neither a minimum nor a maximum


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
    lines = lines_of(expression, batch)
    return expression if lines is None else lowest(lines, batch)


def lowest(lines: Sequence[Line], batch: Any) -> Any:
    """The minimum of lines as an expression."""
    return sympy.Min(*(_line(line, batch) for line in lines))


def open_part(unknowns: Any, joint: Any, batch: Any) -> Any:
    """``unknowns − joint`` as one maximum, with its common factor in front.

    >>> b = sympy.Symbol("B", positive=True, integer=True)
    >>> open_part(3072 * b, sympy.Min(3072 * b, 768 * b + 3456), b)
    1152*Max(0, 2*B - 3)
    """
    known, all_ = lines_of(joint, batch), lines_of(unknowns, batch)
    if known is None or all_ is None or len(all_) != 1:
        args = joint.args if isinstance(joint, sympy.Min) else (joint,)
        return sympy.Max(*(unknowns - a for a in args))
    (start, slope), numbers = all_[0], []
    for a, s in known:
        numbers += [start - a, slope - s]
    common = sympy.gcd_list([sympy.Rational(n) for n in numbers]) or sympy.Integer(1)
    rest = [((start - a), (slope - s)) for a, s in known]
    scale = Fraction(int(common.p), int(common.q))
    largest = sympy.Max(*(_line((a / scale, s / scale), batch) for a, s in rest))
    return sympy.Mul(common, largest, evaluate=largest.is_number or not largest.is_Add)


def stepwise(plus: Sequence[Any], minus: Sequence[Any], batch: Any) -> Any:
    """Σ plus − Σ minus of concave expressions, as cases in B where these are few.

    >>> b = sympy.Symbol("B", positive=True, integer=True)
    >>> gradient, joint = sympy.Min(3600, 2304 * b + 576), sympy.Min(3072 * b, 768 * b + 3456)
    >>> stepwise([gradient, 768 * b], [joint], b)
    Piecewise((576, B <= 1), (144, True))
    """
    whole = sympy.Add(*plus) - sympy.Add(*minus)
    parts = [lines_of(part, batch) for part in (*plus, *minus)]
    if any(part is None for part in parts):
        return whole
    found = [part for part in parts if part is not None]
    ends = sorted({1, *(b for part in found for b in turns(part))})
    ends.append(ends[-1] + 1)
    signs = [1] * len(plus) + [-1] * len(minus)

    def at(b: int) -> Fraction:
        values = (sign * _value(part, b) for sign, part in zip(signs, found, strict=True))
        return sum(values, Fraction(0))

    cases: list[tuple[Line, int]] = []  # a line, and the last B that it holds for; from the right
    last = len(ends) - 1
    while last >= 0:
        if last == 0:
            cases.append(((at(ends[0]), Fraction(0)), ends[0]))
            break
        line = _through((ends[last - 1], at(ends[last - 1])), (ends[last], at(ends[last])))
        first = last - 1
        while first > 0 and _value([line], ends[first - 1]) == at(ends[first - 1]):
            first -= 1
        cases.append((line, ends[last]))
        if first == 0:
            break
        apart = ends[first] - ends[first - 1] > 1  # then the numbers between need their line
        last = first if apart else first - 1
    cases.reverse()
    lines = [line for line, _ in cases]
    if all(_value(lines, b) == at(b) for b in ends):
        return lowest(lines, batch)
    if len(cases) > STEPS:
        return whole
    when = [sympy.Le(batch, end) for _, end in cases[:-1]]
    return sympy.Piecewise(
        *((_line(line, batch), w) for (line, _), w in zip(cases, [*when, True], strict=True))
    )


def _through(one: tuple[int, Fraction], two: tuple[int, Fraction]) -> Line:
    slope = (two[1] - one[1]) / (two[0] - one[0])
    return one[1] - slope * one[0], slope


def turns(lines: Sequence[Line]) -> list[int]:
    """Whole batch sizes on both sides of every corner; the function is linear in between.

    Args:
        lines: of :func:`lines_of`.

    >>> turns([(Fraction(576), Fraction(2304)), (Fraction(3600), Fraction(0))])
    [1, 2]
    """
    found = set()
    for (a, s), (c, t) in pairwise(sorted(lines, key=lambda line: -line[1])):
        meet = (c - a) / (s - t)
        found |= {max(1, floor(meet)), max(1, ceil(meet))}
    return sorted(found)


def lines_of(expression: Any, batch: Any) -> list[Line] | None:
    """The fewest lines whose minimum the expression is at B = 1, 2, …, steepest first; or None."""
    expression = sympy.sympify(expression)
    if not isinstance(batch, sympy.Symbol) or expression.free_symbols - {batch}:
        return None
    found = _lines(expression, batch)
    return None if found is None else _needed(found)


def _line(line: Line, batch: Any) -> Any:
    return sympy.Rational(line[0]) + sympy.Rational(line[1]) * batch


def _value(lines: Sequence[Line], batch: int) -> Fraction:
    return min(a + s * batch for a, s in lines)


def _lines(expression: Any, batch: Any) -> list[Line] | None:
    if expression == batch:
        return [(Fraction(0), Fraction(1))]
    if expression.is_Rational:
        return [(Fraction(int(expression.p), int(expression.q)), Fraction(0))]
    if isinstance(expression, sympy.Min):
        parts = [_lines(part, batch) for part in expression.args]
        if None in parts:
            return None
        return _needed([line for part in parts if part for line in part])
    if isinstance(expression, sympy.Add):
        total: list[Line] = [(Fraction(0), Fraction(0))]
        for argument in expression.args:
            part = _lines(argument, batch)
            if part is None or len(total) * len(part) > MOST:
                return None
            total = _needed([(a + c, s + t) for a, s in total for c, t in part])
        return total
    if isinstance(expression, sympy.Mul):
        factor, rest = expression.as_coeff_Mul()
        inner = None if factor == 1 else _lines(rest, batch)
        if not factor.is_Rational or inner is None or (factor < 0 and len(inner) > 1):
            return None
        scale = Fraction(int(factor.p), int(factor.q))
        return [(scale * a, scale * s) for a, s in inner]
    return None


def _needed(lines: list[Line]) -> list[Line]:
    """Fewest lines with the same minimum at every whole B ≥ 1."""
    lines = sorted(set(lines))
    points = {1}
    for (a, s), (c, t) in combinations(lines, 2):
        if s != t and (meet := (c - a) / (s - t)) > 0:
            points |= {max(1, int(meet)), int(meet) + 1}
    points.add(max(points) + 1)
    lowest_at = {b: _value(lines, b) for b in points}
    touched = {line: {b for b in points if line[0] + line[1] * b == lowest_at[b]} for line in lines}
    kept: list[Line] = []
    while points:
        best = max(lines, key=lambda line: (len(touched[line] & points), line[0] == 0))
        kept.append(best)
        points = points - touched[best]
    return sorted(kept, key=lambda line: -line[1])
