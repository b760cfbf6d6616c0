"""Tables for a terminal: the audit of a network, the equations behind a recovery."""

from __future__ import annotations

import re
from math import isfinite
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from rgap.analysis.plots.discard import percent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from torch import Tensor

    from rgap.analysis.discard.table import Audit, AuditRow
    from rgap.analysis.hardening.table import Hardening
    from rgap.analysis.joint_rank.table import Identifiability
    from rgap.diagnosis import Check
    from rgap.recovery import LayerReport, Recovery

__all__ = [
    "PLAIN",
    "HeadedTable",
    "audit_matrix",
    "audit_table",
    "change_table",
    "finding_table",
    "joint_table",
    "numbers",
    "own_gradient_table",
    "recovery_table",
    "status_text",
]


class _Names(TextWrapper):
    """Folds at blanks, a longer name behind a point or an underscore, and last within a word."""

    def _split(self, text: str) -> list[str]:
        words = re.split(r"(\s+)", text)
        names = (re.split(r"(?<=[._])(?=\w)", w) if len(w) > self.width else [w] for w in words)
        return [part for parts in names for part in parts if part]


class HeadedTable(Table):
    """A table below a heading, on a narrow console closer, or one below the other by columns.

    Nothing is cut: numbers keep their line, names are folded, headings wrap at words.  Where not
    even one column goes beside those that name a row, every row is a paragraph.
    """

    FOLDED = 16  # characters of a name below which no column of names goes
    FRAMES = (3, 1)  # characters beside a column's own

    def __init__(self, heading: str = "", names: int = 1) -> None:
        super().__init__(box=box.SIMPLE_HEAD)
        self._heading = heading
        self._names = names  # leading columns that name a row

    def layers(self) -> None:
        """A column of layers and one of their kinds."""
        self.add_column("layer")
        self.add_column("kind", style="dim")

    def figures(self, *names: str, style: str = "") -> None:
        """Columns of numbers."""
        for name in names:
            self.add_column(name, justify="right", style=style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._heading:
            yield Text(self._heading, style="bold")
        yield from self._tables(options.max_width) or self._paragraphs()
        yield Text()

    def _tables(self, width: int) -> list[Table]:
        """Tables of this width with all columns, or with some below each other; [] for none."""
        places = list(range(len(self.columns)))
        for frame in self.FRAMES:
            if self._least(places, frame) <= width:
                return [self._of(places, frame, width)]
        names, frame = places[: self._names], self.FRAMES[-1]
        tables, kept = [], list(names)
        for place in places[self._names :]:
            if self._least([*names, place], frame) > width:
                return []
            if self._least([*kept, place], frame) > width:
                tables.append(self._of(kept, frame, width))
                kept = list(names)
            kept.append(place)
        return [*tables, self._of(kept, frame, width)]

    def _size(self, place: int) -> tuple[int, int]:
        """Least width of a column, and that which folds and wraps nothing."""
        column = self.columns[place]
        words, cells = str(column.header), [len(str(cell)) for cell in column.cells]
        whole = max(cells, default=0)
        kept = whole if column.justify == "right" else min(whole, self.FOLDED)
        return max(kept, *(len(word) for word in words.split())), max(whole, len(words))

    def _least(self, places: list[int], frame: int) -> int:
        return sum(self._size(place)[0] + frame for place in places) + 1

    def _of(self, places: list[int], frame: int, width: int) -> Table:
        """Some of the columns as a table that is no wider."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, (frame - 1) // 2))
        sizes = {place: self._size(place) for place in places}
        room = width - self._least(places, frame)
        more = dict.fromkeys(places, 0)
        for place in sorted(places, key=lambda n: sizes[n][1] - sizes[n][0]):
            more[place] = min(room, sizes[place][1] - sizes[place][0])
            room -= more[place]
        for place in places:
            column = self.columns[place]
            table.add_column(
                column.header, justify=column.justify, style=column.style, overflow="fold",
                width=sizes[place][0] + more[place],
            )  # fmt: skip
        for row, cells in zip(self.rows, self._cells(places), strict=True):
            folded = (
                "\n".join(_Names(column.width or width).wrap(cell)) if type(cell) is str else cell
                for column, cell in zip(table.columns, cells, strict=True)
            )
            table.add_row(*folded, end_section=row.end_section)
        return table

    def _cells(self, places: list[int]) -> list[tuple[RenderableType, ...]]:
        return list(zip(*(self.columns[place].cells for place in places), strict=True))

    def _paragraphs(self) -> Iterator[Text]:
        heads = [str(column.header) for column in self.columns]
        above = ""  # the first column names a block of rows only once
        for first, *cells in self._cells(list(range(len(heads)))):
            above = str(first) or above
            parts = zip(heads, [above, *map(str, cells)], strict=True)
            yield Text(", ".join(f"{head} {cell}" for head, cell in parts if cell))


# The words of the library are printed as they are: "[B, 3, 8, 8]" is no markup.
PLAIN: dict[str, Any] = {"highlight": False, "markup": False}

_COLOURS = {
    "EXACT": "bold green",
    "COMPLETED": "yellow",
    "UNDERDETERMINED": "yellow",
    "AMBIGUOUS": "yellow",
    "INCONSISTENT": "bold red",
    "UNSUPPORTED": "magenta",
}


def finding_table(check: Check) -> Table:
    """What a check found, the clearest first.

    >>> from rgap.diagnosis import Check, Finding, Kind
    >>> one = Finding(Kind.SIGN, -1.0, "λ = -1", "-g", 1e6)
    >>> finding_table(Check((one,), frozenset())).row_count
    1
    """
    table = HeadedTable("What is wrong with the update")
    table.add_column("finding", style="bold")
    table.figures("value", "strength")
    table.add_column("what it means")
    for finding in check.findings:
        strength = f"{finding.strength:.0e}" if isfinite(finding.strength) else "exact"
        table.add_row(finding.kind.value, f"{finding.value:.6g}", strength, finding.claim)
    return table


def audit_table(audit: Audit) -> Table:
    """Every row of an audit, one block per batch size, layers in forward order.

    >>> from rgap.analysis.discard.table import Audit, AuditRow
    >>> row = AuditRow("fc", "linear", 2, 64, 20, 16, 48, 16, 0.25, 3.0)
    >>> audit_table(Audit("Sequential", "exact", (row,))).row_count
    1
    """
    joint = "joint rank" if all(row.exact for row in audit.rows) else "joint rank ≤"
    table = HeadedTable(f"Equations of every layer's gradient: {audit.model}", names=2)
    table.figures("B", style="bold")
    table.layers()
    table.figures("unknowns", "gradient rank", "weight rank", joint, "missing", "discard")
    table.add_column("route", style="dim")
    for batch in audit.batch_sizes:
        rows = [row for row in audit.rows if row.batch_size == batch]
        for place, row in enumerate(rows):
            table.add_row(
                str(batch) if place == 0 else "",
                row.layer,
                row.kind,
                f"{row.unknowns:,}",
                f"{row.gradient_rank:,}",
                f"{row.weight_rank:,}",
                f"{row.joint_rank:,}",
                *_shortfall(row),
                _route(row),
                end_section=place == len(rows) - 1,
            )
    return table


def _route(row: AuditRow) -> str:
    """How the ranks were found, and what the row counts beside its own layer."""
    behind = f", behind {row.step}" if row.step else ""
    beside = f", with {row.beside}" if row.beside else ""
    return f"{row.route}{behind}{beside}"


def own_gradient_table(audit: Audit) -> Table:
    """Up to which batch a layer's own gradient says its input, in forward order.

    >>> from rgap.analysis.discard.table import Audit, AuditRow
    >>> row = AuditRow("fc", "linear", 2, 64, 20, 16, 48, 16, 0.25, 3.0, by_gradient=10)
    >>> own_gradient_table(Audit("Sequential", "exact", (row,))).row_count
    1
    """
    table = HeadedTable("Largest batch whose inputs a layer's own gradient can tell")
    table.layers()
    table.figures("its cotangents known", "by shifts alone")
    first = {row.layer: row for row in reversed(audit.rows)}
    for layer in audit.layers:
        row = first[layer]
        most = (row.by_gradient, row.by_shifts)
        if most != (None, None):
            table.add_row(layer, row.kind, *("" if one is None else str(one) for one in most))
    return table


def audit_matrix(audit: Audit) -> Table:
    """The discard alone, layer by batch size: the heat map in figures."""
    table = HeadedTable()
    table.layers()
    cells = {(row.layer, row.batch_size): row for row in audit.rows}
    kinds = {row.layer: row.kind for row in audit.rows}
    table.figures(*(f"B = {batch}" for batch in audit.batch_sizes))
    for layer in audit.layers:
        rows = (cells.get((layer, batch)) for batch in audit.batch_sizes)
        shares = [Text("–") if row is None else _shortfall(row)[1] for row in rows]
        table.add_row(layer, kinds[layer], *shares)
    return table


def joint_table(answer: Identifiability) -> Table:
    """What every layer says by itself, and what it and all above it say of the data.

    >>> import rgap
    >>> net = rgap.models.mlp((8,), 3, input_shape=(1, 4, 4), seed=0)
    >>> joint_table(rgap.analysis.identifiability(net, (1, 4, 4))).row_count
    2
    """
    table = HeadedTable(f"The update of {answer.model} at B = {answer.batch_size}")
    table.layers()
    table.figures("equations", "missing alone", "rank with those above", "gain")
    for row in answer.rows:
        table.add_row(
            row.layer,
            row.kind,
            f"{row.equations:,}",
            _count(row.own_nullity),
            f"{'' if row.exact else '≤ '}{row.rank:,}",
            f"{row.gain:,}",
        )
    return table


def change_table(hardening: Hardening) -> Table:
    """The smallest changes, kind by kind.

    >>> from rgap.analysis.hardening.table import Change, Hardening
    >>> one = Change("batch size", "", 1, 2, 240, 6144, 240 / 6144)
    >>> change_table(Hardening("lenet", (3, 32, 32), 1, 0.03, 0, 3072, (one,))).row_count
    1
    """
    table = HeadedTable(
        f"What takes {hardening.wanted:.0%} of the data out of the update: {hardening.model}"
    )
    table.add_column("change", style="bold")
    table.add_column("layer")
    table.figures("from", "to", "missing", "share")
    for change in hardening.changes:
        table.add_row(
            change.kind,
            change.layer,
            f"{change.before:.4g}",
            f"{change.after:.4g}",
            f"{change.missing:,} of {change.unknowns:,}",
            percent(change.fraction),
        )
    return table


def recovery_table(recovery: Recovery) -> Table:
    """The layers of a recovery from the output down, which is the order they are solved in."""
    table = HeadedTable("Equations, from the output down to the data")
    table.layers()
    table.figures("unknowns", "rank", "missing", "condition")
    table.add_column("route")
    for report in reversed(recovery.layers):
        table.add_row(
            report.layer,
            report.kind,
            f"{report.unknowns:,}",
            _count(report.joint_rank),
            _missing(report),
            f"{report.condition:.1e}" if report.condition and isfinite(report.condition) else "–",
            report.route,
        )
    return table


def numbers(values: Tensor | None) -> str:
    """Labels or counts with commas in between, whole numbers without a point.

    >>> import torch
    >>> numbers(torch.tensor([[3.0], [0.5]]))
    '3, 0.5'
    """
    return "unknown" if values is None else ", ".join(f"{n:g}" for n in values.flatten().tolist())


def status_text(name: str) -> Text:
    """A status in its colour: green for what is certain, red for what contradicts itself."""
    return Text(name, style=_COLOURS.get(name, ""))


def _shortfall(row: AuditRow) -> tuple[Text, Text]:
    style = "green" if row.nullity == 0 else "yellow" if row.discard < 0.5 else "red"
    return Text(f"{row.nullity:,}", style=style), Text(percent(row.discard), style=style)


def _missing(report: LayerReport) -> Text:
    if report.nullity is None:
        return Text("–", style="dim")
    return Text(f"{report.nullity:,}", style="bold yellow" if report.nullity else "green")


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"
