"""The options of the commands, declared once: each by itself, and in the groups that they share.

A group is a frozen dataclass whose fields are options of every command that takes it
(:mod:`rgap.cli.command`); its methods read what was typed, before any work is done.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

import typer

from rgap.plugins import offered

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rgap.update.losses import Loss
    from rgap.update.update import Update

__all__ = [
    "DefenceName",
    "Device",
    "Force",
    "Json",
    "LabelMethod",
    "Labelled",
    "LossName",
    "MatchMethod",
    "Network",
    "Precision",
    "PriorName",
    "RankMethod",
    "Reduction",
    "Running",
    "Sample",
    "Seed",
    "Sent",
    "TimeLimit",
    "Work",
    "check_output",
    "either",
    "optional",
    "shape_of",
    "targets_of",
    "usable_device",
    "whole_numbers",
]


class Precision(StrEnum):
    """What a client may compute in."""

    float32 = "float32"
    float64 = "float64"


class RankMethod(StrEnum):
    """How `rgap audit` finds joint ranks."""

    exact = "exact"
    sketch = "sketch"
    formula = "formula"


class PriorName(StrEnum):
    """What may be taken for likely; a test compares the names with `rgap.priors.PRIORS`."""

    natural = "natural"
    patches = "patches"
    denoiser = "denoiser"
    tv = "tv"
    anisotropic = "anisotropic"
    squares = "squares"


class MatchMethod(StrEnum):
    """How `rgap match` searches; a test compares the names with `rgap.matching.METHODS`."""

    gauss_newton = "gauss_newton"
    dlg = "dlg"
    ig = "ig"
    gradinversion = "gradinversion"
    latent = "latent"
    gias = "gias"
    gifd = "gifd"
    untrained = "untrained"


class LabelMethod(StrEnum):
    """How `rgap labels` reads labels; a test compares the names with `rgap.labels.METHODS`."""

    best = "best"
    exact = "exact"
    ilrg = "ilrg"
    rlg = "rlg"
    llg_star = "llg_star"
    llg = "llg"
    gradinversion = "gradinversion"
    idlg = "idlg"
    all = "all"


class DefenceName(StrEnum):
    """What `rgap harden` may look for; a test compares the names with those that have levels."""

    prune = "prune"
    quantise = "quantise"
    sign = "sign"


class Reduction(StrEnum):
    """How the loss of a batch is formed."""

    mean = "mean"
    sum = "sum"


def either(choices: type[StrEnum], group: str = "") -> str:
    """The values of an option in words, with those that installed distributions offer.

    Args:
        choices: what is built in.
        group: of entry points, as "rgap.labels"; "" for none.

    >>> either(Reduction)
    'mean or sum'
    """
    *values, last = dict.fromkeys((*choices, *(offered(group) if group else ())))
    return f"{', '.join(values)} or {last}"


def optional(help: str, metavar: str, *names: str, **more: Any) -> Any:
    """An option that is not set unless it is typed; its help says what happens then."""
    return typer.Option(*names, help=help, metavar=metavar, show_default=False, **more)


_HINTS = {
    "model": "A built-in network (lenet, cnn6, cnn6d, fcn3, mlp, lenet5, vgg, resnet; for ImageNet "
    "resnet18, resnet34, resnet50, vgg11 to vgg19, vgg11_bn to vgg19_bn, mobilenet_v2, "
    "densenet121, convnext_tiny), with options as in lenet:classes=100 or "
    "resnet:channels=64x128x256, or package.module:factory.",
    "weights": "The network's weights: safetensors, a state dict of torch.save (.pt), a checkpoint "
    "(.ckpt) or arrays (.npz); without it those of the factory; "
    "what is drawn is drawn with seed 0, the same in every command.",
    "loss": "A loss by name: cross_entropy, nll_loss, mse_loss, binary_cross_entropy, the same "
    "with _with_logits behind it, focal_loss or sigmoid_focal_loss; default: the built-in "
    "network's own, else cross_entropy.",
    "json": "Print one JSON document on standard output and nothing else.",
    "memory": "To take on top of model and update, as in 4GB, 500MB or 2GiB; default: half of what "
    "is free.",
}

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, …", metavar="NAME")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace what is there already, once all is done.", metavar=""),
]
Json = Annotated[bool, typer.Option("--json", help=_HINTS["json"], metavar="")]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="MODEL", help=_HINTS["model"], show_default=False)
]
LossName = Annotated[str | None, optional(_HINTS["loss"], "NAME")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Show no progress, as --no-progress.", metavar=""),
]
NoProgress = Annotated[bool, typer.Option("--no-progress", hidden=True)]
Seed = Annotated[
    int, typer.Option(help="Of everything that is drawn at random.", min=0, metavar="N")
]
TimeLimit = Annotated[
    float | None,
    optional("Seconds for the whole command, kept within a tenth; default: none.", "SECONDS"),
]


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network of a command: its name, and where its weights come from."""

    panel: ClassVar[str] = "Network"
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_HINTS["model"], show_default=False)]
    weights: Annotated[Path | None, optional(_HINTS["weights"], "FILE")] = None

    def network(self) -> nn.Module:
        """The network itself."""
        from rgap.models.spec import resolve

        return resolve(self.model, self.weights)


