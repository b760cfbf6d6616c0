"""The command line: ``rgap demo | capture | check | audit | invert | match | labels | harden``.

Nothing here imports torch until a command needs it, so that ``rgap --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from rgap._version import __version__
from rgap.cli.arguments import (
    check_output,
    memory_of,
    shape_of,
    targets_of,
    usable_device,
    whole_numbers,
)
from rgap.cli.check import check
from rgap.cli.console import clean, print_json, stderr, stdout
from rgap.cli.harden import harden, print_joint
from rgap.cli.invert import invert, labels
from rgap.cli.match import match
from rgap.cli.options import (
    Device,
    Json,
    LossName,
    MemoryLimit,
    Method,
    Model,
    Precision,
    Quiet,
    Reduction,
    Seed,
    TimeLimit,
    Weights,
)

__all__ = ["app", "main"]

EXIT_CODES = """Exit codes:

- 0: success; for invert, EXACT: recovered and certified; for match, the update is reproduced
- 1: not recovered exactly: COMPLETED, UNDERDETERMINED or AMBIGUOUS; for check, something is wrong
- 2: wrong usage or bad input
- 3: INCONSISTENT: the update does not fit the model as declared
- 4: UNSUPPORTED: a step of the network cannot be inverted"""

app = typer.Typer(
    name="rgap",
    help="What a client's gradient gives away about its data: counted, recovered, certified.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rgap {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_version, metavar=""
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors.", metavar="")
    ] = False,
) -> None:
    """What a client's gradient gives away about its data: counted, recovered, certified."""
    context.obj = debug


@app.command()
def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("demo"),
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """See it work: recover photographs, see where it stops and why (under a minute)."""
    with clean(context):
        from rgap.report.demo import run
        from rgap.report.story import tell

        found = run(output, seed=seed, console=stderr())
        if as_json:
            print_json(found.summary())
        else:
            stdout().print(tell(found))


@app.command()
def capture(
    context: typer.Context,
    model: Model,
    images: Annotated[
        list[str],
        typer.Option(
            help="Picture file, folder of pictures, or shipped photographs photos:0-3; "
            "repeat for more.",
            show_default=False,
        ),
    ],
    labels: Annotated[
        str,
        typer.Option(
            help="One per picture, as in 3,5; for mse_loss the target numbers.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option(help="Where to write the update.")] = Path(
        "update.safetensors"
    ),
    loss: LossName = None,
    reduction: Annotated[Reduction, typer.Option(help="Of the loss.")] = Reduction.mean,
    dtype: Annotated[
        Precision | None,
        typer.Option(
            help="Precision the client computes in; default: the model's own.", show_default=False
        ),
    ] = None,
    weights: Weights = None,
    device: Device = "cpu",
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Crop and resize pictures to channels,height,width; default: what a built-in "
            "network takes, else the files' own size.",
            show_default=False,
        ),
    ] = None,
    share_labels: Annotated[
        bool, typer.Option("--share-labels", help="Put the labels in the update.", metavar="")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the update that a client with these pictures and labels would send."""
    with clean(context):
        import torch

        import rgap
        from rgap.models.spec import expected, resolve
        from rgap.report.pictures import read_pictures
        from rgap.update.losses import Loss

        check_output(output, ".safetensors")
        network = resolve(model, weights).to(usable_device(device))
        shape, usual = expected(model)
        chosen = Loss(loss or usual, reduction=reduction.value)
        pictures = read_pictures(images, shape_of(input_shape) or shape)
        update = rgap.capture(
            network,
            pictures,
            targets_of(labels, len(pictures), chosen.name),
            chosen,
            share_labels=share_labels,
            dtype=None if dtype is None else getattr(torch, dtype.value),
        )
        update.save(output)
        if as_json:
            print_json(
                {
                    "output": str(output),
                    "batch_size": update.batch_size,
                    "input_shape": list(update.input_shape or ()),
                    "loss": chosen.name,
                    "reduction": chosen.reduction,
                    "dtype": str(update.dtype).removeprefix("torch."),
                    "labels_shared": share_labels,
                    "tensors": len(update.gradients),
                    "numbers": sum(g.numel() for g in update.gradients.values()),
                }
            )
        else:
            typer.echo(f"{update}\nwritten to {output}")


@app.command()
def audit(
    context: typer.Context,
    model: Model,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of one sample, as in 3,32,32; default: the built-in network's, else "
            "3,32,32.",
            show_default=False,
        ),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes to audit.")] = "1,2,4,8",
    loss: LossName = None,
    method: Annotated[
        Method,
        typer.Option(
            help="Measured ranks, random sketches for large layers, or counts from the sizes alone."
        ),
    ] = Method.exact,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write the heat map: .png, .pdf or .svg.", show_default=False),
    ] = None,
    joint: Annotated[
        bool,
        typer.Option(
            "--joint",
            help="The whole update at once: its rank as a function of the data.",
            metavar="",
        ),
    ] = False,
    weights: Weights = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
    seed: Seed = 0,
    memory_limit: MemoryLimit = None,
    time_limit: TimeLimit = None,
) -> None:
    """Count, layer by layer, how much of a batch the gradient determines."""
    with clean(context):
        from rgap.models.spec import expected, resolve
        from rgap.report.pictures import figure_format, save_figure
        from rgap.report.tables import audit_table

        if plot is not None:
            figure_format(plot)
            check_output(plot)
        room = memory_of(memory_limit)
        batches = whole_numbers(batch_sizes, "--batch-sizes", "1,2,4,8")
        network = resolve(model, weights)
        shape, usual = expected(model)
        wanted = shape_of(input_shape) or shape or (3, 32, 32)
        if joint:
            print_joint(
                network, model, wanted, batches, loss or usual, plot, as_json, seed,
                usable_device(device), quiet, room, time_limit,
            )  # fmt: skip
            return
        from rgap.analysis.discard.audit import audit as measure

        found = measure(
            network,
            wanted,
            batches,
            loss=loss or usual,
            method=method.value,
            seed=seed,
            device=usable_device(device),
            progress=not quiet,
            memory_budget=room,
            time_limit=time_limit,
        )
        # The name that was asked for says more than nn.Sequential.
        found = replace(found, model=model)
        if plot is not None:
            save_figure(found.plot(), plot)
        if as_json:
            print_json({**found.summary(), "plot": None if plot is None else str(plot)})
            return
        console = stdout()
        console.print(audit_table(found))
        console.print(found.explain(), highlight=False)
        if plot is not None:
            console.print(f"Heat map: {plot}", highlight=False, soft_wrap=True)


app.command(name="check")(check)
app.command(name="invert", epilog=EXIT_CODES)(invert)
app.command(name="match")(match)
app.command(name="labels")(labels)
app.command(name="harden")(harden)


def main() -> None:
    """Entry point of the ``rgap`` command."""
    app()
