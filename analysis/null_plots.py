"""Figures of null spaces under the name by which they are imported: :mod:`rgap.analysis.plots`."""

from __future__ import annotations

from rgap.analysis.plots.null_space import null_pictures, nullity_curves, spectra

__all__ = ["null_pictures", "nullity_curves", "spectra"]
