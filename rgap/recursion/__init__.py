"""From the output of a stage to its input, and so down to the data."""

from __future__ import annotations

from rgap.recursion.descend import descend
from rgap.recursion.reached import Descent, Reached
from rgap.recursion.steps import Unpool

__all__ = ["Descent", "Reached", "Unpool", "descend"]
