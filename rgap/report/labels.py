"""Label estimates on the terminal: how often each class occurs, and how sure that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from rgap.report.tables import PLAIN, HeadedTable, numbers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from rich.table import Table

    from rgap.labels import LabelEstimate

__all__ = ["labels_table", "print_labels"]

_SURE, _LIKELY = 0.9, 0.5


def print_labels(console: Console, estimates: Mapping[str, LabelEstimate]) -> None:
    """The table of counts, then in words what each method assumes or why it does not answer."""
    if any(one.present is not None for one in estimates.values()):
        console.print(labels_table(estimates))
    for name, one in estimates.items():
        if one.labels is not None:
            console.print(f"{name}: labels {numbers(one.labels)}", **PLAIN)
            if one.reason:
                console.print(f"  Note: {one.reason}.", **PLAIN)
            if len(estimates) == 1:
                console.print(f"  It assumes: {'; '.join(one.assumptions)}.", **PLAIN)
        else:
            console.print(f"{name}: undecided: {one.reason}.", **PLAIN)


def labels_table(estimates: Mapping[str, LabelEstimate]) -> Table:
    """Counts with their confidence, a row for each class that some method names.

    >>> import torch
    >>> from rgap.labels import LabelEstimate
    >>> one = LabelEstimate.of(torch.tensor([0, 2, 1]), torch.ones(3), "best", ())
    >>> labels_table({"best": one}).row_count
    3
    """
    table = HeadedTable("Counts, with confidence")
    shown = {name: one for name, one in estimates.items() if one.present is not None}
    table.figures("class", style="bold")
    table.figures(*shown)
    marks = [one.present for one in shown.values() if one.present is not None]
    classes = len(marks[0])
    named = [c for c in range(classes) if any(bool(mark[c]) for mark in marks)]
    for c in named:
        table.add_row(str(c), *(_cell(one, c) for one in shown.values()))
    if len(named) < classes:
        rest = [c for c in range(classes) if c not in named]
        least = [min(float(one.confidence[c]) for c in rest) for one in shown.values()]
        table.add_row(f"{len(rest)} others", *(_styled("0", sure) for sure in least))
    return table


def _cell(one: LabelEstimate, c: int) -> Text:
    if one.counts is not None:
        return _styled(str(int(one.counts[c])), float(one.confidence[c]))
    return _styled("≥ 1" if one.present is not None and one.present[c] else "0", one.confidence[c])


def _styled(count: str, confidence: Any) -> Text:
    sure = float(confidence)
    style = "green" if sure >= _SURE else "yellow" if sure >= _LIKELY else "red"
    text = Text(count)
    return text.append(f"  {100 * sure:3.0f}%", style=style)
