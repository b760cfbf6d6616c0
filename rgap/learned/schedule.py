"""How long an inverse is trained, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from rgap import validation

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """The steps of a training.

    Source: Adam at 1e-4 over 256 updates a step, a tenth of it in the last quarter, is Wu, Chen,
    Guo and Weinberger's (2023); the number of steps is theirs for one sample of CIFAR-10.

    Attributes:
        steps: of Adam, at most.
        updates: hashed gradients a step.
        rate: of Adam.
        time_limit: seconds, of all parts of a training that is resumed together.
        every: steps between two looks at the pictures that are held out.
        patience: looks without a better one after which it stops; None: it does not.
        held_out: share of the pictures that are held out.
        seed: of weights, hash and draws; the global random state is not touched.

    Raises:
        ValueError: a count below 1, a rate or a share that is none.

    >>> Schedule(steps=100).rate_at(80, 0.0) == Schedule.rate / 10
    True
    """

    steps: int = 40_000
    updates: int = 256
    rate: float = 1e-4
    time_limit: float = inf
    every: int = 200
    patience: int | None = 10
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "updates", "every"):
            validation.count(name, getattr(self, name))
        if self.patience is not None:
            validation.count("patience", self.patience)
        validation.seconds("time_limit", self.time_limit)
        validation.seed(self.seed)
        validation.real("rate", self.rate, 1e-4)
        if not 0 < self.rate < inf:
            raise ValueError(f"rate: expected a number above 0, got {self.rate}; write rate=1e-4")
        validation.real("held_out", self.held_out, 0.1)
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"held_out: expected a share between 0 and 1, got {self.held_out}; write "
                "held_out=0.1"
            )

    def share(self, step: int, seconds: float) -> float:
        """How much of the training is over, by its steps or by the clock."""
        return max(step / self.steps, seconds / self.time_limit if self.time_limit else 1.0)

    def rate_at(self, step: int, seconds: float) -> float:
        """Adam's rate after so many steps and seconds."""
        return self.rate * (0.1 if self.share(step, seconds) >= 0.75 else 1.0)
