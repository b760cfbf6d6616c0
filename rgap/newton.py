"""Gauss–Newton on a whole update from one start after another, in stages that can be gone on with.

A network with kinks is softened at first and sharpened stage by stage, as in a completion; where
that ends in a local minimum, once more and more slowly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from math import inf

import torch
from torch import Tensor

from rgap.completion import ANNEALING, BLUNT, PASSES, TRAPPED, stages
from rgap.module_update import ModuleUpdate
from rgap.solvers.gauss_newton import STOPPED, Marks, Minimum, Schedule, Step, gauss_newton
from rgap.solvers.priors import Prior
from rgap.stopping import Checkpoint, Ended, Progress

Callback = Callable[[Progress], bool | None]


@dataclass(frozen=True)
class Place:
    """Where a search stands.

    Attributes:
        turn: number of the pass, over all starts.
        stage: of the pass.
        steps: made in all.
    """

    turn: int = 0
    stage: int = 0
    steps: int = 0


@dataclass
class Search:
    """The state of a search; all of it goes into a checkpoint.

    Attributes:
        place: where it stands.
        x: the batch there.
        best: the one of the lowest misfit of the network itself.
        lowest: that misfit, ‖r‖².
        own: the lowest misfit from the present start.
        marks: of a stage that has begun.
    """

    place: Place
    x: Tensor
    best: Tensor
    lowest: float = inf
    own: float = inf
    marks: Marks | None = None

    def note(self, x: Tensor, misfit: float) -> None:
        """A batch and the misfit of the network itself there."""
        self.own = min(self.own, misfit)
        if misfit < self.lowest:
            self.lowest, self.best = misfit, x

    def checkpoint(self, settings: dict[str, str]) -> Checkpoint:
        """All of it as tensors."""
        marks = () if self.marks is None else tuple(map(float, astuple(self.marks)))
        tensors = {
            "place": torch.tensor(astuple(self.place)),
            "x": self.x,
            "best": self.best,
            "misfits": torch.tensor([self.lowest, self.own], dtype=torch.float64),
            "marks": torch.tensor(marks, dtype=torch.float64),
        }
        return Checkpoint(settings, tensors)

    @classmethod
    def of(cls, checkpoint: Checkpoint, like: Tensor) -> Search:
        """What :meth:`checkpoint` made of it."""
        held = checkpoint.tensors
        lowest, own = held["misfits"].tolist()
        marks = None
        if len(held["marks"]):
            number, weight, smoothing, damping, rest, over = held["marks"].tolist()
            marks = Marks(int(number), weight, smoothing, damping, int(rest), bool(over))
        place = Place(*map(int, held["place"].tolist()))
        return cls(place, held["x"].to(like), held["best"].to(like), lowest, own, marks)


def search(
    equations: ModuleUpdate,
    starts: Sequence[Tensor],
    prior: Prior,
    schedule: Schedule,
    bounds: tuple[float, float] | None,
    settings: dict[str, str],
    callback: Callback | None,
    checkpoint: Checkpoint | None,
) -> tuple[Ended, Search]:
    """The batch of the lowest misfit that any start leads to.

    Args:
        equations: the update as a function of the batch.
        starts: to begin with, one after another; the answer is never worse than any of them.
        prior: of the data.
        schedule: of its weight, and the time; its ``steps`` count once the kinks are sharp.
        bounds: of the data, kept.
        settings: that a checkpoint is for.
        callback: told after every step; True stops.
        checkpoint: of a search that was stopped.
    """
    deadline = time.perf_counter() + schedule.seconds
    equations.settle(starts[0], BLUNT)
    if checkpoint is None:
        held = Search(Place(), starts[0], starts[0])
        for start in starts:  # what comes back is no worse than what went in
            held.note(start, equations.misfit(start))
        held.own = inf
    else:
        held = Search.of(checkpoint, starts[0])
    passes = PASSES if equations.sharpness else PASSES[:1]
    for turn in range(held.place.turn, len(starts) * len(passes)):
        number, again = divmod(turn, len(passes))
        if turn != held.place.turn:
            held.place, held.marks = replace(held.place, turn=turn, stage=0), None
            held.x, held.own = starts[number], held.own if again else inf
        if again and held.own <= TRAPPED:
            continue
        ended = _pass(
            equations, held, prior, schedule, passes[again], bounds, deadline, settings, callback
        )
        if ended is not None:
            return ended, held
    if not held.lowest < inf:
        return Ended.NOT_FINITE, held
    still = held.marks is not None and held.marks.over
    return (Ended.STILL if still else Ended.DONE), held


def _pass(
    equations: ModuleUpdate,
    held: Search,
    prior: Prior,
    schedule: Schedule,
    levels: int,
    bounds: tuple[float, float] | None,
    deadline: float,
    settings: dict[str, str],
    callback: Callback | None,
) -> Ended | None:
    """The stages of one pass that are left; why it stopped before the last."""

    def project(x: Tensor) -> Tensor:
        return x if bounds is None else x.clamp(*bounds)

    def watch(step: Step, x: Tensor) -> bool:
        held.x, held.marks = x, step.marks
        held.place = replace(held.place, steps=held.place.steps + 1)
        if equations.sharpness.value is None:
            held.note(x, step.misfit)
        if callback is None:
            return False
        values = torch.tensor([step.misfit], dtype=torch.float64)
        point = held.checkpoint(settings)
        return bool(callback(Progress("step", held.place.steps, values, held.lowest, point)))

    plan = stages(schedule, levels) if equations.sharpness else [(None, schedule)]
    soft = time.perf_counter() + ANNEALING * (deadline - time.perf_counter())
    for number in range(held.place.stage, len(plan)):
        sharpness, here = plan[number]
        now = time.perf_counter()
        if sharpness is not None and now > soft:
            continue
        if number != held.place.stage:
            held.place, held.marks = replace(held.place, stage=number), None
        equations.sharpness.value = sharpness
        here = replace(here, seconds=(soft if sharpness is not None else deadline) - now)
        found: Minimum = gauss_newton(
            equations.at, held.x, prior, here, project=project, watch=watch, marks=held.marks
        )
        equations.sharpness.value = None
        if sharpness is None:
            held.note(found.value, found.misfit)
        if found.ended == STOPPED:
            return Ended.STOPPED
    return Ended.TIME if time.perf_counter() > deadline else None
