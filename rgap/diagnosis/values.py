"""What the numbers themselves show: coarser precision, signs, zeros, quantisation.

No equation is needed: a float32 tensor whose every entry is a float16 number was one.
"""

from __future__ import annotations

from math import inf

import torch

from rgap.arithmetic.rounding import UNIFORM
from rgap.diagnosis.evidence import Evidence
from rgap.diagnosis.finding import MENDING, Finding, Kind
from rgap.remedy import Remedy
from rgap.update.compression import compression
from rgap.update.quantisation import recognise
from rgap.update.update import Update

COUNTED = "rgap invert MODEL UPDATE, which counts the rounding as noise"


def rounded(update: Update) -> Finding | None:
    """A format coarser than the declared one, or integers, that the values show."""
    grid = recognise(update.gradients)
    if grid is None or set(grid.noise) <= set(update.noise or {}):
        return None
    if grid.dtype is None:
        name = max(grid.noise, key=lambda n: update.gradients[n].numel())
        step = float(grid.noise[name].flatten()[0]) / UNIFORM
        said = f"{grid.evidence} distinct values are multiples of a step, {step:.3g} in '{name}'"
        line = Remedy("update.as_rounded()[0]", COUNTED)
        return Finding(Kind.COMPRESSION, step, f"{said}: {grid.kind}", str(line), inf)
    eps = torch.finfo(grid.dtype).eps
    if eps <= torch.finfo(update.dtype).eps:
        return None
    said = f"{grid.evidence} distinct values of {len(grid.noise)} tensors are {grid.kind} numbers"
    line = Remedy(
        f"update.as_rounded()[0], or dataclasses.replace(update, dtype={grid.dtype})", COUNTED
    )
    return Finding(Kind.PRECISION, eps, said, str(line), inf)


def compressed(evidence: Evidence) -> Finding | None:
    """Signs, or pruned entries; not what a coarse format rounded to zero."""
    sent, grid = evidence.update.gradients, recognise(evidence.update.gradients)
    noise = {**({} if grid is None else grid.noise), **(evidence.update.noise or {})}
    words = compression(sent, evidence.terms, noise, evidence.precision.dtype)
    if words is None:
        return None
    zeros = sum(int((g == 0).sum()) for g in sent.values())
    share = zeros / sum(g.numel() for g in sent.values())
    return Finding(Kind.COMPRESSION, share, words, str(MENDING[Kind.COMPRESSION]), inf)
