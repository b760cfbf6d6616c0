"""Whether the equations of a stage leave nothing open, by what says so: one rule for each kind.

A rank is counted, and its gap says how clearly.  Errors and agreements are no singular values, and
each has a margin of its own below the threshold at which a solve goes on.
"""

from __future__ import annotations

from rgap.limits import CLEAR, UNSEEN
from rgap.solvers.rank import Evidence, EvidenceKind, Rank

__all__ = ["doubt"]


def doubt(joint: Rank | Evidence | None) -> str:
    """Why a stage is not certain to be determined, to follow its name; "" where it is.

    Args:
        joint: of all equations of the stage.

    >>> doubt(Evidence(EvidenceKind.ERROR, 1e-6, 0.1, 48))
    ''
    >>> doubt(Evidence(EvidenceKind.ERROR, 0.05, 0.1, 48))[:29]
    'is too badly conditioned at t'
    """
    if joint is None:
        return "was solved without finding out what its equations leave open"
    if isinstance(joint, Rank):
        return _of_rank(joint)
    if joint.kind is EvidenceKind.AGREEMENT:
        return _of_agreement(joint)
    # The entries that are given have met the bound of a certificate one by one.
    margin = CLEAR if joint.kind is EvidenceKind.ERROR else 1.0
    if margin * joint.value <= joint.threshold:
        return ""
    what = "direction" if joint.kind is EvidenceKind.ERROR else "entry"
    return (
        f"is too badly conditioned at this precision: its worst {what} is known to "
        f"{joint.value:.1e} only"
    )


def _of_rank(rank: Rank) -> str:
    """Full, with a gap of CLEAR to what was cut."""
    if rank.nullity:
        return f"leaves {rank.nullity} of {rank.size} unknowns open"
    if rank.gap >= CLEAR:
        return ""
    return f"has a rank that is not clear: {rank.rank} or {rank.alternative} of {rank.size}"


def _of_agreement(seen: Evidence) -> str:
    """Two starts as near as one open direction would put them with chance UNSEEN at most."""
    if seen.chance <= UNSEEN:
        return ""
    return (
        f"was solved without forming its equations, and answers from two starts differ by "
        f"{seen.value:.1e} of them: one open direction of {seen.unknowns} would do that with "
        f"chance {seen.chance:.0e}; raise memory_budget to have its rank counted"
    )
