"""Figures of the batch studies: readable in grey and for every kind of colour vision."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

INK, MUTED = "#1a1a1a", "#6b6b6b"
# From Okabe and Ito's palette, of different lightness; line style and marker tell them apart too.
STYLES = {
    "gelu": ("#0072b2", "-", "o", "GELU"),
    "relu": ("#d55e00", "--", "s", "ReLU"),
    "sigmoid": ("#000000", ":", "^", "sigmoid"),
    "float64": ("#0072b2", "", "o", "float64"),
    "float32": ("#e69f00", "", "s", "float32"),
}
LINES = {
    "ours": ("#0072b2", "-", "o", "equations, then a prior for the rest"),
    "theirs": ("#d55e00", "--", "s", "signed Adam, cosine, total variation; the same time"),
}

CROWDED = 6  # batch size from which points lie too close for more than a number


def draw_batches(runs: list[dict], path: Path) -> None:
    """Share recovered at width 64; lowest PSNR and least CPU time of a batch, all against B."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    left, middle_axes, right = figure.subplots(1, 3)
    wide = [run for run in runs if run["row"] in ("activations", "sizes")]
    double = [run for run in wide if run["dtype"] == "float64"]
    single = [run for run in wide if run["dtype"] == "float32"]
    _curves(left, [run for run in runs if run["row"] == "limit"], _share)
    _curves(middle_axes, double, _least_psnr)
    _curves(middle_axes, single, _least_psnr, hollow=True)
    _curves(right, double, _least_seconds)
    left.axvline(32.5, color=MUTED, lw=1)
    left.text(33.3, 0.62, "B − 1 unknowns\n= 64 − B equations", color=MUTED, size=7.5)
    left.set_title("width 64: share recovered", size=9.5, loc="left", color=INK)
    left.set_ylim(-0.04, 1.08)
    left.set_xlim(6, 54)
    middle_axes.set_title("lowest PSNR of a sample, dB", size=9.5, loc="left", color=INK)
    middle_axes.set_ylim(60, 330)
    middle_axes.text(
        0.03,
        0.06,
        "filled: float64, hollow: float32",
        color=MUTED,
        size=7.5,
        transform=middle_axes.transAxes,
    )
    right.set_title("CPU seconds a batch, float64", size=9.5, loc="left", color=INK)
    right.set_yscale("log")
    ticks = sorted({run["size"] for run in wide})
    for axes in (middle_axes, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    for axes in (left, middle_axes, right):
        axes.set_xlabel("batch size B")
        _plain(axes)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=200)


def _curves(
    axes: Axes, runs: list[dict], height: Callable[[list[dict]], float], hollow: bool = False
) -> None:
    """A line an activation, over the batch sizes that were run."""
    for name in ("gelu", "relu", "sigmoid"):
        groups: dict[int, list[dict]] = {}
        for run in runs:
            if run["activation"] == name:
                groups.setdefault(run["size"], []).append(run)
        if not groups:
            continue
        colour, style, marker, label = STYLES[name]
        sizes = sorted(groups)
        heights = [height(groups[size]) for size in sizes]
        face = "white" if hollow else colour
        axes.plot(sizes, heights, style, color=colour, marker=marker, mfc=face, label=label, ms=4.5)


def _share(runs: list[dict]) -> float:
    """EXACT, whatever the last digits of the bound."""
    return sum(run["status"] == "EXACT" for run in runs) / len(runs)


def _least_psnr(runs: list[dict]) -> float:
    return min((run["psnr"] for run in runs if run["status"] == "EXACT"), default=math.nan)


def _least_seconds(runs: list[dict]) -> float:
    return min(run.get("cpu", run["seconds"]) for run in runs)


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
        height = 3.0
        axes.axvline(100 * eps, color=MUTED, lw=0.8, ls=":")
        axes.text(120 * eps, height, f"100 ε, {dtype}", color=MUTED, size=8, va="bottom")
    axes.text(2e-3, 3e-2, r"$100\,\varepsilon\,\sigma_1/\sigma_B$", color=MUTED, size=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(r"$\sigma_B/\sigma_1$ of the head's gradient")
    axes.set_ylabel("largest error over largest feature")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(1.0, 0.3))
    _plain(axes)
    figure.savefig(path, dpi=200)


def _plain(axes: Axes) -> None:
    """No box, light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def draw_matching(runs: list[tuple[dict, Tensor, Tensor | None]], path: Path) -> None:
    """Pictures that methods found beside the true ones: a line an experiment, a column a method."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[dict, Tensor, Tensor | None]]] = {}
    for run, x, near in runs:
        if near is not None:
            lines.setdefault(run["row"].removeprefix("blog "), []).append((run, x, near))
    wide = max(1 + len(shown) for shown in lines.values())
    tall = sum(len(shown[0][1]) for shown in lines.values())
    figure = Figure(figsize=(1.25 * wide, 1.35 * tall), layout="constrained")
    grid = figure.subplots(tall, wide, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    top = 0
    for letter, shown in lines.items():
        size = len(shown[0][1])
        for row in range(size):
            _picture(grid[top + row][0], shown[0][1][row], f"({letter}) true" if row == 0 else "")
            for column, (run, _, near) in enumerate(shown, 1):
                assert near is not None
                name = f"{run['method']}\n{run['psnr']:.1f} dB" if row == 0 else ""
                _picture(grid[top + row][column], near[row], name)
        top += size
    figure.savefig(path, dpi=150)


def draw_nullity(runs: list[dict], path: Path) -> None:
    """PSNR of the worst picture against the share of the unknowns that no equation fixes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    top = 5 + max(r[who]["psnr"] for r in runs for who in LINES if _drawn(r, who))
    for who, (colour, line, marker, name) in LINES.items():
        held = sorted(
            (100 * run["nullity"] / run["unknowns"], run[who]["psnr"])
            for run in runs
            if _drawn(run, who)
        )
        axes.plot(*zip(*held, strict=True), color=colour, ls=line, marker=marker, ms=5, label=name)
    for run in runs:
        share, psnr = 100 * run["nullity"] / run["unknowns"], run["ours"]["psnr"]
        if psnr is not None and run["status"] == "EXACT":
            axes.plot(share, top, color=LINES["ours"][0], marker="^", ms=7, clip_on=False)
            text = f"  EXACT, {psnr:.0f} dB"
            axes.text(share, top, text, color=INK, size=8, va="center")
        if run["case"] == 0 and psnr is not None:
            place = (share, top if run["status"] == "EXACT" else psnr)
            name = f"B = {run['size']}" if run["size"] < CROWDED else str(run["size"])
            axes.annotate(
                name, place, (0, 7), textcoords="offset points", color=INK, size=8,
                ha="center",
            )  # fmt: skip
    axes.set_ylim(0, top)
    axes.set_xlabel("unknowns that no equation fixes, %", size=9)
    axes.set_ylabel("PSNR of the worst picture, dB", size=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _drawn(run: dict, who: str) -> bool:
    """True if a run has a point on the curve: an exact one is beyond its axis."""
    return run[who]["psnr"] is not None and not (who == "ours" and run["status"] == "EXACT")


def _picture(axes: Axes, picture: Tensor, title: str) -> None:
    axes.imshow(picture.clamp(0, 1).movedim(0, -1).numpy(), interpolation="nearest")
    axes.set_title(title, size=6.5, color=INK)
