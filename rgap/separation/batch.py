"""A batch to be separated, and what separating it gives."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from torch import Tensor

from rgap.jacobian.batch_loss import BatchLoss
from rgap.machine import memory
from rgap.network.chain import Chain, Stage
from rgap.precision import Estimate, Precision
from rgap.separation.mixture import Mixture, mixture
from rgap.update.losses import Loss

HELD = 4  # matrices of a start that are held at a time: normal, damped, its factor, the Jacobian


@dataclass(frozen=True)
class Batch:
    """What separating needs to know of an update.

    Attributes:
        chain: the network.
        gradients: by parameter name, float64.
        loss: the client's.
        precision: of the update.
        size: stated batch size, or None.
        room: bytes for what separating holds at a time.
        deadline: of ``time.perf_counter``, after which no further round of starts is begun.
    """

    chain: Chain
    gradients: Mapping[str, Tensor]
    loss: Loss
    precision: Precision
    size: int | None
    room: float = inf
    deadline: float = inf
    _mixtures: dict[int, Mixture] = field(default_factory=dict, repr=False, compare=False)

    def mixture(self, index: int) -> Mixture:
        """Of a fully connected stage; decomposed once."""
        if index not in self._mixtures:
            self._mixtures[index] = self._mixture(index)
        return self._mixtures[index]

    def _mixture(self, index: int) -> Mixture:
        stage = self.chain.stages[index]
        name = stage.affine.bias_name
        bias = self.gradients[name] if name and self.precision.sent(name) else None
        gradient = stage.affine.sent(self.gradients)
        return mixture(stage, gradient, bias, self.precision)

    def starts(self, rank: int, most: int, growth: int) -> int:
        """Starts at once, ``most`` or fewer, whose matrices [rank, rank] fit together.

        Args:
            rank: of the mixture.
            most: that are wanted.
            growth: factor on them in the last round of a search.

        Raises:
            OutOfMemory: not even one start fits.
        """
        one = 8.0 * HELD * growth * rank**2
        memory.require(f"telling {rank} samples apart", one, self.room)
        return max(1, int(min(most, max(self.room, memory.LEAST) / one)))

    @property
    def late(self) -> bool:
        """True once the deadline is over."""
        return time.perf_counter() > self.deadline

    def short(self, reason: str) -> Unseparated:
        """Why the samples are not told apart by the starts that there was time for."""
        late = "; the time limit ended the search: write a larger time_limit" if self.late else ""
        return Unseparated(reason + late)

    @property
    def classes(self) -> int:
        """Entries of an output."""
        return self.chain.stages[-1].affine.out_shape[0]


@dataclass(frozen=True)
class Separated:
    """The samples of a batch at one stage.

    Attributes:
        stage: where.
        features: u, [R, *in_shape], one row a different picture.
        cotangents: k, [R, *out_shape].
        head: targets and multiplicities.
        mixture: U, S, V of the stage's gradient.
        worst: largest standard error of any direction that the equations leave a sample.
        route: which equations, in words.
        note: what a reader should know of pictures that occur more than once, or "".
        seconds: time spent.
        passed: why no layer further down separated them, or "".
        others: batches that the equations of this stage allow as well.
        beside: why another one that they allow is not known well enough to be among these, or "".
    """

    stage: Stage
    features: Estimate
    cotangents: Estimate
    head: BatchLoss
    mixture: Mixture
    worst: float
    route: str
    note: str
    seconds: float
    passed: str = ""
    others: tuple[Separated, ...] = ()
    beside: str = ""


@dataclass(frozen=True)
class Unseparated:
    """Why the samples could not be told apart.

    Attributes:
        reason: in plain words, with the numbers.
        consistent: False if the update contradicts what was stated.
        factor: λ that every sample that was found weighs, where each should weigh 1; else None.
    """

    reason: str
    consistent: bool = True
    factor: float | None = None
