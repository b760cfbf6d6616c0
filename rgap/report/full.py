"""Everything on one update as a page: what it gives away, why, and what would change that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from rgap.analysis.discard.page import section as of_audit
from rgap.page import Page, Section, Text
from rgap.recovery.page import sections, verdict

if TYPE_CHECKING:
    from torch import Tensor

    from rgap.analysis.discard.table import Audit
    from rgap.analysis.hardening.table import Hardening
    from rgap.analysis.joint_rank.made_up import MadeUp
    from rgap.diagnosis.finding import Check
    from rgap.recovery import Recovery

__all__ = ["full"]


class Beside(NamedTuple):
    """What else is known of the update and of the network."""

    check: Check | None = None
    audit: Audit | None = None
    hardening: Hardening | None = None
    made_up: MadeUp | None = None


def full(
    recovery: Recovery,
    value_range: tuple[float, float] | None,
    settings: Mapping[str, str],
    *,
    originals: Tensor | None = None,
    prior: str = "",
    beside: Beside | None = None,
) -> Page:
    """The page that ``rgap report`` writes; what is None has no section."""
    check, audit, hardening, made_up = beside or Beside()
    answer, *rest = sections(recovery, originals, value_range)
    parts = [answer]
    if made_up is not None:
        parts.append(_made_up(made_up))
    parts += rest
    if audit is not None:
        parts.append(of_audit(audit))
    if check is not None:
        parts.append(_check(check))
    if hardening is not None:
        parts.append(_hardening(hardening))
    title = "What this update gives away"
    return Page(title, verdict(recovery, prior), parts, settings)


def _made_up(found: MadeUp) -> Section:
    """What was fixed by equations, and what was not."""
    from rgap.page import Drawing

    alt = "Pictures, and below each how much of every pixel no equation fixes"
    return Section(
        "What was made up",
        [Text(items=found.explain().splitlines()), Drawing.of(found.plot(), alt)],
    )


def _check(check: Check) -> Section:
    """Whether the update is what it says."""
    if check.ok:
        words = "Nothing was found that contradicts what the update says of itself."
        return Section("Is the update what it says?", [Text(words)])
    parts = [Text("Probably not. What may be wrong, the most likely first:")]
    parts += [
        Text(f"{finding.claim}:", [f"Seen: {finding.evidence}", f"To do: {finding.remedy}"])
        for finding in check.findings
    ]
    return Section("Is the update what it says?", parts)


def _hardening(found: Hardening) -> Section:
    """What would change the verdict."""
    return Section("What would change this", [Text(items=found.explain().splitlines())])
