"""One reason why a batch is not recovered, as every detector of reasons states it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from rgap.update.update import Update

__all__ = ["FIT", "Cause", "CauseKind", "cause", "sentence", "sharper"]


class CauseKind(StrEnum):
    """What kind of reason it is; a member is equal to its text."""

    COMPRESSED = "compressed update"
    HEAD_LIMIT = "head limit"
    ALIKE = "alike samples"
    MISFIT = "misfit"
    NO_INVERSE = "no inverse"
    NOT_SEPARATED = "not separated"
    PARTS = "parts"  # some of the answer is certified
    MISSING = "missing equations"
    UNCOUNTED = "uncounted rank"
    SEVERAL = "several answers"
    PRECISION = "precision"

    def __repr__(self) -> str:
        return repr(self.value)


# What is decided first comes first: an update that does not fit says nothing about what follows.
FIRST = {
    CauseKind.COMPRESSED: 6.0,
    CauseKind.HEAD_LIMIT: 5.0,
    CauseKind.ALIKE: 4.0,
    CauseKind.MISFIT: 3.5,
    CauseKind.NO_INVERSE: 3.0,
    CauseKind.NOT_SEPARATED: 2.5,
    CauseKind.PARTS: 2.0,
    CauseKind.MISSING: 1.0,
    CauseKind.UNCOUNTED: 0.95,
    CauseKind.SEVERAL: 0.9,
    CauseKind.PRECISION: 0.5,
}


@dataclass(frozen=True)
class Cause:
    """One reason why a batch is not recovered.

    Attributes:
        kind: see :class:`CauseKind`.
        place: the layer, or "".
        number: that says how bad it is; NaN where none was measured.
        words: the cause in plain words, with its number.
        changes: what would change it.
        weight: orders the list, descending.
    """

    kind: CauseKind
    place: str
    number: float
    words: str
    changes: tuple[str, ...]
    weight: float


FIT = (
    "the weights, buffers and loss that the client used",
    "noise=... for noise that was added",
    "the uncompressed update",
)


def cause(
    kind: CauseKind,
    place: str,
    number: float,
    words: str,
    changes: tuple[str, ...],
    share: float = 0.0,
) -> Cause:
    """A cause with the weight by which causes are ranked, that of its kind and its share.

    Args:
        kind: one of those in :data:`FIRST`.
        place: layer or sample that it is about.
        number: what was measured.
        words: the sentence without capital and full stop.
        changes: what to write instead.
        share: in [0, 1], orders causes of one kind.
    """
    return Cause(kind, place, number, words, changes, FIRST[kind] + share)


def sharper(update: Update | None) -> tuple[str, ...]:
    """A finer format, of an update that is known to have a coarser one."""
    return () if update is None or update.dtype == torch.float64 else ("float64 gradients",)


def sentence(words: str) -> str:
    """The words with a capital and a full stop."""
    text = words[:1].upper() + words[1:]
    return text if text.endswith((".", "?")) else text + "."
