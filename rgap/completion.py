"""Completion: where the rank falls short, a prior fills what is missing, and only that.

Of the stage at which the recursion ended the cotangent k is known and, of its input u, all that its
own equations say (``C u = c``, orthonormal rows).  The data then solve

    min ‖C u(x) − c‖² + Σ_j ‖G_j(x) − G_j‖²/‖G_j‖² + λ prior(x),   j below that stage,

by Gauss–Newton, λ going down to 0.  What is determined stays determined.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from rgap.activations import Activation
from rgap.module_update import Inside, ModuleUpdate
from rgap.network import Chain, Stage
from rgap.ops import Reshape
from rgap.precision import Precision
from rgap.recursion import Reached
from rgap.solvers.gauss_newton import Minimum, Schedule, Step, gauss_newton
from rgap.solvers.priors import Prior
from rgap.systems.inequalities import Bounded, Equations
from rgap.systems.known_part import KnownPart
from rgap.systems.matrixfree import memory
from rgap.systems.plain_rows import PlainRows
from rgap.systems.stage import BUDGET

BLUNT, SHARP = 4.0, 2000.0  # sharpness of the kinks at the first and the last level
FADING = 1e-5  # factor on the weight of the prior from the first level to the last
PASSES = (16, 40)  # levels of the first try and of those after it
STEPS = 2  # Gauss–Newton steps a level
ANNEALING = 0.7  # share of the time left that the levels of a pass may take
MISSED = 1e-2  # misfit above which an answer does not reproduce the update
TRAPPED = 1e-4  # misfit above which a pass over kinks may have ended in a local minimum
MOST = 4096  # pre-activations whose Gram matrix is factored; beyond, the rows are used as they are
Watch = Callable[[Step, Tensor], None]


@dataclass(frozen=True)
class Whole:
    """All of a layer's input is known: ``u = û``.

    Attributes:
        value: û, [B, *in_shape].
        expected: squared misfit that the error of û explains.
    """

    value: Tensor
    expected: float = 0.0

    @property
    def equations(self) -> int:
        """As many as unknowns."""
        return self.value.numel()

    def misfit(self, u: Tensor) -> Tensor:
        """The difference u − û, flat."""
        return (u - self.value).flatten()


def inside(
    chain: Chain,
    reached: Reached,
    gradients: Mapping[str, Tensor],
    precision: Precision,
    budget: float = BUDGET,
) -> Inside:
    """What a recursion that ended early knows of the lowest stage that it reached.

    Args:
        chain: the stages, or those above a barrier.
        reached: the lowest stage of which something is known.
        gradients: the update.
        precision: of the update.
        budget: bytes above which no matrix is formed.
    """
    stage = chain.stages[reached.index]
    known: Equations
    if reached.u is not None:
        known = Whole(reached.u.value, float(reached.u.std.square().sum()))
    else:
        assert reached.z is not None
        sent = gradients[stage.affine.weight_name]
        large = reached.z.value.numel() > MOST
        if large or memory(stage.affine, len(reached.k.value)) > budget:
            known = PlainRows.of(stage.affine, sent, reached.z, reached.k, precision)
        else:
            known = KnownPart.of(stage.affine, sent, reached.z, reached.k, precision)
        if _rectified(chain, stage) and not bool(reached.z.known.all()):
            known = Bounded.of(known, stage.affine, ~reached.z.known)
    shape = (len(reached.k.value), *stage.affine.in_shape)
    size = float(reached.k.value.norm())
    blur = float(reached.k.std.norm()) / size if size > 0 else 0.0
    return Inside(stage.name, shape, known, stage.affine.adjoint(reached.k.value), blur)


def _rectified(chain: Chain, stage: Stage) -> bool:
    """True if a pre-activation that no equation fixes is one that a ReLU set to 0.

    Below a pool it may be one that did not win, whatever its sign.
    """
    above = chain.stages[stage.index + 1].lead if stage.index + 1 < len(chain.stages) else ()
    if any(op.barrier is not None for op in above):
        return False
    for op in stage.tail:
        if not isinstance(op, Reshape):
            return isinstance(op, Activation) and op.one_sided
    return False


def complete(
    update: ModuleUpdate,
    start: Tensor,
    prior: Prior,
    schedule: Schedule,
    value_range: tuple[float, float] | None,
    precision: Precision,
    *,
    watch: Watch | None = None,
) -> Minimum:
    """Solve for the data, the prior filling what the equations leave open.

    Where the network has kinks they are rounded off at first and sharpened level by level
    (:mod:`rgap.kinks`); where that ends in a local minimum, once more and more slowly.

    Args:
        update: the equations.
        start: x to begin with, [B, *input_shape].
        prior: of the data.
        schedule: of its weight.
        value_range: of the data, kept; None for none.
        precision: of the update: the weight of the prior stays where the misfit is what errors
            explain (Morozov's discrepancy principle).
        watch: told of every step.

    Returns:
        The :class:`~rgap.solvers.gauss_newton.Minimum`; ``misfit`` is that of the network itself,
        in units in which what is known inside misses by 1 at the start.
    """
    deadline = time.perf_counter() + schedule.seconds

    def project(x: Tensor) -> Tensor:
        return x if value_range is None else x.clamp(*value_range)

    update.balance(start)
    schedule = replace(schedule, target=update.expected(precision))
    best: Minimum | None = None
    steps: tuple[Step, ...] = ()
    for levels in PASSES if update.sharpness else PASSES[:1]:
        left = deadline - time.perf_counter()
        if best is not None and (best.misfit <= TRAPPED or left <= 0 or not isfinite(best.misfit)):
            break
        last, begin = schedule, start
        if update.sharpness:
            begin, last, done = _annealed(
                update, start, prior, schedule, project, levels, ANNEALING * left, watch
            )
            steps = (*steps, *done)
        last = replace(last, seconds=deadline - time.perf_counter())
        found = gauss_newton(update.at, begin, prior, last, project=project, watch=watch)
        steps = (*steps, *found.steps)
        best = found if best is None or found.misfit < best.misfit else best
    assert best is not None
    return replace(best, steps=steps)


def _annealed(
    update: ModuleUpdate,
    x: Tensor,
    prior: Prior,
    schedule: Schedule,
    project: Callable[[Tensor], Tensor],
    levels: int,
    seconds: float,
    watch: Watch | None,
) -> tuple[Tensor, Schedule, tuple[Step, ...]]:
    """Sharpen the kinks level by level: x, what is left of the schedule, and the steps."""
    deadline = time.perf_counter() + seconds
    steps: tuple[Step, ...] = ()
    for sharpness, here in stages(schedule, levels):
        left = deadline - time.perf_counter()
        # Out of time: the kinks are the network's own from here on, the prior weighs what it does.
        schedule = replace(schedule, weight=here.weight, smoothing=here.smoothing)
        if left <= 0 or sharpness is None:
            break
        update.sharpness.value = sharpness
        here = replace(here, seconds=left)
        found = gauss_newton(update.at, x, prior, here, project=project, watch=watch)
        x, steps = found.value, (*steps, *found.steps)
    update.sharpness.value = None
    return x, schedule, steps


def stages(schedule: Schedule, levels: int) -> list[tuple[float | None, Schedule]]:
    """Sharpness of the kinks, None for the network's own, and schedule of every stage of a pass."""
    weight, found = schedule.weight, list[tuple[float | None, Schedule]]()
    for level in range(levels + 1):
        here = replace(
            schedule,
            weight=weight,
            lowest=weight,
            smoothing=min(schedule.smoothing, 10.0 * weight),
            steps=STEPS,
            target=0.0,
        )
        found.append((BLUNT * (SHARP / BLUNT) ** (level / levels), here))
        weight = max(weight * FADING ** (1.0 / levels), schedule.lowest)
    last = replace(schedule, weight=weight, smoothing=min(schedule.smoothing, 10.0 * weight))
    return [*found, (None, last)]


def grey(
    batch: int, shape: Sequence[int], value_range: tuple[float, float] | None, seed: int
) -> Tensor:
    """The middle of the range and a little noise, [B, *shape]."""
    low, high = value_range or (0.0, 1.0)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    return (low + high) / 2 + 1e-3 * (high - low) * noise
