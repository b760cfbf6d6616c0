"""Random networks whose branches meet: no batch is called EXACT that is not the client's.

    python -m benchmarks.sweeps.graphs --cases 1000
    python -m benchmarks.sweeps.graphs --case 17

Every case of ``tests/support/branched.py`` follows from its number.  An answer is wrong if it is
``EXACT`` and an input is off by more than its ``error_bound``, or a label is another; so is a
feature that is off by more than its error, rms.  A genuine update may not be ``INCONSISTENT``.
Exit status 1 if one is.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

import torch
from branched import Case, drawn
from torch import Tensor

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.judging import match


def judged(case: Case) -> tuple[str, str]:
    """The status, with WRONG before it where it is; and the reason."""
    recovery = rgap.invert(case.model, case.update)
    status = recovery.status.name
    if recovery.inputs is None:
        wrong = case.genuine and status == "INCONSISTENT"
        off = features_off(case, recovery) if case.genuine else ""
        return ("WRONG " if wrong or off else "") + status, off or recovery.reason
    found = match(recovery.inputs, recovery.labels, case.inputs, case.labels)
    assert recovery.error_bound is not None
    right = found.once and found.worst <= recovery.error_bound
    right = right and ("targets" not in recovery.certified or found.labels_right)
    words = f"off by {found.worst:.1e}, bound {recovery.error_bound:.1e}; {recovery.reason}"
    return status if right or not recovery.certified else f"WRONG {status}", words


def features_off(case: Case, recovery: rgap.Recovery) -> str:
    """Which of the features are off by more than ten times their error, or ""."""
    true: dict[str, Tensor] = {}
    for name, module in case.model.named_modules():
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: true.__setitem__(name, inputs[0].detach())
        )
    case.model(case.inputs)
    unit = torch.finfo(case.inputs.dtype).eps
    for name, value in recovery.features.items():
        own = true[name].double().flatten(1)
        apart = torch.cdist(own, value.flatten(1)) / own.shape[1] ** 0.5
        off, size = float(apart.amin(1).max()), float(own.abs().max())
        if off > 10.0 * recovery.features_error[name] + 16.0 * unit * size:
            return f"feature {name} is off by {off:.1e}, error {recovery.features_error[name]:.1e}"
    return ""


def main() -> int:
    """Print how often each outcome occurs; 1 if one is wrong."""
    parser = Arguments(__doc__, cases=6)
    parser.add_argument("--cases", type=int, default=1000, help="networks")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--case", type=int, help="one case, in full")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case is not None:
        case = drawn(options.case)
        print(case.model, case.words, *judged(case), sep="\n")
        return 0
    counts: Counter[str] = Counter()
    for number in range(options.first, options.first + options.cases):
        case, began = drawn(number), time.perf_counter()
        outcome, why = judged(case)
        counts[f"{'genuine' if case.genuine else 'mistaken'}: {outcome}"] += 1
        if "WRONG" in outcome:
            print(number, case.words, outcome, why, f"{time.perf_counter() - began:.1f} s")
    print(dict(sorted(counts.items())))
    return int(any("WRONG" in outcome for outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
