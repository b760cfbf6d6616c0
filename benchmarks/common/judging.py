"""What was recovered beside the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import rgap

TARGET = 1e-3  # error of a dense target that counts as right
NUDGE = 1e-2  # distance by which a wrong label loses: far less than two photographs differ by
REPRODUCED = 0.01  # residual of a completed batch, relative to the update


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


def match(inputs: Tensor, labels: Tensor | None, truth: Tensor, given: Tensor) -> Match:
    """Compare without regard to the order, which no gradient carries.

    Rows and samples are paired one to one at the least total distance; of equal pictures, those
    with equal labels.  Dense targets count as right within 1e-3.
    """
    rows = inputs.double().reshape(len(inputs), -1)
    samples = truth.double().reshape(len(truth), -1)
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
        decibels(float(rms[order].max())),
    )


def decibels(rms: float) -> float:
    """PSNR of values in [0, 1] with this rms error, dB; 6000 where there is none."""
    return -20.0 * math.log10(max(rms, 1e-300))


def misstated(recovery: rgap.Recovery, beside: Match, residual: float = REPRODUCED) -> str:
    """What the status of an answer says and the truth denies, or nothing.

    Args:
        recovery: with its status, bound and residual.
        beside: its answer beside the truth.
        residual: below which a COMPLETED counts as reproducing its update.
    """
    bound = recovery.error_bound
    if recovery.exact and (bound is None or beside.worst > bound):
        return "EXACT beyond its bound"
    reproduced = recovery.residual is not None and recovery.residual < residual
    if recovery.status is rgap.Status.COMPLETED and not reproduced:
        return "COMPLETED misses its update"
    return ""


def middle(values: Sequence[float]) -> float:
    """Median, NaN of nothing."""
    return sorted(values)[len(values) // 2] if values else math.nan
