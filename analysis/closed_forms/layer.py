"""Unknowns, ranks, redundancy and nullity of one layer as expressions in its sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FIELDS", "SymbolicLayer", "made"]

FIELDS = ("unknowns", "gradient_rank", "weight_rank", "joint_rank", "overlap", "nullity")
TEXT_SIGNS = {"=": "=", "<=": "≤", ">=": "≥"}
TEX_SIGNS = {"=": "=", "<=": r"\leq", ">=": r"\geq"}  # mathtext knows no \le


@dataclass(frozen=True)
class SymbolicLayer:
    """One layer's counts as sympy expressions; whole numbers are sympy integers.

    Attributes:
        name: of the layer.
        kind: such as "conv2d" or "linear".
        batch: B, a symbol or a number.
        unknowns: inputs of the layer, times B.
        gradient_rank: rank of its gradient constraints.
        weight_rank: rank of its weight constraints.
        joint_rank: rank of both together.
        critical_batch: smallest B at which something stays open; ∞ where that never happens,
            None where the sizes do not say.  An upper bound unless ``exact``.
        exact: True if ``joint_rank`` and ``nullity`` are those of generic weights and cotangents,
            for every value of the symbols; False if ``joint_rank`` is an upper bound, and so
            ``nullity`` a lower one.
        reason: why.
        gradient_exact: the same of ``gradient_rank``.
        weight_exact: the same of ``weight_rank``.
        left_open: ``nullity`` where a formula of its own reads better than the difference.
        beside: layers that read the same input; ``joint_rank`` is that of all of them.
        step: what leads into the layer and passes on less than it is given.
        ahead: entries of one sample ahead of that step, 0 without one.
        shown: entries of one sample that a border ahead of the layer shows more than once, 0
            without one; the counts take every entry for one of its own.
        by_gradient: largest B at which gradient constraints alone can determine the input.
        by_shifts: largest B at which shifts of the kernel tell all positions of all samples apart.
    """

    name: str
    kind: str
    batch: Any
    unknowns: Any
    gradient_rank: Any
    weight_rank: Any
    joint_rank: Any
    critical_batch: Any
    exact: bool
    reason: str
    gradient_exact: bool = True
    weight_exact: bool = True
    left_open: Any = None
    beside: str = ""
    step: str = ""
    ahead: int = 0
    shown: int = 0
    by_gradient: int | None = None
    by_shifts: int | None = None

    @property
    def overlap(self) -> Any:
        """Equations that both blocks contain."""
        from rgap.analysis.closed_forms.batches import stepwise

        return stepwise([self.gradient_rank, self.weight_rank], [self.joint_rank], self._symbol())

    @property
    def nullity(self) -> Any:
        """Unknowns that the equations leave open."""
        from rgap.analysis.closed_forms.batches import open_part

        if self.left_open is not None:
            return self.left_open
        return open_part(self.unknowns, self.joint_rank, self._symbol())

    def at(self, values: Mapping[Any, int]) -> dict[str, int]:
        """The counts as whole numbers, for values of the symbols.

        Args:
            values: by symbol or by name; more than are needed do no harm.

        Raises:
            ValueError: a symbol without a value.

        >>> from rgap.analysis import layer_form
        >>> layer_form("linear", {"in_features": 4, "out_features": 3}).at({"B": 5})["nullity"]
        2
        """
        named = {str(symbol): value for symbol, value in values.items()}
        out = {}
        for what in FIELDS:
            expression = getattr(self, what)
            put = {s: named[s.name] for s in expression.free_symbols if s.name in named}
            missing = sorted(s.name for s in expression.free_symbols - put.keys())
            if missing:
                raise ValueError(
                    f"'{self.name}' ({self.kind}): expected values for {missing}, got "
                    f"{sorted(named)}; write at({{'{missing[0]}': 2, ...}})"
                )
            out[what] = int(expression.subs(put))
        return out

    def text(self) -> str:
        """The counts, one a line; ≤ and ≥ mark bounds.

        >>> from rgap.analysis import layer_form
        >>> print(layer_form("linear", {"in_features": 4, "out_features": 3}).text())
        linear: exact; the null space is the product of those of k and W
          unknowns       = 4·B
          gradient rank  = min(4·B, 12)
          weight rank    = 3·B
          joint rank     = min(4·B, 3·B + 3)
          shared         = min(3·B, 9)
          nullity        = max(0, B − 3)
          critical batch = 4
        """
        from rgap.analysis.closed_forms.writing import abbreviated, in_text

        title = self.name if self.name == self.kind else f"{self.name} ({self.kind})"
        lines = [f"{title}: {'exact' if self.exact else 'a bound'}; {self.reason}"]
        rows = self.signed()
        short, names = abbreviated([getattr(self, what) for _, what, _ in rows])
        for (label, _, sign), value in zip(rows, short, strict=True):
            lines.append(f"  {label:<14} {TEXT_SIGNS[sign]} {in_text(value)}")
        if names:
            where = ", ".join(f"{in_text(name)} = {in_text(what)}" for name, what in names)
            lines.append(f"  where {where}")
        return "\n".join(lines)

    def latex(self) -> str:
        r"""The counts as a LaTeX ``aligned`` block.

        >>> from rgap.analysis import layer_form
        >>> form = layer_form("linear", {"in_features": "n", "out_features": "m"})
        >>> r"\text{nullity} &= \max\left(0, B - m\right) \max\left(0, n - m\right)" in form.latex()
        True
        """
        from rgap.analysis.closed_forms.writing import abbreviated, in_latex

        rows = self.signed()
        short, names = abbreviated([getattr(self, what) for _, what, _ in rows])
        lines = [
            rf"\text{{{label}}} &{TEX_SIGNS[sign]} {in_latex(value)}"
            for (label, _, sign), value in zip(rows, short, strict=True)
        ]
        lines += [rf"{in_latex(name)} &:= {in_latex(what)}" for name, what in names]
        body = r" \\ ".join(lines)
        return rf"\begin{{aligned}} {body} \end{{aligned}}"

    def signed(self) -> list[tuple[str, str, str]]:
        """Label, attribute and sign ("=", "<=" or ">=") of every count that is known."""
        above, below = ("=", "=") if self.exact else ("<=", ">=")
        all_exact = self.exact and self.gradient_exact and self.weight_exact and not self.beside
        rows = [
            ("unknowns", "unknowns", "="),
            ("gradient rank", "gradient_rank", "=" if self.gradient_exact else "<="),
            ("weight rank", "weight_rank", "=" if self.weight_exact else "<="),
            ("joint rank", "joint_rank", above),
            ("nullity", "nullity", below),
        ]
        if all_exact:  # a difference of bounds is none
            rows.insert(4, ("shared", "overlap", "="))
        if self.critical_batch is not None:
            rows.append(("critical batch", "critical_batch", above))
        if self.by_gradient is not None:
            rows.append(("k known, to B", "by_gradient", "<="))
        if self.by_shifts is not None:
            rows.append(("shifts, to B", "by_shifts", "="))
        return rows

    def _repr_latex_(self) -> str:
        return f"${self.latex()}$"

    def _symbol(self) -> Any:
        """B, or the one symbol that the number of samples is a multiple of."""
        import sympy

        symbols = sympy.sympify(self.batch).free_symbols
        return next(iter(symbols)) if len(symbols) == 1 else sympy.Symbol("B")


def made(
    name: str,
    kind: str,
    batch: Any,
    counts: Sequence[Any],
    critical: Any,
    reason: str,
    *,
    exact: tuple[bool, bool, bool] = (True, True, True),
    left_open: Any = None,
) -> SymbolicLayer:
    """A layer from its counts, each written as tidily as possible.

    Args:
        name: of the layer.
        kind: such as "conv2d".
        batch: B, a symbol or a number.
        counts: unknowns, and the ranks of gradient constraints, weight constraints and both.
        critical: smallest B at which something stays open, or None.
        reason: why the counts hold.
        exact: which of the three ranks are exact and no bounds.
        left_open: the nullity where a formula of its own reads better than the difference.
    """
    import sympy

    from rgap.analysis.closed_forms.batches import tidy

    samples = sympy.sympify(batch)
    symbols = samples.free_symbols
    own = next(iter(symbols)) if len(symbols) == 1 else None
    unknowns, gradient, weight, joint = (tidy(sympy.sympify(value), own) for value in counts)
    return SymbolicLayer(
        name,
        kind,
        samples,
        unknowns,
        gradient,
        weight,
        joint,
        critical_batch=None if critical is None else sympy.sympify(critical),
        exact=exact[2],
        reason=reason,
        gradient_exact=exact[0],
        weight_exact=exact[1],
        left_open=left_open,
    )
