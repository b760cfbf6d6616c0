"""Why an update does not fit: one finding a file, each a trial with its number, and a ranking.

rgap.check(model, update).explain()
"""

from rgap.diagnosis.finding import Check, Finding, Kind
from rgap.diagnosis.ranking import check

__all__ = ["Check", "Finding", "Kind", "check"]
