"""When searches are to end, and whether somebody asked for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf

__all__ = ["ENDLESS", "LONGER", "Clock"]

LONGER = "write a longer time_limit"


@dataclass(frozen=True)
class Clock:
    """The end of the time of a call.

    Attributes:
        deadline: of ``time.perf_counter``, after which a search begins no further round.
        limited: a limit was given, so that no search is begun after it.

    >>> Clock().late, Clock(0.0).late, Clock(0.0).over, Clock(0.0, limited=True).over
    (False, True, False, True)
    """

    deadline: float = inf
    limited: bool = False

    @property
    def late(self) -> bool:
        """True if the time is up."""
        return time.perf_counter() > self.deadline

    @property
    def over(self) -> bool:
        """True if no search may be begun."""
        return self.limited and self.late


ENDLESS = Clock()
