"""Batches of different real photographs, and what was recovered of them beside the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import rgap

SIDE = 32
LARGE = 64  # side of the stored photographs
MOST = 256
TARGET = 1e-3  # error of a dense target that counts as right
NUDGE = 1e-2  # distance by which a wrong label loses: far less than two photographs differ by


def pictures(count: int, seed: int = 0, among: Sequence[int] | None = None) -> Tensor:
    """Different pictures, float64, [count, 3, 32, 32], in [0, 1].

    First the photographs themselves, in an order drawn from the seed and each mirrored or not;
    beyond them random windows of the 64×64 originals, mirrored or not.  No two are equal.

    Args:
        count: at most 256.
        seed: of the order, the windows and the mirrors.
        among: places of the photographs to take from; all 32 by default.

    Raises:
        ValueError: a count below 1 or above 256.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"count: expected 1 to {MOST} pictures, got {count}")
    generator = torch.Generator().manual_seed(seed)
    places = torch.tensor(range(len(rgap.photos.names())) if among is None else list(among))
    order = places[torch.randperm(len(places), generator=generator)]
    whole = _mirrored(rgap.photos.load()[order[:count]], generator)
    found = list(whole)
    large = rgap.photos.load(size=LARGE)
    seen = {picture.numpy().tobytes() for picture in found}
    while len(found) < count:
        which = places[int(torch.randint(len(places), (1,), generator=generator))]
        top, left = torch.randint(LARGE - SIDE + 1, (2,), generator=generator).tolist()
        window = large[which, :, top : top + SIDE, left : left + SIDE]
        window = _mirrored(window[None], generator)[0].contiguous()
        if (key := window.numpy().tobytes()) not in seen:
            seen.add(key)
            found.append(window)
    return torch.stack(found)


def _mirrored(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Every picture left as it is or mirrored, at random."""
    flip = torch.rand(len(batch), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], batch.flip(3), batch)


def drawn_labels(kind: str, count: int, classes: int, seed: int) -> Tensor:
    """Labels [count]: ``distinct`` (as far as there are classes), all ``equal``, or ``random``."""
    if kind == "distinct":
        return torch.arange(count) % classes
    if kind == "equal":
        return torch.full((count,), (3 + seed) % classes)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (count,), generator=generator)


@dataclass(frozen=True)
class Match:
    """What was recovered, each row beside its own sample.

    Attributes:
        once: as many rows as samples.
        labels_right: every row carries the label (or dense target) of its sample.
        worst: largest error of any entry.
        rms: of every row, [B'].
        psnr: the lowest of any row, for values in [0, 1].
    """

    once: bool
    labels_right: bool
    worst: float
    rms: Tensor
    psnr: float


def match(found: Tensor, labels: Tensor | None, truth: Tensor, given: Tensor) -> Match:
    """Compare without regard to the order, which no gradient carries.

    Rows and samples are paired one to one at the least total distance; of equal pictures, those
    with equal labels.  Dense targets count as right within 1e-3.
    """
    rows, samples = found.flatten(1).double(), truth.flatten(1).double()
    cost = torch.cdist(rows, samples, compute_mode="donot_use_mm_for_euclid_dist")
    agree = torch.zeros_like(cost, dtype=torch.bool)
    if labels is not None:
        own, true = labels.double().reshape(len(rows), -1), given.double().reshape(len(samples), -1)
        agree = (own[:, None] - true[None]).abs().amax(2) <= TARGET
    index, mate = linear_sum_assignment((cost + NUDGE * ~agree).numpy())
    order, mates = torch.from_numpy(index), torch.from_numpy(mate)
    error = rows[order] - samples[mates]
    rms = torch.full((len(rows),), math.inf, dtype=torch.float64)
    rms[order] = error.square().mean(1).sqrt()
    return Match(
        len(rows) == len(samples),
        bool(agree[order, mates].all()),
        float(error.abs().max()),
        rms,
        -20.0 * math.log10(max(float(rms[order].max()), 1e-300)),
    )


def middle(values: Sequence[float]) -> float:
    """Median, NaN of nothing."""
    return sorted(values)[len(values) // 2] if values else math.nan
