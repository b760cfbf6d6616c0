"""What ``invert`` returns: the batch if it is determined, and why it is or is not."""

from __future__ import annotations

from rgap.recovery.layers import LayerReport, Route
from rgap.recovery.result import Candidate, Recovery, Status, plain

__all__ = ["Candidate", "LayerReport", "Recovery", "Route", "Status", "plain"]
