"""The one loop that anneals kinks: softened stage by stage, then the network itself.

A pass begins with blunt kinks (:mod:`rgap.jacobian.smoothing`), sharpens them level by level while
the weight of the prior goes down, and ends with the network's own.  Where it stands is a
:class:`Position`, from which another call goes on.  No stage is left with its sharpness switched
on: each runs inside ``with update.softened(sharpness)``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from rgap.jacobian.module_update import ModuleUpdate
from rgap.solvers.gauss_newton import STOPPED, DescentMarks, Minimum, Schedule, Step, gauss_newton
from rgap.solvers.priors import Prior

BLUNT, SHARP = 4.0, 2000.0  # sharpness of the kinks at the first and the last level
FADING = 1e-5  # factor on the weight of the prior from the first level to the last
STEPS = 2  # Gauss–Newton steps a level
ANNEALING = 0.7  # share of the time left that the levels of a pass may take
TRAPPED = 1e-4  # misfit above which a pass over kinks may have ended in a local minimum

Watch = Callable[[Step, Tensor], bool | None]


@dataclass
class Position:
    """Where a pass stands; with it, it goes on from there.

    Attributes:
        x: the batch.
        stage: number of the stage.
        marks: of the stage, once it has begun.
    """

    x: Tensor
    stage: int = 0
    marks: DescentMarks | None = None


@dataclass(frozen=True)
class Plan:
    """How a pass goes down.

    Attributes:
        prior: of the data.
        schedule: of its weight; its ``steps`` and ``target`` count once the kinks are sharp.
        levels: of sharpness.
        deadline: of ``time.perf_counter``, of the whole pass.
        share: of the time left that softened stages may take.
        project: on the admissible x.
    """

    prior: Prior
    schedule: Schedule
    levels: int
    deadline: float
    share: float = ANNEALING
    project: Callable[[Tensor], Tensor] = lambda x: x


def stages(schedule: Schedule, levels: int) -> list[tuple[float | None, Schedule]]:
    """Sharpness β of the kinks, None for the network's own, and schedule of every stage of a pass.

    β grows from BLUNT to SHARP and the weight of the prior falls by FADING, both geometrically.

    Args:
        schedule: weight of the prior at the first stage; steps and target of the last one.
        levels: of sharpness before the network's own.
    """
    weight, softened = schedule.weight, list[tuple[float | None, Schedule]]()
    for level in range(levels + 1):
        here = replace(
            schedule,
            weight=weight,
            lowest=weight,
            smoothing=min(schedule.smoothing, 10.0 * weight),
            steps=STEPS,
            target=0.0,
        )
        softened.append((BLUNT * (SHARP / BLUNT) ** (level / levels), here))
        weight = max(weight * FADING ** (1.0 / levels), schedule.lowest)
    last = replace(schedule, weight=weight, smoothing=min(schedule.smoothing, 10.0 * weight))
    return [*softened, (None, last)]


def anneal(
    update: ModuleUpdate, position: Position, plan: Plan, watch: Watch | None = None
) -> Minimum:
    """What is left of one pass: the softened stages, then the network itself.

    Out of the time that softened stages may take, the kinks are the network's own from there on,
    and the prior weighs what it does at that stage.  A network without kinks has one stage.

    Args:
        update: the equations.
        position: where to begin; kept up to date, so that what stops can be gone on with.
        plan: how it goes down.
        watch: told of every step; True stops the pass.

    Returns:
        The :class:`~rgap.solvers.gauss_newton.Minimum` of the last stage, with the steps of all;
        its misfit is the network's own unless ``ended`` is ``STOPPED``.
    """

    def noted(step: Step, x: Tensor) -> bool:
        position.x, position.marks = x, step.marks
        return watch is not None and bool(watch(step, x))

    ahead: list[tuple[float | None, Schedule]] = [(None, plan.schedule)]
    if update.sharpness:
        ahead = stages(plan.schedule, plan.levels)
    last = len(ahead) - 1
    now = time.perf_counter()
    soft = now + plan.share * (plan.deadline - now)
    steps: tuple[Step, ...] = ()
    number = position.stage
    while True:
        sharpness, here = ahead[number]
        now = time.perf_counter()
        if number < last and now >= soft:
            final = ahead[last][1]
            ahead[last] = (None, replace(final, weight=here.weight, smoothing=here.smoothing))
            number = last
            continue
        if number != position.stage:
            position.stage, position.marks = number, None
        here = replace(here, seconds=(soft if number < last else plan.deadline) - now)
        with update.softened(sharpness):
            minimum = gauss_newton(
                update.at, position.x, plan.prior, here,
                project=plan.project, watch=noted, marks=position.marks,
            )  # fmt: skip
        position.x, steps = minimum.value, (*steps, *minimum.steps)
        if number == last or minimum.ended == STOPPED:
            return replace(minimum, steps=steps)
        number += 1
