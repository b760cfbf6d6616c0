r"""What a generator adds: searches over what it draws, and completions with it as the prior.

    python -m benchmarks.studies.generators --generator digits.safetensors
    python -m benchmarks.studies.generators --generator digits.safetensors --kinds photographs
    python -m benchmarks.studies.generators --generator digits.safetensors --another
    python -m benchmarks.studies.generators --generator photographs.safetensors --colour \
        --kinds photographs digits
    python -m benchmarks.studies.generators --read runs.jsonl       the table of runs on file

The generator is that of benchmarks.training.generator; its digits are trained on the first 4500 of
5000, constants were chosen on the next 100 (``--tuning``), and the table is of the last 400.
Kinds: ``digits``, and ``photographs`` and ``textures``, which no digit looks like; all in grey, or
with ``--colour``, for a generator of such pictures (``benchmarks.training.generator --pictures``).
Clients: the LeNet of DLG with its weights from uniform(−½, ½), and an MLP with one hidden layer of
256 ReLUs, ten classes, float32 updates, labels known.

Searches, each for the same wall time, the domains of one share it as their iterations do:
``latent``, ``gias``, ``gifd`` and, without a generator, ``ig``; ``evolved latent`` with first codes
from an evolution strategy (pip install cma).  Their constants are those of the library but for
rates, which depend on the size of a generator (SMALL); ``--ball 0.1`` keeps features in a tenth of
the published ball.  Completions: ``natural`` and
``drawn``, the same with :class:`rgap.priors.drawn.Drawn` added.

``--another``: the update of other pictures is matched, and what is drawn is compared with the
pictures that it does not belong to; beside it the mean picture.  A prior that draws as well from
the wrong update as from the right one measures itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.generators import trained_generator
from benchmarks.common.json_lines import append, grouped, read
from benchmarks.common.judging import decibels
from benchmarks.common.pictures import FIRST, SIDE, digits, drawn_labels, pictures
from benchmarks.studies.priors import textures
from rgap.matching.presets import PRESETS, Preset
from rgap.priors.drawn import Drawn
from rgap.priors.generator import Generator
from rgap.solvers.first_order import Adam
from rgap.solvers.priors import Prior, Sum, natural

CLIENTS = {
    "lenet": lambda shape, seed: rgap.models.lenet(
        10, input_shape=shape, seed=seed, weights="uniform"
    ),
    "mlp": lambda shape, seed: rgap.models.mlp((256,), 10, "relu", input_shape=shape, seed=seed),
}
EVOLVED = "evolved "
SEARCHES = "latent", "gias", "gifd", "ig", EVOLVED + "latent"
GENERATIONS = 40  # of an evolution strategy for the first codes
COMPLETIONS = "natural", "drawn"
KINDS = "digits", "photographs", "textures"
TUNING = 100  # of the digits that no generator is trained on
TRAINED = 4500
SMALL = {"latent": 0.1, "weights": 1e-3, "features": 0.03}  # rates, of 300,000 weights
SPREAD, WEIGHT = 0.05, 1.0  # of the prior


class Cell(NamedTuple):
    """A batch of the table."""

    client: str
    kind: str
    size: int
    case: int


def preset(name: str, ball: float = 1.0) -> Preset:
    """A search with the constants of a small generator, and a ball of so many published radii."""
    evolved = name.startswith(EVOLVED)
    made = PRESETS[name.removeprefix(EVOLVED)]
    domains = tuple(
        replace(
            domain, rule=Adam(SMALL[domain.over]), radius=ball * domain.radius,
            growth=ball * domain.growth,
        )
        for domain in made.domains
    )  # fmt: skip
    return replace(made, domains=domains, evolution=GENERATIONS if evolved else 0)


@cache
def padded() -> Tensor:
    """All digits with two black pixels around, [5000, 1, 32, 32]."""
    return pad(digits()[0], (2, 2, 2, 2))


def batch(kind: str, size: int, case: int, tuning: bool, colour: bool) -> Tensor:
    """Pictures that no generator and no constant has seen, float64, [B, 1 or 3, 32, 32]."""
    if kind == "digits":
        held = padded()[TRAINED:]
        some = held[:TUNING] if tuning else held[TUNING:]
        grey = some[torch.arange(case * size, (case + 1) * size) % len(some)]
        return grey.expand(-1, 3, -1, -1).contiguous() if colour else grey
    if kind == "photographs":
        x = pictures(size, case, range(FIRST) if tuning else range(FIRST, 32))
    else:
        x = textures(size, torch.Generator().manual_seed(1000 + case))
    return x if colour else x.mean(1, keepdim=True)


@cache
def mean_picture(kind: str, colour: bool) -> Tensor:
    """Of pictures of a kind that were tuned on, [1 or 3, 32, 32]."""
    return batch(kind, TUNING, 0, True, colour).mean(0)


def one(options: argparse.Namespace, generator: Generator, cell: Cell, name: str) -> dict:
    """A batch through a search or a completion."""
    rest = options.tuning, options.colour
    x = batch(cell.kind, cell.size, cell.case, *rest)
    model = CLIENTS[cell.client](x.shape[1:], cell.case)
    labels = drawn_labels("random", cell.size, 10, cell.case)
    sent = batch(cell.kind, cell.size, cell.case + 37, *rest) if options.another else x
    update = rgap.capture(model, sent.float(), labels)
    if name in COMPLETIONS:
        prior: Prior = natural(x.shape[1])
        if name == "drawn":
            fitted = generator.fitted(x.shape[1:], (0.0, 1.0), torch.zeros(1))
            prior = Sum([prior, Drawn(fitted, SPREAD, WEIGHT)])
        found = rgap.invert(
            model, update, labels=labels, complete=True, prior=prior, time_limit=options.seconds
        )
    else:
        method = name if name == "ig" else preset(name, options.ball)
        found = rgap.match(
            model, update, labels=labels, method=method,
            generator=None if name == "ig" else generator, time_limit=options.seconds,
            seed=cell.case,
        )  # fmt: skip
    run = {**cell._asdict(), "method": name, "another": options.another, "psnr": None}
    run |= {"status": found.status.name, "seconds": found.seconds}
    if found.nearest is None:
        return run
    score, middle = rgap.analysis.score(found, x), mean_picture(cell.kind, options.colour)
    flat = (x - middle).square().flatten(1).mean(1).sqrt()
    return run | {
        "psnr": score.psnr.tolist(),
        "ssim": None if score.ssim is None else score.ssim.tolist(),
        "mean picture": statistics.fmean(map(decibels, flat.tolist())),
    }


def table(runs: Sequence[dict]) -> None:
    """A line a cell and method: pictures of all its batches."""
    print("\n| client | kind | B | method | pictures | dB | ± | worst | SSIM | mean picture | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    keys = "client", "kind", "size", "another", "method"
    for (client, kind, size, another, method), cell in grouped(runs, *keys).items():
        mine = [run for run in cell if run["psnr"] is not None]
        every = [value for run in mine for value in run["psnr"]]
        if not every:
            continue
        of_batches = [statistics.fmean(run["psnr"]) for run in mine]
        error = f"{statistics.stdev(of_batches) / len(mine) ** 0.5:.1f}" if len(mine) > 1 else "–"
        alike = statistics.fmean(value for run in mine for value in run["ssim"])
        print(
            f"| {client} | {'another' if another else kind} | {size} | {method} | {len(every)} | "
            f"{statistics.fmean(every):.1f} | {error} | {min(every):.1f} | {alike:.2f} | "
            f"{statistics.fmean(run['mean picture'] for run in mine):.1f} | "
            f"{statistics.fmean(run['seconds'] for run in mine):.0f} |"
        )


def main() -> int:
    """Run what the command line asks for."""
    parser = Arguments(
        __doc__,
        clients=["mlp"],
        kinds=["textures"],
        sizes=[2],
        methods=["latent", "drawn"],
        pictures=2,
        seconds=4.0,
    )
    parser.add_argument("--generator", type=Path, help="weights; random ones without a file")
    parser.several("--clients", CLIENTS, "networks")
    parser.several("--kinds", KINDS, "of pictures", ["digits"])
    parser.several("--sizes", (1, 4, 8, 16), "of a batch", [1, 4, 8])
    parser.several("--methods", (*SEARCHES, *COMPLETIONS), "searches and completions", SEARCHES[:4])
    parser.add_argument("--pictures", type=int, default=20, help="of a cell, at least")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a search, at most")
    parser.add_argument(
        "--colour", action="store_true", help="pictures with three channels, as the generator's"
    )
    parser.add_argument("--ball", type=float, default=1.0, help="of features, in published radii")
    parser.add_argument("--tuning", action="store_true", help="pictures that were tuned on")
    parser.add_argument("--another", action="store_true", help="match the update of other pictures")
    parser.output()
    parser.read()
    options = parser.parse_args()
    runs = read(options.read) if options.read is not None else []
    if options.read is None:
        generator = trained_generator(options.generator, (3 if options.colour else 1, SIDE, SIDE))
        for client, kind, size in product(options.clients, options.kinds, options.sizes):
            for case in range(-(-options.pictures // size)):
                for name in options.methods:
                    run = one(options, generator, Cell(client, kind, size, case), name)
                    runs.append(run)
                    shown = (
                        "–" if run["psnr"] is None else f"{statistics.fmean(run['psnr']):.1f} dB"
                    )
                    print(
                        f"{client:6} {kind:12} B={size} batch {case:2} {name:8} "
                        f"{run['status']:15} {shown:9} {run['seconds']:4.0f} s",
                        flush=True,
                    )
                    append(options.output, [run])
    table(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
