"""Figures of results; a result calls its figure, a figure imports no result."""

from __future__ import annotations

from rgap.analysis.plots.discard import discard_heatmap, percent, psnr, side_by_side

__all__ = ["discard_heatmap", "percent", "psnr", "side_by_side"]
