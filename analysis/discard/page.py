"""An audit as a page for people: how much of a batch each layer's gradient lets through."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING

from rgap.page import Cell, Page, Section, Table, Text, Verdict

if TYPE_CHECKING:
    from rgap.analysis.discard.table import Audit, AuditRow

__all__ = ["page", "section"]


def page(audit: Audit, settings: Mapping[str, str]) -> Page:
    """The page of an audit alone; see :meth:`rgap.analysis.Audit.report`."""
    told = {"network": audit.model, "ranks": audit.method, **settings}
    return Page(f"How much {audit.model} gives away", _verdict(audit), [section(audit)], told)


def section(audit: Audit) -> Section:
    """The table of layers and batch sizes, every cell with its equation, and the table in words."""
    sizes = audit.batch_sizes
    rows: list[list[Cell | str]] = [
        [layer, *(_cell(audit, layer, size) for size in sizes)] for layer in reversed(audit.layers)
    ]
    caption = (
        "Share of the input of each layer that its own equations do not determine, from the output "
        "down, by batch size B"
    )
    table = Table(caption, ["layer", *(f"B = {size}" for size in sizes)], rows)
    first, *rest = audit.explain().splitlines()
    return Section("What each layer lets through", [table, Text("In words:", [first, *rest])])


def _cell(audit: Audit, layer: str, size: int) -> Cell:
    """A share, and the ranks that it is of."""
    try:
        row = audit.row(layer, size)
    except KeyError:
        return Cell("–")
    share = "< 0.1%" if row.nullity and row.discard < 0.001 else f"{row.discard:.1%}"
    return Cell(share, row.discard, _equation(row))


def _equation(row: AuditRow) -> str:
    """The counting of one cell."""
    bound = "at most " if not row.exact else ""
    condition = (
        "" if row.condition is None or row.condition == inf else f", condition {row.condition:.1e}"
    )
    return (
        f"rank {bound}{row.joint_rank} (gradient constraint {row.gradient_rank}, weight constraint "
        f"{row.weight_rank}) of {row.unknowns} unknowns, {row.nullity} missing{condition}"
    )


def _verdict(audit: Audit) -> Verdict:
    """For someone who is no mathematician."""
    largest, sizes = audit.largest_exact_batch, audit.batch_sizes
    if largest == max(sizes):
        return Verdict(
            "GIVEN AWAY",
            "given away",
            f"Every layer of this network lets through all of a batch of up to {largest}: an "
            "update of that size gives its data away.",
        )
    if largest:
        return Verdict(
            "GIVEN AWAY",
            "given away",
            f"An update of up to {largest} samples gives them away layer by layer; at larger "
            "batches equations are missing in the layers shown below.",
        )
    return Verdict(
        "EQUATIONS MISSING",
        "partly",
        "At every batch size looked at, some layer determines less than all of its input. What is "
        "missing there may still be determined by layers below, or guessed.",
    )
