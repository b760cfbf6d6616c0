"""Measures equations and recoveries: how much of a batch each layer's gradient determines."""

from __future__ import annotations

from rgap.analysis.discard import audit
from rgap.analysis.table import Audit, AuditRow

__all__ = ["Audit", "AuditRow", "audit"]
