"""Every mistake on every network of tests/support/mistakes_table.py: what `rgap.check` says first.

    OMP_NUM_THREADS=1 python -m benchmarks.sweeps.check
    OMP_NUM_THREADS=1 python -m benchmarks.sweeps.check --mistakes sign noise
    OMP_NUM_THREADS=1 python -m benchmarks.sweeps.check --unstated
    OMP_NUM_THREADS=1 python -m benchmarks.sweeps.check --genuine 400

A row a mistake: how often the first finding names it, names it among those that no equation tells
apart ("undecided"), names it as a rival, is missing, or is another one (a fault), and which ones
came first.  With ``--unstated`` the server does not know the batch size.  With ``--genuine`` random
networks, losses and batches of clients without mistakes, each with its batch size and without;
every finding is a fault.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import torch
from genuine_updates import drawn
from mistakes_table import MISTAKES, trials

from benchmarks.common.arguments import Arguments
from rgap import check
from rgap.diagnosis import Kind


def genuine(first: int, count: int) -> int:
    """Check updates without a mistake; 1 where one has a finding."""
    faults = 0
    for seed in range(first, first + count):
        model, update = drawn(seed)
        for size in (update.batch_size, None):
            seen = check(model, replace(update, batch_size=size))
            if any(f.kind is not Kind.NAMES for f in seen.findings):
                faults += 1
                print(seed, "B =", size, update.loss, seen.explain(), flush=True)
    print(f"{faults} of {2 * count} genuine updates have a finding")
    return int(faults > 0)


def main() -> int:
    """Run the study; 1 where a first finding is wrong."""
    parser = Arguments(__doc__, mistakes=["sign"])
    parser.add_argument("--seeds", type=int, default=1, help="of every trial")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--unstated", action="store_true", help="leave the batch sizes out")
    parser.add_argument("--genuine", type=int, default=0, help="updates without a mistake")
    parser.several("--mistakes", MISTAKES, "that are made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.genuine:
        return genuine(options.first, options.genuine)
    ends: dict[str, Counter[str]] = {name: Counter() for name in MISTAKES}
    firsts: dict[str, Counter[str]] = {name: Counter() for name in MISTAKES}
    for seed in range(options.first, options.first + options.seeds):
        for trial in trials(seed, tuple(options.mistakes), not options.unstated):
            end, first, found = trial.outcome()
            ends[trial.mistake][end] += 1
            firsts[trial.mistake][first] += 1
            if end == "wrong":
                print(trial, found.best.sentence if found.best else "", flush=True)
    print("| mistake | named | undecided | a rival | nothing | another | first findings |")
    print("| --- | --: | --: | --: | --: | --: | --- |")
    for name, counts in ends.items():
        if counts:
            numbers = [str(counts[end]) for end in ("right", "open", "rival", "silent", "wrong")]
            listed = ", ".join(f"{kind} {n}" for kind, n in firsts[name].most_common())
            print(f"| {name} | {' | '.join(numbers)} | {listed} |")
    return int(any(counts["wrong"] for counts in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
