"""How a training went."""

from __future__ import annotations

from dataclasses import dataclass

from rgap.matching.checkpoint import Ended

__all__ = ["TrainingReport"]


@dataclass(frozen=True)
class TrainingReport:
    """How a training went.

    Attributes:
        errors: mean squared error on pictures that were held out, by batch size, of data in
            [0, 1].
        mean_picture: that of the mean of the pictures that were learned from, for every answer.
        counted: share of held-out batches whose size is guessed right; None for a single size.
        steps: that were made.
        seconds: they took, the gradients included.
        ended: why.

    After :func:`rgap.learned.adapt` it is of the new weights: errors of pictures that the
    regression was not made from, the steps of the training, the seconds of the regression.
    """

    errors: dict[int, float]
    mean_picture: float
    counted: float | None
    steps: int
    seconds: float
    ended: Ended
