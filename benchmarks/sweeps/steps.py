"""Every step at every place of a small network: how a recovery ends, and whether it is right.

    python -m benchmarks.sweeps.steps
    python -m benchmarks.sweeps.steps --every 20     a sample

49 steps, four places, B = 1, 2, 3, five losses; prints how often each status came by step, every
part that was certified and is wrong, and every genuine update that is called inconsistent.
"""

from __future__ import annotations

import sys
from collections import Counter

from steps_table import STEPS, cases, wrong

from benchmarks.common.arguments import Arguments


def main() -> int:
    """Run the sweep; 1 if something certified is wrong."""
    parser = Arguments(__doc__, every=400)
    parser.add_argument("--seeds", type=int, default=1, help="of every case")
    parser.add_argument("--every", type=int, default=1, help="of the cases, to look at a sample")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {step: Counter() for step in STEPS}
    faults = []
    listed = [case for seed in range(options.seeds) for case in cases(seed)][:: options.every]
    for case in listed:
        status, why = wrong(case)
        counts[case.step][status] += 1
        if why:
            faults.append(f"{case}: {status}: {why}")
            print(faults[-1], flush=True)
    for step, found in counts.items():
        print(f"{step:20s}", ", ".join(f"{name} {n}" for name, n in found.most_common()))
    total: Counter[str] = sum(counts.values(), Counter())
    print(f"{len(listed)} cases:", dict(total.most_common()), f"{len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
