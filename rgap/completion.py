"""Completion: where the rank falls short, a prior fills what is missing, and only that.

Of the stage at which the recursion ended the cotangent k is known and, of its input u, all that its
own equations say (``C u = c``, orthonormal rows).  The data then solve

    min ‖C u(x) − c‖² + Σ_j ‖G_j(x) − G_j‖²/‖G_j‖² + λ prior(x),   j below that stage,

by Gauss–Newton, λ going down to 0.  What is determined stays determined.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.module_update import Inside, ModuleUpdate
from rgap.network import Chain
from rgap.precision import Precision
from rgap.recursion import Reached
from rgap.solvers.gauss_newton import Minimum, Schedule, Step, gauss_newton
from rgap.solvers.priors import Prior
from rgap.systems.known_part import KnownPart

SIGNS = 1e-7  # misfit of the known part at which the signs of almost all units are settled
SETTLED = 1e-5  # weight of the prior from there on
ROUNDED = 0.1  # rounding of the prior's kinks, at most
Watch = Callable[[Step, Tensor], None]


@dataclass(frozen=True)
class Whole:
    """All of a layer's input is known: ``u = û``.

    Attributes:
        value: û, [B, *in_shape].
    """

    value: Tensor

    @property
    def equations(self) -> int:
        """As many as unknowns."""
        return self.value.numel()

    def misfit(self, u: Tensor) -> Tensor:
        """The difference u − û, flat."""
        return (u - self.value).flatten()


def inside(
    chain: Chain, reached: Reached, gradients: dict[str, Tensor], precision: Precision
) -> Inside:
    """What a recursion that ended early knows of the lowest stage that it reached.

    Args:
        chain: the stages, or those above a barrier.
        reached: the lowest stage of which something is known.
        gradients: the update.
        precision: of the update.
    """
    stage = chain.stages[reached.index]
    known: KnownPart | Whole
    if reached.u is not None:
        known = Whole(reached.u.value)
    else:
        assert reached.z is not None
        sent = gradients[stage.affine.weight_name]
        known = KnownPart.of(stage.affine, sent, reached.z, reached.k, precision)
    shape = (len(reached.k.value), *stage.affine.in_shape)
    return Inside(stage.name, shape, known, stage.affine.adjoint(reached.k.value))


def complete(
    update: ModuleUpdate,
    start: Tensor,
    prior: Prior,
    schedule: Schedule,
    value_range: tuple[float, float] | None,
    *,
    kinked: bool = False,
    watch: Watch | None = None,
) -> Minimum:
    """Solve for the data, the prior filling what the equations leave open.

    Args:
        update: the equations.
        start: x to begin with, [B, *input_shape].
        prior: of the data.
        schedule: of its weight.
        value_range: of the data, kept; None for none.
        kinked: an activation below changes its slope at a point.  Cotangents that jump there have
            no slope to follow: what is known inside settles the signs before gradients are used.
        watch: told of every step.
    """
    began = time.perf_counter()

    def project(x: Tensor) -> Tensor:
        return x if value_range is None else x.clamp(*value_range)

    update.balance(start)
    if kinked and isinstance(update.source, Inside):
        early = replace(schedule, target=max(schedule.target, SIGNS), lowest=SETTLED)
        update.share = 0.0
        found = gauss_newton(update.at, start, prior, early, project=project, watch=watch)
        update.share, start = 1.0, found.value
        update.balance(start)  # what settled the signs may not give way to the gradients now
        rounding = min(ROUNDED, 10.0 * found.misfit**0.5)  # the picture is known about that well
        left = schedule.seconds - (time.perf_counter() - began)
        schedule = replace(schedule, weight=SETTLED, seconds=left, smoothing=rounding)
    return gauss_newton(update.at, start, prior, schedule, project=project, watch=watch)


def grey(
    batch: int, shape: Sequence[int], value_range: tuple[float, float] | None, seed: int
) -> Tensor:
    """The middle of the range and a little noise, [B, *shape]."""
    low, high = value_range or (0.0, 1.0)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    return (low + high) / 2 + 1e-3 * (high - low) * noise
