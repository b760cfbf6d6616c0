"""Batches below a pair of fully connected layers: what is recovered, how exactly, how fast.

    python -m benchmarks.studies.batches --seeds 1                  one seed a cell
    python -m benchmarks.studies.batches --output batches.jsonl     all of it, hours on one core
    python -m benchmarks.studies.batches --rows sizes --seeds 1     a part of it
    python -m benchmarks.studies.batches --read batches.jsonl --figure docs/pictures/batches.png

Rows: ``activations`` (3072-512-512-10, six activations), ``sizes`` (width 1024, up to 256
samples), ``limit`` (width 64, batch sizes around half of it), ``trained`` (after 0, 100 and 1000
steps of Adam on other photographs), ``edges`` (batches that the method must refuse, or nearly).
A batch counts as recovered if the status is EXACT, every sample is there once with its label, and
no entry is off by more than the certified bound.  Exit status 1 if an EXACT is anything else, or if
a row misses its goal.  ``--output`` appends one JSON line a batch; ``--read`` prints the tables and
draws the figure from such a file, without running anything.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append, grouped, read
from benchmarks.common.judging import match, middle
from benchmarks.common.measuring import Stopwatch
from benchmarks.common.pictures import drawn_labels, pictures
from benchmarks.figures.batches import draw_batches
from benchmarks.studies.batch_cases import edges, split, trained

ROWS = ("activations", "sizes", "limit", "trained", "edges")
ACTIVATIONS = ("gelu", "silu", "relu", "leaky_relu", "tanh", "sigmoid")
FLAT = ("tanh", "sigmoid")  # weak curvature: held to a lower goal
SIZES = (64, 100, 128, 200, 256)
LIMIT = (8, 16, 24, 28, 30, 32, 33, 34, 40)
STEPS = (0, 100, 1000)
SECONDS = {("activations", 32): 10.0, ("sizes", 64): 30.0}
SEEDS = {"activations": 10, "sizes": 1, "limit": 5, "trained": 5, "edges": 3}
Run = dict


def main() -> int:
    """Run what the command line asks for, print one line a cell, say what was missed."""
    parser = Arguments(__doc__, rows=["limit"], sizes=[8], activations=["gelu"], seeds=1)
    parser.rows(ROWS)
    parser.add_argument("--seeds", type=int, help="batches a cell; by default " + str(SEEDS))
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.several("--activations", ACTIVATIONS, "of the networks")
    parser.add_argument("--sizes", nargs="+", type=int, help="these batch sizes only")
    parser.dtypes()
    parser.output()
    parser.read()
    parser.figure("sizes and limit")
    options = parser.parse_args()
    runs: list[Run] = []
    if options.read is not None:
        runs = read(options.read)
        for row in ROWS:
            show(row, [run for run in runs if run["row"] == row])
    else:
        for row in options.rows:
            print(f"\n{row}\n{HEADER}", flush=True)
            for cell in cells(row, options):
                runs += attempted(row, cell, options)
    if options.figure is not None:
        draw_batches(runs, options.figure)
    return verdict(runs)


def cells(row: str, options: argparse.Namespace) -> Iterator[dict]:
    """What a row is made of, as far as the command line wants it."""
    wanted = options.activations
    plan: list[dict] = []
    if row == "activations":
        plan = [
            {"activation": a, "width": 512, "size": b, "labels": y, "dtype": d}
            for d, sizes in (("float64", (8, 16, 32)), ("float32", (8, 16)))
            for a in ACTIVATIONS
            for b in sizes
            for y in ("distinct", "equal")
        ]
    elif row == "sizes":
        plan = [
            {"activation": a, "width": 1024, "size": b, "labels": "distinct", "dtype": "float64"}
            for b in SIZES
            for a in ("gelu", "relu", "sigmoid")
        ]
    elif row == "limit":
        plan = [
            {"activation": a, "width": 64, "size": b, "labels": "distinct", "dtype": "float64"}
            for a in ("gelu", "relu", "sigmoid")
            for b in LIMIT
        ]
    elif row == "trained":
        plan = [
            {
                "activation": a,
                "width": 512,
                "size": b,
                "labels": "distinct",
                "dtype": d,
                "steps": steps,
            }
            for d in ("float64", "float32")
            for a in ("relu", "gelu")
            for b in (8, 16)
            for steps in STEPS
        ]
    else:
        plan = [{"dtype": d} for d in ("float64", "float32")]
    for cell in plan:
        size = cell.get("size")
        if cell["dtype"] not in options.dtypes or cell.get("activation", wanted[0]) not in wanted:
            continue
        if options.sizes is not None and size is not None and size not in options.sizes:
            continue
        yield cell


def attempted(row: str, cell: dict, options: argparse.Namespace) -> list[Run]:
    """Every seed of a cell, printed and stored."""
    count = options.seeds or SEEDS[row]
    runs: list[Run] = []
    for seed in range(options.start, options.start + count):
        runs += at_edges(cell, seed) if row == "edges" else [one(row, cell, seed)]
    append(options.output, runs)
    for text in lines(runs):
        print(text, flush=True)
    return runs


def one(row: str, cell: dict, seed: int) -> Run:
    """One batch of one client."""
    width, size = cell["width"], cell["size"]
    if row == "trained":
        model = trained(cell["activation"], cell["steps"], seed)
        x = pictures(size, seed, split(seed)[0])
    else:
        model = rgap.models.mlp((width, width), 10, cell["activation"], seed=seed)
        x = pictures(size, seed)
    y = drawn_labels(cell["labels"], size, 10, seed)
    return {"row": row, **cell, "seed": seed, **outcome(model, x, y, cell["dtype"])}


def at_edges(cell: dict, seed: int) -> list[Run]:
    """Every case at an edge."""
    return [
        {
            "row": "edges",
            "title": case.title,
            "solvable": case.solved,
            **cell,
            "seed": seed,
            **outcome(case.model, case.x, case.y, cell["dtype"], case.loss),
        }
        for case in edges(seed)
    ]


def outcome(
    model: nn.Module, x: Tensor, y: Tensor, dtype: str, loss: str | rgap.Loss = "cross_entropy"
) -> Run:
    """Capture, invert, compare."""
    update = rgap.capture(model, x, y, loss, dtype=getattr(torch, dtype))
    with Stopwatch() as watch:
        recovery = rgap.invert(model, update)
    run: Run = {
        "seconds": watch.wall,
        "cpu": watch.cpu,  # of all threads: steadier on a shared machine
        "status": recovery.status.name,
        "reason": recovery.reason,
        "warnings": list(recovery.warnings),
        "threads": torch.get_num_threads(),
    }
    if recovery.inputs is None:
        return run
    inputs, labels, predicted = recovery.inputs, recovery.labels, recovery.predicted_error
    if recovery.multiplicities is not None:
        run["copies"] = recovery.multiplicities.tolist()
    copies = recovery.multiplicities
    if copies is not None and len(copies) == len(inputs) < len(x):
        inputs = inputs.repeat_interleave(copies, 0)
        labels = None if labels is None else labels.repeat_interleave(copies, 0)
        predicted = None if predicted is None else predicted.repeat_interleave(copies, 0)
    beside = match(inputs, labels, x, y)
    run |= {
        "once": beside.once,
        "labels_right": beside.labels_right,
        "worst": beside.worst,
        "bound": recovery.error_bound,
        "psnr": beside.psnr,
    }
    if predicted is not None:
        run["honesty"] = float((beside.rms / predicted).square().mean().sqrt())
        run["honesty_most"] = float((beside.rms / predicted).max())
    return run


def recovered(run: Run) -> bool:
    """EXACT, every sample once, labels right, no entry beyond the bound."""
    return (
        run["status"] == "EXACT"
        and run["once"]
        and run["labels_right"]
        and run["worst"] <= run["bound"]
    )


def reached(run: Run) -> bool:
    """Recovered as exactly as the row asks for."""
    if run["row"] == "edges":
        return not wrong(run) and (recovered(run) or not run["solvable"])
    if run["row"] in ("limit", "trained"):
        return not wrong(run)
    if not recovered(run):
        return False
    flat = run["activation"] in FLAT
    if run["dtype"] == "float64":
        return run["psnr"] >= (150.0 if flat else 190.0)
    return run["psnr"] >= 85.0 or (flat and run["honesty"] <= 3.0)


def wrong(run: Run) -> bool:
    """EXACT, and yet not the batch."""
    return run["status"] == "EXACT" and not recovered(run)


HEADER = (
    f"{'network':16} {'B':>3} {'labels':9} {'dtype':8} {'recovered':>9} {'min dB':>7} "
    f"{'median':>7} {'true/pred':>9} {'s/batch':>7} {'cpu s':>6} {'wrong':>5}  status"
)


def lines(runs: list[Run]) -> list[str]:
    """The runs of one cell as a line; at the edges one line a case."""
    first = runs[0]
    if first["row"] == "edges":
        titles = dict.fromkeys(run["title"].replace("\n", " ") for run in runs)
        return [at_edge([run for run in runs if run["title"] == title]) for title in titles]
    done = [run for run in runs if recovered(run)]
    psnr = [run["psnr"] for run in done]
    name = f"{first['activation']} {first['width']}"
    if "steps" in first:
        name = f"{first['activation']} {first['steps']} steps"
    statuses = Counter(run["status"] for run in runs)
    return [
        f"{name:16} {first['size']:3} {first['labels']:9} {first['dtype']:8} "
        f"{len(done):3} of {len(runs):2} {min(psnr, default=0.0):7.1f} {middle(psnr):7.1f} "
        f"{middle([run['honesty'] for run in done]):9.2f} "
        f"{middle([run['seconds'] for run in runs]):7.1f} "
        f"{middle([run.get('cpu', math.nan) for run in runs]):6.1f} {sum(map(wrong, runs)):5}  "
        + ", ".join(f"{count} {status}" for status, count in statuses.items())
    ]


def at_edge(runs: list[Run]) -> str:
    """One case at an edge: how often, and in whose words."""
    first = runs[0]
    statuses = Counter(run["status"] for run in runs)
    counted = ", ".join(f"{count} {status}" for status, count in statuses.items())
    psnr = [run["psnr"] for run in runs if recovered(run)]
    decibel = f", at least {min(psnr):.0f} dB" if psnr else ""
    copies = f", copies {first['copies']}" if "copies" in first else ""
    silent = " WRONG" if any(map(wrong, runs)) else ""
    return (
        f"{first['title']} ({first['dtype']}): {counted}{silent}; recovered {len(psnr)}"
        f"{decibel}{copies}; {first['reason']}"
    )


def show(row: str, runs: list[Run]) -> None:
    """The table of a row, from stored runs."""
    if not runs:
        return
    print(f"\n{row}\n{HEADER}")
    keys = ("dtype", "activation", "width", "steps", "size", "labels")
    for group in grouped(runs, *keys).values():
        print("\n".join(lines(group)))


def verdict(runs: list[Run]) -> int:
    """Print every miss; 0 if there was none and no EXACT was wrong."""
    missed = [run for run in runs if not reached(run)]
    for run in missed:
        what = run.get("title") or f"{run['activation']} {run['width']} B = {run['size']}"
        print(
            f"missed: {run['row']} {what} {run.get('labels', '')} {run['dtype']} "
            f"steps {run.get('steps', 0)} seed {run['seed']}: {run['status']}, "
            f"{run.get('psnr', 0.0):.1f} dB; {run['reason']}"
        )
    for (row, size), most in SECONDS.items():
        spent = [r["seconds"] for r in runs if r["row"] == row and r.get("size") == size]
        if spent:
            print(f"{row}, B = {size}: median {middle(spent):.1f} s, goal {most:.0f} s on 2 cores")
    print(f"{len(runs) - len(missed)} of {len(runs)} as asked; wrong: {sum(map(wrong, runs))}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
