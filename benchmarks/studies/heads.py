"""Batches at a softmax head alone: no pair of layers below it, only the loss tells samples apart.

    python -m benchmarks.studies.heads --seeds 2 --classes 10 100   two batches a cell, minutes
    python -m benchmarks.studies.heads --output heads.jsonl         20 batches a cell, hours
    python -m benchmarks.studies.heads --classes 100 --networks lenet --seeds 3
    python -m benchmarks.studies.heads --read heads.jsonl --figure docs/pictures/heads.png
    python -m benchmarks.studies.heads --read heads.jsonl --table   the tables of docs/batches.md

The law to be held: with ε the machine epsilon of the update and σ_B/σ_1 the ratio of the B-th to
the first singular value of the head's gradient as sent, every batch with σ_B/σ_1 > 100 ε is solved
with all labels right and no feature off by more than 100 ε σ_1/σ_B of the largest one; every other
batch is flagged, or solved as well as the errors say that its answer states (six standard errors).
Beyond the law samples may be nearer to each other than those errors; they then come as copies of
one, ``merged``.  ``missed``: flagged though the ratio is above 100 ε.  ``wrong``: an answer beyond
its error or with a wrong label, silently.  Each batch size runs in a process of its own, whose
peak memory so far is shown; its first run, which imports much, is not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append, grouped, read
from benchmarks.common.judging import middle
from benchmarks.common.measuring import GIB, Stopwatch, peak
from benchmarks.common.networks import seeded
from benchmarks.common.pictures import drawn_labels, pictures
from benchmarks.figures.batches import draw_heads
from benchmarks.figures.heads_table import (
    LABELS,
    Run,
    good,
    lawful,
    merged,
    missed,
    most_of_law,
    print_tables,
    wrong,
)
from rgap.network.chain import parse
from rgap.precision import Precision
from rgap.separation.batch import Batch, Separated, Unseparated
from rgap.separation.softmax.separate import separate_head, unfit
from rgap.update.losses import Loss

NETWORKS = ("mlp", "lenet", "cnn", "relu", "gauss")
WIDTH = 256  # of features that are drawn: no network lies below the head of the last two
BATCHES = {10: (2, 4, 8), 100: (16, 32, 64), 1000: (128,)}
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
SECONDS = {(100, 32): 1.0, (1000, 128): 10.0}
MEMORY = {(1000, 128): 2.0}  # GiB


def main() -> int:
    """Run what the command line asks for, print one line a cell, say what was missed."""
    parser = Arguments(
        __doc__, classes=[10], networks=["mlp"], sizes=[2], labels=["distinct"], seeds=1
    )
    parser.several("--networks", NETWORKS, "below the head")
    parser.several("--classes", BATCHES, "how many")
    parser.add_argument("--sizes", nargs="+", type=int, help="these batch sizes only")
    parser.several("--labels", LABELS, "of a batch")
    parser.dtypes()
    parser.add_argument("--seeds", type=int, default=20, help="batches a cell")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.output()
    parser.read()
    parser.figure("error against conditioning")
    parser.add_argument("--table", action="store_true", help="of the runs read, as in the docs")
    options = parser.parse_args()
    runs = [] if options.read is None else read(options.read)
    if options.table:
        print_tables(runs)
        return int(any(map(wrong, runs)))
    print(HEADER, flush=True)
    if options.read is not None:
        for group in grouped(runs, "classes", "network", "size", "labels", "dtype").values():
            print(line(group))
    else:
        for _, same in groupby(cells(options), lambda cell: (cell["classes"], cell["size"])):
            for group in in_own_process(list(same), options):
                runs += group
                print(line(group), flush=True)
                append(options.output, group)
    if options.figure is not None:
        draw_heads(runs, options.figure)
    return verdict(runs)


def cells(options: argparse.Namespace) -> Iterator[dict]:
    """What the command line asks for."""
    for classes in options.classes:
        for size in BATCHES[classes]:
            if options.sizes is not None and size not in options.sizes:
                continue
            for network in options.networks:
                for labels in options.labels:
                    for dtype in options.dtypes:
                        yield {
                            "classes": classes,
                            "network": network,
                            "size": size,
                            "labels": labels,
                            "dtype": dtype,
                        }


def in_own_process(cells: list[dict], options: argparse.Namespace) -> Iterator[list[Run]]:
    """All batches of these cells, so that the peak memory is their own."""
    seeds = range(options.start, options.start + options.seeds)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=warm) as pool:
        for cell in cells:
            yield pool.submit(batches, cell, list(seeds)).result()


def warm() -> None:
    """One small batch: what a process imports at its first is not a batch's time."""
    torch.set_num_threads(THREADS)
    one({"classes": 10, "network": "mlp", "size": 2, "labels": "distinct", "dtype": "float64"}, 0)


