"""Gauss–Newton on a whole update from one start after another, in stages that can be gone on with.

A network with kinks is softened at first and sharpened stage by stage, as in a completion; where
that ends in a local minimum, once more and more slowly.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import inf

import torch
from torch import Tensor

from rgap.completion.annealing import BLUNT, TRAPPED, Plan, Position, anneal
from rgap.completion.complete import PASSES
from rgap.jacobian.module_update import ModuleUpdate
from rgap.matching.checkpoint import Checkpoint, Ended, Progress
from rgap.matching.problem import Limits
from rgap.solvers.gauss_newton import STOPPED, DescentMarks, Schedule, Step
from rgap.solvers.priors import Prior, remember, remembered


@dataclass
class SearchState:
    """The state of a search; all of it goes into a checkpoint.

    Attributes:
        position: where the pass stands.
        prior: of the data, with what it remembers.
        best: the batch of the lowest misfit of the network itself.
        turn: number of the pass, over all starts.
        steps: made in all.
        lowest: the misfit of ``best``, ‖r‖².
        own: the lowest misfit from the present start.
    """

    position: Position
    prior: Prior
    best: Tensor
    turn: int = 0
    steps: int = 0
    lowest: float = inf
    own: float = inf

    def note(self, x: Tensor, misfit: float) -> None:
        """A batch and the misfit of the network itself there."""
        self.own = min(self.own, misfit)
        if misfit < self.lowest:
            self.lowest, self.best = misfit, x

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        held, place = self.position.marks, self.best.device
        marks = () if held is None else tuple(map(float, astuple(held)))
        return {
            "place": torch.tensor([self.turn, self.position.stage, self.steps], device=place),
            "x": self.position.x,
            "best": self.best,
            "misfits": self.best.new_tensor([self.lowest, self.own], dtype=torch.float64),
            "marks": self.best.new_tensor(marks, dtype=torch.float64),
            **remembered(self.prior),
        }

    @classmethod
    def of(cls, checkpoint: Checkpoint, prior: Prior, like: Tensor) -> SearchState:
        """What :meth:`state` made of it."""
        held = checkpoint.tensors
        remember(prior, held)
        lowest, nearest = held["misfits"].tolist()
        marks = None
        if len(held["marks"]):
            number, weight, smoothing, damping, rest, over = held["marks"].tolist()
            marks = DescentMarks(int(number), weight, smoothing, damping, int(rest), bool(over))
        turn, stage, steps = map(int, held["place"].tolist())
        position = Position(held["x"].to(like), stage, marks)
        return cls(position, prior, held["best"].to(like), turn, steps, lowest, nearest)


def search(
    equations: ModuleUpdate,
    starts: Sequence[Tensor],
    prior: Prior,
    schedule: Schedule,
    bounds: tuple[float, float] | None,
    limits: Limits,
) -> tuple[Ended, SearchState]:
    """The batch of the lowest misfit that any start leads to.

    Args:
        equations: the update as a function of the batch.
        starts: to begin with, one after another; the answer is never worse than any of them.
        prior: of the data.
        schedule: of its weight, and the time; its ``steps`` count once the kinks are sharp.
        bounds: of the data, kept.
        limits: who is told, and where to go on from.
    """
    deadline = time.perf_counter() + schedule.seconds
    equations.settle(starts[0], BLUNT)
    if limits.checkpoint is None:
        held = SearchState(Position(starts[0]), prior, starts[0])
        for start in starts:  # what comes back is no worse than what went in
            held.note(start, equations.misfit(start))
        held.own = inf
    else:
        held = SearchState.of(limits.checkpoint, prior, starts[0])

    def project(x: Tensor) -> Tensor:
        return x if bounds is None else x.clamp(*bounds)

    def watch(step: Step, x: Tensor) -> bool:
        held.steps += 1
        if equations.sharpness.value is None:
            held.note(x, step.misfit)
        if limits.callback is None:
            return False
        values = x.new_tensor([step.misfit], dtype=torch.float64)
        point = limits.saved(held.state())
        return bool(limits.callback(Progress("step", held.steps, values, held.lowest, point)))

    passes = PASSES if equations.sharpness else PASSES[:1]
    for turn in range(held.turn, len(starts) * len(passes)):
        number, again = divmod(turn, len(passes))
        if turn != held.turn:
            held.turn, held.position = turn, Position(starts[number])
            held.own = held.own if again else inf
        if again and held.own <= TRAPPED:
            continue
        plan = Plan(prior, schedule, passes[again], deadline, project=project)
        minimum = anneal(equations, held.position, plan, watch)
        if minimum.ended == STOPPED:
            return Ended.STOPPED, held
        held.note(minimum.value, minimum.misfit)
        if time.perf_counter() > deadline:
            return Ended.TIME, held
    if not held.lowest < inf:
        return Ended.NOT_FINITE, held
    marks = held.position.marks
    still = marks is not None and marks.over
    return (Ended.STILL if still else Ended.DONE), held
