"""What the numbers themselves show: coarser precision, signs, zeros, quantisation.

No equation is needed: a float32 tensor whose every entry is a float16 number was one.
"""

from __future__ import annotations

from math import inf, log2

import torch
from torch import Tensor

from rgap.arithmetic.doubles import blocks
from rgap.arithmetic.rounding import UNIFORM
from rgap.diagnosis.evidence import Evidence
from rgap.diagnosis.finding import MENDING, Finding, Kind
from rgap.remedy import Remedy
from rgap.update.compression import compression
from rgap.update.quantisation import EVIDENCE, recognise
from rgap.update.update import Update, view

HALVES = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
RATES = [n * 10.0**-k for k in (6, 5, 4, 3, 2) for n in range(10, 100)]  # two digits, below one
FEW = 16  # values of a tensor that are looked at first
OFF = 2 * torch.finfo(torch.float32).eps  # of a quotient and the rate itself
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


def divided(update: Update) -> tuple[Update, Finding] | None:
    """Values that are numbers of a coarse format only times a rate: a rounded weight difference.

    ``u = fl(h/η)`` with h of float16 or bfloat16 has all its digits.  Rates of two digits are
    tried; of those that differ by a power of two the smallest that explains the values is taken,
    whose grid is the coarsest.

    Returns:
        The update with the rounding of h, over η, as noise, and the finding; or None.
    """
    sent = {n: g for n, g in update.gradients.items() if g.dtype in WIDE and bool(g.any())}
    if not sent or update.noise:
        return None
    few = torch.cat([_largest(g) for g in sent.values()])
    rates = few.new_tensor(RATES)[:, None]
    likely = [
        (dtype, RATES[int(number)])
        for dtype in HALVES
        for number in _on_grid(few, dtype, rates).nonzero()
    ]
    for dtype, rate in likely:
        parts = (part for g in sent.values() for part in blocks(g))
        if not all(bool(_on_grid(part, dtype, rate)) for part in parts):
            continue
        grid = recognise({n: (g.double() * rate).to(dtype).to(g) for n, g in sent.items()})
        if grid is None or grid.dtype != dtype or grid.scaled:
            continue
        finer = max(torch.finfo(g.dtype).eps for g in sent.values())
        bits = grid.evidence * log2(torch.finfo(dtype).eps / finer)
        if bits < EVIDENCE + log2(len(HALVES) * len(RATES)):
            continue  # of so many rates one fits a few values by chance
        said = (
            f"{grid.evidence} distinct values of {len(grid.noise)} tensors are {grid.kind} numbers "
            f"times 1/{rate:g}, or over a power of two more: a weight difference that was rounded "
            "and divided by the rate"
        )
        line = Remedy(
            f"dataclasses.replace(update, gradients={{n: (g * {rate:g}).to({dtype}) for n, g "
            "in update.gradients.items()})",
            f"an UPDATE that holds the difference of the weights as {grid.kind} numbers",
        )
        mended = view(update, dtype=dtype, noise={n: s / rate for n, s in grid.noise.items()})
        eps = torch.finfo(dtype).eps
        return mended, Finding(Kind.PRECISION, eps, said, str(line), inf)
    return None


def _largest(g: Tensor) -> Tensor:
    """A few values of a tensor, on the CPU: they refute nearly every rate."""
    sizes = g.detach().flatten().abs()
    return sizes.topk(min(FEW, len(sizes))).values.double().cpu()


def _on_grid(values: Tensor, dtype: torch.dtype, rate: float | Tensor) -> Tensor:
    """True for quotients of numbers of a format and a rate, up to the rounding of float32.

    Args:
        values: [n].
        dtype: the format.
        rate: one, or many [m, 1], of which each is told.
    """
    wide = values.double()
    near = (wide * rate).to(dtype).double() / rate
    return ((near - wide).abs() <= OFF * wide.abs()).all(-1)


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
