"""What a client sends after several steps of its own, as a function of its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from rgap import validation

Gradient = Callable[[dict[str, Tensor], slice], dict[str, Tensor]]


@dataclass(frozen=True)
class LocalTraining:
    """Plain gradient descent on the client between two rounds (FedAvg).

    Attributes:
        rate: its learning rate.
        size: samples a step, taken in order and again from the first once all are used; None: all
            of them at every step.

    Raises:
        ValueError: a rate that is no positive number, a size below 1.

    >>> LocalTraining(rate=0.1, size=2).rows(3, batch=4)
    slice(2, 4, None)
    """

    rate: float
    size: int | None = None

    def __post_init__(self) -> None:
        if not (isfinite(self.rate) and self.rate > 0):
            raise ValueError(
                f"rate: expected a positive learning rate, got {self.rate!r}; write "
                "LocalTraining(rate=0.01)"
            )
        if self.size is not None:
            validation.count("size", self.size)

    def rows(self, number: int, batch: int) -> slice:
        """Samples of step ``number``; a remainder that fills no step is never used."""
        size = min(self.size or batch, batch)
        first = number % (batch // size) * size
        return slice(first, first + size)


def average(
    gradient: Gradient,
    parameters: dict[str, Tensor],
    local: LocalTraining | None,
    steps: int,
    batch: int,
) -> dict[str, Tensor]:
    """``(θ_0 − θ_T)/(η T) = 1/T Σ_t ∇L_t(θ_t)`` with ``θ_{t+1} = θ_t − η ∇L_t(θ_t)``.

    Differentiable where ``gradient`` is, as the inversion of FedAvg updates needs it.

    Args:
        gradient: of the loss by parameter name, at parameters, for some rows of the batch.
        parameters: θ_0.
        local: how the client trains; None: one step, whose rate does not matter.
        steps: T.
        batch: samples in all.

    Source: Geiping et al. (2020), section 6.
    """
    if local is None:
        return gradient(parameters, slice(0, batch))
    current, total = parameters, dict[str, Tensor]()
    for number in range(steps):
        step = gradient(current, local.rows(number, batch))
        total = {n: total[n] + g if total else g for n, g in step.items()}
        if number + 1 < steps:
            current = {n: p - local.rate * step[n] for n, p in current.items()}
    return {n: t / steps for n, t in total.items()}
