"""What the numbers themselves show: coarser precision, signs, zeros, quantisation.

No equation is needed: a float32 tensor whose every entry is a float16 number was one.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from rgap.symptoms import FEWEST, compression
from rgap.update import Update

from .finding import Finding, Kind

COARSER = (torch.float16, torch.bfloat16, torch.float32)
LEVELS = 256  # distinct values of an 8-bit quantisation
CROWD = 4  # entries a level, from which few distinct values are no accident
LEAST = 6  # levels; fewer may be a grid by symmetry
ON_GRID = 1e-3  # of a step, by which a level may miss the grid


def precision(update: Update) -> Finding | None:
    """A precision coarser than the declared one in which every entry is exact."""
    values = torch.cat([g.flatten() for g in update.gradients.values()])
    if int((values != 0).sum()) < FEWEST:
        return None
    for dtype in sorted(COARSER, key=lambda d: torch.finfo(d).eps, reverse=True):
        if torch.finfo(dtype).eps <= torch.finfo(update.dtype).eps:
            continue
        if bool((values.to(dtype).to(values.dtype) == values).all()):
            name = str(dtype).removeprefix("torch.")
            said = f"all {len(values)} entries are exactly {name} numbers"
            line = f"dataclasses.replace(update, dtype=torch.{name})"
            return Finding(Kind.PRECISION, float(torch.finfo(dtype).eps), said, line, inf)
    return None


def compressed(gradients: Mapping[str, Tensor]) -> Finding | None:
    """Signs, pruned entries, or a uniform grid of few levels."""
    words = compression(gradients)
    if words is not None:
        line = "rgap.match(model, update); the equations need the gradient as it was"
        zeros = sum(int((g == 0).sum()) for g in gradients.values())
        share = zeros / sum(g.numel() for g in gradients.values())
        return Finding(Kind.COMPRESSION, share, words, line, inf)
    steps = {n: s for n, g in gradients.items() if (s := _grid(g)) is not None}
    if not steps:
        return None
    name = max(steps, key=lambda n: gradients[n].numel())
    levels = len(gradients[name].unique())
    step = steps[name]
    said = f"'{name}' takes {levels} values on a grid of step {step:.4g}, as 8-bit integers leave"
    line = f"rgap.invert(model, update, noise={step / 12**0.5:.3g})"
    return Finding(Kind.COMPRESSION, step, said, line, inf)


def _grid(gradient: Tensor) -> float | None:
    """Step of a uniform grid of at most 256 levels that all entries lie on, or None."""
    levels = gradient.double().flatten().unique()
    if not LEAST <= len(levels) <= LEVELS or gradient.numel() < max(FEWEST, CROWD * len(levels)):
        return None
    gaps = levels.diff()
    step = float(gaps.min())
    size = float(levels.abs().max())
    if step <= 4 * torch.finfo(gradient.dtype).eps * size:
        return None
    multiples = (levels - levels[0]) / step
    off = (multiples - multiples.round()).abs().max()
    return step if float(off) < ON_GRID * float(multiples.max()) ** 0.5 else None
