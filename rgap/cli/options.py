"""Arguments and options that several commands share, and the choices that an option offers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rgap.plugins import offered

__all__ = [
    "DefenceName",
    "InputShape",
    "Json",
    "LabelMethod",
    "LossName",
    "MatchMethod",
    "MemoryLimit",
    "Method",
    "Model",
    "Noise",
    "Precision",
    "PriorName",
    "Quiet",
    "Reduction",
    "Seed",
    "TimeLimit",
    "Weights",
    "choices",
]

_HINTS = {
    "model": "A built-in network (lenet, cnn6, cnn6d, fcn3, mlp, lenet5, vgg, resnet), with "
    "options as in lenet:activation=tanh,classes=100, or package.module:factory.",
    "weights": "Safetensors file with the network's weights; without it they are drawn with "
    "seed 0, the same in every command.",
    "loss": "A loss by name: cross_entropy, binary_cross_entropy_with_logits, mse_loss, nll_loss, "
    "binary_cross_entropy, focal_loss or sigmoid_focal_loss; default: the built-in "
    "network's own, else cross_entropy.",
    "json": "Print one JSON document on standard output and nothing else.",
}

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_HINTS["model"], show_default=False)]
Weights = Annotated[Path | None, typer.Option(help=_HINTS["weights"], show_default=False)]
LossName = Annotated[str | None, typer.Option(help=_HINTS["loss"], show_default=False)]
UpdatePath = Annotated[
    Path, typer.Argument(metavar="UPDATE", help="What rgap capture wrote.", show_default=False)
]
BatchSize = Annotated[
    int | None, typer.Option(help="If the update does not state it.", min=1, show_default=False)
]
InputShape = Annotated[
    str | None,
    typer.Option(
        help="Shape of one sample, as in 3,32,32, if the update does not state it.",
        show_default=False,
    ),
]
KnownLabels = Annotated[
    str | None, typer.Option(help="If they are known, as in 3,5.", show_default=False)
]
Noise = Annotated[float, typer.Option(help="Standard deviation of noise in every entry.", min=0.0)]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, …")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        help="To take on top of model and update, as in 4GB, 500MB or 2GiB; default: half of what "
        "is free.",
        show_default=False,
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        help="Seconds for the whole command, kept within a tenth; default: none.",
        show_default=False,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "--no-progress", "-q", help="Show no progress.", metavar="")
]
Json = Annotated[bool, typer.Option("--json", help=_HINTS["json"], metavar="")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn at random.", min=0)]


class Precision(StrEnum):
    """What a client may compute in."""

    float32 = "float32"
    float64 = "float64"


class Method(StrEnum):
    """How `rgap audit` finds joint ranks."""

    exact = "exact"
    sketch = "sketch"
    formula = "formula"


class PriorName(StrEnum):
    """What may be taken for likely; a test compares the names with `rgap.priors.PRIORS`."""

    natural = "natural"
    tv = "tv"
    anisotropic = "anisotropic"
    squares = "squares"


class MatchMethod(StrEnum):
    """How `rgap match` searches; a test compares the names with `rgap.matching.METHODS`."""

    gauss_newton = "gauss_newton"
    dlg = "dlg"
    ig = "ig"
    gradinversion = "gradinversion"


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


def choices(built_in: type[StrEnum], group: str) -> str:
    """Names as the help shows them: what is built in, and what installed distributions offer.

    >>> choices(Reduction, "rgap.nothing")
    '[mean|sum]'
    """
    return f"[{'|'.join(dict.fromkeys((*built_in, *offered(group))))}]"


class DefenceName(StrEnum):
    """What `rgap harden` may look for; a test compares the names with those that have levels."""

    prune = "prune"
    quantise = "quantise"
    sign = "sign"


class Reduction(StrEnum):
    """How the loss of a batch is formed."""

    mean = "mean"
    sum = "sum"
