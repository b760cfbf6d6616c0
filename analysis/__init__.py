"""Measures equations and recoveries: how much of a batch each layer's gradient determines."""

from __future__ import annotations

from rgap.analysis.discard import audit
from rgap.analysis.identifiability import identifiability
from rgap.analysis.identifiability_table import Identifiability, IdentifiabilityRow
from rgap.analysis.largest_batch import LargestBatch, largest_identifiable_batch
from rgap.analysis.table import Audit, AuditRow

__all__ = [
    "Audit",
    "AuditRow",
    "Identifiability",
    "IdentifiabilityRow",
    "LargestBatch",
    "audit",
    "identifiability",
    "largest_identifiable_batch",
]
