"""LeNet beyond one picture: the head's features are exact, the layers below end the recursion.

    python -m benchmarks.studies.lenet_batches                       B = 2 ... 8, 10 batches each
    python -m benchmarks.studies.lenet_batches --rows 2 4 8 --seeds 1    one batch each
    python -m benchmarks.studies.lenet_batches --rows 2 3 --dtypes float32 --output lenet.jsonl

``invert`` separates the batch at the softmax head and descends; where it stops, its report is held
beside the row of ``rgap.analysis.audit`` for that batch size, whose weights are the same and
whose pictures are not: unknowns, joint rank and nullity must agree.  ``features``: largest error of
the head's features over the largest feature.  Exit status 1 if a batch that the head gave up should
have been solved (σ_B/σ_1 > 100 ε), a nullity differs, a label is wrong, or an EXACT is returned
where the audit says that equations are missing.
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from torch import nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append
from benchmarks.common.judging import middle
from benchmarks.common.pictures import drawn_labels, pictures
from benchmarks.figures.heads_table import Run, lawful
from benchmarks.studies.heads import compared, features
from rgap.analysis import audit
from rgap.inversion.batch_rows import batch_of
from rgap.inversion.problem import prepare
from rgap.separation.batch import Separated
from rgap.separation.route import separate
from rgap.update.preflight import ClientView

SIZES = tuple(range(2, 9))
LABELS = ("distinct", "equal")
SHAPE = (3, 32, 32)


def main() -> int:
    """Run what the command line asks for, print one line a cell, say what was missed."""
    parser = Arguments(
        __doc__, rows=[2], labels=["distinct"], activations=["sigmoid"], dtypes=["float64"], seeds=1
    )
    parser.rows(SIZES)
    parser.several("--labels", ("random", *LABELS), "of a batch", LABELS)
    parser.several("--activations", rgap.models.ACTIVATIONS, "of LeNet", ("sigmoid", "leaky_relu"))
    parser.dtypes()
    parser.add_argument("--seeds", type=int, default=10, help="batches a cell")
    parser.output()
    options = parser.parse_args()
    print(HEADER, flush=True)
    runs: list[Run] = []
    for activation in options.activations:
        for size in options.rows:
            for labels in options.labels:
                for dtype in options.dtypes:
                    cell = {"activation": activation, "size": size, "labels": labels}
                    group = [one({**cell, "dtype": dtype}, seed) for seed in range(options.seeds)]
                    print(line(group), flush=True)
                    runs += group
                    append(options.output, group)
    return verdict(runs)


def one(cell: dict, seed: int) -> Run:
    """One batch through ``invert``, its head once more by itself, and the audit."""
    size, dtype = cell["size"], getattr(torch, cell["dtype"])
    model = rgap.models.lenet(10, activation=cell["activation"], seed=seed)
    x, y = pictures(size, seed), drawn_labels(cell["labels"], size, 10, seed)
    update = rgap.capture(model, x, y, dtype=dtype)
    values = torch.linalg.svdvals(update.gradients["head.weight"].double())
    recovery = rgap.invert(model, update)
    stop = next((r for r in reversed(recovery.layers) if r.nullity), None)
    run: Run = {
        **cell,
        "seed": seed,
        "ratio": float(values[size - 1] / values[0]),
        "eps": torch.finfo(dtype).eps,
        "status": recovery.status.name,
        "reason": recovery.reason,
        "seconds": recovery.seconds,
        "route": recovery.layers[-1].route,
        "stop": None if stop is None else [stop.layer, stop.unknowns, stop.joint_rank],
        "audit": audited(model, size, seed),
    }
    return run | at_head(model, update, x, y)


def audited(model: nn.Module, size: int, seed: int) -> list | None:
    """The audit's first row from above with missing equations; None if there is none."""
    table = audit(model, SHAPE, batch_sizes=(size,), seed=seed)
    row = next((row for row in reversed(table.rows) if row.nullity), None)
    return None if row is None else [row.layer, row.unknowns, row.joint_rank]


def at_head(model: nn.Module, update: rgap.Update, x: torch.Tensor, y: torch.Tensor) -> Run:
    """What the head alone says of features and labels, the route that ``invert`` takes."""
    problem = prepare(ClientView.of(model, update), budget=2.0**31)
    answer = separate(batch_of(problem))
    if not isinstance(answer, Separated):
        return {"solved": False}
    return {"solved": True, **compared(answer, features(problem.chain, x), y)}


def fault(run: Run) -> str:
    """What is wrong with a run, or nothing."""
    if not run["solved"]:
        return "the head gave up" if lawful(run) else ""
    if not run["labels_right"]:
        return "a label is wrong"
    if lawful(run) and run["relative"] > 100 * run["eps"] / run["ratio"]:
        return f"features off by {run['relative']:.1e}"
    if run["stop"] != run["audit"]:
        return f"stops at {run['stop']}, the audit says {run['audit']}"
    if run["status"] == "EXACT" and run["audit"] is not None:
        return "EXACT although equations are missing"
    return ""


HEADER = (
    f"{'network':10} {'B':>2} {'labels':8} {'dtype':7} {'law':>7} {'solved':>7} {'labels':>6} "
    f"{'features':>8} {'s':>5}  status; stops at layer, joint rank of unknowns"
)


def line(runs: list[Run]) -> str:
    """One cell of the table."""
    first = runs[0]
    done = [run for run in runs if run["solved"]]
    stops = Counter(
        f"{run['stop'][0]}, {run['stop'][2]} of {run['stop'][1]}" for run in done if run["stop"]
    )
    statuses = Counter(run["status"] for run in runs)
    return (
        f"{first['activation']:10} {first['size']:2} {first['labels']:8} {first['dtype']:7} "
        f"{sum(map(lawful, runs)):4}/{len(runs):2} {len(done):4}/{len(runs):2} "
        f"{sum(run['labels_right'] for run in done):6} "
        f"{max((run['relative'] for run in done), default=float('nan')):8.1e} "
        f"{middle([run['seconds'] for run in runs]):5.1f}  "
        + ", ".join(f"{count} {status}" for status, count in statuses.items())
        + "; "
        + ", ".join(f"{count}× {stop}" for stop, count in stops.most_common(3))
    )


def verdict(runs: list[Run]) -> int:
    """Print every fault; 0 if there was none."""
    faults = [(run, fault(run)) for run in runs]
    faults = [(run, words) for run, words in faults if words]
    for run, words in faults:
        print(
            f"{run['activation']} B = {run['size']} {run['labels']} {run['dtype']} seed "
            f"{run['seed']}: {words} (σ_B/σ_1 {run['ratio']:.1e}; {run['status']}: {run['reason']})"
        )
    print(f"{len(runs) - len(faults)} of {len(runs)} as the equations say")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
