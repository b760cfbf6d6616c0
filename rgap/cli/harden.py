"""``rgap harden``: the smallest changes that take part of the data out of the update."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from rgap.cli.command import command
from rgap.cli.console import print_json, stdout
from rgap.cli.options import DefenceName, Json, Sample, TimeLimit, Work, either, optional

__all__ = ["harden"]


@command
def harden(
    sample: Sample,
    work: Work,
    fraction: Annotated[
        float, typer.Option(help="Share of the data that shall not be identifiable.", metavar="X")
    ] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Batch size as it is.", min=1, metavar="N")] = 1,
    changes: Annotated[
        str, typer.Option(help="What may change, with commas in between.", metavar="NAMES")
    ] = "batch size,channels,stride,noise",
    defence: Annotated[
        str,
        optional(
            "Defences to look for the weakest level of, with commas in between: "
            f"{either(DefenceName, 'rgap.defences')}.",
            "NAMES",
        ),
    ] = "",
    time_limit: TimeLimit = None,
    as_json: Json = False,
) -> int:
    """Find the smallest changes after which part of the data is not in the update."""
    from rgap.analysis.hardening.harden import harden as search
    from rgap.report.tables import change_table

    network, (shape, loss) = sample.network(), sample.declared()
    kinds = tuple(part.strip() for part in changes.split(","))
    defences = tuple(part.strip() for part in defence.split(",") if part.strip())
    result = search(
        network, shape, fraction, batch_size, changes=kinds, defence=defences, loss=loss,
        time_limit=time_limit, **work.arguments(),
    )  # fmt: skip
    result = replace(result, model=sample.model)
    if as_json:
        print_json(result.summary())
        return 0
    if result.changes:
        stdout().print(change_table(result))
    stdout().print(result.explain(), highlight=False)
    return 0
