"""Figures of predicted error: pixel maps, measured against predicted, and weighed spectra.

Everything is drawn on a bare `matplotlib.figure.Figure`.  Maps run from dark to light in one order
that survives in grey; curves differ in dash and marker as well as in Okabe and Ito's colours.
"""

from __future__ import annotations

from math import log10
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from rgap.analysis.plots.canvas import BLUE, INK, MUTED, ORANGE, label, panel

if TYPE_CHECKING:
    from rgap.analysis.noise_bound.report import NoiseReport
    from rgap.analysis.noise_bound.trials import NoiseTrials

__all__ = ["error_map", "measured_against_predicted", "noise_levels", "weighed_spectrum"]


def error_map(report: NoiseReport) -> Figure:
    """Draw the predicted standard error of every pixel, one picture beside the other.

    The root mean square over the channels, on one logarithmic scale; light is uncertain.

    Args:
        report: for inputs [B, C, H, W].

    Raises:
        ValueError: inputs that are no pictures, or no error to draw.

    >>> import rgap
    >>> from rgap.analysis.noise_bound.cramer_rao import noise
    >>> net = rgap.models.mlp((16,), 4, "tanh", input_shape=(1, 4, 4), seed=0)
    >>> error_map(noise(net, (1, 4, 4), sigma=1e-4)).axes[0].get_xlabel()[-2:]
    'dB'
    """
    if len(report.input_shape) != 3:
        raise ValueError(
            f"expected input_shape [C, H, W] for a map, got {list(report.input_shape)}; write "
            "weighed_spectrum(report)"
        )
    maps = report.variance.mean(1).sqrt()
    if not bool((maps > 0).any()):
        raise ValueError(
            "expected an error to draw, got none at all; write noise(model, inputs, sigma=1e-3)"
        )
    high = float(maps.max())
    low = max(float(maps[maps > 0].min()), high * 1e-6)
    if low > high / 1.01:
        low = high / 10  # one value everywhere still needs a scale
    count = len(maps)
    figure = Figure(figsize=(1.3 + 1.9 * count, 2.9), layout="constrained")
    grid: Any = figure.subplots(1, count, squeeze=False)
    image = None
    for axes, picture, quality in zip(grid[0], maps, report.psnr.tolist(), strict=True):
        image = axes.imshow(
            picture.clamp_min(low).numpy(),
            cmap="cividis",
            norm=LogNorm(low, high),
            interpolation="nearest",
        )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#c8c8c8")
        axes.set_xlabel(f"{quality:.1f} dB", fontsize=9, color=INK)
    assert image is not None
    bar = figure.colorbar(image, ax=list(grid[0]), pad=0.03, aspect=16)
    bar.ax.tick_params(labelsize=8, labelcolor=INK)
    bar.set_label("standard error of a pixel", fontsize=9, color=INK)
    bar.outline.set_visible(False)
    title = f"{report.model}, σ = {report.level:.1e}"
    if report.nullity:
        title += f": the {report.rank:,} identifiable directions"
    figure.suptitle(title, fontsize=10, color=INK)
    return figure


def measured_against_predicted(trials: NoiseTrials) -> Figure:
    """Draw the measured standard error of every entry against the predicted one.

    On the diagonal the bound is attained.  The band is where 95 % of the points lie if it is, for
    the number of trials.

    Args:
        trials: what `rgap.analysis.noise_trials` returned.

    >>> import rgap
    >>> from rgap.analysis.noise_bound.trials import noise_trials
    >>> net = rgap.models.mlp((16,), 4, "tanh", input_shape=(1, 4, 4), seed=0)
    >>> figure = measured_against_predicted(noise_trials(net, (1, 4, 4), sigma=1e-6, trials=20))
    >>> figure.axes[0].get_xlabel()
    'predicted standard error'
    """
    predicted = trials.report.std.flatten()
    measured = trials.variance.flatten().sqrt()
    count = len(trials.totals)
    figure, axes = panel(4.4, 4.2)
    both = torch.cat([predicted, measured])
    low, high = float(both.min()) / 1.3, float(both.max()) * 1.3
    ends = torch.tensor([low, high])
    # A sum of T squares scatters by √(2/T), its root by half of that.
    half = 1.96 / (2 * count) ** 0.5
    axes.fill_between(
        ends, ends * (1 - half), ends * (1 + half), color="#d9d9d9", linewidth=0, label="95 %"
    )
    axes.plot(ends, ends, color=MUTED, linewidth=1.0, linestyle="--", label="bound attained")
    axes.plot(
        predicted, measured, linestyle="none", marker="o", markersize=2.6, color=BLUE,
        markeredgewidth=0, alpha=0.7, label="one entry of the batch",
    )  # fmt: skip
    if high / low > 10:  # fewer powers of ten have no ticks to read on a logarithmic axis
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(scilimits=(0, 0))
        axes.locator_params(nbins=5)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    label(
        axes,
        "predicted standard error",
        f"measured, {count:,} noisy updates",
        f"{trials.report.model}: measured / predicted squared error "
        f"{trials.ratio:.3f} ± {trials.standard_error:.3f}",
        "upper left",
    )
    return figure


