"""The equations of the whole update weighed: one over the standard error of every row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rgap.bilinear import Rows
from rgap.jacobian import Linearisation
from rgap.precision import Known, Precision


def row_weights(
    point: Linearisation,
    kappa: Known,
    precision: Precision,
    others: Iterable[Rows] = (),
) -> Rows:
    """1/σ per gradient entry, pooled over each filter.

    σ holds the rounding of the entry's own sum, the stated noise, and what the client's rounding
    at every other step does to the entry, sampled one member at a time; and ``others``, samples
    of any other error, by parameter name [1, *parameter.shape].
    """
    single = replace(precision, samples=1, seed=precision.seed + 2)
    zero = torch.zeros((1, *point.x.shape), dtype=torch.float64, device=point.x.device)
    squares = _update_std(point, precision)
    pooled = {name: _pool(s.square()) for name, s in squares.items()}
    drawn = [{name: _pool(rows[0].square()) for name, rows in one.items()} for one in others]
    for one in drawn:
        for name, variance in one.items():
            pooled[name] = pooled[name] + variance / len(drawn)
    count = min(8, len(kappa.error))
    for member in range(count):
        carried = point.jvp(zero, kappa.error[member : member + 1], inject=single)
        for name, rows in carried.items():
            pooled[name] = pooled[name] + _pool(rows[0].square()) / count
    return {
        name: pooled[name].sqrt().clamp_min(1e-300).reciprocal().reshape(-1, *([1] * (s.ndim - 1)))
        for name, s in squares.items()
    }


def _update_std(point: Linearisation, precision: Precision) -> Rows:
    """Standard error of every entry from the rounding of its own sum, and the stated noise."""
    totals = point.gradients() if len(point.x) > 1 else {}
    squares = point.squares()
    return {name: precision.update_std(s, totals.get(name)) for name, s in squares.items()}


def update_noise(point: Linearisation, kappa: Known, precision: Precision) -> Rows:
    """Samples of the update's error: rounding of the whole computation, and the stated noise."""
    zero = torch.zeros(
        (precision.samples, *point.x.shape), dtype=torch.float64, device=point.x.device
    )
    carried = point.jvp(zero, kappa.error, inject=precision)
    own = {n: precision.normal(s) for n, s in _update_std(point, precision).items()}
    return {name: own[name] + carried[name] for name in own}


def _pool(variance: Tensor) -> Tensor:
    """Mean over everything but the filters."""
    return variance if variance.ndim == 1 else variance.flatten(1).mean(1)


def residuals(point: Linearisation, gradients: Mapping[str, Tensor]) -> Rows:
    """What was sent minus what the point sends."""
    return {name: gradients[name] - g for name, g in point.gradients().items()}


def row_misfits(
    point: Linearisation, gradients: Mapping[str, Tensor], weights: Rows
) -> dict[str, float]:
    """Weighted rms residual of every parameter; about 1 when consistent."""
    gaps = residuals(point, gradients)
    return {n: float((gap * weights[n]).square().mean().sqrt()) for n, gap in gaps.items()}


def objective(misfits: Mapping[str, float], gradients: Mapping[str, Tensor]) -> float:
    """Σ of squared weighted residuals; infinite if any is not a number."""
    total = sum(m * m * gradients[name].numel() for name, m in misfits.items())
    return total if total == total else float("inf")
