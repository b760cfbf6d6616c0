"""Batches of a ReLU network: the sparsity route beside the library's own, by batch size.

    python -m benchmarks.studies.sparsity                        B = 2 ... 25, up to an hour
    python -m benchmarks.studies.sparsity --sizes 4 8 --seeds 1  a minute
    python -m benchmarks.studies.sparsity --uniform              rows drawn uniformly

A network 3072-200-200-200-200-200-10 with biases, photographs as inputs.  Success: every picture
within 1e-3 in every entry.  Beyond 32 pictures of a batch, mirrored ones and windows of the larger
originals join.

The sparsity route is a re-implementation of the idea, for one CPU, and a weaker peer than the
published code, which runs on a GPU.  ``--uniform`` is not the published
algorithm unchanged either: drawn rows are uniform, but each kernel is still followed by a walk over
exchanges of single rows.  A batch that it does not solve here within its time says nothing about
the published one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append
from benchmarks.common.judging import match, middle
from rgap.recovery import Status
from rgap.separation.sparsity.separate import SparseOptions, sparse_separation

SIZES = (2, 3, 4, 6, 8, 10, 12, 16, 20, 25)
CLOSE = 1e-3


def main() -> int:
    """Run what the command line asks for, print one line a batch size."""
    parser = Arguments(__doc__, sizes=[2], labels=["distinct"], seeds=1)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="of a batch")
    parser.several("--labels", ("distinct", "equal"), "of a batch")
    parser.dtypes("float64")
    parser.add_argument("--seeds", type=int, default=3, help="batches a cell")
    parser.add_argument("--limit-s", type=float, default=60.0, help="per batch, sparsity route")
    parser.add_argument("--uniform", action="store_true", help="draw rows uniformly")
    parser.add_argument("--centred", action="store_true", help="inputs (x − 0.5) / 0.25")
    parser.add_argument("--alone", action="store_true", help="the sparsity route only")
    parser.output()
    options = parser.parse_args()
    runs: list[dict] = []
    print(HEADER, flush=True)
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for labels in options.labels:
            for size in options.sizes:
                group = [one(size, labels, dtype, seed, options) for seed in range(options.seeds)]
                runs += group
                append(options.output, group)
                print(line(group), flush=True)
    print(law(runs))
    return 0


def pictures(count: int, seed: int) -> Tensor:
    """Different photographs [count, 3, 32, 32]: whole ones, mirrored ones, windows."""
    generator = torch.Generator().manual_seed(seed)
    whole, large = rgap.photos.load(), rgap.photos.load(size=64)
    row, column = torch.randint(33, (2,), generator=generator).tolist()
    parts = large[:, :, row : row + 32, column : column + 32]
    pool = torch.cat([whole, whole.flip(3), parts, parts.flip(3)])
    first = torch.randperm(len(whole), generator=generator)
    rest = len(whole) + torch.randperm(len(pool) - len(whole), generator=generator)
    return pool[torch.cat([first, rest])[:count]]


def one(size: int, labels: str, dtype: torch.dtype, seed: int, options: argparse.Namespace) -> dict:
    """One batch through both routes."""
    x = pictures(size, seed).to(dtype)
    if options.centred:
        x = (x - 0.5) / 0.25
    classes = max(10, size) if labels == "distinct" else 10
    y = torch.arange(size) if labels == "distinct" else torch.full((size,), seed % 10)
    model = rgap.models.mlp((200,) * 5, classes, "relu", seed=seed).to(dtype)
    update = rgap.capture(
        model, x, y, dtype=dtype, value_range=(-2, 2) if options.centred else (0, 1)
    )
    first = next(m for m in model if isinstance(m, nn.Linear))
    weight, bias = list(update.gradients.values())[:2]
    off = first(x.flatten(1)) <= 0
    live = ~off.all(0)
    separation = sparse_separation(
        weight,
        bias,
        first.weight.detach(),
        first.bias.detach(),
        size,
        SparseOptions(
            unit=torch.finfo(dtype).eps / 2,
            seconds=options.limit_s,
            seed=seed,
            guided=not options.uniform,
        ),
    )
    run = {
        "size": size,
        "labels": labels,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "zeros": float(off[:, live].double().mean()),
        "trials": separation.trials,
        "seconds": separation.seconds,
        "directions": separation.directions,
        "returned": separation.inputs is not None,
        "predicted": separation.error,
        "reason": separation.reason,
        **quality("", separation.inputs, x),
    }
    if not options.alone:
        start = time.perf_counter()
        recovery = rgap.invert(model, update)
        run["own_seconds"] = time.perf_counter() - start
        run["own_status"] = recovery.status.name
        exact = recovery.inputs if recovery.status is Status.EXACT else None
        run |= quality("own_", exact, x)
    return run


def quality(prefix: str, inputs: Tensor | None, truth: Tensor) -> dict:
    """Success up to order, the largest entry of the error and the lowest PSNR of a picture."""
    if inputs is None:
        return {f"{prefix}success": False, f"{prefix}worst": None, f"{prefix}psnr": None}
    beside = match(inputs, None, truth, truth)
    return {
        f"{prefix}success": beside.once and beside.worst < CLOSE,
        f"{prefix}worst": beside.worst,
        f"{prefix}psnr": beside.psnr,
    }


HEADER = (
    f"{'B':>3} {'labels':9} {'dtype':8} {'zeros':>6} {'sparsity':>9} {'min dB':>7} "
    f"{'subsets':>10} {'seconds':>8} {'wrong':>5} | {'own':>5} {'min dB':>7} {'seconds':>8}  status"
)


def line(runs: list[dict]) -> str:
    """One row: medians over the seeds, successes, returned answers that were wrong."""
    one = runs[0]

    def median(key: str) -> float:
        return middle([run[key] for run in runs if run.get(key) is not None])

    def least(key: str) -> float:
        return min((run[key] for run in runs if run.get(key) is not None), default=math.nan)

    text = (
        f"{one['size']:3} {one['labels']:9} {one['dtype']:8} {median('zeros'):6.2f} "
        f"{sum(r['success'] for r in runs):4} of {len(runs)} {least('psnr'):7.1f} "
        f"{median('trials'):10.0f} {median('seconds'):8.2f} "
        f"{sum(r['returned'] and not r['success'] for r in runs):5} |"
    )
    if "own_seconds" not in one:
        return text
    return (
        f"{text} {sum(r['own_success'] for r in runs):2}/{len(runs):2} {least('own_psnr'):7.1f} "
        f"{median('own_seconds'):8.2f}  {', '.join(sorted({r['own_status'] for r in runs}))}"
    )


def law(runs: list[dict]) -> str:
    """Growth of the number of subsets with B, fitted to the successes: log2 over B."""
    solved = [(r["size"], math.log2(r["trials"])) for r in runs if r["success"] and r["trials"] > 0]
    if len({size for size, _ in solved}) < 2:
        return "no growth to fit: fewer than two batch sizes were solved by sampling"
    x = torch.tensor(solved, dtype=torch.float64)
    centred = x - x.mean(0)
    slope = float((centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum())
    lost = sum(not r["success"] for r in runs)
    return (
        f"subsets grow like 2^({slope:.2f} B) over {len(solved)} solved batches, B from "
        f"{int(x[:, 0].min())} to {int(x[:, 0].max())} (2^B if half of each cotangent were zero "
        f"and rows were drawn uniformly); {lost} not solved"
    )


if __name__ == "__main__":
    sys.exit(main())
