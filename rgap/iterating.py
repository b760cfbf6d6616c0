"""The loop of the published optimisers: all starts together, watched, stopped, gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf, isfinite, prod

import torch
from torch import Tensor

from rgap.objective import Objective
from rgap.solvers.first_order import State
from rgap.stopping import Checkpoint, Ended, Progress

GAIN = 1e-4  # relative gain on the best value that counts as progress
EXPLODED = 1e8  # multiples of its first value, or of a usual one, above which a start is given up


def run(
    objective: Objective,
    state: State,
    settings: dict[str, str],
    iterations: int,
    bounds: tuple[float, float] | None,
    patience: int | None,
    seconds: float,
    callback: Callable[[Progress], bool | None] | None,
    seed: int,
) -> tuple[Ended, State]:
    """Step all rows together; the state is that before the step that was not made any more.

    Args:
        objective: with its preset.
        state: of :func:`first`, or one that was saved.
        settings: that a saved state is for.
        iterations: at most.
        bounds: of the data, as the optimiser has them.
        patience: iterations without progress after which it stops.
        seconds: after which no further step is begun.
        callback: told after every evaluation.
        seed: of the noise.
    """
    deadline, size = time.perf_counter() + seconds, prod(objective.shape)
    preset, state = objective.preset, dict(state)
    while True:
        number = int(state["iteration"])
        values, slopes = objective(state["rows"])
        values = _judged(state, values, slopes, objective.usual)
        best = float(state["best_values"].min())
        shown = Progress("iteration", number, values, best, Checkpoint(settings, dict(state)))
        stop = callback is not None and bool(callback(shown))
        alive = state["alive"]
        if not bool(alive.any()):
            return (Ended.EXPLODED if isfinite(best) else Ended.NOT_FINITE), state
        if number >= iterations:
            return Ended.DONE, state
        if stop:
            return Ended.STOPPED, state
        if patience is not None and number - int(state["progress"]) >= patience:
            return Ended.STILL, state
        if time.perf_counter() > deadline:
            return Ended.TIME, state
        own = {n.removeprefix("rule."): t for n, t in state.items() if n.startswith("rule.")}
        slopes = torch.where(alive[:, None], slopes, 0.0)
        rate = preset.rule.length(number, iterations)
        rows, own = preset.rule.step(state["rows"], slopes, own, rate)
        if preset.noise:
            rows[:, :size] += rate * preset.noise * drawn(rows[:, :size], seed, number)
        if bounds is not None:
            rows = torch.cat([rows[:, :size].clamp(*bounds), rows[:, size:]], 1)
        # A start that is given up stays at its best, where everything is finite.
        rows = torch.where(alive[:, None], rows, state["best"])
        state.update({f"rule.{n}": t for n, t in own.items()})
        state["rows"], state["iteration"] = rows, torch.tensor(number + 1)


def _judged(state: State, values: Tensor, slopes: Tensor, usual: float) -> Tensor:
    """Note the best rows and the ones to be given up; the values, ∞ where not finite."""
    finite = torch.isfinite(values) & torch.isfinite(slopes).all(1)
    values = torch.where(finite, values, inf)
    number, low = state["iteration"], float(state["best_values"].min())
    begun = torch.isfinite(state["first_values"])
    state["first_values"] = torch.where(begun, state["first_values"], values)
    # A start that is right already has next to no value to compare with.
    most = EXPLODED * state["first_values"].clamp_min(usual)
    state["alive"] = state["alive"] & finite & (values <= most)
    better = values < state["best_values"]
    state["best"] = torch.where(better[:, None], state["rows"], state["best"])
    state["best_values"] = torch.where(better, values, state["best_values"])
    state["best_at"] = torch.where(better, number.to(state["best_at"]), state["best_at"])
    best = float(state["best_values"].min())
    if best < low - GAIN * abs(low) or not isfinite(low):
        state["progress"] = number
    return values


def drawn(like: Tensor, seed: int, number: int) -> Tensor:
    """Standard normal numbers that depend on the seed and the number of the step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number + 1)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def first(objective: Objective, rows: Tensor) -> State:
    """The state before the first iteration."""
    own = {f"rule.{n}": t for n, t in objective.preset.rule.begin(rows).items()}
    count = len(rows)
    return {
        "rows": rows,
        "best": torch.zeros_like(rows),
        "best_values": torch.full((count,), inf).to(rows),
        "best_at": torch.zeros(count, dtype=torch.int64, device=rows.device),
        "first_values": torch.full((count,), inf).to(rows),
        "alive": torch.ones(count, dtype=torch.bool, device=rows.device),
        "iteration": torch.tensor(0),
        "progress": torch.tensor(0),
        **own,
    }


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
