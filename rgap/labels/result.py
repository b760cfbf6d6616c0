"""What every method returns: labels, counts, how sure it is, and under which assumptions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LabelEstimate"]


@dataclass(frozen=True, eq=False)
class LabelEstimate:
    """Labels of a batch as far as one method decides them; ``labels`` is None when it does not.

    The order of a batch leaves no trace in its gradient, so labels are a multiset, sorted here.

    Attributes:
        labels: class indices [B], long, sorted, or None.
        counts: how often each class occurs [C], long, or None.
        confidence: a number in [0, 1] for each class [C], zeros when undecided. What it measures
            differs between methods and stands in the docstring of each.
        method: name of the method, or of the rule that was used.
        assumptions: what must hold for ``labels`` to be right.
        reason: why nothing was decided, or a flag on the evidence; empty when all is clear.
        estimates: the real numbers [C] that were rounded to ``counts``, or None.
        present: which classes occur [C], bool; given also where repeats stay unknown.

    Example:
        >>> import torch
        >>> from rgap.labels import LabelEstimate
        >>> LabelEstimate.of(torch.tensor([0, 2, 1]), torch.ones(3), "by hand", ())
        LabelEstimate('by hand', labels=[1, 1, 2])
    """

    labels: Tensor | None
    counts: Tensor | None
    confidence: Tensor
    method: str
    assumptions: tuple[str, ...]
    reason: str = ""
    estimates: Tensor | None = None
    present: Tensor | None = None

    @classmethod
    def of(
        cls,
        counts: Tensor,
        confidence: Tensor,
        method: str,
        assumptions: tuple[str, ...],
        reason: str = "",
        estimates: Tensor | None = None,
    ) -> LabelEstimate:
        """The estimate with these counts [C]; labels and presence follow from them."""
        labels = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts.cpu())
        return cls(
            labels, counts, confidence, method, assumptions, reason, estimates, present=counts > 0
        )

    @classmethod
    def rounded(
        cls,
        estimates: Tensor,
        counts: Tensor,
        method: str,
        assumptions: tuple[str, ...],
        reason: str = "",
    ) -> LabelEstimate:
        """The estimate with ``counts``, as sure as ``estimates`` are near to them.

        The confidence is ``1 - 2 |estimate - count|`` per class, not below 0: 1 where the real
        number was a whole one, 0 where it lay half-way to another.
        """
        confidence = (1.0 - 2.0 * (estimates - counts).abs()).clamp(0.0, 1.0)
        return cls.of(counts, confidence, method, assumptions, reason, estimates)

    @classmethod
    def undecided(
        cls,
        classes: int,
        method: str,
        assumptions: tuple[str, ...],
        reason: str,
        present: Tensor | None = None,
        confidence: Tensor | None = None,
    ) -> LabelEstimate:
        """No labels, and why; ``present`` where at least the occurring classes are known."""
        sure = confidence
        if sure is None:
            sure = torch.zeros(classes, dtype=torch.float64, device="cpu")
        return cls(None, None, sure, method, assumptions, reason, present=present)

    @property
    def decided(self) -> bool:
        """True if there are labels."""
        return self.labels is not None

    @property
    def least(self) -> float:
        """The lowest confidence of any class."""
        return float(self.confidence.min()) if self.confidence.numel() else 0.0

    def summary(self) -> dict[str, object]:
        """The estimate as plain numbers, for JSON."""
        return {
            "method": self.method,
            "labels": None if self.labels is None else self.labels.tolist(),
            "counts": None if self.counts is None else self.counts.tolist(),
            "present": None if self.present is None else self.present.tolist(),
            "confidence": self.confidence.tolist(),
            "estimates": None if self.estimates is None else self.estimates.tolist(),
            "assumptions": list(self.assumptions),
            "reason": self.reason,
        }

    def __repr__(self) -> str:
        shown = "None" if self.labels is None else str(self.labels.tolist())
        why = f", reason={self.reason!r}" if self.reason else ""
        return f"LabelEstimate({self.method!r}, labels={shown}{why})"
