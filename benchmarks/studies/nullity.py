"""PSNR against joint nullity, B = 1 to 8: a completion beside signed Adam with total variation.

    python -m benchmarks.studies.nullity                           one batch of every size
    python -m benchmarks.studies.nullity --sizes 2 4 --cases 3
    python -m benchmarks.studies.nullity --figure docs/pictures/nullity.png --read runs.jsonl
    python -m benchmarks.studies.nullity --tuning                  the weights below

LeNet with sigmoids, ten classes, distinct labels, float64 updates, photographs 8 and later.  The
joint nullity is the number of unknowns minus the rank of the whole Jacobian at the batch
(``rgap.analysis.identifiability``).  Ours: ``rgap.invert(complete=True)`` with ``--seconds`` at
most.  Theirs: the preset ``ig``, labels known, with the best weight of ``--tuning`` (photographs 0
to 7) and a schedule that ends with the time that ours took, at least ``--least`` seconds.  PSNR of
the worst picture of a batch and the mean of all.  Exit status 1 if an EXACT is off by more than its
bound or a COMPLETED does not reproduce its update to 1%.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.equal_time import WEIGHTS, signed_adam, timed
from benchmarks.common.json_lines import append, read
from benchmarks.common.judging import decibels, match, misstated
from benchmarks.common.pictures import FIRST, photographs
from benchmarks.figures.batches import draw_nullity
from rgap.analysis import identifiability

BEST = {1: 1e-8, 4: 1e-6, 8: 1e-5}  # weight of the total variation, from this size on


def batch(size: int, first: int) -> tuple[nn.Module, Tensor, Tensor, rgap.Update]:
    """The network, the client's pictures and labels, and what it sends."""
    model = rgap.models.lenet(10, activation="sigmoid", seed=first)
    x = photographs(range(first, first + size))
    targets = (torch.arange(size) * 3 + first) % 10
    return model, x, targets, rgap.capture(model, x, targets, dtype=torch.float64)


def search(
    model: nn.Module, update: rgap.Update, targets: Tensor, weight: float, seconds: float
) -> rgap.Matching:
    """Signed Adam with total variation that knows the labels."""
    return timed(model, replace(update, labels=targets), signed_adam(weight), seconds)


def measured(recovery: rgap.Recovery, x: Tensor, targets: Tensor) -> dict:
    """PSNR of the worst picture and of all, and what was claimed wrongly."""
    near = recovery.nearest
    if near is None:
        return {"psnr": None, "mean": None, "fault": ""}
    beside = match(near, recovery.nearest_labels, x, targets)
    mean = statistics.fmean(map(decibels, beside.rms.tolist()))
    return {"psnr": beside.psnr, "mean": mean, "fault": misstated(recovery, beside)}


def one(size: int, case: int, seconds: float, least: float) -> dict:
    """A batch of this size through both."""
    model, x, targets, update = batch(size, FIRST + case * size)
    told = identifiability(model, x, labels=targets, null_space=False, sequential=False)
    ours = rgap.invert(model, update, complete=True, time_limit=seconds)
    took = max(ours.seconds, least)
    weight = BEST[max(known for known in BEST if known <= size)]
    theirs = search(model, update, targets, weight, took)
    return {
        "size": size,
        "case": case,
        "unknowns": x.numel(),
        "nullity": told.joint_nullity,
        "status": ours.status.name,
        "reason": ours.reason,
        "seconds": ours.seconds,
        "ours": measured(ours, x, targets),
        "theirs": measured(theirs, x, targets),
        "weight": weight,
        "iterations": theirs.iterations,
    }


def tune(sizes: Sequence[int], seconds: float) -> None:
    """PSNR of every weight on photographs 0 to 7."""
    for size in sizes:
        for weight in WEIGHTS:
            model, x, targets, update = batch(size, 0)
            recovery = search(model, update, targets, weight, seconds)
            psnr = measured(recovery, x, targets)["psnr"]
            print(f"B={size} weight {weight:g}: {psnr:.1f} dB", flush=True)


def main() -> int:
    """Run what the command line asks for."""
    parser = Arguments(__doc__, sizes=[1], cases=1, seconds=10.0, least=1.0)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(range(1, 9)), help="of a batch"
    )
    parser.add_argument("--cases", type=int, default=1, help="batches a size")
    parser.add_argument("--seconds", type=float, default=240.0, help="of a completion, at most")
    parser.add_argument("--least", type=float, default=20.0, help="seconds of a search, at least")
    parser.add_argument("--tuning", action="store_true", help="weights of the total variation")
    parser.output()
    parser.read()
    parser.figure("the curve")
    options = parser.parse_args()
    if options.tuning:
        tune(options.sizes, options.least)
        return 0
    runs = []
    if options.read is not None:
        runs = read(options.read)
    else:
        print("B  nullity  unknowns  status            ours (mean)  signed Adam (mean)     s")
        for case in range(options.cases):
            for size in options.sizes:
                run = one(size, case, options.seconds, options.least)
                runs.append(run)
                cells = [
                    "     –" if run[who]["psnr"] is None
                    else f"{run[who]['psnr']:6.1f} ({run[who]['mean']:5.1f})"
                    for who in ("ours", "theirs")
                ]  # fmt: skip
                print(
                    f"{size}  {run['nullity']:7} {run['unknowns']:9}  {run['status']:15} "
                    f"{cells[0]} {cells[1]} {run['seconds']:9.0f}  {run['ours']['fault']}",
                    flush=True,
                )
                append(options.output, [run])
    if options.figure is not None:
        draw_nullity(runs, options.figure)
    return int(any(run["ours"]["fault"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
