"""The sizes of a layer as its caller writes them: numbers, names of symbols, expressions."""

from __future__ import annotations

from typing import Any

import sympy

from rgap.analysis.closed_forms.residue_classes import Size

__all__ = ["Reader", "Sizes", "symbol"]

Sizes = dict[str, Any]


def symbol(name: str) -> sympy.Symbol:
    """The symbol of a size: a positive integer.

    >>> symbol("H").is_positive
    True
    """
    return sympy.Symbol(name, positive=True, integer=True)


class Reader:
    """Takes sizes by name, one error for all that is wrong with them.

    Args:
        kind: of the layer, for the errors.
        sizes: by name; what was not taken is in ``left``.
    """

    def __init__(self, kind: str, sizes: Sizes) -> None:
        self.kind = kind
        self.left = dict(sizes)

    def one(self, name: str, default: Any = None, least: int = 1) -> Size:
        """One size; required where there is no default."""
        if name not in self.left and default is None:
            raise ValueError(
                f"{self.kind}: expected the size {name!r}, got {sorted(self.left)}; write "
                f"{{'{name}': 3, ...}} or {{'{name}': 'n', ...}} for a symbol"
            )
        return self._value(name, self.left.pop(name, default), least)

    def each(self, name: str, dims: int, default: Any = None, least: int = 1) -> list[Size]:
        """One size per dimension, or one for all of them."""
        value = self.left.pop(name, default)
        if isinstance(value, (tuple, list)):
            if len(value) != dims:
                raise ValueError(
                    f"{self.kind}: expected {dims} sizes in {name!r}, got {value!r}; write one "
                    "for every dimension"
                )
            return [self._value(name, v, least) for v in value]
        self.left[name] = value
        if value is None:
            del self.left[name]
        return [self.one(name, default, least)] * dims

    def sides(self, dims: int) -> list[tuple[Size, Size]]:
        """Padding before and after the picture, per dimension."""
        value = self.left.pop("padding", 0)
        per_dimension = value if isinstance(value, (tuple, list)) else (value,) * dims
        if len(per_dimension) != dims:
            raise ValueError(
                f"{self.kind}: expected {dims} paddings, got {value!r}; write one for every "
                "dimension, a pair where its two sides differ"
            )
        out = []
        for side in per_dimension:
            low, high = side if isinstance(side, (tuple, list)) else (side, side)
            out.append((self._value("padding", low, 0), self._value("padding", high, 0)))
        return out

    def finish(self) -> None:
        """Refuse sizes that nobody took."""
        if self.left:
            raise ValueError(
                f"{self.kind}: got sizes {sorted(self.left)} that it does not have; leave them out"
            )

    def _value(self, name: str, value: Any, least: int) -> Size:
        if isinstance(value, str):
            return symbol(value)
        if isinstance(value, sympy.Integer):
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole and not isinstance(value, sympy.Expr):
            raise ValueError(
                f"{self.kind}: expected {name} to be a whole number >= {least}, a sympy expression "
                f"or the name of a symbol, got {value!r}; write {name}={max(least, 1)}"
            )
        return value
