"""Runs at a softmax head alone: what the law asks of each, and the tables of docs/batches.md.

With ε the machine epsilon of the update and σ_B/σ_1 the ratio of the B-th to the first singular
value of the head's gradient, the law asks for a solution wherever σ_B/σ_1 > 100 ε.
"""

from __future__ import annotations

import math

from benchmarks.common.json_lines import grouped
from benchmarks.common.judging import middle

Run = dict
LABELS = ("distinct", "equal", "random")
SLACK = 6.0  # standard errors


def lawful(run: Run) -> bool:
    """True if the law demands a solution."""
    return run["ratio"] > 100 * run["eps"]


def good(run: Run) -> bool:
    """Solved as well as the law, or beyond it the answer itself, says."""
    if not run["returned"] or not run["labels_right"]:
        return False
    if lawful(run):
        return run["once"] and run["relative"] <= 100 * run["eps"] / run["ratio"]
    return run["honesty_most"] <= SLACK


def merged(run: Run) -> bool:
    """Solved, with samples nearer to each other than the errors as copies of one."""
    return run["returned"] and not run["once"] and good(run)


def missed(run: Run) -> bool:
    """Flagged though the law says that it can be solved."""
    return lawful(run) and not run["returned"]


def wrong(run: Run) -> bool:
    """An answer that is none."""
    return run["returned"] and not good(run)


def most_of_law(runs: list[Run]) -> float:
    """Largest error over what the law allows, 100 ε σ_1/σ_B; NaN where it asks for nothing."""
    shares = [
        r["relative"] * r["ratio"] / (100 * r["eps"]) for r in runs if lawful(r) and r["returned"]
    ]
    return max(shares, default=math.nan)


def print_tables(runs: list[Run]) -> None:
    """Print one row a batch size, network and precision, then the shares."""
    print(
        "| C | B | network | dtype | σ_B/σ_1 distinct · equal · random | batches | above 100 ε | "
        "solved | merged | flagged | missed | wrong | error / law | cpu s | GiB |"
    )
    print("|" + "---|" * 15)
    groups = grouped(runs, "classes", "size", "network", "dtype")
    for (classes, size, network, dtype), group in sorted(groups.items()):
        print(f"| {classes} | {size} | {network} | {dtype} | {row(group)} |")
    print(f"\n{len(runs)} batches, of which wrong: {sum(map(wrong, runs))}\n")
    shares(runs)


def row(group: list[Run]) -> str:
    """Everything after the name of a group."""
    ratios = []
    for kind in LABELS:
        own = [run["ratio"] for run in group if run["labels"] == kind]
        ratios.append(f"{middle(own):.0e}" if own else "–")
    most, copied = most_of_law(group), sum(map(merged, group))
    cells = [
        " · ".join(ratios),
        len(group),
        sum(map(lawful, group)),
        sum(map(good, group)) - copied,
        copied,
        sum(not r["returned"] for r in group),
        sum(map(missed, group)),
        sum(map(wrong, group)),
        "–" if math.isnan(most) else f"{most:.1e}",
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
            copied = sum(map(merged, part))
            counts = [sum(map(good, part)) - copied]
            counts += [] if side else [copied]
            counts += [sum(not run["returned"] for run in part)]
            percent = [f"{100 * count / len(part):.0f}%" if part else "–" for count in counts]
            cells += [str(len(part)), *percent]
        print(f"| {classes} | {size} | " + " | ".join(cells) + " |")
