"""The equations of the whole update weighed: one over the standard error of every row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rgap.jacobian.layer import ParameterRows, pooled
from rgap.jacobian.linearisation import Linearisation
from rgap.precision import Estimate, Precision


def row_weights(
    point: Linearisation,
    kappa: Estimate,
    precision: Precision,
    others: Iterable[ParameterRows] = (),
) -> ParameterRows:
    """1/σ per gradient entry, pooled over each filter.

    ``σ² = rounding of the entry's own sum + stated noise + Σ mean squares of sampled errors``.

    Args:
        point: the update linearised at x.
        kappa: the head's cotangent with samples of its error, which are carried to every entry.
        precision: of the client's arithmetic, and the noise that it states.
        others: mean squares over each filter of samples of any other error, [S, filters].
    """
    single = replace(precision, samples=1, seed=precision.seed + 2)
    squares = _update_std(point, precision)
    variance = {name: pooled(s.square()[None])[0] for name, s in squares.items()}
    drawn = list(others)
    count = min(8, len(kappa.error))
    # The rows of convolutions are formed: one member's at a time.
    step = 1 if any(node.stage.affine.geometry for node in point.nodes) else count
    for members in torch.split(kappa.error[:count], max(step, 1)):
        for name, power in point.power(None, members, inject=single).items():
            variance[name] = variance[name] + power.sum(0) / count
    for one in drawn:
        for name, power in one.items():
            variance[name] = variance[name] + power.sum(0) / sum(len(o[name]) for o in drawn)
    return {
        name: variance[name]
        .sqrt()
        .clamp_min(1e-300)
        .reciprocal()
        .reshape(-1, *([1] * (s.ndim - 1)))
        for name, s in squares.items()
    }


def _update_std(point: Linearisation, precision: Precision) -> ParameterRows:
    """Standard error of every entry from the rounding of its own sum, and the stated noise."""
    totals = point.gradients() if len(point.x) > 1 else {}
    squares = point.squares()
    return {name: precision.update_std(name, s, totals.get(name)) for name, s in squares.items()}


def update_noise(point: Linearisation, kappa: Estimate, precision: Precision) -> ParameterRows:
    """Samples of the update's error: rounding of the whole computation, and the stated noise."""
    carried = point.jvp(None, kappa.error, inject=precision)
    own = {n: precision.normal(s) for n, s in _update_std(point, precision).items()}
    return {name: own[name] + carried[name] for name in own}


def residuals(point: Linearisation, gradients: Mapping[str, Tensor]) -> ParameterRows:
    """``G − g(x)`` by parameter name: what was sent minus what the batch x would send."""
    return {name: gradients[name].reshape(g.shape) - g for name, g in point.gradients().items()}


def row_misfits(
    point: Linearisation, gradients: Mapping[str, Tensor], weights: ParameterRows
) -> dict[str, float]:
    """Weighted rms residual of every parameter; about 1 when consistent."""
    gaps = residuals(point, gradients)
    return {n: float((gap * weights[n]).square().mean().sqrt()) for n, gap in gaps.items()}


def objective(misfits: Mapping[str, float], gradients: Mapping[str, Tensor]) -> float:
    """Σ of squared weighted residuals; infinite if any is not a number."""
    total = sum(m * m * gradients[name].numel() for name, m in misfits.items())
    return total if total == total else float("inf")
