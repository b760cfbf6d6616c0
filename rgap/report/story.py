"""The demonstration in words and tables, for someone who sees it for the first time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rgap.recovery import Route
from rgap.report.tables import audit_matrix, numbers, status_text

if TYPE_CHECKING:
    from rgap.analysis.discard.table import Audit
    from rgap.report.demo import Case, Demo

__all__ = ["tell"]


def tell(demo: Demo) -> RenderableType:
    """The summary of a demonstration, for a rich console; ends with where the pictures are."""
    return Group(
        _heading("1  One picture, one gradient"),
        _text(
            "A client computed the gradient of one photograph in float32 and sent it. From the "
            "gradient and the network alone, solved layer by layer:"
        ),
        _indented(_single_table(demo.single)),
        _heading("2  Two pictures in one gradient"),
        *(_text(line) for line in _pair_lines(demo.pair)),
        _heading("3  Where the information goes"),
        _text("Share of each layer's input that its gradient discards, by batch size B:"),
        _indented(audit_matrix(demo.audit)),
        *(_text(line) for line in _audit_lines(demo.audit)),
        _heading("4  Four pictures of one label in one gradient of a ResNet-18"),
        *(_text(line) for line in _residual_lines(demo.residual)),
        _heading(f"Done in {demo.seconds:.0f} s. Look at the pictures"),
        *(Text(f"  {file}", style="cyan", no_wrap=True) for file in demo.files),
    )


def _single_table(cases: tuple[Case, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("network")
    table.add_column("unknowns", justify="right")
    table.add_column("label sent → found")
    table.add_column("verdict")
    table.add_column("PSNR", justify="right")
    table.add_column("largest error", justify="right")
    table.add_column("certified bound", justify="right")
    table.add_column("time", justify="right")
    for case in cases:
        answer = case.recovery
        label, quality, error = "–", "–", "–"
        if answer.inputs is not None and case.psnr is not None:
            quality = f"{case.psnr[0]:.1f} dB"
            error = f"{float((answer.inputs - case.originals).abs().max()):.1e}"
        if answer.labels is not None:
            label = numbers(answer.labels)
        table.add_row(
            case.network,
            f"{case.originals.numel():,}",
            f"{case.labels[0]} → {label}",
            status_text(answer.status.name),
            quality,
            error,
            "–" if answer.error_bound is None else f"{answer.error_bound:.1e}",
            f"{answer.seconds:.1f} s",
        )
    return table


def _pair_lines(case: Case) -> list[str]:
    """What happens to a batch of two, layer by layer from the output down."""
    answer = case.recovery
    lines = [
        f"{case.network}, two photographs with labels {case.labels[0]} and {case.labels[1]}. "
        f"Given here, not recovered: the {case.given} of both pictures, so that the question is "
        "what the layers below the head determine.",
        f"{answer.status.name}: {answer.reason}.",
    ]
    for report in reversed(answer.layers):
        if report is answer.layers[-1]:  # its input is what was given
            lines.append(f"• {report.layer}: given.")
            continue
        if report.nullity is None or report.route is Route.NOT_REACHED:
            continue
        lines.append(
            f"• {report.layer}: all {report.unknowns:,} unknowns of its input are determined."
            if report.nullity == 0
            else f"• {report.layer}: {report.joint_rank:,} independent equations for "
            f"{report.unknowns:,} unknowns: {report.nullity:,} of {report.unknowns:,} are missing."
        )
    if answer.inputs is None:
        lines.append("So no picture is returned: a mixture of the two would be no answer.")
    return lines


def _residual_lines(case: Case) -> list[str]:
    """What a wide network gives away, in three sentences."""
    answer = case.recovery
    lines = [
        f"{len(case.originals)} photographs with the label {case.labels[0]}, {case.network} with "
        "batch norm in eval mode, nothing given. Its layers have more equations than the batch has "
        "unknowns there, so that their gradients give every value of the network away, from the "
        "output down, and these the pictures.",
        f"{answer.status.name}: {answer.reason}.",
    ]
    if answer.inputs is not None and case.psnr is not None:
        found = "none" if answer.labels is None else numbers(answer.labels)
        lines.append(
            f"PSNR {', '.join(f'{value:.1f}' for value in sorted(case.psnr))} dB, labels {found}, "
            f"{answer.seconds:.0f} s."
        )
    return lines


def _audit_lines(table: Audit) -> list[str]:
    if table.largest_exact_batch:
        first = f"Up to B = {table.largest_exact_batch}, no layer discards anything."
    else:
        first = "At every batch size some layer discards part of its input."
    return [
        first,
        "Counted layer by layer; a layer below can still fix what one above leaves open.",
    ]


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _text(text: str) -> Padding:
    return _indented(Text(text))


def _indented(item: RenderableType) -> Padding:
    return Padding(item, (0, 0, 0, 2))
