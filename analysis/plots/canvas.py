"""One panel for curves: the inks, the frame and the labels that all figures of curves share.

Everything is drawn on a bare `matplotlib.figure.Figure`, so that no call here opens a window,
changes the current figure of ``pyplot`` or needs a display.  Colours are Okabe and Ito's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED = "#1a1a1a", "#6b6b6b"
BLUE, ORANGE = "#0072B2", "#D55E00"

LegendPlace = Literal["best", "upper left", "lower left"]


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one set of axes, its size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def label(axes: Axes, across: str, up: str, title: str, legend: LegendPlace | None = None) -> None:
    """Name the axes and the panel, place the legend, and take away what no one reads.

    Args:
        axes: with its curves.
        across: name of the horizontal axis.
        up: name of the vertical one.
        title: of the panel.
        legend: its place; None for no legend.

    >>> figure, axes = panel(3.0, 2.0)
    >>> label(axes, "index", "value", "nothing")
    >>> axes.get_title(), axes.get_legend() is None
    ('nothing', True)
    """
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.set_title(title, fontsize=10, color=INK)
    if legend is not None:
        axes.legend(frameon=False, fontsize=8.5, loc=legend)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c8c8c8")
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
