"""``rgap capture``: the update that a client would send."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from rgap.cli.command import command
from rgap.cli.console import print_json
from rgap.cli.options import (
    Device,
    Force,
    Json,
    LossName,
    Network,
    Precision,
    Reduction,
    check_output,
    either,
    optional,
    shape_of,
    targets_of,
    usable_device,
)

if TYPE_CHECKING:
    from rgap.update.update import Update

__all__ = ["capture", "described"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The pictures and labels of a client."""

    panel: ClassVar[str] = "Batch"
    images: Annotated[
        list[str],
        optional(
            "Picture file, folder of pictures, or shipped photographs, as photos:0-3 of 0 to 31; "
            "repeat for more.",
            "PATH",
        ),
    ]
    labels: Annotated[
        str, optional("One per picture, as in 3,5; for mse_loss the target numbers.", "LABELS")
    ]
    input_shape: Annotated[
        str | None,
        optional(
            "Crop and resize pictures to channels,height,width; default: what a built-in "
            "network takes, else the files' own size.",
            "SHAPE",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Client:
    """How a client computes its gradient."""

    panel: ClassVar[str] = "Client"
    loss: LossName = None
    reduction: Annotated[
        Reduction,
        typer.Option(help=f"Of the loss of a batch: {either(Reduction)}.", metavar="NAME"),
    ] = Reduction.mean
    dtype: Annotated[
        Precision | None,
        optional(
            f"What the client computes in: {either(Precision)}; default: the model's own.", "NAME"
        ),
    ] = None
    device: Device = "cpu"


@command
def capture(
    network: Network,
    batch: Batch,
    client: Client,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the update.", metavar="FILE")
    ] = Path("update.safetensors"),
    force: Force = False,
    share_labels: Annotated[
        bool, typer.Option("--share-labels", help="Put the labels in the update.", metavar="")
    ] = False,
    as_json: Json = False,
) -> int:
    """Write the update that a client with these pictures and labels would send."""
    import torch

    import rgap
    from rgap.models.spec import expected
    from rgap.report.pictures import read_pictures
    from rgap.update.losses import Loss

    check_output(output, ".safetensors")
    model = network.network().to(usable_device(client.device))
    shape, usual = expected(network.model)
    loss = Loss(client.loss or usual, reduction=client.reduction.value)
    pictures = read_pictures(batch.images, shape_of(batch.input_shape) or shape)
    update = rgap.capture(
        model,
        pictures,
        targets_of(batch.labels, len(pictures), loss),
        loss,
        share_labels=share_labels,
        dtype=None if client.dtype is None else getattr(torch, client.dtype.value),
    )
    update.save(output)
    if as_json:
        print_json({"output": str(output), **described(update)})
    else:
        typer.echo(f"{update}\nwritten to {output}")
    return 0


def described(update: Update) -> dict[str, Any]:
    """What an update states of itself, for JSON."""
    return {
        "batch_size": update.batch_size,
        "input_shape": list(update.input_shape or ()),
        "loss": update.loss.name,
        "reduction": update.loss.reduction,
        "dtype": str(update.dtype).removeprefix("torch."),
        "labels_shared": update.labels is not None,
        "tensors": len(update.gradients),
        "numbers": sum(g.numel() for g in update.gradients.values()),
    }
