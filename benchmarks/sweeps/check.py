"""Every mistake on every network of tests/support/mistakes_table.py: what `rgap.check` says first.

    OMP_NUM_THREADS=1 python -m benchmarks.sweeps.check
    OMP_NUM_THREADS=1 python -m benchmarks.sweeps.check --mistakes sign noise

A row a mistake: how often the first finding names it, names it as a rival, is another one (a fault)
or is missing, and which ones came first.
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from mistakes_table import MISTAKES, trials

from benchmarks.common.arguments import Arguments


def main() -> int:
    """Run the study; 1 where a first finding is wrong."""
    parser = Arguments(__doc__, mistakes=["sign"])
    parser.add_argument("--seeds", type=int, default=1, help="of every trial")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.several("--mistakes", MISTAKES, "that are made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ends: dict[str, Counter[str]] = {name: Counter() for name in MISTAKES}
    firsts: dict[str, Counter[str]] = {name: Counter() for name in MISTAKES}
    for seed in range(options.first, options.first + options.seeds):
        for trial in trials(seed, tuple(options.mistakes)):
            end, first, found = trial.outcome()
            ends[trial.mistake][end] += 1
            firsts[trial.mistake][first] += 1
            if end == "wrong":
                print(trial, found.best.sentence if found.best else "", flush=True)
    print("| mistake | named | a rival | nothing | another | first findings |")
    print("| --- | --: | --: | --: | --: | --- |")
    for name, counts in ends.items():
        if counts:
            numbers = [str(counts[end]) for end in ("right", "rival", "silent", "wrong")]
            listed = ", ".join(f"{kind} {n}" for kind, n in firsts[name].most_common())
            print(f"| {name} | {' | '.join(numbers)} | {listed} |")
    return int(any(counts["wrong"] for counts in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
