"""Completion: where the rank falls short, a prior fills what is missing, and only that.

Of the stage at which the recursion ended the cotangent k is known and, of its input u, all that its
own equations say (``C u = c``, orthonormal rows).  The data then solve

    min ‖C u(x) − c‖² + Σ_j ‖G_j(x) − G_j‖²/‖G_j‖² + λ prior(x),   j below that stage,

by Gauss–Newton, λ going down to 0.  What is determined stays determined.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap.completion.annealing import TRAPPED, Plan, Position, Watch, anneal
from rgap.constraints.known_input import Bounded, Equations, KnownPart, PlainRows, Whole
from rgap.jacobian.module_update import KnownFeatures, ModuleUpdate
from rgap.machine.allowance import SYMMETRIC, Ahead, OutOfTime, freely
from rgap.network.activations import Activation
from rgap.network.chain import Chain, Stage
from rgap.network.reshape import Reshape
from rgap.precision import Estimate, Precision
from rgap.priors import Likely, named, prior_of
from rgap.recursion.matrix_free import memory
from rgap.recursion.reached import Reached
from rgap.recursion.stage import BUDGET
from rgap.solvers.gauss_newton import Minimum, Schedule, Step
from rgap.solvers.priors import Prior

PASSES = (16, 40)  # levels of the first try and of those after it
MISSED = 1e-4  # misfit above which an answer does not reproduce the update: one per cent of it
MOST = 4096  # pre-activations whose Gram matrix is factored; beyond, the rows are used as they are


FAINT = 1e-3  # spread of a start's noise, in widths of the range


@dataclass(frozen=True)
class PriorSchedule:
    """How what the equations leave open is chosen.

    Attributes:
        prior: of the data.
        schedule: of its weight; its seconds count from ``began``.
        began: of ``time.perf_counter``.
        start: a batch to begin with, [B, *shape]; None: grey noise.
        name: of the prior, in a report.
    """

    prior: Prior
    schedule: Schedule
    began: float
    start: Tensor | None = None
    name: str = "the prior"

    @property
    def deadline(self) -> float:
        """When the time is up, by ``time.perf_counter``."""
        return self.began + self.schedule.seconds

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(self.deadline - time.perf_counter(), 0.0)

    @classmethod
    def of(
        cls,
        prior: Likely | None,
        seconds: float,
        shape: Sequence[int],
        value_range: tuple[float, float] | None,
        began: float | None = None,
    ) -> PriorSchedule:
        """With the usual prior where none is given: that of pictures if entries have neighbours.

        Raises:
            ValueError: no time, or no prior of that name.
        """
        if not seconds > 0:
            raise ValueError(
                f"time_limit: expected seconds above 0, got {seconds!r}; write time_limit=60.0"
            )
        low, high = value_range or (0.0, 1.0)
        schedule = Schedule(seconds=float(seconds), smoothing=Schedule.smoothing * (high - low))
        began = time.perf_counter() if began is None else began
        own = "natural" if prior is None else prior
        chosen = prior_of(own, shape, value_range, began + seconds)
        return cls(chosen, schedule, began, name=named(own))


def met(
    update: ModuleUpdate, misfit: float, residual: float, precision: Precision, blank: Tensor
) -> bool:
    """True for an answer that reproduces the update: to one per cent, or as stated noise says.

    Args:
        update: the equations.
        blank: data that are no answer; noise that explains them too explains nothing.
        misfit: squared, of each tensor by its own norm.
        residual: relative difference of the whole update.
        precision: of the update.
    """
    each, whole = update.allowed(precision, blank)
    return misfit <= max(MISSED, each) and residual**2 <= max(MISSED, whole)


def blank_words(update: ModuleUpdate, precision: Precision, blank: Tensor) -> str:
    """What a reason ends with where stated noise explains data that are no answer; else ""."""
    if not precision.noisy or update.allowed(precision, blank)[1]:
        return ""
    return "; the stated noise would explain a blank batch too: no batch is told from others"


def inside(
    chain: Chain,
    reached: Reached,
    gradients: Mapping[str, Tensor],
    precision: Precision,
    budget: float = BUDGET,
    ahead: Ahead = freely,
) -> KnownFeatures:
    """What a recursion that ended early knows of the lowest stage that it reached.

    Args:
        chain: the stages, or those above a barrier.
        reached: the lowest stage of which something is known.
        gradients: the update.
        precision: of the update.
        budget: bytes above which no matrix is formed.
        ahead: asked for time before one is factored; without it the rows are used as they are.
    """
    stage = chain.stages[reached.index]
    known: Equations
    if reached.u is not None:
        known = Whole(reached.u.value, float(reached.u.std.square().sum()))
    else:
        assert reached.z is not None
        sent = stage.affine.sent(gradients)
        k = reached.k
        if not precision.sent(stage.affine.weight_name):  # as in the recursion: K = 0
            k = Estimate(0.0 * k.value, 0.0 * k.error)
        large = memory(stage.affine, len(k.value)) > budget
        if large or not _factored(reached.z.value.numel(), ahead):
            known = PlainRows.of(stage.affine, sent, reached.z, k, precision)
        else:
            known = KnownPart.of(stage.affine, sent, reached.z, k, precision)
        if _rectified(chain, stage) and not bool(reached.z.known.all()):
            known = Bounded.of(known, stage.affine, ~reached.z.known)
    shape = (len(reached.k.value), *stage.affine.in_shape)
    size = float(reached.k.value.norm())
    blur = float(reached.k.std.norm()) / size if size > 0 else 0.0
    return KnownFeatures(stage.name, shape, known, stage.affine.adjoint(reached.k.value), blur)


def _factored(size: int, ahead: Ahead) -> bool:
    """True if there is room and time for the eigenvectors of a Gram matrix of so many rows."""
    if size > MOST:
        return False
    try:
        ahead(SYMMETRIC * size**3)
    except OutOfTime:
        return False
    return True


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
    blank: Tensor | None = None,
) -> Minimum:
    """Solve for the data, the prior filling what the equations leave open.

    Where the network has kinks they are rounded off at first and sharpened level by level
    (:mod:`rgap.jacobian.smoothing`); where that ends in a local minimum, once more and more slowly.

    Args:
        update: the equations.
        start: x to begin with, [B, *input_shape].
        prior: of the data.
        schedule: of its weight.
        value_range: of the data, kept; None for none.
        precision: of the update: the weight of the prior stays where the misfit is what errors
            explain (Morozov's discrepancy principle).
        watch: told of every step.
        blank: data that are no answer, by which the misfit of what is known is measured; by default
            the start, which is none then.

    Returns:
        The :class:`~rgap.solvers.gauss_newton.Minimum`; ``misfit`` is that of the network itself,
        in units in which what is known inside misses by 1 at the start.
    """
    deadline = time.perf_counter() + schedule.seconds

    def project(x: Tensor) -> Tensor:
        return x if value_range is None else x.clamp(*value_range)

    update.balance(start if blank is None else blank)
    schedule = replace(schedule, target=update.expected(precision))
    best: Minimum | None = None
    steps: tuple[Step, ...] = ()
    for levels in PASSES if update.sharpness else PASSES[:1]:
        late = time.perf_counter() > deadline
        if best is not None and (best.misfit <= TRAPPED or late or not isfinite(best.misfit)):
            break
        plan = Plan(prior, schedule, levels, deadline, project=project)
        minimum = anneal(update, Position(start), plan, watch)
        steps = (*steps, *minimum.steps)
        best = minimum if best is None or minimum.misfit < best.misfit else best
    assert best is not None
    return replace(best, steps=steps)


def beginning(update: ModuleUpdate, start: Tensor) -> Tensor | None:
    """A start whose rows are in the order of the features that are known inside, or None.

    The order of a batch is not in its gradient, so that whoever made the start had another: where
    all of a layer's input is known, rows are paired by the smallest sum of squared differences.
    Rows that are left over are copies of others; None: there are too few, or too many of which
    nothing says which are left over.

    Args:
        update: the equations, of B different samples.
        start: x, ``[B', *input_shape]``.
    """
    assert update.inside is not None
    size, own = update.inside.shape[0], []
    if not isinstance(update.inside.known, Whole):
        return start if len(start) == size else None
    if len(start) < size:
        return None
    with torch.no_grad():
        for first in range(0, len(start), size):  # as many at a time as the equations are of
            update.run(start[torch.arange(first, first + size) % len(start)])
            own.append(update.seen.flatten(1))
    wanted = update.inside.known.value.flatten(1)
    costs = torch.cdist(wanted, torch.cat(own)[: len(start)].to(wanted)).square()
    return start[torch.from_numpy(linear_sum_assignment(costs.cpu().numpy())[1]).to(start.device)]


def grey(
    batch: int,
    shape: Sequence[int],
    value_range: tuple[float, float] | None,
    seed: int,
    spread: float = FAINT,
) -> Tensor:
    """The middle of the range and noise, [B, *shape], float64.

    Args:
        batch: B.
        shape: of one sample.
        value_range: of the data; [0, 1] for None.
        seed: of the noise.
        spread: of the noise, in widths of the range; by default a little.
    """
    low, high = value_range or (0.0, 1.0)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    return (low + high) / 2 + spread * (high - low) * noise
