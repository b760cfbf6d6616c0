"""The way down through steps that have no weights: activations, shapes, pools, scalings.

``z = φ^{-1}(x)`` and ``k ⊙ φ'(z)``, each with an ensemble of its errors; a step without an inverse
ends the way, or is handed to whoever may open it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from rgap.halt import Halt, HaltKind
from rgap.jacobian.layer import each
from rgap.limits import ON
from rgap.network.activations import Activation
from rgap.network.affine import Affine
from rgap.network.chain import Stage
from rgap.network.pooling import LinearMap, Pool
from rgap.network.reshape import Op
from rgap.precision import UNKNOWN, Estimate, Precision

__all__ = ["Unpool", "down", "lift", "through"]

Unpool = Callable[[int, Op, Estimate, Estimate], tuple[Estimate, Estimate] | None]


def lift(
    stage: Stage, u: Estimate, k: Estimate, precision: Precision, unpool: Unpool | None = None
) -> tuple[Estimate, Estimate] | Halt:
    """From the affine map's input u to the stage's input x, through the lead; k alike."""

    def passed(op: Op, u: Estimate, k: Estimate) -> tuple[Estimate, Estimate] | None:
        return None if unpool is None else unpool(stage.index, op, u, k)

    return through(stage.lead, u, k, precision, passed)


def through(
    ops: tuple[Op, ...],
    x: Estimate,
    k: Estimate,
    precision: Precision,
    passed: Callable[[Op, Estimate, Estimate], tuple[Estimate, Estimate] | None] | None = None,
    on: Tensor | None = None,
) -> tuple[Estimate, Estimate] | Halt:
    """Back through some steps, from their output and its cotangent to their input and its own.

    Args:
        ops: the steps, in forward order: a lead, or a tail.
        x: their output, [B, ...].
        k: the cotangent at it.
        precision: of the update.
        passed: asked at a step that has no inverse.
        on: units of rectifiers that are on whatever the errors of their values, as bool.
    """
    for op in reversed(ops):
        taken, given = prod(op.in_shape), prod(op.out_shape)
        if op.barrier is not None:
            both = None if passed is None else passed(op, x, k)
            if both is None:
                return _no_inverse(op)
            x, k = both
        elif taken > given:
            return Halt.narrowing(op.name, op.kind, x.value.shape[0], taken, given)
        elif isinstance(op, Activation):  # in a lead: of the data, or above a pooling
            x, k = _invert_activation(op, x, k, precision, on)
        else:
            value = op.inverse(x.value)
            x = Estimate(value, each(op.inverse_linear, x.error + _summed(op, value, precision)))
            k = Estimate(op.adjoint(k.value), each(op.adjoint, k.error))
    return x, k


def _summed(op: Op, x: Tensor, precision: Precision) -> Tensor | float:
    """Samples of the error that the client's sum left in the output of an affine step."""
    squares = op.terms(x)
    return 0.0 if squares is None else precision.normal(precision.sum_std(squares))


def _invert_activation(
    op: Activation, x: Estimate, k: Estimate, precision: Precision, on: Tensor | None = None
) -> tuple[Estimate, Estimate]:
    """The pre-activation φ^{-1}(x) and k ⊙ φ'(z), with the errors of both.

    A unit whose side of a kink the error leaves open shows up in the ensemble: its slope is taken
    at each perturbed value.  One-sided units (ReLU at 0) carry no equation: their z gets an
    infinite error, hence weight 0, and their k is 0.
    """
    known = x.known
    if not bool(known.all()):  # of entries that nothing read: any value will do, none is known
        value = torch.where(known, x.value, op.forward(torch.zeros_like(x.value)))
        z, below = _invert_activation(
            op, Estimate(value, torch.where(known, x.error, 0.0)), k, precision, on
        )
        error = torch.where(known, z.error, x.error)
        return Estimate(torch.where(known, z.value, 0.0), error), below
    # The client's own φ rounded its result, so even an exact x fixes z only to that precision.
    error = x.error + precision.rounding(x.value)
    value = x.value
    if op.one_sided:
        std = error.square().mean(0).sqrt()
        active = value > ON * std
        active = active if on is None else active | on
        zero = torch.zeros_like(value)
        z = Estimate(
            torch.where(active, value, zero),
            torch.where(active, error, torch.full_like(error, UNKNOWN)),
        )
        mask = active.to(value)
        return z, Estimate(k.value * mask, k.error * mask)
    slope = op.slope(value)
    bend = _bend(op, value, error, slope)
    off = (error / slope.clamp_min(1e-300)).clamp(-UNKNOWN, UNKNOWN)
    if not op.homogeneous:  # within its error of an asymptote a value is that of any z beyond
        off = torch.where(slope <= ON * bend.square().mean(0).sqrt(), UNKNOWN, off)
    z = Estimate(op.inverse(value), off)
    product = k.value * slope
    spread = k.error * slope + k.value * bend + precision.rounding(product)
    return z, Estimate(product, spread)


def _bend(op: Activation, value: Tensor, error: Tensor, slope: Tensor) -> Tensor:
    """Samples of the error of φ'(z) that those of the output make, [S, *value.shape].

    The slope at each perturbed value, which alone shows a kink near it; or the tangent of the
    slope where that says more, as for values beyond an asymptote, which are all taken to be on it.
    """
    moved = op.slope(value + error) - slope
    tangent = op.slope_derivative(value) * error
    return torch.where(tangent.abs() > moved.abs(), tangent, moved)


def down(affine: Affine, k: Estimate, precision: Precision) -> Estimate:
    """The cotangent at the input of an affine map, ``Wᵀ k``, with its errors."""
    # The terms of the client's sum rounded, however small a result they cancel to.
    rounded = precision.normal(precision.sum_std(affine.adjoint_of_squares(k.value.square())))
    return Estimate(affine.adjoint(k.value), each(affine.adjoint, k.error) + rounded)


def _no_inverse(op: Op) -> Halt:
    """The halt at a step that has a barrier, by what kind of step it is."""
    kind = HaltKind.STEP
    if isinstance(op, Pool):
        kind = HaltKind.POOL
    elif isinstance(op, LinearMap):
        kind = HaltKind.AVERAGE
    elif isinstance(op, Activation):
        kind = HaltKind.ACTIVATION
    assert op.barrier is not None
    return Halt(kind, op.name, op.barrier)
