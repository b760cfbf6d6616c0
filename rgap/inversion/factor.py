"""One factor λ on the update of a batch: a loss scale, clipping, a sum that was declared as a mean.

The equations that separate a batch do not see λ: it only shows in what every sample weighs.  Where
all weigh the same, the update is divided by that and read again as it was declared; λ is then
refined together with the samples, on the gradient of the layer at which they were separated.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rgap.arithmetic.doubles import Doubles
from rgap.arithmetic.rounding import ABSENT
from rgap.inversion.problem import Problem
from rgap.separation.batch import Separated
from rgap.separation.errors import cotangents

__all__ = ["divided", "remaining"]

STEP = 1e-6  # of a forward difference, in units of the largest entry


def divided(problem: Problem, factor: float, spread: float = 0.0) -> Problem:
    """The problem of the update over λ, its noise with it.

    Args:
        problem: as it was sent.
        factor: λ > 0.
        spread: relative error of λ, which every entry has then.
    """
    gradients = {n: problem.gradients[n] / factor for n in problem.gradients}
    precision = problem.precision
    entries = {
        n: torch.where(std < ABSENT, std / factor, std) for n, std in precision.entries.items()
    }
    if spread:
        own = {n: spread * g.abs() for n, g in gradients.items()}
        entries |= {n: torch.hypot(e, entries[n]) if n in entries else e for n, e in own.items()}
    return replace(
        problem,
        gradients=Doubles(gradients, problem.gradients.device),
        precision=replace(precision, noise=precision.noise / factor, entries=entries),
        update=replace(problem.update, gradients=gradients),
    )


def remaining(problem: Problem, separated: Separated) -> float:
    """The factor that is left, of which the samples know nothing yet.

    A Gauss-Newton step on ``G V = (1 + μ) k(Q)ᵀ Q`` for the rows Q of the mixture and μ together:
    samples that were fitted with a wrong factor have taken a part of it up.

    Args:
        problem: the update, divided by what λ is known to be.
        separated: its samples.
    """
    samples, affine = separated.mixture, separated.stage.affine
    roots = separated.features.value.flatten(1) @ samples.right
    rank = len(roots)
    sent = samples.gradient @ samples.right

    def own(q: Tensor) -> Tensor:
        x = (q @ samples.right.T).reshape(-1, *affine.in_shape)
        k = cotangents(problem.chain, separated.stage.index, x, separated.head).flatten(1)
        return k.T @ q

    at = own(roots)
    step = STEP * float(roots.abs().max())
    columns = [at.flatten()]
    for row in range(rank):
        for column in range(rank):
            moved = roots.clone()
            moved[row, column] += step
            columns.append((own(moved) - at).flatten() / step)
    table = torch.stack(columns, 1)
    sizes = table.norm(dim=0).clamp_min(1e-300)
    answer = torch.linalg.lstsq(table / sizes, (sent - at).flatten()[:, None], driver="gelsd")
    return 1.0 + float(answer.solution[0, 0] / sizes[0])
