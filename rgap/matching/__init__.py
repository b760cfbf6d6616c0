"""Searches on the whole update, ours and published ones; they certify nothing."""

from __future__ import annotations

from rgap.matching.presets import PRESETS, Preset
from rgap.matching.search import METHODS, Checkpoint, Ended, Matching, Progress, match

__all__ = ["METHODS", "PRESETS", "Checkpoint", "Ended", "Matching", "Preset", "Progress", "match"]
