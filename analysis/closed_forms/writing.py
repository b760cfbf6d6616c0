"""Expressions as one would write them on a slide: plain text and LaTeX."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sympy
from sympy.printing.latex import LatexPrinter
from sympy.printing.str import StrPrinter

__all__ = ["abbreviated", "in_latex", "in_text"]

NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
GREEK = dict(zip((*NAMES, "rho"), "αβγδεζηθρ", strict=True))
LONG = 8  # operations of an expression above which repeated parts of it get a name


def in_text(value: Any) -> str:
    """One line of plain text.

    >>> b = sympy.Symbol("B", positive=True, integer=True)
    >>> in_text(sympy.Min(3600, 2304 * b + 576))
    'min(2304·B + 576, 3600)'
    >>> in_text(1152 * sympy.Max(0, 2 * b - 3)), in_text(sympy.oo), in_text(None)
    ('1152·max(0, 2·B − 3)', 'never', '?')
    """
    if value is None:
        return "?"
    if value == sympy.oo:
        return "never"
    written: str = _Text().doprint(value)
    written = re.sub(r"\*\*2\b", "²", re.sub(r"\*\*3\b", "³", written))
    written = written.replace("**", "^").replace("*", "·").replace("-", "−")
    return re.sub(r"[a-z]+", lambda word: GREEK.get(word[0], word[0]), written)


def in_latex(value: Any) -> str:
    r"""The same in LaTeX, without the dollars.

    >>> b = sympy.Symbol("B", positive=True, integer=True)
    >>> print(in_latex(sympy.Min(3072 * b, 768 * b + 3456)))
    \min\left(3072 B, 768 B + 3456\right)
    """
    if value is None:
        return r"\mathrm{unknown}"
    if value == sympy.oo:
        return r"\mathrm{never}"
    return str(_Tex().doprint(sympy.sympify(value)))


def abbreviated(values: Sequence[Any]) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """Long expressions with names for what they repeat, and what the names stand for.

    >>> c, f, p = sympy.symbols("C F P", positive=True, integer=True)
    >>> most = sympy.Min(p * sympy.Min(f, 9 * c), 4 * c)
    >>> short, names = abbreviated([most + f * (9 * c - sympy.Min(f, 9 * c)), most])
    >>> [in_text(value) for value in short], [(in_text(n), in_text(what)) for n, what in names]
    (['F·(9·C − α) + β', 'β'], [('α', 'min(9·C, F)'), ('β', 'min(4·C, P·α)')])
    """
    out = [value if value is None else sympy.sympify(value) for value in values]
    names: list[tuple[Any, Any]] = []
    if all(value is None or value.count_ops() <= LONG for value in out):
        return out, names
    for greek in NAMES:
        seen = Counter(
            part
            for value in out
            if value is not None
            for part in sympy.preorder_traversal(value)
            if isinstance(part, (sympy.Min, sympy.floor)) or (part.is_Add and part.has(sympy.floor))
        )
        again = [part for part, times in seen.items() if times > 1]
        if not again:
            break
        part = min(again, key=lambda part: (part.count_ops(), str(part)))
        bigger = [p for p in again if p.is_Add and part in p.args and seen[p] == seen[part]]
        part = bigger[0] if bigger else part
        name = sympy.Symbol(greek, positive=True, integer=True)
        names.append((name, part))
        out = [value if value is None else value.xreplace({part: name}) for value in out]
    return out, names


def _positive_first(terms: list[Any]) -> list[Any]:
    """For n − m in the place of −m + n."""
    front = next((t for t in terms if not t.could_extract_minus_sign()), None)
    return terms if front is None else [front, *(t for t in terms if t is not front)]


class _Text(StrPrinter):  # type: ignore[misc]  # sympy has no types
    def _as_ordered_terms(self, expr: Any, order: Any = None) -> list[Any]:
        return _positive_first(super()._as_ordered_terms(expr, order))

    def _print_Min(self, value: Any) -> str:  # noqa: N802  # sympy's names
        return f"min({', '.join(self._print(arg) for arg in _in_order(value.args, -1))})"

    def _print_Max(self, value: Any) -> str:  # noqa: N802
        return f"max({', '.join(self._print(arg) for arg in _in_order(value.args, 1))})"

    def _print_Piecewise(self, value: Any) -> str:  # noqa: N802
        *cases, (rest, _) = value.args
        parts = [f"{in_text(what)} if {self._when(when)}" for what, when in cases]
        return ", ".join([*parts, f"else {in_text(rest)}"])

    def _when(self, when: Any) -> str:
        if isinstance(when, sympy.Le) and when.rhs == 1:
            return f"{in_text(when.lhs)} = 1"
        sign = {sympy.Le: "≤", sympy.Gt: ">"}[type(when)]
        return f"{in_text(when.lhs)} {sign} {in_text(when.rhs)}"


class _Tex(LatexPrinter):  # type: ignore[misc]  # sympy has no types
    def _as_ordered_terms(self, expr: Any, order: Any = None) -> list[Any]:
        return _positive_first(super()._as_ordered_terms(expr, order))

    def _print_Min(self, value: Any, exp: Any = None) -> str:  # noqa: N802
        return self._of(r"\min", _in_order(value.args, -1), exp)

    def _print_Max(self, value: Any, exp: Any = None) -> str:  # noqa: N802
        return self._of(r"\max", _in_order(value.args, 1), exp)

    def _of(self, name: str, args: Sequence[Any], exp: Any) -> str:
        inside = ", ".join(self._print(arg) for arg in args)
        power = "" if exp is None else f"^{{{exp}}}"
        return rf"{name}{power}\left({inside}\right)"

    def _print_Piecewise(self, value: Any) -> str:  # noqa: N802  # one line, as a table needs it
        *cases, (rest, _) = value.args
        parts = [rf"{in_latex(what)}\;({self._when(when)})" for what, when in cases]
        return r",\; ".join([*parts, rf"{in_latex(rest)}\;(\mathrm{{else}})"])

    def _when(self, when: Any) -> str:
        if isinstance(when, sympy.Le) and when.rhs == 1:
            return f"{in_latex(when.lhs)} = 1"
        return str(self._print(when))


def _in_order(args: Sequence[Any], sign: int) -> list[Any]:
    """Lines of one symbol in the order in which they hold as it grows; others as sympy has them."""
    ordered = sorted(args, key=sympy.default_sort_key)
    symbols = set().union(*(arg.free_symbols for arg in ordered))
    if len(symbols) != 1:
        return ordered
    (one,) = symbols
    slopes = [sympy.diff(arg, one) for arg in ordered]
    if not all(slope.is_number for slope in slopes):
        return ordered
    return [ordered[i] for i in sorted(range(len(ordered)), key=lambda i: (sign * slopes[i], i))]
