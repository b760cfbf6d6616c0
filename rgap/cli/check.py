"""``rgap check``: what may be wrong with an update before it is inverted."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from rgap.cli.command import command
from rgap.cli.console import print_json, stdout
from rgap.cli.mending import Mending
from rgap.cli.options import Json, Labelled, Running, usable_device
from rgap.cli.spoken import worded

__all__ = ["check"]


@command
def check(
    context: typer.Context,
    sent: Labelled,
    mending: Mending,
    work: Running,
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which no further trial begins.", metavar="SECONDS")
    ] = 20.0,
    as_json: Json = False,
) -> int:
    """Look for what may be wrong with an update: its sign, scale, mode, noise, weights."""
    import rgap
    from rgap.progress import Progress

    with Progress(work.shown) as show:  # begins before torch is imported, which takes seconds
        show.stage("reading model and update")
        network = sent.network()
        update = mending.mended(sent.read(), network)
        network.to(usable_device(work.device))
        labels = sent.known(update)
        show.stage("trying what may be wrong")
        result = rgap.check(
            network,
            update,
            batch_size=sent.batch_size,
            labels=labels,
            noise=sent.noise,
            seed=work.seed,
            time_limit=time_limit,
        )
    findings = tuple(worded(one, context, "evidence", "remedy") for one in result.findings)
    result = worded(replace(result, findings=findings), context, "unrun")
    if as_json:
        print_json(result.summary())
    else:
        from rgap.report.tables import finding_table

        if result.findings:
            stdout().print(finding_table(result))
        stdout().print(result.explain(), highlight=False, markup=False, soft_wrap=True)
    return 0 if result.ok else 1
