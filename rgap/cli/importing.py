"""``rgap import``: an update from files of another library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from rgap.cli.capture import described
from rgap.cli.command import command
from rgap.cli.console import print_json
from rgap.cli.options import (
    Force,
    Json,
    LossName,
    ModelOption,
    Reduction,
    check_output,
    either,
    optional,
    range_of,
    shape_of,
    targets_of,
)

if TYPE_CHECKING:
    from torch import nn

    from rgap.update.foreign import Tensors
    from rgap.update.update import Update

__all__ = ["import_"]

KINDS = (
    "a state dict (.pt, .pth), Lightning's checkpoint (.ckpt), safetensors, or arrays (.npz), by "
    "name or in the order of the state dict"
)


@dataclass(frozen=True, kw_only=True)
class Files:
    """What was sent, and the network that it is of."""

    panel: ClassVar[str] = "Files"
    model: ModelOption
    before: Annotated[
        Path | None, optional(f"Weights that the client began with: {KINDS}.", "FILE")
    ] = None
    after: Annotated[Path | None, optional("Weights that it sent back.", "FILE")] = None
    gradients: Annotated[
        Path | None, optional("Its gradients, where it sent these instead of weights.", "FILE")
    ] = None
    prefix: Annotated[
        str,
        typer.Option(
            help="Take the names that begin with it, without it; words of wrappers "
            "(module., _module., _orig_mod.) are left out anyway.",
            metavar="WORDS",
            show_default=False,
        ),
    ] = ""

    def network(self) -> nn.Module:
        """The network with the weights of before, and every option held against the others."""
        from rgap.models.spec import resolve
        from rgap.models.weights import fill
        from rgap.update.interop import arrays_by_name

        if (self.after is None) == (self.gradients is None):
            both = f"both, {self.after} and {self.gradients}"
            got = "neither" if self.after is None else both
            raise ValueError(
                f"--after, --gradients: expected one of them, got {got}; write --before A --after "
                "B --lr 0.01 for weights, --gradients G for gradients"
            )
        if self.after is not None and self.before is None:
            raise ValueError(
                "--before: expected the weights that the client began with, got none; a gradient "
                "is the difference of both, so write --before A"
            )
        model = resolve(self.model)
        if self.before is not None:
            found = self.read(self.before, "--before")
            named = arrays_by_name(model, found) if isinstance(found, list) else found
            try:
                fill(model, named, str(self.before))
            except ValueError as error:
                raise ValueError(f"--before: {str(error).removeprefix('weights: ')}") from error
        return model

    def read(self, path: Path, option: str) -> Tensors:
        """The tensors of a file."""
        from rgap.update.foreign import GRADIENTS, WEIGHTS, tensors

        within = GRADIENTS if option == "--gradients" else WEIGHTS
        return tensors(path, self.prefix, option, within)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the client came from the weights before to those after."""

    panel: ClassVar[str] = "Training"
    lr: Annotated[float | None, optional("Learning rate of its SGD.", "RATE")] = None
    local_steps: Annotated[
        int, typer.Option(help="Steps between before and after.", min=1, metavar="N")
    ] = 1
    weight_decay: Annotated[float, typer.Option(help="Of its SGD.", metavar="X")] = 0.0
    momentum: Annotated[float, typer.Option(help="Of its SGD.", metavar="X")] = 0.0
    nesterov: Annotated[
        bool, typer.Option("--nesterov", help="The momentum was Nesterov's.", metavar="")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """As `rgap.Update.from_delta` takes them."""
        if self.lr is None:
            raise ValueError(
                "--lr: expected the learning rate of the client, got none; weights before and "
                "after differ by it times the gradient, so write --lr 0.01"
            )
        return {
            "lr": self.lr,
            "steps": self.local_steps,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
        }


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What no file says of the client's batch."""

    panel: ClassVar[str] = "Batch"
    batch_size: Annotated[int | None, optional("If it is known.", "N", min=1)] = None
    input_shape: Annotated[
        str | None,
        optional("Of one sample, as in 3,32,32; default: the built-in network's.", "SHAPE"),
    ] = None
    value_range: Annotated[
        str | None, optional("Of the data, as in -1,1; default: open.", "LOW,HIGH")
    ] = None
    labels: Annotated[
        str | None, optional("If they are known, as in 3,5; soft ones as in 0.1,0.9.", "LABELS")
    ] = None
    loss: LossName = None
    reduction: Annotated[
        Reduction,
        typer.Option(help=f"Of the loss of a batch: {either(Reduction)}.", metavar="NAME"),
    ] = Reduction.mean

    def fields(self, model: str) -> dict[str, Any]:
        """Of the update."""
        from rgap.models.spec import expected
        from rgap.update.losses import Loss

        shape, usual = expected(model)
        loss = Loss(self.loss or usual, reduction=self.reduction.value)
        labels = self.labels and targets_of(self.labels, self.batch_size, loss)
        size = self.batch_size if labels is None else len(labels)
        return {
            "batch_size": size,
            "input_shape": shape_of(self.input_shape) or shape,
            "value_range": self.value_range and range_of(self.value_range, "--value-range", "0,1"),
            "loss": loss,
            "labels": labels,
        }


@command
def import_(
    files: Files,
    training: Training,
    stated: Stated,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the update.", metavar="FILE")
    ] = Path("update.safetensors"),
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Write an update from weights before and after training, or from gradients, in any format."""
    check_output(output, ".safetensors")
    model = files.network()
    update = _update(files, model, training, stated.fields(files.model)).fitted(model)
    update.save(output)
    if as_json:
        print_json({"output": str(output), **described(update)})
    else:
        typer.echo(f"{update}\nwritten to {output}")
        weights = "" if files.before is None else f" --weights {files.before}"
        typer.echo(f"next: rgap report {files.model} {output}{weights} -o report.html")
    return 0


def _update(files: Files, model: nn.Module, training: Training, fields: dict[str, Any]) -> Update:
    """From what the files hold."""
    from rgap.update.naming import renamed, renaming
    from rgap.update.update import Update as Sent

    if files.gradients is not None:
        if training != Training():
            raise ValueError(
                "--gradients: are what they are, whatever the training was; leave out --lr, "
                "--local-steps, --weight-decay, --momentum and --nesterov"
            )
        found = files.read(files.gradients, "--gradients")
        if isinstance(found, list):
            return Sent.from_ndarrays(model, found, **fields)
        own = dict(model.named_parameters())
        named = renamed(found, renaming(found, own))
        ordered = {name: named[name] for name in own if name in named}  # safetensors sorts names
        return Sent({**ordered, **named}, **fields)
    assert files.after is not None
    found, how = files.read(files.after, "--after"), training.arguments()
    if isinstance(found, list):
        return Sent.from_ndarrays(model, found, **how, **fields)
    return Sent.from_delta(
        model, renamed(found, renaming(found, model.state_dict())), **how, **fields
    )
