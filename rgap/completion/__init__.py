"""Below the stage at which the recursion ends.

Annealed Gauss-Newton with a prior on what the equations leave open.
"""

from __future__ import annotations

from rgap.completion.complete import (
    MISSED,
    MOST,
    PASSES,
    PriorSchedule,
    complete,
    grey,
    inside,
    met,
)

__all__ = ["MISSED", "MOST", "PASSES", "PriorSchedule", "complete", "grey", "inside", "met"]