def noise_levels(report: NoiseReport, psnr: float = 20.0) -> Figure:
    """Draw the predicted PSNR of every picture against the noise, and where it ends to be usable.

    Args:
        report: with an error proportional to the noise.
        psnr: in dB, the quality below which a picture does not count as recovered.

    Raises:
        ValueError: as :meth:`NoiseReport.critical_sigma`; nothing that is identifiable.

    >>> import rgap
    >>> from rgap.analysis.noise_bound.cramer_rao import noise
    >>> net = rgap.models.mlp((16,), 4, "tanh", input_shape=(1, 4, 4), seed=0)
    >>> noise_levels(noise(net, (1, 4, 4))).axes[0].get_xlabel()
    'noise σ of an entry of the update'
    """
    limit = report.critical_sigma(psnr)
    if report.unit_variance is None or limit == 0:
        raise ValueError(
            "expected a batch of which something is identifiable, got none; write "
            "report.explain() for the cause"
        )
    each = report.unit_variance.flatten(1).mean(1)
    levels = limit * torch.logspace(-3, 1.5, 50, dtype=torch.float64)
    figure, axes = panel(5.2, 3.6)
    axes.axhspan(psnr - 1000, psnr, color="#efefef", linewidth=0)
    for number, unit in enumerate(each.tolist()):
        curve = 20 * log10(report.width) - 10 * (levels.square() * unit).log10()
        axes.plot(
            levels, curve, color=BLUE, linewidth=1.6,
            linestyle=("-", "--", "-.", ":")[number % 4],
            label=f"picture {number + 1}" if len(each) <= 8 else None,
        )  # fmt: skip
    axes.axvline(limit, color=ORANGE, linewidth=1.2, linestyle=(0, (5, 2)))
    axes.annotate(
        f"σ* = {limit:.1e}", (limit, 1), xycoords=("data", "axes fraction"), xytext=(5, -12),
        textcoords="offset points", fontsize=9, color=ORANGE,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(float(levels[0]), float(levels[-1]))
    low = 20 * log10(report.width) - 10 * log10(float(levels[-1]) ** 2 * float(each.max()))
    high = 20 * log10(report.width) - 10 * log10(float(levels[0]) ** 2 * float(each.min()))
    axes.set_ylim(low, high)
    label(
        axes,
        "noise σ of an entry of the update",
        "predicted PSNR in dB",
        f"{report.model}, B = {report.batch_size}",
        "lower left" if 1 < len(each) <= 8 else None,
    )
    return figure


def weighed_spectrum(report: NoiseReport) -> Figure:
    """Draw the standard error of every identifiable direction, and two cutoffs.

    ``level/σ_i`` over the singular values of the weighed Jacobian, in ascending order.  Above the
    dashed line a direction is known worse than from the range of the data; what lies beyond the
    rank is not in the update at any noise.

    Args:
        report: of a method that saw the spectrum, with noise.

    Raises:
        ValueError: no spectrum, or no noise.

    >>> import rgap
    >>> from rgap.analysis.noise_bound.cramer_rao import noise
    >>> net = rgap.models.mlp((16,), 4, "tanh", input_shape=(1, 4, 4), seed=0)
    >>> weighed_spectrum(noise(net, (1, 4, 4), sigma=1e-4)).axes[0].get_yscale()
    'log'
    """
    if report.decision is None or report.level == 0 or not report.rank:
        raise ValueError(
            f"expected noise and singular values to draw, got method={report.method!r}, rank "
            f"{report.rank} and a noise of {report.level:g}; write noise(model, inputs, "
            "sigma=1e-3, method='dense')"
        )
    errors = report.level / report.spectrum[: report.rank].double()
    index = torch.arange(1, len(errors) + 1)
    figure, axes = panel(5.6, 3.7)
    axes.plot(index, errors, color=BLUE, linewidth=1.8)
    axes.axhline(report.width, color=ORANGE, linewidth=1.2, linestyle="--")
    axes.annotate(
        "range of the data", (0.01, report.width), xycoords=("axes fraction", "data"),
        xytext=(0, 3), textcoords="offset points", fontsize=8, color=ORANGE,
    )  # fmt: skip
    if report.nullity:
        axes.axvspan(len(errors) + 0.5, report.unknowns + 0.5, color="#e3e3e3", linewidth=0)
        axes.annotate(
            f"{report.nullity:,} not in the update",
            ((len(errors) + report.unknowns) / 2, 0.5), xycoords=("data", "axes fraction"),
            rotation=90, ha="center", va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(0.5, report.unknowns + 0.5)
    low, high = float(errors.min()), max(float(errors.max()), report.width)
    axes.set_ylim(low / 2, high * 4)
    label(
        axes,
        "direction of the batch",
        "standard error",
        f"{report.model}, B = {report.batch_size}, σ = {report.level:.1e}: "
        f"{report.rank:,} of {report.unknowns:,} identifiable, {report.lost:,} above the range",
    )
    return figure
