"""The table that an audit fills: one row per layer and batch size, in words, figures and frames."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from rgap.analysis.finding import aligned, data_frame

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from rgap.page import Page


MEASURED = "measured"  # the route of a row whose ranks are those of matrices
_SHOWN = (
    "layer", "kind", "batch_size", "unknowns", "gradient_rank", "weight_rank", "joint_rank",
    "nullity", "route",
)  # fmt: skip


@dataclass(frozen=True)
class AuditRow:
    """One layer at one batch size.

    Attributes:
        layer: module path.
        kind: "linear", "conv1d", "conv2d" or "conv3d"; "step" for a step without weights that
            discards and leads into no single layer.
        batch_size: B.
        unknowns: entries of the layer's input for the batch (before a pool that leads into it).
        gradient_rank: rank of the gradient constraints.
        weight_rank: rank of the weight constraints.
        joint_rank: of both together.
        nullity: unknowns − joint_rank.
        discard: nullity / unknowns.
        condition: σ_1/σ_r of the gradient constraints over what they determine; of their sketch
            where they were sketched, None where nothing was measured.
        route: how the ranks were found.
        exact: False where ``joint_rank`` is only an upper bound, and so ``nullity`` a lower one.
        step: what leads into the layer and passes on less than it is given, such as a pool, a
            mean or a selection; its input is the unknown.
        beside: layers that read the same input: ``joint_rank`` is that of all of them together; or
            the layer itself, where it is called more than once and its calls count like samples.
        by_gradient: largest B at which gradient constraints alone can determine the input, the
            cotangents being known; None where that is not counted.
        by_shifts: largest B at which shifts of a kernel tell all positions of all samples apart,
            with nothing known; 0 if one sample is too much, None where there are no shifts.
    """

    layer: str
    kind: str
    batch_size: int
    unknowns: int
    gradient_rank: int
    weight_rank: int
    joint_rank: int
    nullity: int
    discard: float
    condition: float | None
    route: str = MEASURED
    exact: bool = True
    step: str = ""
    beside: str = ""
    by_gradient: int | None = None
    by_shifts: int | None = None


@dataclass(frozen=True)
class Audit:
    """The table of a network: layer by batch size.

    Attributes:
        model: name of the network's class.
        method: how the joint ranks were found.
        rows: batch size by batch size, within each in forward order.
        notes: what the reader should know about single layers.
    """

    model: str
    method: str
    rows: tuple[AuditRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The audited batch sizes."""
        return tuple(dict.fromkeys(row.batch_size for row in self.rows))

    @property
    def layers(self) -> tuple[str, ...]:
        """The audited layers, in forward order."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    @property
    def largest_exact_batch(self) -> int:
        """Largest audited batch size at which no layer discards anything; 0 if there is none.

        A row whose rank is only a bound does not count as determined.
        """
        exact = [
            b
            for b in self.batch_sizes
            if all(row.nullity == 0 and row.exact for row in self.rows if row.batch_size == b)
        ]
        return max(exact, default=0)

    def row(self, layer: str, batch_size: int) -> AuditRow:
        """One cell of the table.

        Raises:
            KeyError: naming what there is.
        """
        for row in self.rows:
            if row.layer == layer and row.batch_size == batch_size:
                return row
        raise KeyError(
            f"expected a layer of {list(self.layers)} and a batch size of "
            f"{list(self.batch_sizes)}, got {layer!r} and {batch_size}"
        )

    def explain(self) -> str:
        """The table in plain words: where the recursion would stop, and how much is missing."""
        lines = []
        for batch in self.batch_sizes:
            rows = [row for row in self.rows if row.batch_size == batch]
            short = [row for row in reversed(rows) if row.nullity]
            if not short:
                lines.append(
                    f"B = {batch}: every layer determines its input."
                    if all(row.exact for row in rows)
                    else f"B = {batch}: counting finds no equation missing; that is no proof."
                )
                continue
            first = short[0]
            missing = f"{first.nullity} of {first.unknowns} equations are missing"
            lines.append(
                f"B = {batch}: from the output down, '{first.layer}' ({first.kind}) is the first "
                f"layer that falls short: {missing if first.exact else 'at least ' + missing} "
                f"({first.discard:.1%})."
            )
        lines += self._given_away()
        lines.append(
            "Per layer and in sequence; a layer below can still fix what one above leaves open."
        )
        return "\n".join([*lines, *self.notes])

    def _given_away(self) -> list[str]:
        """From which layer up convolutions give their inputs away, by batch size."""
        lines = []
        for batch in self.batch_sizes:
            rows = [row for row in self.rows if row.batch_size == batch]
            told = [row.layer for row in rows if (row.by_shifts or 0) >= batch]
            if told:
                lines.append(
                    f"B = {batch}: shifts of their kernels tell all positions of {len(told)} "
                    f"convolutions apart, the lowest '{told[0]}', before anything is known of "
                    "them: where all steps above these pass cotangents on, features and perhaps "
                    "the data come back whatever falls short above."
                )
        return lines

    def plot(self) -> Figure:
        """The discard heat map, layer by batch size."""
        from rgap.analysis.plots.discard import discard_heatmap

        return discard_heatmap(self)

    def report(self) -> Page:
        """A page for people, one HTML file: every cell with its equation, and the table in words.

        Returns:
            The :class:`~rgap.page.Page`; ``.save("audit.html")`` writes it.

        >>> import rgap
        >>> model = rgap.models.mlp((8,), 3, input_shape=(1, 4, 4), seed=0)
        >>> rgap.analysis.audit(model, (1, 4, 4)).report().verdict.word
        'GIVEN AWAY'
        """
        from rgap.analysis.discard.page import page

        return page(self, {})

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a pandas data frame.

        Raises:
            ImportError: pandas is not installed; it is the extra ``frames``.
        """
        return data_frame([asdict(row) for row in self.rows])

    def summary(self) -> dict[str, Any]:
        """The table as plain numbers, for JSON."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["condition"] = None if row["condition"] == inf else row["condition"]
        return {
            "model": self.model,
            "method": self.method,
            "largest_exact_batch": self.largest_exact_batch,
            "rows": rows,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        sizes = ", ".join(map(str, self.batch_sizes))
        return (
            f"Audit({self.model!r}, {self.method!r}, {len(self.layers)} layers at B = {sizes}, "
            f"largest_exact_batch={self.largest_exact_batch})"
        )

    def __str__(self) -> str:
        head = [name.replace("_", " ") for name in _SHOWN]
        rows = [[_cell(row, name) for name in _SHOWN] for row in self.rows]
        return "\n".join([*aligned([head, *rows]), self.explain()])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in _SHOWN)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(row, n))}</td>" for n in _SHOWN) + "</tr>"
            for row in self.rows
        )
        return f"<table><tr>{head}</tr>{body}</table>"


def _cell(row: AuditRow, name: str) -> str:
    bound = {"joint_rank": "≤ ", "nullity": "≥ "}.get(name, "") if not row.exact else ""
    return f"{bound}{getattr(row, name)}"
