"""``rgap check``, which :mod:`rgap.cli` registers beside its own."""

from __future__ import annotations

from typing import Annotated

import typer

from rgap.cli.arguments import loaded, targets_of, usable_device
from rgap.cli.console import clean, print_json, stdout
from rgap.cli.options import (
    BatchSize,
    Device,
    InputShape,
    Json,
    KnownLabels,
    Model,
    Noise,
    Quiet,
    Seed,
    UpdatePath,
    Weights,
)
from rgap.cli.spoken import options_of, spoken

__all__ = ["check"]


def check(
    context: typer.Context,
    model: Model,
    update: UpdatePath,
    weights: Weights = None,
    batch_size: BatchSize = None,
    labels: KnownLabels = None,
    noise: Noise = 0.0,
    input_shape: InputShape = None,
    device: Device = "cpu",
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which no further trial begins.")
    ] = 20.0,
    quiet: Quiet = False,
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """Look for what may be wrong with an update: its sign, scale, mode, noise, weights."""
    with clean(context):
        import rgap
        from rgap.models.spec import resolve
        from rgap.progress import Progress
        from rgap.report.tables import finding_table

        sent = loaded(update, input_shape)
        network = resolve(model, weights).to(usable_device(device))
        known = None if labels is None else targets_of(labels, None, sent.loss.name)
        with Progress(not quiet) as show:
            show.stage("trying what may be wrong")
            found = rgap.check(
                network,
                sent,
                batch_size=batch_size,
                labels=known,
                noise=noise,
                seed=seed,
                time_limit=time_limit,
            )
        if as_json:
            print_json(found.summary())
        else:
            if found.findings:
                stdout().print(finding_table(found))
            words = spoken(found.explain(), options_of(context))
            stdout().print(words, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(0 if found.ok else 1)
