"""Figures: how much each layer discards, and pictures beside what was recovered of them.

Everything is drawn on a bare `matplotlib.figure.Figure`, so that no call here opens a window,
changes the current figure of ``pyplot`` or needs a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, isfinite, log10
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from rgap.analysis.plots.canvas import INK, MUTED
from rgap.analysis.scoring import psnr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rgap.analysis.discard.table import Audit

__all__ = ["discard_heatmap", "percent", "psnr", "side_by_side"]

Pictures = Tensor | Sequence[Tensor | None]

# One hue from light to dark: reads the same in grey and for every kind of colour vision.
_MAP = "Blues"


def discard_heatmap(audit: Audit) -> Figure:
    """Draw the information discard of every layer (rows) at every batch size (columns).

    The colour is ``nullity / unknowns`` on the fixed scale 0 to 1, so that figures of different
    networks compare.  Each cell states the percentage and, below it, the number of missing
    equations.

    Args:
        audit: what `rgap.analysis.audit` returned.

    Returns:
        A `matplotlib.figure.Figure`; save it with ``figure.savefig(path, dpi=200)``.

    Raises:
        ValueError: an audit without rows.

    >>> from rgap.analysis.discard.table import Audit, AuditRow
    >>> row = AuditRow("fc", "linear", 2, 64, 20, 16, 48, 16, 0.25, 3.0)
    >>> figure = discard_heatmap(Audit("Sequential", "exact", (row,)))
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['25.0%', '16']
    """
    layers, batches = audit.layers, audit.batch_sizes
    if not layers:
        raise ValueError(
            "expected an audit with rows, got an empty one; write "
            "rgap.analysis.audit(model, input_shape, batch_sizes=(1, 2, 4, 8))"
        )
    cells = {(row.layer, row.batch_size): row for row in audit.rows}
    values = np.full((len(layers), len(batches)), np.nan)
    figure = Figure(
        figsize=(2.4 + 1.05 * len(batches), 1.7 + 0.62 * len(layers)), layout="constrained"
    )
    axes = figure.add_subplot()
    for i, layer in enumerate(layers):
        for j, batch in enumerate(batches):
            row = cells.get((layer, batch))
            if row is None:  # a layer that this batch size did not reach
                axes.text(j, i, "–", ha="center", va="center", color=MUTED)
                continue
            values[i, j] = row.discard
            ink = _readable(row.discard)
            axes.text(
                j, i - 0.14, percent(row.discard), ha="center", va="center", color=ink, fontsize=11
            )
            axes.text(
                j, i + 0.22, f"{row.nullity:,}", ha="center", va="center", color=ink, fontsize=7.5
            )
    image = axes.imshow(values, cmap=_MAP, vmin=0.0, vmax=1.0, aspect="auto")
    kinds = {row.layer: row.kind for row in audit.rows}
    through = {row.layer: f" ← {row.step}" for row in audit.rows if row.step}
    axes.set_xticks(range(len(batches)), [str(b) for b in batches])
    axes.set_yticks(
        range(len(layers)), [f"{name}{through.get(name, '')}  ({kinds[name]})" for name in layers]
    )
    axes.set_xticks(np.arange(0.5, len(batches) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(layers) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("batch size", color=INK)
    axes.set_title(f"What each gradient of {audit.model} discards", fontsize=12, color=INK, pad=10)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.03, aspect=18)
    bar.ax.set_yticklabels(["0%", "25%", "50%", "75%", "100%"])
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    bar.set_label("missing equations / unknowns", fontsize=9, color=INK)
    bar.outline.set_visible(False)
    return figure


def percent(share: float) -> str:
    """A percentage that reads 0% and 100% only where that is the exact count.

    >>> percent(0.0), percent(1152 / 6144), percent(1e-5), percent(0.99999)
    ('0%', '18.8%', '<0.1%', '>99.9%')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    if share < 0.001:
        return "<0.1%"
    return ">99.9%" if share > 0.999 else f"{share:.1%}"


