"""The tables of docs/batches.md about a softmax head alone, from runs of ``studies.heads``.

python -m benchmarks.figures.heads_table heads.jsonl [more.jsonl ...]
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.common.pictures import middle
from benchmarks.studies.heads import LABELS, Run, good, lawful, missed, wrong


def main() -> int:
    """Print one row a batch size, network and precision, then the shares."""
    runs = [
        json.loads(line) for path in sys.argv[1:] for line in Path(path).read_text().splitlines()
    ]
    print(
        "| C | B | network | dtype | σ_B/σ_1 distinct · equal · random | batches | above 100 ε | "
        "solved | merged | flagged | missed | wrong | error / law | cpu s | GiB |"
    )
    print("|" + "---|" * 15)
    for (classes, size, network, dtype), group in sorted(grouped(runs).items()):
        print(f"| {classes} | {size} | {network} | {dtype} | {row(group)} |")
    print(f"\n{len(runs)} batches, of which wrong: {sum(map(wrong, runs))}\n")
    shares(runs)
    return 0


def grouped(runs: list[Run]) -> dict[tuple, list[Run]]:
    """By classes, batch size, network and precision."""
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run["classes"], run["size"], run["network"], run["dtype"]].append(run)
    return groups


def row(group: list[Run]) -> str:
    """Everything after the name of a group."""
    ratios = []
    for kind in LABELS:
        own = [run["ratio"] for run in group if run["labels"] == kind]
        ratios.append(f"{middle(own):.0e}" if own else "–")
    of_law = [
        r["relative"] * r["ratio"] / (100 * r["eps"]) for r in group if lawful(r) and r["returned"]
    ]
    merged = sum(r["returned"] and not r["once"] and good(r) for r in group)
    cells = [
        " · ".join(ratios),
        len(group),
        sum(map(lawful, group)),
        sum(map(good, group)) - merged,
        merged,
        sum(not r["returned"] for r in group),
        sum(map(missed, group)),
        sum(map(wrong, group)),
        f"{max(of_law):.1e}" if of_law else "–",
        f"{middle([r['cpu'] for r in group]):.1f}",
        f"{max(r['memory'] for r in group):.1f}",
    ]
    return " | ".join(str(cell) for cell in cells)


def shares(runs: list[Run]) -> None:
    """Shares of solved, merged and flagged batches on both sides of the law."""
    print("| C | B | above 100 ε: batches | solved | flagged | below: batches | solved | merged | "
          "flagged |")  # fmt: skip
    print("|" + "---|" * 9)
    sizes = sorted({(run["classes"], run["size"]) for run in runs})
    for classes, size in sizes:
        own = [run for run in runs if (run["classes"], run["size"]) == (classes, size)]
        cells: list[str] = []
        for side in (True, False):
            part = [run for run in own if lawful(run) is side]
            merged = sum(run["returned"] and not run["once"] and good(run) for run in part)
            counts = [sum(map(good, part)) - merged]
            counts += [] if side else [merged]
            counts += [sum(not run["returned"] for run in part)]
            percent = [f"{100 * count / len(part):.0f}%" if part else "–" for count in counts]
            cells += [str(len(part)), *percent]
        print(f"| {classes} | {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
