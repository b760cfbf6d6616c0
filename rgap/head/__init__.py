"""One sample at the last layer: the bias attack, the scale, the features, the target."""

from __future__ import annotations

from rgap.head.features import (
    HeadCandidate,
    HeadFailure,
    features_from_bias,
    rank_one_tolerance,
    solve_head,
)

__all__ = ["HeadCandidate", "HeadFailure", "features_from_bias", "rank_one_tolerance", "solve_head"]