@dataclass(frozen=True, kw_only=True)
class Sample(Network):
    """A network, and what a client would give it: of commands that read no update."""

    panel: ClassVar[str] = "Network and samples"
    input_shape: Annotated[
        str | None,
        optional(
            "Shape of one sample, as in 3,32,32; default: the built-in network's, else 3,32,32.",
            "SHAPE",
        ),
    ] = None
    loss: LossName = None

    def declared(self) -> tuple[tuple[int, ...], str]:
        """Shape of one sample and name of the loss, those of the built-in network by default."""
        from rgap.models.spec import expected

        shape, usual = expected(self.model)
        return shape_of(self.input_shape) or shape or (3, 32, 32), self.loss or usual


@dataclass(frozen=True, kw_only=True)
class Sent(Network):
    """An update, the network that it was computed on, and what the update does not state."""

    panel: ClassVar[str] = "Network and update"
    update: Annotated[
        Path, typer.Argument(metavar="UPDATE", help="What rgap capture wrote.", show_default=False)
    ]
    batch_size: Annotated[int | None, optional("If the update does not state it.", "N", min=1)] = (
        None
    )
    input_shape: Annotated[
        str | None,
        optional("Shape of one sample, as in 3,32,32, if the update does not state it.", "SHAPE"),
    ] = None
    noise: Annotated[
        float,
        typer.Option(help="Standard deviation of noise in every entry.", min=0.0, metavar="X"),
    ] = 0.0

    def read(self) -> Update:
        """The update in the file, of samples of another shape than it states where one is given."""
        from rgap.update.update import Update

        if self.update.is_dir():
            raise ValueError(
                f"UPDATE: expected a file, got the folder {self.update}; write the name of the "
                f"file in it, as {self.update / 'update.safetensors'}"
            )
        if not self.update.exists():
            raise ValueError(f"UPDATE: no file {self.update}; write one with rgap capture")
        if not self.update.is_file():
            raise ValueError(
                f"UPDATE: expected a file, got {self.update}, a pipe or a device, which cannot be "
                "read from any place; write it to a file first"
            )
        shape, update = shape_of(self.input_shape), Update.load(self.update)
        return update if shape is None else replace(update, input_shape=shape)


