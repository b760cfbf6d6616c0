"""A published search that is given a time: its schedule is set to end with it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

import rgap
from rgap.matching.presets import PRESETS, Preset

FEWEST = 50  # iterations
# Of the total variation, to choose from: where cosines of gradients are near 1 it must be tiny.
WEIGHTS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def signed_adam(variation: float = 0.0, name: str | None = None) -> Preset:
    """Adam on signs, cosine (the preset ``ig``) with this weight of the total variation."""
    return replace(PRESETS["ig"], name=name or f"cosine, TV {variation:g}", variation=variation)


def timed(model: nn.Module, update: rgap.Update, preset: Preset, seconds: float) -> rgap.Matching:
    """What a preset finds in about this time; its labels are the update's."""
    rgap.match(model, update, method=preset, iterations=3)
    probe = rgap.match(model, update, method=preset, iterations=20)
    iterations = max(FEWEST, int(seconds / probe.seconds * 20))
    return rgap.match(model, update, method=preset, iterations=iterations, time_limit=1.1 * seconds)
