"""``rgap harden`` and ``rgap audit --joint``, which :mod:`rgap.cli` registers beside its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgap.cli.arguments import memory_of, shape_of, usable_device
from rgap.cli.console import clean, print_json, say, stdout
from rgap.cli.options import (
    DefenceName,
    Device,
    Json,
    LossName,
    MemoryLimit,
    Model,
    Quiet,
    Seed,
    TimeLimit,
    Weights,
    choices,
)

if TYPE_CHECKING:
    from torch import nn

    from rgap.analysis.joint_rank.table import Identifiability

__all__ = ["harden", "print_joint"]


def harden(
    context: typer.Context,
    model: Model,
    fraction: Annotated[
        float, typer.Option(help="Share of the data that shall not be identifiable.")
    ] = 0.1,
    input_shape: Annotated[
        str | None,
        typer.Option(help="Shape of one sample, as in 3,32,32.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Batch size as it is.", min=1)] = 1,
    changes: Annotated[
        str, typer.Option(help="What may change, with commas in between.")
    ] = "batch size,channels,stride,noise",
    defence: Annotated[
        str,
        typer.Option(
            help="Defences to look for the weakest level of, with commas in between.",
            metavar=choices(DefenceName, "rgap.defences"),
            show_default=False,
        ),
    ] = "",
    loss: LossName = None,
    weights: Weights = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
    seed: Seed = 0,
    memory_limit: MemoryLimit = None,
    time_limit: TimeLimit = None,
) -> None:
    """Find the smallest changes after which part of the data is not in the update."""
    with clean(context):
        from dataclasses import replace

        from rgap.analysis.hardening.harden import harden as search
        from rgap.models.spec import expected, resolve
        from rgap.report.tables import change_table

        room = memory_of(memory_limit)
        network = resolve(model, weights)
        shape, usual = expected(model)
        wanted = shape_of(input_shape) or shape or (3, 32, 32)
        kinds = tuple(part.strip() for part in changes.split(","))
        found = search(
            network,
            wanted,
            fraction,
            batch_size,
            changes=kinds,
            defence=tuple(part.strip() for part in defence.split(",") if part.strip()),
            loss=loss or usual,
            seed=seed,
            device=usable_device(device),
            progress=not quiet,
            memory_budget=room,
            time_limit=time_limit,
        )
        found = replace(found, model=model)
        if as_json:
            print_json(found.summary())
            return
        if found.changes:
            stdout().print(change_table(found))
        stdout().print(found.explain(), highlight=False)


def print_joint(
    network: nn.Module,
    name: str,
    shape: tuple[int, ...],
    batches: tuple[int, ...],
    loss: str,
    plot: Path | None,
    as_json: bool,
    seed: int,
    device: str,
    quiet: bool,
    room: float | None,
    time_limit: float | None,
) -> None:
    """``rgap audit --joint``: the rank of the whole update at every batch size."""
    from dataclasses import replace

    from rgap.allowance import OutOfTime, seconds_of
    from rgap.analysis.joint_rank.identifiability import identifiability
    from rgap.analysis.plots.null_space import nullity_curves
    from rgap.report.pictures import save_figure
    from rgap.report.tables import joint_table

    found: list[Identifiability] = []
    end = time.perf_counter() + seconds_of(time_limit)
    for batch in batches:
        left = max(end - time.perf_counter(), 1e-3)
        try:
            one = identifiability(
                network, shape, batch, loss=loss, seed=seed, device=device, progress=not quiet,
                memory_budget=room, time_limit=left,
            )  # fmt: skip
        except OutOfTime as reason:
            if not found:
                raise
            say(f"B = {batch} and what follows was not measured ({reason})")
            break
        found.append(replace(one, model=name))
    if plot is not None:
        save_figure(nullity_curves(found), plot)
    if as_json:
        written = None if plot is None else str(plot)
        print_json({"model": name, "joint": [one.summary() for one in found], "plot": written})
        return
    for one in found:
        stdout().print(joint_table(one))
        stdout().print(one.explain(), highlight=False)
    if plot is not None:
        stdout().print(f"Figure: {plot}", highlight=False, soft_wrap=True)
