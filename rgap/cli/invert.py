"""``rgap invert`` and ``rgap labels``, which :mod:`rgap.cli` registers beside its own."""

from __future__ import annotations

from dataclasses import replace
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
    LabelMethod,
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
from rgap.cli.spoken import options_of, spoken

if TYPE_CHECKING:
    from torch import nn

    from rgap.labels import LabelEstimate
    from rgap.recovery import Recovery
    from rgap.update.update import Update

__all__ = ["invert", "labels"]

_CODES = {"EXACT": 0, "INCONSISTENT": 3, "UNSUPPORTED": 4}  # see cli.EXIT_CODES


def invert(
    context: typer.Context,
    model: Model,
    update: UpdatePath,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where recovered pictures go: a new folder, a .png (batch of one), or a "
            ".safetensors file with every digit.",
            show_default=False,
        ),
    ] = None,
    weights: Weights = None,
    batch_size: BatchSize = None,
    input_shape: InputShape = None,
    labels: KnownLabels = None,
    noise: Noise = 0.0,
    device: Device = "cpu",
    complete: Annotated[
        bool,
        typer.Option(
            "--complete",
            help="Where the equations end, go on and let a prior choose what they leave open.",
            metavar="",
        ),
    ] = False,
    prior: Annotated[
        str | None,
        typer.Option(
            help="Of --complete: that of pictures, total variation (isotropic or not), or distance "
            "from one half; default: natural, that of pictures where inputs have neighbours.",
            metavar=choices(PriorName, "rgap.priors"),
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which --complete begins no further step.")
    ] = 60.0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say it layer by layer.", metavar="")
    ] = False,
    quiet: Quiet = False,
    why: Annotated[
        bool, typer.Option("--why", help="Rank what stands in the way.", metavar="")
    ] = False,
    as_json: Json = False,
    seed: Seed = 0,
    memory_limit: MemoryLimit = None,
) -> None:
    """Recover from an update what its equations determine, and say what they do not."""
    with clean(context):
        import rgap
        from rgap.models.spec import resolve
        from rgap.report.results import check_target, print_recovery, write_recovery

        if prior is not None and not complete:
            raise ValueError("--prior: chooses in a completion only; write --complete as well")
        sent = loaded(update, input_shape)
        if output is not None:
            check_target(output, sent)
        room = memory_of(memory_limit)
        network = resolve(model, weights)
        known = None if labels is None else targets_of(labels, None, sent.loss.name)
        found = rgap.invert(
            network,
            sent,
            labels=known,
            batch_size=batch_size,
            complete=complete,
            prior=prior,
            time_limit=time_limit,
            noise=noise,
            device=usable_device(device),
            seed=seed,
            progress=not quiet,
            memory_budget=room,
        )
        found = replace(found, reason=spoken(found.reason, options_of(context)))
        written = None if output is None else write_recovery(found, output, sent.value_range)
        causes = None
        if why:
            from rgap.analysis.causes.explain import explain as rank_causes

            causes = rank_causes(found, network, sent)
        if as_json:
            told = {} if causes is None else {"why": causes.numbers()}
            kept = {"output": None if written is None else str(written)}
            print_json({**found.summary(), **told, **kept})
        else:
            print_recovery(stdout(), found, explain=explain)
            if causes is not None:
                stdout().print(f"\n{causes.text}", highlight=False, soft_wrap=True)
            if written is not None:
                stdout().print(f"Pictures: {written}", highlight=False, soft_wrap=True)
        if output is not None and written is None:
            say(f"nothing written to {output}: {_why_not(found)}")
    raise typer.Exit(_CODES.get(found.status.name, 1))


def _why_not(found: Recovery) -> str:
    if found.inputs is not None:
        return "several batches fit; name a folder for all of them"
    if found.candidates:
        return "the completion found no batch that reproduces the update"
    return "the batch is not determined"


def labels(
    context: typer.Context,
    model: Model,
    update: UpdatePath,
    method: Annotated[
        str,
        typer.Option(
            help="One method, or all of them; exact recovers the batch first.",
            metavar=choices(LabelMethod, "rgap.labels"),
        ),
    ] = "best",
    weights: Weights = None,
    batch_size: BatchSize = None,
    input_shape: InputShape = None,
    noise: Noise = 0.0,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
    seed: Seed = 0,
    memory_limit: MemoryLimit = None,
) -> None:
    """Read the labels of a batch off the last layer's gradient: how often each class occurs."""
    with clean(context):
        from rgap.labels import METHODS
        from rgap.models.spec import resolve
        from rgap.report.labels import print_labels

        sent = loaded(update, input_shape)
        room = memory_of(memory_limit)
        network = resolve(model, weights)
        names = list(METHODS.working()) if method == LabelMethod.all else [method]
        place = usable_device(device)
        found = {
            name: _read(network, sent, name, batch_size, noise, seed, place, not quiet, room)
            for name in names
        }
        if as_json:
            print_json(
                {
                    "batch_size": sent.batch_size if batch_size is None else batch_size,
                    "classes": len(next(iter(found.values())).confidence),
                    "methods": {name: one.summary() for name, one in found.items()},
                }
            )
        else:
            print_labels(stdout(), found)
    raise typer.Exit(0 if any(one.decided for one in found.values()) else 1)


def _read(
    network: nn.Module,
    sent: Update,
    method: str,
    batch_size: int | None,
    noise: float,
    seed: int,
    device: str,
    progress: bool,
    room: float | None,
) -> LabelEstimate:
    """One method's answer; `exact` inverts the update for the features that it needs."""
    import torch

    import rgap
    from rgap.labels import LabelEstimate, estimate, head_features

    if method != "exact":
        return estimate(
            network, sent, method=method, batch_size=batch_size, device=device, memory_budget=room
        )
    # Before the work of an inversion: what is refused is refused at once.
    undecided = estimate(network, sent, method=method, batch_size=batch_size, memory_budget=room)
    if sent.local_steps > 1:
        return undecided
    recovery = rgap.invert(
        network, sent, batch_size=batch_size, noise=noise, seed=seed, device=device,
        progress=progress, memory_budget=room,
    )  # fmt: skip
    if "targets" not in recovery.certified:
        return replace(undecided, reason=f"{recovery.status.name}: {recovery.reason}")
    found = recovery.inputs
    features = None if found is None else head_features(network, sent, found)
    if features is None and recovery.labels is not None:  # certified, but not by the identity
        counts = torch.bincount(recovery.labels, minlength=len(undecided.confidence))
        sure = counts.new_ones(len(counts), dtype=torch.float64)
        return LabelEstimate.of(counts, sure, method, ("the recovery certifies the targets",))
    return estimate(
        network, sent, method=method, batch_size=batch_size, features=features, device=device,
        memory_budget=room,
    )  # fmt: skip
