"""The ranks of one layer for every batch size, proved at a few of them.

**Proposition.**  For generic k and W the ranks of K and of both blocks together are concave
functions of B = 0, 1, 2, …, and 0 at B = 0.

*Proof.*  Let V be the null space of one sample's W.  x is in the null space of both blocks if and
only if every x_b is in V and Σ_b K_b x_b = 0, so the joint rank is ``B·rank W + s(B)`` with s(B)
the dimension of S = Σ_b K_b V, where the K_b are drawn alike.  One more sample adds
``dim(S + K_b V) − dim S``, which can only fall as S grows.  With the whole space for V the same
holds of K. ∎

So an upper bound that is linear between a few batch sizes is the rank everywhere as soon as it is
the rank at those, and grows by rank W a sample beyond the last.

A concave function of B is written as a minimum of lines: :func:`tidy`, :func:`turns`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise
from math import ceil, floor, prod
from typing import Any

import sympy

from rgap.analysis.closed_forms.closed_form import closed_form
from rgap.analysis.closed_forms.pattern import reads
from rgap.analysis.closed_forms.residue_classes import bounds
from rgap.analysis.closed_forms.witness import EFFORT, Witness
from rgap.network.affine import Affine

__all__ = [
    "EveryBatch",
    "Line",
    "every_batch",
    "first_open",
    "lines_of",
    "lowest",
    "open_part",
    "stepwise",
    "tidy",
    "turns",
]


Line = tuple[Fraction, Fraction]  # value at B = 0, slope
MOST = 400  # lines of a sum of minima, beyond which an expression stays as it is
STEPS = 4  # cases of an expression that is neither a minimum nor a maximum
SMALL = 4000  # entries of one sample's pattern, up to which ranks are counted B by B
LONGEST = 12  # batch sizes counted
FARTHEST = 1 << 24  # batch size up to which a critical one is looked for
BOUND = "rows and pixels counted by residue classes of the stride"
SYMBOL = sympy.Symbol("B", positive=True, integer=True)


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
    known = [part for part in parts if part is not None]
    ends = sorted({1, *(b for part in known for b in turns(part))})
    ends.append(ends[-1] + 1)
    signs = [1] * len(plus) + [-1] * len(minus)

    def at(b: int) -> Fraction:
        values = (sign * _value(part, b) for sign, part in zip(signs, known, strict=True))
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
    sizes = set()
    for (a, s), (c, t) in pairwise(sorted(lines, key=lambda line: -line[1])):
        meet = (c - a) / (s - t)
        sizes |= {max(1, floor(meet)), max(1, ceil(meet))}
    return sorted(sizes)


def lines_of(expression: Any, batch: Any) -> list[Line] | None:
    """The fewest lines whose minimum the expression is at B = 1, 2, …, steepest first; or None."""
    expression = sympy.sympify(expression)
    if not isinstance(batch, sympy.Symbol) or expression.free_symbols - {batch}:
        return None
    lines = _lines(expression, batch)
    return None if lines is None else _needed(lines)


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


Lines = list[Line]


@dataclass(frozen=True)
class EveryBatch:
    """Ranks as expressions in B, and which of them are proved.

    Attributes:
        gradient: rank of the gradient constraints, or an upper bound.
        weight: rank of the weight constraints, or an upper bound.
        joint: rank of both, or an upper bound.
        gradient_exact: True if it is proved for every B.
        weight_exact: the same of the weight constraints.
        exact: the same of both together.
        critical: smallest B that leaves something open (an upper bound on it unless ``exact``);
            ∞ if there is none, None if the bound does not say.
        reason: why.
    """

    gradient: Any
    weight: Any
    joint: Any
    gradient_exact: bool
    weight_exact: bool
    exact: bool
    critical: Any
    reason: str


def every_batch(affine: Affine, batch: Any, effort: float = EFFORT) -> EveryBatch:
    """Ranks of a layer's constraints, all units on, for generic weights and cotangents.

    Args:
        affine: the layer; its weights are not looked at.
        batch: the symbol B.
        effort: multiplications that one elimination of a proof may take.

    >>> import torch
    >>> from rgap.network.affine import Geometry, convolution
    >>> w = torch.ones(12, 12, 5, 5)
    >>> spread = Geometry.of((5, 5), stride=2, padding=2)
    >>> conv = convolution("c", w, None, ("w", None), (12, 16, 16), spread)
    >>> found = every_batch(conv, sympy.Symbol("B", positive=True, integer=True))
    >>> found.joint, found.exact, found.critical
    (Min(3072*B, 768*B + 3456), True, 2)
    """
    bound = bounds(affine, batch)
    blocks = [lines_of(rank, batch) for rank in (bound.gradient, bound.weight, bound.joint)]
    if any(block is None for block in blocks):
        k, w, both = map(sympy.sympify, (bound.gradient, bound.weight, bound.joint))
        return EveryBatch(k, w, both, False, False, False, None, BOUND)
    gradient, weight, joint = (block for block in blocks if block is not None)

    seen, single = Witness(affine, effort), prod(affine.in_shape)
    per_sample = int(weight[0][1])
    weight_exact = seen.weight(per_sample) == per_sample
    gradient_exact = _reached(gradient, 0, lambda b, _: seen.gradient(b))
    if weight_exact and per_sample == single:
        joint, exact = [weight[0]], True
    else:
        exact = weight_exact and _reached(joint, per_sample, seen.joint)
    counted = _one_by_one(affine, per_sample) if weight_exact and not exact else None
    if counted is not None:
        joint, exact = counted, True
    critical = first_open(lambda b: b * single - min(a + s * b for a, s in joint))
    looked = ", ".join(map(str, _looked_at(joint)))
    reason = BOUND
    if exact and per_sample == single:
        reason = "the weight constraints alone determine every sample"
    elif counted is not None:
        reason = "counted by matchings batch size by batch size, and ranks are concave in B"
    elif exact:
        reason = (
            "rows and pixels counted by residue classes of the stride; ranks at a point reach the "
            f"count at B = {looked}, and ranks are concave in B"
        )
    return EveryBatch(
        lowest(gradient, batch),
        lowest(weight, batch),
        lowest(joint, batch),
        gradient_exact,
        weight_exact,
        exact,
        critical if exact or critical != sympy.oo else None,
        reason,
    )


def _looked_at(lines: Lines) -> list[int]:
    return sorted({1, *turns(lines)})


def _reached(lines: Lines, tail: int, rank: Callable[[int, int], int]) -> bool:
    """True if a concave rank that grows by ``tail`` in the end is the minimum of these lines."""
    if lines[-1][1] != tail:
        return False
    for b in _looked_at(lines):
        value = min(a + s * b for a, s in lines)
        if rank(b, int(value)) < value:
            return False
    return True


def _one_by_one(affine: Affine, tail: int) -> Lines | None:
    """Joint ranks at B = 1, 2, … until a sample adds only ``tail``; None without a proof."""
    again = affine.geometry is not None and affine.geometry.border != "zeros"
    entries = len(reads(affine).tap) * prod(affine.weight.shape[:2])
    if again or entries > SMALL:  # matchings do not see what a border shows again
        return None
    lines: Lines = []
    before = 0
    for b in range(1, LONGEST + 1):
        form = closed_form(affine, b)
        if not form.exact:
            return None
        slope = form.joint_rank - before
        lines.append((Fraction(before - (b - 1) * slope), Fraction(slope)))
        if slope == tail:
            return lines_of(lowest(lines, SYMBOL), SYMBOL)
        before = form.joint_rank
    return None


def first_open(nullity: Callable[[int], Any]) -> Any:
    """Smallest B with nullity(B) > 0; the nullity is convex in B and 0 at B = 0."""
    low, high = 0, 1
    while nullity(high) <= 0:
        low, high = high, 2 * high
        if high > FARTHEST:
            return sympy.oo
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if nullity(middle) > 0 else (middle, high)
    return sympy.Integer(high)
