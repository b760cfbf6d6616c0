"""A network's layers in closed form, added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import nn

from rgap.analysis.closed_forms.kinds import symbol
from rgap.analysis.closed_forms.layer import TEX_SIGNS, TEXT_SIGNS, SymbolicLayer
from rgap.analysis.closed_forms.witness import EFFORT
from rgap.analysis.finding import aligned

__all__ = ["SymbolicNetwork", "symbolic"]

COLUMNS = (
    ("unknowns", "unknowns"),
    ("gradient rank", "gradient_rank"),
    ("weight rank", "weight_rank"),
    ("joint rank", "joint_rank"),
    ("nullity", "nullity"),
    ("critical batch", "critical_batch"),
)
HEADINGS = tuple(heading for heading, _ in COLUMNS)


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
        from rgap.analysis.closed_forms.batches import open_part

        return open_part(self.total_unknowns, self.total_equations, self._symbol())

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

        critical = [layer.critical_batch for layer in self.layers]
        if 1 in critical:
            return sympy.Integer(1)
        return None if any(value is None for value in critical) else sympy.Min(*critical)

    def text(self) -> str:
        """A table in plain text; ≤ and ≥ mark bounds."""
        from rgap.analysis.closed_forms.writing import in_text

        rows = [
            ("layer", "kind", *HEADINGS),
            *(self._cells(layer, _plain) for layer in self.layers),
        ]
        lines = aligned(rows)
        above, below = ("", "") if self.exact else ("≤ ", "≥ ")
        lines += [
            f"{self.model}: {in_text(self.total_unknowns)} unknowns in all layers",
            f"  equations       {above}{in_text(self.total_equations)}",
            f"  nullity         {below}{in_text(self.total_nullity)}",
            f"  critical batch  {above}{in_text(self.critical_batch)}, layer by layer",
        ]
        return "\n".join([*lines, *self.notes])

    def latex(self) -> str:
        """A ``booktabs`` table."""
        from rgap.analysis.closed_forms.writing import in_latex

        def write(value: Any, sign: str) -> str:
            return f"${'' if sign == '=' else TEX_SIGNS[sign] + ' '}{in_latex(value)}$"

        def safe(word: str) -> str:
            return word.replace("_", r"\_")

        body = []
        for layer in self.layers:
            name, kind, *cells = self._cells(layer, write)
            body.append(" & ".join([safe(name), safe(kind), *cells]))
        above, below = ("=", "=") if self.exact else ("<=", ">=")
        totals = (
            write(self.total_unknowns, "="),
            "",
            "",
            write(self.total_equations, above),
            write(self.total_nullity, below),
            write(self.critical_batch, above),
        )
        return "\n".join(
            [
                rf"\begin{{tabular}}{{ll{'r' * len(COLUMNS)}}}",
                r"\toprule",
                " & ".join(("layer", "kind", *HEADINGS)) + r" \\",
                r"\midrule",
                *(line + r" \\" for line in body),
                r"\midrule",
                "total & & " + " & ".join(totals) + r" \\",
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

        from rgap.analysis.closed_forms.batches import tidy

        return tidy(sympy.Add(*(getattr(layer, what) for layer in self.layers)), self._symbol())

    def _symbol(self) -> Any:
        """The symbol of the batch size; any other one where it is a number."""
        import sympy

        symbols = set().union(*(layer.batch.free_symbols for layer in self.layers))
        return next(iter(symbols)) if len(symbols) == 1 else sympy.Symbol("B")

    @staticmethod
    def _cells(layer: SymbolicLayer, write: Callable[[Any, str], str]) -> tuple[str, ...]:
        signs = {what: sign for _, what, sign in layer.signed()}
        cells = (write(getattr(layer, what), signs.get(what, "=")) for _, what in COLUMNS)
        return (layer.name, layer.kind, *cells)


def _plain(value: Any, sign: str) -> str:
    """A number in plain text, with the sign of what it bounds."""
    from rgap.analysis.closed_forms.writing import in_text

    return ("" if sign == "=" else TEXT_SIGNS[sign] + " ") + in_text(value)


def symbolic(
    model: nn.Module,
    input_shape: Sequence[int],
    batch: int | str | None = None,
    *,
    loss: str = "cross_entropy",
    effort: float = EFFORT,
) -> SymbolicNetwork:
    """Closed forms of every layer of a network, at the sizes its input gives them.

    Args:
        model: left as it was; a copy without storage runs once.
        input_shape: of one sample, for example (3, 32, 32).
        batch: number of samples, the name of its symbol, or None for B.
        loss: "cross_entropy" takes the last fully connected layer for a softmax head.
        effort: multiplications that one step of a proof may take; what is not proved is a bound.

    Raises:
        ValueError: batch below 1, or a model without layers that the closed forms cover.

    >>> import rgap
    >>> net = symbolic(rgap.models.lenet(seed=0), (3, 32, 32))
    >>> [str(layer.critical_batch) for layer in net.layers]
    ['oo', '2', 'oo', '10']
    """
    if isinstance(batch, int) and batch < 1:
        raise ValueError(f"expected batch >= 1, got {batch}; write batch=1 or batch=None")
    from rgap.analysis.closed_forms.met import Met
    from rgap.analysis.closed_forms.rows import in_order, recorded_notes, structure_of
    from rgap.analysis.closed_forms.uses import Counter
    from rgap.analysis.probe import frozen_weights
    from rgap.update.losses import Loss

    size = tuple(int(n) for n in input_shape)
    samples: Any = batch if isinstance(batch, int) else symbol(batch or "B")
    recording, names = structure_of(model, size)
    notes = recorded_notes(model, recording)
    met = Met(model, size, Loss.of(loss), effort)
    frozen = frozen_weights(model)
    counted = Counter(recording, samples, met, frozen, loss, names, effort).rows()
    rows = in_order(recording, counted, samples, effort)
    return SymbolicNetwork(type(model).__name__, rows, notes)
