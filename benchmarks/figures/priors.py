"""The gallery of docs/priors.md: what each family of priors makes of one and the same update.

    python -m benchmarks.figures.priors --generator digits.safetensors --inverse inverse.safetensors

Eight digits that nothing was trained on, in one float32 update of the LeNet of DLG, labels known.
A row each: the client's pictures; the equations and ``natural`` for what they leave open; searches
over codes, weights and features of a generator, of the weights of an untrained one, and of signed
Adam; a learned inverse; in the margin the mean PSNR and, for the equations, the status.  Every
search takes the same time.

The generator is that of benchmarks.training.generator; the inverse is trained here for
``--steps`` where no file is given.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.generators import trained_generator
from benchmarks.common.measuring import ROOT
from benchmarks.common.pictures import SIDE, digits, drawn_labels
from benchmarks.studies.generators import CLIENTS, KINDS, TRAINED, batch, padded, preset
from rgap.analysis.scoring import psnr
from rgap.learned import Design, Inverse, Schedule
from rgap.seeding import batch_of

SHAPE = (1, SIDE, SIDE)


def main() -> int:
    """Make every row and draw them."""
    parser = Arguments(
        __doc__, kind="textures", size=2, seconds=2.0, steps=20, output="gallery.png"
    )
    parser.add_argument("--generator", type=Path, help="weights; random ones without a file")
    parser.add_argument("--inverse", type=Path, help="of the client; trained without a file")
    parser.add_argument("--steps", type=int, default=2000, help="of that training")
    parser.add_argument("--kind", choices=KINDS, default="digits", help="of pictures")
    parser.add_argument("--size", type=int, default=8, help="of the batch")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a search, at most")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures" / "priors.png")
    options = parser.parse_args()
    x = batch(options.kind, options.size, 0, tuning=False, colour=False)
    labels = drawn_labels("random", options.size, 10, 0)
    model = CLIENTS["lenet"](SHAPE, 0)
    update = rgap.capture(model, x.float(), labels)
    generator = trained_generator(options.generator, SHAPE)
    rows: list[tuple[str, Tensor]] = [("client", x)]

    def told(name: str, made: Tensor) -> None:
        near = [psnr(a, b) for a, b in zip(x, made.double(), strict=True)]
        rows.append((f"{name}\n{statistics.fmean(near):.1f} dB", made.double()))
        print(f"{name.splitlines()[0]:12} {statistics.fmean(near):.1f} dB", flush=True)

    found = rgap.invert(model, update, labels=labels, complete=True, time_limit=options.seconds)
    told(f"equations,\n{found.status.name}", ordered(found, x))
    for name in ("latent", "gias", "gifd", "untrained", "ig"):
        drawing = name in ("latent", "gias", "gifd")
        searched = rgap.match(
            model, update, labels=labels, method=preset(name) if drawing else name,
            generator=generator if drawing else None, time_limit=options.seconds,
        )  # fmt: skip
        told(name, ordered(searched, x))
    told("learned", inverse(options, model).pictures(model, update, labels=labels))
    drawn(rows).savefig(options.output, dpi=120)
    return 0


def ordered(found: rgap.Recovery, x: Tensor) -> Tensor:
    """The batch of a recovery in the order of the client's pictures."""
    rows, _ = batch_of(found)
    return rows.detach().cpu()[rgap.analysis.score(found, x).order]


def inverse(options: argparse.Namespace, model: nn.Module) -> Inverse:
    """Read, or trained on the digits that generators are trained on, or on textures."""
    if options.inverse is not None:
        return rgap.learned.load(options.inverse)
    if options.kind == "digits":
        pictures, labels = (part[:TRAINED] for part in (padded(), digits()[1]))
    else:
        pictures = torch.cat(
            [batch(options.kind, 20, case, tuning=True, colour=False) for case in range(10)]
        )
        labels = torch.arange(len(pictures)) % 10
    return rgap.learned.train(
        model, pictures.float(), labels, design=Design(batch_sizes=(options.size,), hidden=1000),
        schedule=Schedule(steps=options.steps, rate=3e-4), progress=True,
    )  # fmt: skip


def drawn(rows: list[tuple[str, Tensor]]) -> Figure:
    """A row for each, named in its margin."""
    count = len(rows[0][1])
    figure = Figure(figsize=(1.5 + 0.75 * count, 0.78 * len(rows)), layout="constrained")
    grid: Any = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, pictures) in zip(grid, rows, strict=True):
        for axes, picture in zip(line, pictures.clamp(0, 1), strict=True):
            axes.imshow(picture[0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
