"""Figures of what an update leaves open: null directions, spectra, nullity against batch size.

Everything is drawn on a bare `matplotlib.figure.Figure`.  Colours are Okabe and Ito's, with
markers and dashes that tell the curves apart in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rgap.analysis.plots.canvas import BLUE, INK, MUTED, ORANGE, label, panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rgap.analysis.joint_rank.table import Identifiability

__all__ = ["null_pictures", "nullity_curves", "spectra"]

_STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", (0, (5, 1)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "P"),
    ("#000000", (0, (1, 1)), "X"),
)
_FLOOR = 1e-20  # of the largest: no axis goes below it
BEYOND = 0.05  # outside [0, 1], that tells values of another range from a little overshoot


def null_pictures(answer: Identifiability, count: int = 5) -> Figure:
    """Draw the smoothest null directions of every sample, and what share of each pixel is known.

    A row per sample, a column per direction: moving the batch along all pictures of one column
    together changes nothing in the update.  Red adds, blue takes away, white stays; colour pictures
    show the mean over the channels.  The last column is the determined share of every pixel's
    variance, averaged over the channels.

    Args:
        answer: with an ``input_shape`` [C, H, W] of a picture.
        count: directions to draw, at most.

    Raises:
        ValueError: inputs that are no pictures, nothing undetermined, or a count below 1.

    >>> import rgap
    >>> net = rgap.models.lenet(channels=2, input_shape=(1, 8, 8), seed=0)
    >>> figure = null_pictures(rgap.analysis.identifiability(net, (1, 8, 8), 2), count=3)
    >>> [axes.get_title() for axes in figure.axes[:4]]
    ['direction 1', 'direction 2', 'direction 3', 'determined share']
    """
    shape = answer.input_shape
    if len(shape) != 3:
        raise ValueError(
            f"expected input_shape [C, H, W] for pictures, got {list(shape)}; write spectra(found)"
        )
    if answer.joint_nullity == 0:
        raise ValueError(
            "expected a null space to draw, got none: the batch is determined; write spectra(found)"
        )
    pictures = answer.pictures(count).mean(2)  # over the channels
    share = answer.share.mean(1)
    batch, columns = answer.batch_size, len(pictures) + 1
    figure = Figure(figsize=(0.7 + 1.5 * columns, 0.9 + 1.5 * batch), layout="constrained")
    grid: Any = figure.subplots(batch, columns, squeeze=False)
    limit = float(pictures.abs().max()) or 1.0
    drawn = known = None
    for b in range(batch):
        for j, picture in enumerate(pictures[:, b]):
            drawn = grid[b, j].imshow(
                picture.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
            )
        known = grid[b, -1].imshow(
            share[b].numpy(), cmap="cividis", vmin=0, vmax=1, interpolation="nearest"
        )
        grid[b, 0].set_ylabel(f"sample {b + 1}", fontsize=10, color=INK)
    for j in range(columns - 1):
        grid[0, j].set_title(f"direction {j + 1}", fontsize=9, color=INK)
    grid[0, -1].set_title("determined share", fontsize=9, color=INK)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#c8c8c8")
    assert drawn is not None
    assert known is not None
    bars = (
        (drawn, grid[-1, :-1], [-limit, 0, limit], ["takes away", "stays", "adds"]),
        (known, grid[-1, -1:], [0, 0.5, 1], ["0", "½", "1"]),
    )
    for image, below, ticks, words in bars:
        bar = figure.colorbar(
            image, ax=list(below), location="bottom", ticks=ticks, pad=0.04, fraction=0.05
        )
        bar.ax.set_xticklabels(words)
        bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
        bar.outline.set_visible(False)
    figure.suptitle(
        f"{answer.joint_nullity:,} of {answer.unknowns:,} directions leave the update of "
        f"{answer.model} as it is",
        fontsize=11,
        color=INK,
    )
    return figure


def made_up_shares(
    pictures: Tensor, share: Tensor, value_range: tuple[float, float] | None = None
) -> Figure:
    """Draw every picture, and below it what share of each pixel no equation fixes.

    Args:
        pictures: [B, C, H, W], C = 1 or 3.
        share: of each entry, in [0, 1], alike; drawn is its mean over the channels.
        value_range: of the pictures, black to white; by default [0, 1], or from the smallest to the
            largest value where some lie outside.

    Raises:
        ValueError: data that are no pictures.

    >>> figure = made_up_shares(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4))
    >>> len(figure.axes)
    5
    """
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise ValueError(
            f"expected pictures [B, C, H, W] with 1 or 3 channels, got {list(pictures.shape)}; "
            "write made_up(...).share"
        )
    ends = float(pictures.min()), float(pictures.max())
    low, high = value_range or (ends if min(ends[0], 1.0 - ends[1]) < -BEYOND else (0.0, 1.0))
    pictures = ((pictures - low) / (high - low)).clamp(0, 1)
    batch = len(pictures)
    figure = Figure(figsize=(0.9 + 1.5 * batch, 3.6), layout="constrained")
    grid: Any = figure.subplots(2, batch, squeeze=False)
    drawn = None
    for b in range(batch):
        picture = pictures[b].permute(1, 2, 0).squeeze(2).numpy()
        grid[0, b].imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        drawn = grid[1, b].imshow(
            share[b].mean(0).numpy(), cmap="cividis", vmin=0, vmax=1, interpolation="nearest"
        )
    grid[0, 0].set_ylabel("recovered", fontsize=10, color=INK)
    grid[1, 0].set_ylabel("made up", fontsize=10, color=INK)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#c8c8c8")
    assert drawn is not None
    bar = figure.colorbar(drawn, ax=list(grid[1]), location="right", ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0", "½", "1"])
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    bar.outline.set_visible(False)
    return figure


def spectra(answer: Identifiability) -> Figure:
    """Draw the singular values that decided the ranks, with the cutoff's two sides and the gap.

    One curve per decision, each over its largest value; what lies beyond the rank is drawn hollow.
    Values that are exactly zero have no place on the axis and are left out.

    Args:
        answer: any finding with spectra.

    Raises:
        ValueError: no singular values were needed.

    >>> import rgap
    >>> net = rgap.models.mlp((8,), 3, input_shape=(1, 4, 4), seed=0)
    >>> spectra(rgap.analysis.identifiability(net, (1, 4, 4))).axes[0].get_yscale()
    'log'
    """
    curves = [(name, values) for name, values in answer.spectra if values.numel()]
    if answer.method == "dense":
        curves = [(name, values) for name, values in curves if name == "all layers"]
    if not curves:
        raise ValueError(
            "expected singular values to draw, got none: every rank followed from small factors; "
            "write identifiability(..., method='dense')"
        )
    gaps = {row.layer: row.gap for row in answer.rows}
    gaps["all layers"] = answer.gap
    figure, axes = panel(6.4, 4.0)
    low = 1.0
    for i, (name, values) in enumerate(curves):
        colour, dash, marker = _STYLES[i % len(_STYLES)]
        low = min(low, _curve(axes, name, values, gaps.get(name, inf), (colour, dash, marker)))
    axes.set_yscale("log")
    axes.set_ylim(max(low / 10, _FLOOR / 10), 3)
    label(
        axes,
        "index",
        "singular value / largest",
        f"{answer.model}, B = {answer.batch_size}: rank {answer.joint_rank:,} of "
        f"{answer.unknowns:,}",
        "best",
    )
    return figure


def nullity_curves(findings: Sequence[Identifiability]) -> Figure:
    """Draw missing equations against batch size: layer by layer, and jointly.

    Args:
        findings: of one network at several batch sizes, in any order.

    Raises:
        ValueError: no findings, several networks, or a batch size twice.

    >>> import rgap
    >>> net = rgap.models.lenet(channels=2, input_shape=(1, 8, 8), seed=0)
    >>> found = [rgap.analysis.identifiability(net, (1, 8, 8), b) for b in (1, 2)]
    >>> [line.get_label() for line in nullity_curves(found).axes[0].lines]
    ['layer by layer', 'jointly', 'all unknowns']
    """
    ordered = sorted(findings, key=lambda answer: answer.batch_size)
    sizes = [answer.batch_size for answer in ordered]
    same = len({(answer.model, answer.input_shape) for answer in ordered}) == 1
    if not same or len(set(sizes)) != len(sizes):
        raise ValueError(
            f"expected findings of one network, one per batch size, got {len(ordered)} with batch "
            f"sizes {sizes}; write [identifiability(model, shape, b) for b in (1, 2, 4)]"
        )
    figure, axes = panel(5.6, 3.8)
    with_own = [answer for answer in ordered if answer.sequential_nullity is not None]
    if with_own:
        axes.plot(
            [answer.batch_size for answer in with_own],
            [answer.sequential_nullity or 0 for answer in with_own],
            color=ORANGE, linestyle="--", marker="s", label="layer by layer",
        )  # fmt: skip
    joint = [answer.joint_nullity for answer in ordered]
    axes.plot(sizes, joint, color=BLUE, marker="o", label="jointly")
    unknowns = [answer.unknowns for answer in ordered]
    axes.plot(sizes, unknowns, color=MUTED, linestyle=":", linewidth=1.2, label="all unknowns")
    for size, missing in zip(sizes, joint, strict=True):
        if missing:
            axes.annotate(
                f"{missing:,}", (size, missing), textcoords="offset points", xytext=(8, -8),
                fontsize=8, color=BLUE,
            )  # fmt: skip
    axes.set_yscale("symlog", linthresh=max(1.0, min([m for m in joint if m], default=1) / 2))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xticks(sizes)
    label(
        axes,
        "batch size",
        "missing equations",
        f"What the update of {ordered[0].model} leaves open",
        "best",
    )
    return figure


def _curve(axes: Axes, name: str, values: Tensor, gap: float, style: tuple[str, Any, str]) -> float:
    colour, dash, marker = style
    relative = (values / values.max()).double()
    relative = relative[relative > _FLOOR]
    cut = len(relative)
    if gap != inf and len(relative) > 1:
        cut = int(torch.argmax(relative[:-1] / relative[1:])) + 1
    index = torch.arange(1, len(relative) + 1)
    words = f"{name}: {cut} of {len(values)}"
    if gap != inf:
        words += f", gap {gap:.0e}"
    axes.plot(index[:cut], relative[:cut], color=colour, linestyle=dash, linewidth=1.8, label=words)
    if cut < len(relative):
        axes.plot(
            index[cut:], relative[cut:], color=colour, linestyle="none", marker=marker,
            markersize=3, markerfacecolor="white", markeredgewidth=0.7,
        )  # fmt: skip
        middle = float((relative[cut - 1] * relative[cut]).sqrt())
        axes.plot(
            [cut + 0.5, cut + 0.5], [float(relative[cut]), float(relative[cut - 1])],
            color=MUTED, linewidth=0.8,
        )  # fmt: skip
        axes.annotate(
            "gap", (cut + 0.5, middle), textcoords="offset points", xytext=(-4, 0), ha="right",
            va="center", fontsize=8, color=MUTED,
        )  # fmt: skip
    return float(relative.min())
