"""Every run of the suite draws the same examples, and a failing one prints how to repeat it."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("rgap", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("rgap")
