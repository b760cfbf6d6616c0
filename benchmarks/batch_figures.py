"""Figures of the batch studies: readable in grey and for every kind of colour vision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from batch_pictures import middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED = "#1a1a1a", "#6b6b6b"
# From Okabe and Ito's palette, of different lightness; line style and marker tell them apart too.
STYLES = {
    "gelu": ("#0072b2", "-", "o", "GELU"),
    "relu": ("#d55e00", "--", "s", "ReLU"),
    "sigmoid": ("#000000", ":", "^", "sigmoid"),
    "float64": ("#0072b2", "", "o", "float64"),
    "float32": ("#e69f00", "", "s", "float32"),
}


def draw_batches(runs: list[dict], path: Path) -> None:
    """Share recovered against B over the width, and seconds against B."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, row, value in ((left, "limit", "share"), (right, "sizes", "seconds")):
        for name in ("gelu", "relu", "sigmoid"):
            groups: dict[int, list[dict]] = {}
            for run in runs:
                if run["row"] == row and run["activation"] == name:
                    groups.setdefault(run["size"], []).append(run)
            sizes = sorted(groups)
            if not sizes:
                continue
            colour, style, marker, label = STYLES[name]
            heights = [_height(value, groups[size]) for size in sizes]
            axes.plot(sizes, heights, style, color=colour, marker=marker, label=label, ms=4.5)
        axes.set_xlabel("batch size B")
        _plain(axes)
    left.axvline(32.5, color=MUTED, lw=1)
    left.text(32.2, 0.45, "B − 1 unknowns\n= 64 − B equations", color=MUTED, ha="right", size=8)
    left.set_title("width 64: share of batches recovered", size=9.5, loc="left", color=INK)
    left.set_ylim(-0.04, 1.08)
    right.set_title("width 1024: seconds a batch", size=9.5, loc="left", color=INK)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    ticks = sorted({run["size"] for run in runs if run["row"] == "sizes"})
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    right.legend(frameon=False, fontsize=8)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=200)


def draw_heads(runs: list[dict], path: Path) -> None:
    """Relative error against σ_B/σ_1, beside the law 100 ε σ_1/σ_B; flagged batches below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for dtype, eps in (("float64", 2.0**-52), ("float32", 2.0**-23)):
        colour, _, marker, label = STYLES[dtype]
        mine = [run for run in runs if run["dtype"] == dtype and run["ratio"] > 0]
        done = [run for run in mine if run["returned"]]
        axes.plot(
            [run["ratio"] for run in done],
            [max(run["relative"], 1e-17) for run in done],
            marker,
            color=colour,
            ms=3.0,
            alpha=0.6,
            mew=0,
            label=f"{label}, solved",
        )
        axes.plot(
            [run["ratio"] for run in mine if not run["returned"]],
            [3e-18 if dtype == "float64" else 1e-18] * (len(mine) - len(done)),
            "x" if dtype == "float32" else "+",
            color=colour,
            ms=4,
            label=f"{label}, flagged",
        )
        ends = [100 * eps, 1.0]
        axes.plot(ends, [100 * eps / ratio for ratio in ends], "-", color=MUTED, lw=1)
        height = 6e-9 if dtype == "float32" else 3e-16
        axes.axvline(100 * eps, color=MUTED, lw=0.8, ls=":")
        axes.text(120 * eps, height, f"100 ε, {dtype}", color=MUTED, size=8, rotation=90, va="top")
    axes.text(3e-3, 4e-2 * 3e-2, "100 ε σ₁/σ_B", color=MUTED, size=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("σ_B/σ₁ of the head's gradient")
    axes.set_ylabel("largest error over largest feature")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(1.0, 0.3))
    _plain(axes)
    figure.savefig(path, dpi=200)


def _height(value: str, runs: list[dict]) -> float:
    if value == "seconds":
        return middle([run["seconds"] for run in runs])
    good = [r["status"] == "EXACT" and r["worst"] <= r["bound"] for r in runs]
    return sum(good) / len(good)


def _plain(axes: Axes) -> None:
    """No box, light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
