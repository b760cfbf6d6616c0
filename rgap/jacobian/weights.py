"""The equations of the whole update weighed: one over the standard error of every row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

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
    squares = _update_std(point, precision)
    variance = {name: pooled(s.square()[None])[0] for name, s in squares.items()}
    drawn = list(others)
    count = min(8, len(kappa.error))
    # The rows of convolutions are formed: one member's at a time.
    step = 1 if any(node.stage.affine.geometry for node in point.nodes) else max(count, 1)
    # Each with a draw of its own: one unit's rounding is a factor on all of its row, and of a
    # single draw that is by chance near 0 every residual is many times too long.
    drawing = replace(precision, samples=step, seed=precision.seed + 2)
    for members in torch.split(kappa.error[:count], step):
        for name, power in point.power(None, members, inject=drawing).items():
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
    squares = point.squares(precision)
    return {name: precision.update_std(name, s, totals.get(name)) for name, s in squares.items()}


def update_noise(point: Linearisation, kappa: Estimate, precision: Precision) -> ParameterRows:
    """Samples of the update's error: rounding of the whole computation, and the stated noise."""
    carried = point.jvp(None, kappa.error, inject=precision)
    own = {n: precision.normal(s) for n, s in _update_std(point, precision).items()}
    return {name: own[name] + carried[name] for name in own}


SHARES = (1.0, 0.5, 0.25)  # of a Gauss–Newton step, tried in turn


@dataclass(frozen=True)
class Fit:
    """An update linearised beside the one that was sent.

    Attributes:
        point: the network there.
        gradients: what was sent.
        weights: 1/σ of its rows.
        free: the cotangents of the head are unknowns too.
    """

    point: Linearisation
    gradients: Mapping[str, Tensor]
    weights: ParameterRows
    free: bool = False

    @cached_property
    def misfits(self) -> dict[str, float]:
        """Weighted rms residual of every parameter; about 1 when consistent."""
        weighed = {n: r * self.weights[n] for n, r in self.left.items()}
        return {n: float(r.square().mean().sqrt()) for n, r in weighed.items()}

    @property
    def misfit(self) -> float:
        """The largest of them."""
        return max(self.misfits.values())

    @property
    def objective(self) -> float:
        """Σ of squared weighted residuals, what a step has to lower; infinite if any is NaN."""
        total = sum(m * m * self.gradients[name].numel() for name, m in self.misfits.items())
        return total if total == total else float("inf")

    @property
    def left(self) -> ParameterRows:
        """What was sent minus what x would send, by parameter name, [1, *parameter.shape]."""
        rows = self.point.gradients()
        return {n: (self.gradients[n].reshape(g.shape) - g)[None] for n, g in rows.items()}

    def shortened(self, dx: Tensor, dkappa: Tensor | None) -> tuple[Self, float]:
        """After a step [1, ...], halved until it lowers the objective; and the share taken.

        A unit whose sign changes on the way bends the objective: the whole step can rise where its
        first half descends.  Free cotangents take the step that goes with it.
        """
        for share in SHARES:
            kappa = None if dkappa is None else self.point.kappa + share * dkappa[0]
            trial = replace(self, point=self.point.moved(self.point.x + share * dx[0], kappa))
            if trial.objective < self.objective:
                return trial, share
        return self, 0.0
