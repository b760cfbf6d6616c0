"""From the output of a stage to its input, and so down to the data."""

from __future__ import annotations

from rgap.recursion.descend import Descent, Reached, Unpool, descend

__all__ = ["Descent", "Reached", "Unpool", "descend"]
