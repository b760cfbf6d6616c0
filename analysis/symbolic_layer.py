"""Unknowns, ranks, redundancy and nullity of one layer as expressions in its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FIELDS", "SIGNS", "SymbolicLayer", "layer_form"]

FIELDS = ("unknowns", "gradient_rank", "weight_rank", "joint_rank", "overlap", "nullity")
SIGNS = {"=": "=", "<=": r"\le", ">=": r"\ge"}


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
            None where the sizes do not say.
        exact: True if the expressions are the ranks for generic weights and cotangents; False
            if ``joint_rank`` is an upper bound, and so ``nullity`` a lower one.
        reason: why.
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

    @property
    def overlap(self) -> Any:
        """Equations that both blocks contain."""
        return self.gradient_rank + self.weight_rank - self.joint_rank

    @property
    def nullity(self) -> Any:
        """Unknowns that the equations leave open."""
        import sympy

        joint = self.joint_rank
        if isinstance(joint, sympy.Min):  # n − min(a, b) = max(n − a, n − b) reads better
            return sympy.Max(*(sympy.expand(self.unknowns - a) for a in joint.args))
        return sympy.expand(self.unknowns - joint)

    def at(self, values: Mapping[Any, int]) -> dict[str, int]:
        """The counts as whole numbers, for values of the symbols.

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
        """The counts, one a line."""
        lines = [f"{self.name} ({self.kind}): {'exact' if self.exact else 'bound'}, {self.reason}"]
        for label, what, sign in self._rows():
            lines.append(f"  {label:<14} {sign} {getattr(self, what)}")
        return "\n".join(lines)

    def latex(self) -> str:
        """The counts as a LaTeX ``aligned`` block."""
        import sympy

        body = r" \\ ".join(
            rf"\text{{{label}}} &{SIGNS[sign]} " + sympy.latex(getattr(self, what))
            for label, what, sign in self._rows()
        )
        return rf"\begin{{aligned}} {body} \end{{aligned}}"

    def _repr_latex_(self) -> str:
        return f"${self.latex()}$"

    def _rows(self) -> list[tuple[str, str, str]]:
        above, below = ("=", "=") if self.exact else ("<=", ">=")
        rows = [
            ("unknowns", "unknowns", "="),
            ("gradient rank", "gradient_rank", above),
            ("weight rank", "weight_rank", above),
            ("joint rank", "joint_rank", above),
            ("overlap", "overlap", "="),
            ("nullity", "nullity", below),
        ]
        if self.critical_batch is not None:
            rows.append(("critical batch", "critical_batch", above))
        return rows


def layer_form(kind: str, sizes: Mapping[str, Any], *, name: str | None = None) -> SymbolicLayer:
    """Counts of one layer; every size is a number, a sympy symbol, or the name of one.

    ``sizes`` takes the arguments of the PyTorch module, and ``batch`` (the symbol B if left out).
    Convolutions take ``in_channels, out_channels, kernel_size, input_size`` and, if they differ
    from PyTorch's defaults, ``stride, padding, dilation, groups``; a size per dimension is a tuple,
    a padding per side a pair in that tuple.  ``linear`` and ``head`` (a linear layer below a
    softmax loss) take ``in_features, out_features``; pools ``channels, input_size, kernel_size``;
    ``batch_norm``, ``invertible`` and ``relu`` take ``features``, and ``relu`` the fraction
    ``active`` of units that are on.

    Args:
        kind: "linear", "head", "conv1d", "conv2d", "conv3d", "average_pool", "max_pool",
            "batch_norm", "invertible" or "relu".
        sizes: by name.
        name: of the layer; its kind if None.

    Raises:
        ValueError: an unknown kind, a missing or an unknown size, a number below 1.

    >>> sizes = {"in_channels": 12, "out_channels": 12, "kernel_size": 5, "input_size": (16, 16),
    ...          "stride": 2, "padding": 2}
    >>> conv = layer_form("conv2d", sizes)
    >>> conv.at({"B": 2})["nullity"], conv.critical_batch
    (1152, 2)
    """
    from rgap.analysis.symbolic_kinds import KINDS

    if kind not in KINDS:
        raise ValueError(f"expected kind in {sorted(KINDS)}, got {kind!r}; write kind='conv2d'")
    return KINDS[kind](kind, dict(sizes), name or kind)
