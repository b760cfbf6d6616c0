"""A network's layers in closed form, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from torch import nn

from rgap.analysis.symbolic_layer import SIGNS, SymbolicLayer, layer_form
from rgap.analysis.symbolic_modules import calls_of, head_of, sizes_of

__all__ = ["SymbolicNetwork", "symbolic"]

HEADINGS = ("unknowns", "gradient rank", "weight rank", "overlap", "nullity", "critical batch")


@dataclass(frozen=True)
class SymbolicNetwork:
    """Closed forms of every layer of a network.

    Attributes:
        model: name of its class.
        layers: one per call, in forward order.
        notes: what the expressions leave out, one sentence each.
    """

    model: str
    layers: tuple[SymbolicLayer, ...]
    notes: tuple[str, ...] = ()

    @property
    def total_unknowns(self) -> Any:
        """Unknowns of all layers."""
        return self._total("unknowns")

    @property
    def total_equations(self) -> Any:
        """Independent equations of all layers: the sum of the joint ranks."""
        return self._total("joint_rank")

    @property
    def total_nullity(self) -> Any:
        """What layer after layer leaves open."""
        return self._total("nullity")

    @property
    def exact(self) -> bool:
        """True if every layer's expressions are."""
        return all(layer.exact for layer in self.layers)

    @property
    def critical_batch(self) -> Any:
        """Smallest batch at which some layer leaves something open, layer by layer.

        A layer below can still fix what a layer above leaves open; None where a layer's sizes do
        not say.
        """
        import sympy

        found = [layer.critical_batch for layer in self.layers]
        return None if any(value is None for value in found) else sympy.Min(*found)

    def text(self) -> str:
        """A table in plain text; ≤ and ≥ mark bounds."""
        rows = [
            ("layer", "kind", *HEADINGS),
            *(self._cells(layer, _plain) for layer in self.layers),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(
            f"{self.model}: {self.total_unknowns} unknowns, {self.total_equations} equations, "
            f"critical batch {_plain(self.critical_batch)}"
        )
        return "\n".join([*lines, *self.notes])

    def latex(self) -> str:
        """A ``booktabs`` table."""
        body = [" & ".join(self._cells(layer, _math, escaped=True)) for layer in self.layers]
        total = _math(self.total_unknowns), _math(self.total_nullity)
        middle = " & ".join(_math(self._total(what)) for what in ("gradient_rank", "weight_rank"))
        shared = _math(self._total("overlap"))
        when = _math(self.critical_batch)
        return "\n".join(
            [
                r"\begin{tabular}{llrrrrrr}",
                r"\toprule",
                " & ".join(("layer", "kind", *HEADINGS)) + r" \\",
                r"\midrule",
                *(line + r" \\" for line in body),
                r"\midrule",
                rf"total & & {total[0]} & {middle} & {shared} & {total[1]} & {when} \\",
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )

    def _repr_latex_(self) -> str:
        return self.latex()

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        head = line(("layer", "kind", *HEADINGS), "th")
        body = "".join(line(self._cells(layer, _plain), "td") for layer in self.layers)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>{notes}"

    def _total(self, what: str) -> Any:
        import sympy

        return sympy.Add(*(getattr(layer, what) for layer in self.layers))

    def _cells(self, layer: SymbolicLayer, write: Any, *, escaped: bool = False) -> tuple[str, ...]:
        above, below = ("", "") if layer.exact else ("<=", ">=")
        name, kind = layer.name, layer.kind
        if escaped:
            name, kind = (word.replace("_", r"\_") for word in (name, kind))
        pairs = (
            (layer.unknowns, ""),
            (layer.gradient_rank, above),
            (layer.weight_rank, above),
            (layer.overlap, ""),
            (layer.nullity, below),
            (layer.critical_batch, above),
        )
        return (name, kind, *(write(value, sign) for value, sign in pairs))


def _plain(value: Any, sign: str = "") -> str:
    import sympy

    if value is None:
        return "?"
    if value == sympy.oo:
        return "never"
    return {"": "", "<=": "≤ ", ">=": "≥ "}[sign] + str(value)


def _math(value: Any, sign: str = "") -> str:
    import sympy

    if value is None:
        return "--"
    return f"${SIGNS.get(sign, '')} {sympy.latex(value)}$".replace("$ ", "$")


def symbolic(
    model: nn.Module,
    input_shape: Sequence[int],
    batch: int | str | None = None,
    *,
    loss: str = "cross_entropy",
) -> SymbolicNetwork:
    """Closed forms of every layer of a network, at the sizes its input gives them.

    Args:
        model: left as it was; a copy without storage runs once.
        input_shape: of one sample, for example (3, 32, 32).
        batch: number of samples, the name of its symbol, or None for B.
        loss: "cross_entropy" takes the last fully connected layer for a softmax head.

    Raises:
        ValueError: batch below 1, or a model without layers that the closed forms cover.

    >>> import rgap
    >>> net = symbolic(rgap.models.lenet(seed=0), (3, 32, 32))
    >>> [str(layer.critical_batch) for layer in net.layers]
    ['oo', '2', 'oo', '10']
    """
    if isinstance(batch, int) and batch < 1:
        raise ValueError(f"expected batch >= 1, got {batch}; write batch=1 or batch=None")
    samples = "B" if batch is None else batch
    calls, notes = calls_of(model, tuple(int(n) for n in input_shape))
    head = head_of(calls) if loss == "cross_entropy" else None
    rows = []
    for call in calls:
        kind, sizes, repeats = sizes_of(call, head=call is head)
        row = layer_form(kind, {**sizes, "batch": _samples(samples, repeats)}, name=call.name)
        if repeats > 1 and row.critical_batch is not None:
            row = replace(row, critical_batch=_ceiling(row.critical_batch, repeats))
        rows.append(row)
    return SymbolicNetwork(type(model).__name__, tuple(rows), notes)


def _samples(batch: int | str, repeats: int) -> Any:
    """Samples of a layer that is applied at ``repeats`` places of a sequence."""
    if isinstance(batch, int):
        return batch * repeats
    import sympy

    return repeats * sympy.Symbol(batch, positive=True, integer=True)


def _ceiling(value: Any, repeats: int) -> Any:
    import sympy

    return value if value == sympy.oo else sympy.ceiling(value / sympy.Integer(repeats))