def batches(cell: dict, seeds: list[int]) -> list[Run]:
    """One run a seed."""
    return [one(cell, seed) for seed in seeds]


def network(kind: str, classes: int, seed: int) -> nn.Module:
    """A network whose head is the only fully connected layer, or is treated as if it were."""
    if kind == "mlp":
        return rgap.models.mlp((256,), classes, "gelu", seed=seed)
    if kind == "lenet":
        return rgap.models.lenet(classes, seed=seed)
    if kind in ("relu", "gauss"):
        return seeded(lambda: nn.Sequential(nn.Linear(WIDTH, classes)), seed)
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2048, classes),
        ),
        seed,
    )


def one(cell: dict, seed: int) -> Run:
    """One batch: its conditioning, and its features if the head gives them."""
    size, classes = cell["size"], cell["classes"]
    dtype = getattr(torch, cell["dtype"])
    model = network(cell["network"], classes, seed)
    x, y = data(cell["network"], size, seed), drawn_labels(cell["labels"], size, classes, seed)
    update = rgap.capture(model, x, y, dtype=dtype, value_range=None)
    chain = parse(model, tuple(x.shape[1:]))
    gradients = {name: g.double() for name, g in update.gradients.items()}
    batch = Batch(chain, gradients, Loss(), Precision(dtype), size)
    head = chain.stages[-1]
    values = torch.linalg.svdvals(gradients[head.affine.weight_name])
    with Stopwatch() as watch:
        top = batch.mixture(head.index)
        answer = unfit(batch, top) or separate_head(batch, top)
    run: Run = {
        **cell,
        "seed": seed,
        "seconds": watch.wall,
        "cpu": watch.cpu,  # of all threads: steadier on a shared machine
        "threads": torch.get_num_threads(),
        "ratio": float(values[size - 1] / values[0]),
        "eps": torch.finfo(dtype).eps,
        "rank": top.rank,
        "returned": isinstance(answer, Separated),
        "memory": peak() / GIB,
    }
    if isinstance(answer, Unseparated):
        return {**run, "reason": answer.reason}
    return run | compared(answer, features(chain, x), y)


def data(kind: str, size: int, seed: int) -> Tensor:
    """Photographs, or features of a head that has nothing below it: normal, or their ReLU."""
    if kind not in ("relu", "gauss"):
        return pictures(size, seed)
    drawn = torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(seed))
    return drawn.relu() if kind == "relu" else drawn


def features(chain: rgap.network.Chain, x: Tensor) -> Tensor:
    """The true input of the head, [B, n]."""
    value = x.double()
    for stage in chain.stages[:-1]:
        value = stage.forward(value)[1]
    for op in chain.stages[-1].lead:
        value = op.forward(value)
    return value.flatten(1)


