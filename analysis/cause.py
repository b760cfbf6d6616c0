"""One reason why a batch is not recovered, as every detector of reasons states it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIT", "Cause", "cause", "sentence"]

# What is decided first comes first: an update that does not fit says nothing about what follows.
FIRST = {
    "compressed update": 6.0,
    "head limit": 5.0,
    "alike samples": 4.0,
    "misfit": 3.5,
    "no inverse": 3.0,
    "not separated": 2.5,
    "parts": 2.0,
    "missing equations": 1.0,
    "several answers": 0.9,
    "precision": 0.5,
}


@dataclass(frozen=True)
class Cause:
    """One reason why a batch is not recovered.

    Attributes:
        kind: "compressed update", "misfit", "head limit", "alike samples", "no inverse",
            "not separated", "parts" (some of the answer is certified), "missing equations",
            "several answers" or "precision".
        place: the layer, or "".
        number: that says how bad it is; NaN where none was measured.
        words: the cause in plain words, with its number.
        changes: what would change it.
        weight: orders the list, descending.
    """

    kind: str
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
    kind: str, place: str, number: float, words: str, changes: tuple[str, ...], share: float = 0.0
) -> Cause:
    """A cause of a kind in :data:`FIRST`; ``share`` in [0, 1] orders causes of one kind."""
    return Cause(kind, place, number, words, changes, FIRST[kind] + share)


def sentence(words: str) -> str:
    """The words with a capital and a full stop."""
    text = words[:1].upper() + words[1:]
    return text if text.endswith((".", "?")) else text + "."