def side_by_side(
    originals: Pictures,
    recovered: Pictures | None,
    *,
    titles: Sequence[str] | None = None,
    value_range: tuple[float, float] = (0, 1),
) -> Figure:
    """Draw each original above what was recovered of it and the amplified error.

    One column per picture.  The caption under a recovered picture is its PSNR; the error panel
    shows the largest error of a pixel's channels, times the factor written above it.

    Args:
        originals: pictures [B, C, H, W] with C = 1 (grey) or 3 (RGB), or a list of [C, H, W] of
            any sizes.
        recovered: the same, or None where nothing was determined: the panel then says so.  For
            a list, single entries may be None.
        titles: one per picture.
        value_range: of the data; values beyond it are clipped in the drawing only.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: shapes that are no pictures or do not match, or too many or too few titles.

    >>> import torch
    >>> figure = side_by_side(torch.zeros(2, 3, 4, 4), None)
    >>> [axes.texts[0].get_text() for axes in figure.axes if axes.texts]
    ['not determined', 'not determined']
    """
    left = [_picture("originals", picture) for picture in originals]
    right: list[Tensor | None] = (
        [None] * len(left)
        if recovered is None
        else [None if p is None else _picture("recovered", p) for p in recovered]
    )
    _check(left, right, titles, value_range)
    rows = 3 if any(p is not None for p in right) else 2
    # One column is widened so that its caption fits; many keep to a page's width.
    width = 1.9 if len(left) < 7 else 1.4
    figure = Figure(
        figsize=(0.5 + width * len(left), 0.3 + (width + 0.3) * rows), layout="constrained"
    )
    grid: Any = figure.subplots(rows, len(left), squeeze=False)
    for column, (original, answer) in enumerate(zip(left, right, strict=True)):
        _show(grid[0, column], original, value_range)
        if titles is not None:
            grid[0, column].set_title(titles[column], fontsize=9, color=INK)
        if answer is None:
            _undetermined(grid[1, column], original)
            if rows == 3:
                grid[2, column].set_axis_off()
            continue
        _show(grid[1, column], answer, value_range)
        grid[1, column].set_xlabel(_quality(psnr(original, answer, value_range)), fontsize=9)
        _error(grid[2, column], original, answer, value_range)
    for axes, name in zip(grid[:, 0], ("original", "recovered", "error"), strict=False):
        axes.set_ylabel(name, fontsize=10, color=INK)
    if rows == 3 and right[0] is None:
        for column, answer in enumerate(right):
            if answer is not None:  # the row's name belongs to its first drawn panel
                grid[2, column].set_ylabel("error", fontsize=10, color=INK)
                break
    return figure


def _check(
    left: Sequence[Tensor],
    right: Sequence[Tensor | None],
    titles: Sequence[str] | None,
    value_range: tuple[float, float],
) -> None:
    if not left or len(left) != len(right):
        raise ValueError(
            f"expected as many recovered pictures as originals, at least one, got {len(right)} and "
            f"{len(left)}; write recovered=None if none was determined"
        )
    for number, (original, answer) in enumerate(zip(left, right, strict=True)):
        if answer is not None and answer.shape != original.shape:
            raise ValueError(
                f"expected recovered[{number}] of shape {list(original.shape)} like its original, "
                f"got {list(answer.shape)}"
            )
    if titles is not None and len(titles) != len(left):
        raise ValueError(f"expected {len(left)} titles, one per picture, got {len(titles)}")
    if not value_range[0] < value_range[1]:
        raise ValueError(f"expected value_range (low, high) with low < high, got {value_range}")


def _picture(name: str, picture: Tensor | None) -> Tensor:
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] not in (1, 3):
        got = list(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
        raise ValueError(
            f"{name}: expected pictures [C, H, W] with 1 or 3 channels, got {got}; for flat inputs "
            "write inputs.reshape(-1, 1, 28, 28) with the picture's own shape"
        )
    return picture.detach().cpu().double()


def _show(axes: Axes, picture: Tensor, value_range: tuple[float, float]) -> None:
    low, high = value_range
    shown = ((picture - low) / (high - low)).clamp(0, 1).movedim(0, -1).numpy()
    if shown.shape[-1] == 1:
        axes.imshow(shown[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(shown, interpolation="nearest")
    _frame(axes)


def _error(axes: Axes, original: Tensor, answer: Tensor, value_range: tuple[float, float]) -> None:
    error = (answer - original).abs().amax(0) / (value_range[1] - value_range[0])
    factor, written = _amplification(float(error.max()))
    axes.imshow((error * factor).numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(written, fontsize=9, color=INK)
    _frame(axes)


def _amplification(largest: float) -> tuple[float, str]:
    """The largest 1, 2 or 5 times a power of ten that keeps the error in range, and its title."""
    if largest == 0:
        return 1.0, "no error at all"
    if not isfinite(largest) or largest > 0.5:
        return 1.0, "error × 1"
    exponent = floor(-log10(largest))
    digit = max(d for d in (1, 2, 5) if d == 1 or d * 10.0**exponent * largest <= 1)
    factor = digit * 10.0**exponent
    if factor < 1000:
        return factor, f"error × {factor:g}"
    power = f"10^{{{exponent}}}"
    return factor, f"error × ${power}$" if digit == 1 else f"error × ${digit} \\cdot {power}$"


def _undetermined(axes: Axes, original: Tensor) -> None:
    axes.set_xlim(0, original.shape[-1])
    axes.set_ylim(original.shape[-2], 0)
    axes.set_aspect("equal")
    axes.set_facecolor("#f2f2f2")
    axes.text(
        0.5,
        0.5,
        "not determined",
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=9,
        color=MUTED,
    )
    _frame(axes)


def _frame(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#c8c8c8")


def _quality(value: float) -> str:
    return f"PSNR {value:.1f} dB" if isfinite(value) else "identical"


def _readable(share: float) -> str:
    """Ink that stands out from the cell's colour."""
    red, green, blue, _ = colormaps[_MAP](share)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else INK