@dataclass(frozen=True, kw_only=True)
class Labelled(Sent):
    """An update whose labels may be known."""

    labels: Annotated[
        str | None, optional("If they are known, as in 3,5; soft ones as in 0.1,0.9.", "LABELS")
    ] = None

    def known(self, update: Update) -> Tensor | None:
        """The labels as targets of the update's loss, None if they are not given."""
        size = update.batch_size if self.batch_size is None else self.batch_size
        return None if self.labels is None else targets_of(self.labels, size, update.loss)


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where a command computes, what it draws, and whether it shows how far it is."""

    panel: ClassVar[str] = "Computation"
    device: Device = "cpu"
    quiet: Quiet = False
    no_progress: NoProgress = False
    seed: Seed = 0

    @property
    def shown(self) -> bool:
        """Whether it shows how far it is."""
        return not (self.quiet or self.no_progress)


class Arguments(TypedDict):
    """Keyword arguments that the functions behind the commands share."""

    device: str
    seed: int
    progress: bool
    memory_budget: float | None


@dataclass(frozen=True, kw_only=True)
class Work(Running):
    """A computation that is held against a limit of memory."""

    memory_limit: Annotated[str | None, optional(_HINTS["memory"], "SIZE")] = None

    def arguments(self) -> Arguments:
        """The options as arguments of the library's functions.

        >>> Work(quiet=True, memory_limit="500MB").arguments()["memory_budget"]
        500000000.0
        """
        from rgap.machine.memory import bytes_of

        limit = self.memory_limit
        return {
            "device": usable_device(self.device),
            "seed": self.seed,
            "progress": self.shown,
            "memory_budget": None if limit is None else bytes_of(limit, "--memory-limit"),
        }


def check_output(path: Path, suffix: str | None = None, option: str = "--output") -> None:
    """Refuse before the work what could not be written after it."""
    if suffix is not None and path.suffix.lower() != suffix:
        raise ValueError(
            f"--output: expected a {suffix} file, got {path}; write {path.with_suffix(suffix)}"
        )
    if path.is_dir():
        raise ValueError(f"{option}: expected a file name, got the folder {path}")
    if not path.parent.is_dir():
        raise ValueError(
            f"{option}: no folder {path.parent} to write {path.name} to; create it first"
        )


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """``3,32,32`` as the shape of one sample; None stays None."""
    return None if text is None else whole_numbers(text, "--input-shape", "3,32,32")


def whole_numbers(text: str, option: str, example: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, separated by commas.

    >>> whole_numbers("1,2,4", "--batch-sizes", "1,2")
    (1, 2, 4)
    """
    parts = [part.strip() for part in re.sub(r"(?<=\d)x(?=\d)", ",", text).split(",")]
    wrong = [part for part in parts if not (part.isdecimal() and int(part) > 0)]
    if wrong:
        said = " and ".join(map(repr, wrong)) + ("" if wrong == [text] else f" in {text!r}")
        raise ValueError(
            f"{option}: expected whole numbers of at least 1, got {said}; write {option} {example}"
        )
    return tuple(map(int, parts))


def range_of(text: str, option: str, example: str) -> tuple[float, float]:
    """Two numbers, the smaller one first.

    >>> range_of("-1,1", "--value-range", "0,1")
    (-1.0, 1.0)
    """
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise ValueError(
            f"{option}: expected two numbers, the smaller one first, got {text!r}; write "
            f"{option} {example}"
        )
    return low, high


def targets_of(text: str, count: int | None, loss: Loss) -> Tensor:
    """``3,5`` as targets of ``loss`` for ``count`` pictures.

    Class indices are one number a picture; other targets are as many as the model has outputs,
    picture by picture, all of one where their count is not known.
    """
    import torch

    from rgap.update.targets import BINARIES

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--labels: expected numbers such as 3,5, got {text!r}") from None
    whole, size = loss.targets == "index", len(numbers)
    if whole and any(number != int(number) for number in numbers):
        raise ValueError(f"--labels: {loss.name} expects whole numbers such as 3,5, got {text!r}")
    targets = torch.tensor(numbers, dtype=torch.long if whole else torch.float64)
    if whole and count in (None, size):
        return targets
    if whole and loss.name not in BINARIES:
        raise ValueError(f"--labels: expected {count}, one per picture, got {size}")
    if size % (count or 1):
        raise ValueError(
            f"--labels: expected the same number of targets for each of {count} pictures, got "
            f"{size} numbers"
        )
    return targets.reshape(count or 1, -1)


def usable_device(name: str) -> str:
    """``name`` if a float64 tensor can be made there, which everything here needs.

    Raises:
        ValueError: the device is unknown, absent, or has no float64.
    """
    import torch

    try:
        torch.zeros(1, device=name, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {name!r} does not work here ({reason}); try cpu") from None
    return name