def compared(answer: Separated, truth: Tensor, labels: Tensor) -> Run:
    """Error beside the truth and beside what the answer itself states."""
    own = answer.features.value.flatten(1).repeat_interleave(answer.head.copies.long(), 0)
    stated = answer.features.error.flatten(2).square().mean(0).sqrt()
    stated = stated.repeat_interleave(answer.head.copies.long(), 0)
    classes = answer.head.targets.argmax(1).repeat_interleave(answer.head.copies.long(), 0)
    distance = torch.cdist(own, truth, compute_mode="donot_use_mm_for_euclid_dist")
    # A mean of copies may be nearer to a sample of another label than to those it stands for.
    near = distance.masked_fill(classes[:, None] != labels, 1e9).argmin(1)
    error = own - truth[near]
    rms, predicted = error.square().mean(1).sqrt(), stated.square().mean(1).sqrt()
    once = sorted(near.tolist()) == list(range(len(truth)))
    return {
        "once": once,
        "rows": len(answer.features.value),
        "labels_right": torch.equal(classes.sort().values, labels.sort().values)
        and torch.equal(classes, labels[near]),
        "relative": float(error.abs().max() / truth.abs().max()),
        "honesty": float((rms / predicted).square().mean().sqrt()),
        "honesty_most": float((rms / predicted).max()),
    }


HEADER = (
    f"{'C':>4} {'network':7} {'B':>3} {'labels':8} {'dtype':7} {'runs':>4} {'law':>4} "
    f"{'solved':>6} {'merged':>6} {'flagged':>7} {'missed':>6} {'wrong':>5} {'σ_B/σ_1':>16} "
    f"{'error/law':>9} {'true/pred':>9} {'s':>6} {'cpu s':>6} {'GiB':>5}"
)


def line(runs: list[Run]) -> str:
    """One cell of the table."""
    first = runs[0]
    ratios = [run["ratio"] for run in runs]
    return (
        f"{first['classes']:4} {first['network']:7} {first['size']:3} {first['labels']:8} "
        f"{first['dtype']:7} {len(runs):4} {sum(map(lawful, runs)):4} {sum(map(good, runs)):6} "
        f"{sum(map(merged, runs)):6} "
        f"{sum(not r['returned'] for r in runs):7} {sum(map(missed, runs)):6} "
        f"{sum(map(wrong, runs)):5} {min(ratios):7.0e}..{max(ratios):7.0e} "
        f"{most_of_law(runs):9.1e} "
        f"{middle([r['honesty'] for r in runs if r['returned']]):9.2f} "
        f"{middle([r['seconds'] for r in runs]):6.2f} "
        f"{middle([r.get('cpu', float('nan')) for r in runs]):6.2f} "
        f"{max(r['memory'] for r in runs):5.2f}"
    )


def verdict(runs: list[Run]) -> int:
    """Print every miss; 0 if the law held in every run."""
    for run in runs:
        if missed(run) or wrong(run):
            print(
                f"{'missed' if missed(run) else 'wrong'}: {run['network']} C = {run['classes']} "
                f"B = {run['size']} {run['labels']} {run['dtype']} seed {run['seed']}: "
                f"σ_B/σ_1 {run['ratio']:.1e}, "
                + (
                    f"error {run['relative']:.1e}, labels right {run['labels_right']}, "
                    f"true/predicted {run['honesty_most']:.1f}"
                    if run["returned"]
                    else run["reason"]
                )
            )
    for (classes, size), most in SECONDS.items():
        mine = [r for r in runs if (r["classes"], r["size"]) == (classes, size)]
        if mine:
            spent, gib = middle([r["seconds"] for r in mine]), max(r["memory"] for r in mine)
            print(
                f"C = {classes}, B = {size}: median {spent:.2f} s (goal {most:.0f}), peak "
                f"{gib:.2f} GiB (goal {MEMORY.get((classes, size), float('inf'))})"
            )
    held = [run for run in runs if not missed(run) and not wrong(run)]
    print(f"the law held in {len(held)} of {len(runs)} runs; wrong: {sum(map(wrong, runs))}")
    return int(len(held) < len(runs))


if __name__ == "__main__":
    sys.exit(main())
