"""``rgap match``, which :mod:`rgap.cli` registers beside its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgap.cli.arguments import loaded, memory_of, targets_of, usable_device
from rgap.cli.console import clean, print_json, say, stdout
from rgap.cli.options import (
    BatchSize,
    Device,
    InputShape,
    Json,
    KnownLabels,
    MatchMethod,
    MemoryLimit,
    Model,
    Noise,
    PriorName,
    Quiet,
    Seed,
    UpdatePath,
    Weights,
    choices,
)

if TYPE_CHECKING:
    from torch import Tensor

    from rgap.matching.checkpoint import Progress
    from rgap.update.local_training import LocalTraining

__all__ = ["match"]

EVERY = 10.0  # seconds between two writings of a checkpoint


def match(
    context: typer.Context,
    model: Model,
    update: UpdatePath,
    method: Annotated[
        str,
        typer.Option(help="How to search.", metavar=choices(MatchMethod, "rgap.presets")),
    ] = "gauss_newton",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the nearest pictures go: a new folder, a .png (batch of one), or a "
            ".safetensors file with every digit.",
            show_default=False,
        ),
    ] = None,
    weights: Weights = None,
    batch_size: BatchSize = None,
    input_shape: InputShape = None,
    labels: KnownLabels = None,
    noise: Noise = 0.0,
    start: Annotated[
        Path | None,
        typer.Option(
            help="Begin with the batch in this .safetensors file, as rgap invert --output writes "
            "it.",
            show_default=False,
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            help="What is likely; default: the method's own.",
            metavar=choices(PriorName, "rgap.priors"),
            show_default=False,
        ),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(help="Starts; default: the method's own.", min=1, show_default=False),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(help="At most; default: the method's own.", min=1, show_default=False),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Iterations without progress that end it.", min=1, show_default=False),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(help="Seconds after which no further step is begun.", show_default=False),
    ] = None,
    local_rate: Annotated[
        float | None,
        typer.Option(
            help="The client's learning rate, for an update over several local steps.",
            show_default=False,
        ),
    ] = None,
    local_size: Annotated[
        int | None,
        typer.Option(help="Samples of a local step; default: all.", min=1, show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on from this file if it is there, and write it every ten seconds and at the "
            "end.",
            show_default=False,
        ),
    ] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
    seed: Seed = 0,
    memory_limit: MemoryLimit = None,
) -> None:
    """Search the batch whose update comes nearest, on any network; nothing is certified."""
    with clean(context):
        import rgap
        from rgap.models.spec import resolve
        from rgap.report.results import check_target, print_recovery, write_recovery

        sent = loaded(update, input_shape)
        if output is not None:
            check_target(output, sent)
        if resume is not None and not resume.parent.is_dir():
            raise ValueError(f"--resume: no folder {resume.parent}; create it first")
        held = rgap.Checkpoint.load(resume) if resume is not None and resume.exists() else None
        callback = None if resume is None else _written(resume)
        found = rgap.match(
            resolve(model, weights),
            sent,
            method=method,
            labels=None if labels is None else targets_of(labels, None, sent.loss.name),
            batch_size=batch_size,
            start=None if start is None else _read(start),
            prior=prior,
            local=_local(local_rate, local_size),
            noise=noise,
            restarts=restarts,
            iterations=iterations,
            patience=patience,
            time_limit=inf if time_limit is None else time_limit,
            callback=callback,
            checkpoint=held,
            device=usable_device(device),
            seed=seed,
            progress=not quiet,
            memory_budget=memory_of(memory_limit),
        )
        if resume is not None and found.checkpoint is not None:
            found.checkpoint.save(resume)
        near = replace(found, inputs=found.nearest, labels=found.nearest_labels, candidates=())
        written = None
        if output is not None:
            written = write_recovery(near, output, sent.value_range)
        if as_json:
            kept = None if written is None else str(written)
            print_json({**found.summary(), "labels": near.summary()["labels"], "output": kept})
        else:
            print_recovery(stdout(), found, explain=False)
            if written is not None:
                stdout().print(f"Pictures: {written}", highlight=False, soft_wrap=True)
        if output is not None and written is None:
            say(f"nothing written to {output}: {found.reason}")
    raise typer.Exit(0 if found.inputs is not None else 1)


def _written(resume: Path) -> Callable[[Progress], None]:
    """A callback that writes down where a search is, now and then."""
    last = time.monotonic()

    def told(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            progress.checkpoint.save(resume)
            last = time.monotonic()

    return told


def _read(path: Path) -> Tensor:
    """The batch in a file of recovered pictures."""
    from rgap.update.storage import opened

    if not path.is_file():
        raise ValueError(f"--start: no file {path}; write one with rgap invert --output")
    tensors = opened(path, "rgap invert --output")[1]
    for name in ("inputs", "candidate-0-inputs"):
        if name in tensors:
            return tensors[name]
    raise ValueError(
        f"--start: expected a file with the tensor 'inputs', got {sorted(tensors)}; write one with "
        f"rgap invert --output {path.name}"
    )


def _local(rate: float | None, size: int | None) -> LocalTraining | None:
    from rgap.update.local_training import LocalTraining

    if rate is None:
        if size is not None:
            raise ValueError("--local-size: expected a rate with it; write --local-rate 0.01 too")
        return None
    return LocalTraining(rate, size)
