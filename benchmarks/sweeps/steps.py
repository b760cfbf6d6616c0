"""Every step at every place of a small network: how a recovery ends, and whether it is right.

    python -m benchmarks.sweeps.steps [--seeds 1]

49 steps, four places, B = 1, 2, 3, five losses; prints how often each status came by step, every
part that was certified and is wrong, and every genuine update that is called inconsistent.
"""

from __future__ import annotations

import argparse
from collections import Counter

from steps_table import STEPS, cases, wrong


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
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


if __name__ == "__main__":
    main()
