"""The loop of the published optimisers: all starts together, watched, stopped, gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, prod

import torch
from torch import Tensor

from rgap.matching.checkpoint import Ended, Progress
from rgap.matching.objective import Objective
from rgap.matching.problem import Limits
from rgap.solvers.first_order import State
from rgap.solvers.priors import remember, remembered

GAIN = 1e-4  # relative gain on the best value that counts as progress
Project = Callable[[Tensor], Tensor]
EXPLODED = 1e8  # multiples of its first value, or of a usual one, above which a start is given up


def iterate(
    objective: Objective, state: State, project: Project | None, limits: Limits
) -> tuple[Ended, State]:
    """Step all rows together; the state is that before the step that was not made any more.

    Args:
        objective: with its preset.
        state: of :func:`first`, or one that was saved.
        project: on the rows that are admitted, [R, n], after every step.
        limits: when to stop, and who is told.
    """
    deadline, size = time.perf_counter() + limits.seconds, prod(objective.shape)
    preset, at, patience = objective.preset, RestartState.of(state), limits.patience
    remember(objective.prior, state)
    before = remembered(objective.prior)

    def stand() -> State:
        """The rows that are judged now, and what the prior remembered before they were."""
        return {**at.state(), **before}

    with objective.kernels():
        while True:
            before = remembered(objective.prior)
            values, slopes = objective(at.rows)
            at.judge(values, slopes, objective.usual)
            best, number = min(at.best_values), at.number
            stop = False
            if limits.callback is not None:
                point = Progress("iteration", number, at.values, best, limits.saved(stand()))
                stop = bool(limits.callback(point))
            if not any(at.alive):
                return (Ended.EXPLODED if isfinite(best) else Ended.NOT_FINITE), {
                    **at.state(),
                    **before,
                }
            if number >= limits.iterations:
                return Ended.DONE, stand()
            if stop:
                return Ended.STOPPED, stand()
            if patience is not None and number - at.progress >= patience:
                return Ended.STILL, stand()
            if time.perf_counter() > deadline:
                return Ended.TIME, stand()
            rate = preset.rule.length(number, limits.iterations)
            rows, at.rule = preset.rule.step(at.rows, at.living(slopes, 0.0), at.rule, rate)
            if preset.noise:
                rows[:, :size] += rate * preset.noise * drawn(rows[:, :size], limits.seed, number)
            if project is not None:
                rows = project(rows)
            # A start that is given up stays at its best, where everything is finite.
            at.rows = at.living(rows, at.best)
            at.number += 1


@dataclass
class RestartState:
    """A state in numbers instead of tensors, so that an iteration makes next to none.

    Attributes:
        rows: now, [R, n]; replaced at every step, never written into, and so are the others.
        best: of every start.
        rule: what the rule keeps.
        best_values: of every start.
        best_at: iterations of them.
        first_values: the first finite ones.
        alive: the starts that are not given up.
        number: of the iteration.
        progress: iteration of the last gain.
        values: the last ones, ∞ where not finite.
    """

    rows: Tensor
    best: Tensor
    rule: State
    best_values: list[float]
    best_at: list[int]
    first_values: list[float]
    alive: list[bool]
    number: int
    progress: int
    values: Tensor

    @classmethod
    def of(cls, state: State) -> RestartState:
        """From tensors."""
        return cls(
            state["rows"],
            state["best"],
            {n.removeprefix("rule."): t for n, t in state.items() if n.startswith("rule.")},
            state["best_values"].tolist(),
            state["best_at"].tolist(),
            state["first_values"].tolist(),
            state["alive"].tolist(),
            int(state["iteration"]),
            int(state["progress"]),
            state["best_values"],
        )

    def state(self) -> State:
        """To tensors, from which to go on."""
        place, dtype = self.rows.device, self.rows.dtype
        return {
            "rows": self.rows,
            "best": self.best,
            "best_values": torch.tensor(self.best_values, dtype=dtype, device=place),
            "best_at": torch.tensor(self.best_at, device=place),
            "first_values": torch.tensor(self.first_values, dtype=dtype, device=place),
            "alive": torch.tensor(self.alive, device=place),
            "iteration": torch.tensor(self.number, device=place),
            "progress": torch.tensor(self.progress, device=place),
            **{f"rule.{n}": t for n, t in self.rule.items()},
        }

    def living(self, tensor: Tensor, other: Tensor | float) -> Tensor:
        """Rows of the starts that go on, the other's for those given up."""
        if all(self.alive):
            return tensor
        alive = torch.tensor(self.alive, device=tensor.device)
        return torch.where(alive[:, None], tensor, other)

    def judge(self, values: Tensor, slopes: Tensor, usual: float) -> None:
        """Note the best rows and the ones to be given up."""
        # Not finite where an entry of the slope is not, and finite numbers times 0 are 0.
        judged = values + 0.0 * slopes.abs().amax(1)
        seen = [value if isfinite(value) else inf for value in judged.tolist()]
        low = min(self.best_values)
        better = [value < best for value, best in zip(seen, self.best_values, strict=True)]
        for row, value in enumerate(seen):
            if not isfinite(self.first_values[row]):
                self.first_values[row] = value
            # A start that is right already has next to no value to compare with.
            most = EXPLODED * max(self.first_values[row], usual)
            self.alive[row] = self.alive[row] and isfinite(value) and value <= most
            if better[row]:
                self.best_values[row], self.best_at[row] = value, self.number
        if all(better):
            self.best = self.rows
        elif any(better):
            chosen = torch.tensor(better, device=self.rows.device)
            self.best = torch.where(chosen[:, None], self.rows, self.best)
        best = min(self.best_values)
        if best < low - GAIN * abs(low) or not isfinite(low):
            self.progress = self.number
        sound = all(map(isfinite, seen))
        self.values = values if sound else torch.where(torch.isfinite(judged), values, inf)


def drawn(like: Tensor, seed: int, number: int) -> Tensor:
    """Standard normal numbers that depend on the seed and the number of the step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number + 1)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def first(objective: Objective, rows: Tensor) -> State:
    """The state before the first iteration, of starts [R, n]."""
    none = [inf] * len(rows)
    rule, best = objective.preset.rule.begin(rows), torch.zeros_like(rows)
    counts, alive = [0] * len(rows), [True] * len(rows)
    return RestartState(rows, best, rule, none, counts, none, alive, 0, 0, rows).state()


def random_rows(
    objective: Objective, begin: Tensor | None, bounds: tuple[float, float] | None,
    restarts: int, seed: int,
) -> Tensor:  # fmt: skip
    """Starts from N(0, 1) as the optimiser has the data, [R, n]; the given one first."""
    preset, size = objective.preset, prod(objective.shape)
    like = next(iter(objective.sent.values()))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(restarts, objective.unknowns, generator=generator, dtype=torch.float64)
    if bounds is not None:
        rows[:, :size] = rows[:, :size].clamp(*bounds)
    if begin is not None:
        where = objective.coordinates
        rows[0, :size] = ((begin - where.centre) / where.unit).flatten()
        rows[0, size:] = 0.0 if preset.joint else rows[0, size:]
    return rows.to(like)
