"""One random convolution after another: K and X up to Γ by shifts, and never beyond the condition.

    python -m benchmarks.sweeps.shifts
    python -m benchmarks.sweeps.shifts --cases 50 --first 1000 --each

Sizes, kernel, stride, dilation, padding and batch size are drawn; inputs are rectified normal
numbers or rectified random filters of photographs; gradients in float64 or rounded to float32.  A
case is within where an arrangement of the taps bears its batch, otherwise beyond.  An answer is
right if its batch size is, and K and X, each after the best Γ, are off by no more than 100 ε times
the condition that it states.  Exit status 1 if one is wrong.
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from shifted import Convolution, random_convolution

from benchmarks.common.arguments import Arguments
from rgap.separation.shifts.positions import Positions, tell_positions_apart

ALLOWED = 100.0  # times ε and the condition


def judged(case: Convolution) -> tuple[str, float, str]:
    """What became of a case, its error over ε times the condition, and why it was flagged."""
    told = tell_positions_apart(case.affine, case.gradient, case.noise)
    where = "within" if case.within else "beyond"
    if not isinstance(told, Positions):
        return f"{where}: flagged", 0.0, told.reason
    if told.batch != len(case.inputs):
        return f"{where}: WRONG batch size", 0.0, ""
    unit = torch.finfo(case.dtype).eps * told.condition
    share = case.error(told.cotangents, told.inputs) / unit
    return f"{where}: {'right' if share <= ALLOWED else 'WRONG'}", share, ""


def main() -> int:
    """Print how often each outcome occurs, and the largest error; 1 if one is wrong."""
    parser = Arguments(__doc__, cases=10)
    parser.add_argument("--cases", type=int, default=500, help="convolutions")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--each", action="store_true", help="a line a case")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    worst = 0.0
    for number in range(options.first, options.first + options.cases):
        outcome, share, why = judged(random_convolution(number))
        counts[outcome] += 1
        worst = max(worst, share)
        if options.each or "WRONG" in outcome:
            print(number, outcome, f"{share:.2g}", why, flush=True)
    print(dict(sorted(counts.items())), f"largest error {worst:.2g} of its condition times ε")
    return int(any("WRONG" in outcome for outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
