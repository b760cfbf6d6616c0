"""Completion: what a prior adds where the equations end, in PSNR of the worst picture of a batch.

    python -m benchmarks.studies.completion                       every row, photographs 8 and later
    python -m benchmarks.studies.completion --rows pair cnn6d --cases 1
    python -m benchmarks.studies.completion --tuning --rows pair  on the pictures of the tuning

The constants of the completion (schedule of the prior's weight, sharpness of kinks) were chosen on
photographs 0 to 3; the rows are measured on others.  ``pair``: LeNet, sigmoid, two pictures,
float64, distinct labels; ``equal``: the same with one label; ``single``: distinct labels, the
client computes in float32; ``four``: four pictures; ``cnn6d``: CNN6-d, one picture, float32.  Exit
status 1 if a row misses its goal, an EXACT is off by more than its bound, or a COMPLETED does not
reproduce its update to 10%.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append
from benchmarks.common.judging import match, misstated
from benchmarks.common.networks import BINARY
from benchmarks.common.pictures import FIRST, photographs


@dataclass(frozen=True)
class Row:
    """One line of the table: what the client holds, and what must come back.

    Attributes:
        size: of the batch.
        labels: of its pictures.
        dtype: in which the client computes.
        goal: PSNR of the worst picture, dB.
        network: ``lenet`` or ``cnn6d``.
    """

    size: int
    labels: tuple[int, ...]
    dtype: torch.dtype
    goal: float
    network: str = "lenet"


ROWS = {
    "pair": Row(2, (3, 5), torch.float64, 40.0),
    "equal": Row(2, (3, 3), torch.float64, 36.0),
    "single": Row(2, (3, 5), torch.float32, 38.0),
    "four": Row(4, (3, 5, 0, 8), torch.float64, 27.0),
    "cnn6d": Row(1, (1,), torch.float32, 90.0, "cnn6d"),
}


def main() -> int:
    """Run what the command line asks for and say what was missed."""
    parser = Arguments(__doc__, rows=["cnn6d"], cases=1)
    parser.rows(ROWS)
    parser.add_argument("--cases", type=int, default=2, help="batches a row")
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds of a batch")
    parser.add_argument("--tuning", action="store_true", help="on the photographs tuned on")
    parser.output()
    options = parser.parse_args()
    print("row     photographs  status            PSNR  goal residual     s")
    missed = 0
    for name in options.rows:
        for case in range(options.cases):
            size = ROWS[name].size
            first = 0 if options.tuning else FIRST
            places = [(first + case * size + i) % 32 for i in range(size)]
            run = one(name, ROWS[name], places, case, options.time_limit)
            missed += bool(run["fault"])
            shown = f"{places[0]}–{places[-1]}" if size > 1 else f"{places[0]}"
            residual = float("nan") if run["residual"] is None else run["residual"]
            print(
                f"{name:7} {shown:12} {run['status']:15} {run['psnr']:6.1f} {ROWS[name].goal:5.0f} "
                f"{residual:8.1e} {run['seconds']:5.0f}  {run['fault']}",
                flush=True,
            )
            append(options.output, [run])
    return int(bool(missed))


def one(name: str, row: Row, places: list[int], seed: int, seconds: float) -> dict:
    """One batch through ``invert`` with a completion."""
    x = photographs(places)
    if row.network == "cnn6d":
        model = rgap.models.cnn6d(seed=seed)
        targets: Tensor = torch.tensor(row.labels, dtype=torch.float64)
        update = rgap.capture(model, x, targets, BINARY, dtype=row.dtype)
    else:
        model = rgap.models.lenet(10, activation="sigmoid", seed=seed)
        targets = torch.tensor(row.labels)
        update = rgap.capture(model, x, targets, dtype=row.dtype)
    recovery = rgap.invert(model, update, complete=True, time_limit=seconds)
    inputs, labels = recovery.inputs, recovery.labels
    if inputs is None and recovery.candidates:
        inputs, labels = recovery.candidates[0].inputs, recovery.candidates[0].labels
    run = {
        "row": name,
        "photographs": places,
        "status": recovery.status.name,
        "reason": recovery.reason,
        "residual": recovery.residual,
        "seconds": recovery.seconds,
        "psnr": float("nan"),
        "fault": "nothing recovered",
    }
    if inputs is None:
        return run
    beside = match(inputs, labels, x, targets)
    fault = misstated(recovery, beside)
    if not fault and beside.psnr < row.goal:
        fault = "below the goal"
    elif not fault and row.network == "cnn6d" and not recovery.exact:
        fault = "not EXACT"
    return {**run, "psnr": beside.psnr, "fault": fault}


if __name__ == "__main__":
    sys.exit(main())
