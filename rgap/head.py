"""Head equations at B = 1: features, cotangent and target of the last layer.

With a bias the features follow from the bias attack and the target from the loss.  Without one
``G = k xᵀ`` fixes x up to a factor α, and the loss fixes α: ``α k(α) = G u`` with x = α u.  Every
root and every admissible target is a candidate until an equation refutes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.optimize import brentq
from torch import Tensor

from rgap.activations import Activation
from rgap.bias import bias_attack, rank_one_residual
from rgap.losses import Loss
from rgap.network import Stage
from rgap.precision import Known, Precision

DECADES = (-7.0, 7.0)  # of the scale α, around the size at which the logits are of order one
GRID = 3000


@dataclass(frozen=True)
class HeadCandidate:
    """One solution of the head equations of a single sample.

    Attributes:
        features: input x of the last affine map, [1, n], with its errors.
        cotangent: k at its output, [1, m].
        target: dense target, [1, C] (before label smoothing).
        labels: the nearest admissible target.
        distance: of ``target`` from it (largest entry).
        tolerance: the distance that rounding and noise explain.
        misfit: relative residual of ``G − k xᵀ``.
        scale: α with x = α u for the leading right singular vector u of G; 0 with a bias.
    """

    features: Known
    cotangent: Known
    target: Tensor
    labels: Tensor
    distance: float
    tolerance: float
    misfit: float
    scale: float = 0.0

    @property
    def uncertainty(self) -> float:
        """Relative error of the features."""
        return float(
            self.features.error.norm()
            / len(self.features.error) ** 0.5
            / self.features.value.norm()
        )

    @property
    def admissible(self) -> bool:
        """True if the target is one that the loss allows, within the precision of the update."""
        return self.distance <= self.tolerance


@dataclass(frozen=True)
class HeadFailure:
    """Why the head equations have no answer; ``consistent`` is False when they contradict."""

    reason: str
    consistent: bool


def solve_head(
    stage: Stage,
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    loss: Loss,
    precision: Precision,
) -> list[HeadCandidate] | HeadFailure:
    """All solutions of the head equations for one sample.

    Args:
        stage: the last stage, fully connected.
        weight_gradient: ∂L/∂W, [m, n], float64.
        bias_gradient: ∂L/∂b, [m], or None for a head without a bias.
        loss: the client's loss.
        precision: of the update.

    Returns:
        Candidates, best first, or a :class:`HeadFailure`.
    """
    if bias_gradient is not None:
        return _with_bias(stage, weight_gradient, bias_gradient, loss, precision)
    return _without_bias(stage, weight_gradient, loss, precision)


def features_from_bias(
    weight_gradient: Tensor, bias_gradient: Tensor, precision: Precision
) -> tuple[Known, Known]:
    """Input x and cotangent k of a fully connected stage with a bias, with their errors.

    ∂b is k itself, as the client used it, so without noise it carries no error of its own.
    """
    k = bias_gradient
    x = bias_attack(weight_gradient, k)
    noise_k = precision.normal(torch.full_like(k, precision.noise))
    # dx = (δG − k-error·xᵀ)ᵀ k / ‖k‖², up to second order
    std = (weight_gradient.abs() * precision.unit + precision.floor).square()
    noise_g = precision.normal((std + precision.noise**2).sqrt())
    scaled = k / k.square().sum()
    dx = torch.einsum("smn,m->sn", noise_g, scaled) - (noise_k @ scaled)[:, None] * x
    return Known(x[None], dx[:, None]), Known(k[None], noise_k[:, None])


def _with_bias(
    stage: Stage, gradient: Tensor, bias_gradient: Tensor, loss: Loss, precision: Precision
) -> list[HeadCandidate] | HeadFailure:
    if not bool((bias_gradient != 0).any()):
        return HeadFailure(
            f"the bias gradient of '{stage.name}' is zero: the loss was already minimal, or it "
            "underflowed; nothing about the features was sent",
            consistent=not bool((gradient != 0).any()),
        )
    x, k = features_from_bias(gradient, bias_gradient, precision)
    return [_candidate(stage, gradient, x, k, loss, precision)]


def _candidate(
    stage: Stage, gradient: Tensor, x: Known, k: Known, loss: Loss, precision: Precision
) -> HeadCandidate:
    target, spread = target_of(stage, x, k, loss, precision)
    labels, distance = loss.read(target)
    misfit = rank_one_residual(gradient, x.value[0], k.value[0])
    return HeadCandidate(x, k, target, labels, float(distance), spread, misfit)


def target_of(
    stage: Stage, x: Known, k: Known, loss: Loss, precision: Precision
) -> tuple[Tensor, float]:
    """Dense target [1, C] that explains k at the recovered features, and its tolerance."""
    z = stage.affine.forward(x.value)
    outputs, slopes = _tail(stage, z)
    target = loss.targets_from(outputs, k.value / slopes)
    # The client's softmax rounds in absolute terms (p − 1), its logits relatively.
    dz = torch.stack([stage.affine.linear(e) for e in x.error])
    scale = float(
        loss.targets_from(outputs, torch.ones_like(k.value))
        .sub(loss.targets_from(outputs, torch.zeros_like(k.value)))
        .abs()
        .max()
    )
    own = float(k.error.abs().max()) * scale / float(slopes.abs().min().clamp_min(1e-300))
    width = float(dz.abs().max()) + float(z.abs().max()) * precision.unit * 16
    tolerance = 30 * (own + width + 16 * precision.unit * max(1.0, scale * precision.unit))
    return target, min(tolerance, 0.05)


def _tail(stage: Stage, z: Tensor) -> tuple[Tensor, Tensor]:
    """Network output and dφ/dz of an element-wise tail on the head (ones without a tail)."""
    slopes = torch.ones_like(z)
    for op in stage.tail:
        if isinstance(op, Activation):
            slopes = slopes * op.derivative(z)
        z = op.forward(z)
    return z, slopes.reshape(z.shape)


def _without_bias(
    stage: Stage, gradient: Tensor, loss: Loss, precision: Precision
) -> list[HeadCandidate] | HeadFailure:
    if not bool((gradient != 0).any()):
        return HeadFailure(f"the gradient of '{stage.name}' is zero", consistent=True)
    if loss.targets != "index":
        return HeadFailure(
            f"'{stage.name}' has no bias and its target is continuous: features and target share "
            "a free scale; 1 equation is missing",
            consistent=True,
        )
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    u, v = right[0], left[:, 0] * values[0]
    found = []
    for alpha, target in _roots(stage, u, v, loss):
        outputs, slopes = _tail(stage, stage.affine.forward((alpha * u)[None]))
        k = loss.cotangent(outputs, target) * slopes
        miss = float((alpha * k[0] - v).norm() / v.norm())
        explained = 100 * (precision.unit * abs(alpha) / float(v.norm()) + precision.unit)
        explained += 10 * precision.noise * max(1.0, gradient.numel() ** 0.5) / float(values[0])
        if miss <= min(max(explained, 1e-9), 0.05):
            x, cot = _scaled(stage, gradient, u, v, alpha, target, loss, precision)
            candidate = _candidate(stage, gradient, x, cot, loss, precision)
            found.append(replace(candidate, scale=alpha))
    if not found:
        return HeadFailure(
            f"no scale and no target of {loss.name} reproduce the gradient of '{stage.name}'",
            consistent=False,
        )
    return sorted(found, key=lambda candidate: candidate.uncertainty)


def _scaled(
    stage: Stage,
    gradient: Tensor,
    u: Tensor,
    v: Tensor,
    alpha: float,
    target: Tensor,
    loss: Loss,
    precision: Precision,
) -> tuple[Known, Known]:
    """X = αu and k = v/α with errors: of the gradient's entries, and of α through the loss."""
    std = (gradient.abs() * precision.unit + precision.floor).square() + precision.noise**2
    noise = precision.normal(std.sqrt())
    vv = v.square().sum()
    du = torch.einsum("smn,m->sn", noise, v) / vv
    du = du - (du @ u)[:, None] * u
    dv = noise @ u
    # α from the largest entry: f(α) = α k_j(α) − v_j, so dα = (dv_j + α·rounding of k) / f'(α)
    j = int(v.abs().argmax())
    equation = _scale_equation(stage, u, v, loss, target)
    ends = alpha * torch.tensor([1 + 1e-6, 1 - 1e-6], dtype=torch.float64)
    high, low = equation(ends)
    derivative = float((high - low) / (2e-6 * alpha))
    rounding = precision.normal(torch.tensor(2 * precision.unit * abs(alpha)).double())
    dalpha = (dv[:, j] + rounding) / (derivative if derivative else 1e-300)
    dx = dalpha[:, None] * u + alpha * du
    dk = dv / alpha - dalpha[:, None] * v / alpha**2
    return Known((alpha * u)[None], dx[:, None]), Known((v / alpha)[None], dk[:, None])


def _roots(stage: Stage, u: Tensor, v: Tensor, loss: Loss) -> list[tuple[float, Tensor]]:
    """Scales α and dense targets with α k_j(α) = v_j in the largest entry j of v."""
    logits = stage.affine.linear(u[None]).abs().max()
    unit = 1.0 / float(logits.clamp_min(1e-30))
    grid = unit * torch.logspace(*DECADES, GRID, dtype=torch.float64)
    found: list[tuple[float, Tensor]] = []
    for sign in (1.0, -1.0):
        for target in _targets(loss, sign * v):
            equation = _scale_equation(stage, u, v, loss, target)
            found += [(root, target) for root in _zeros(equation, sign * grid)]
    return found


def _scale_equation(
    stage: Stage, u: Tensor, v: Tensor, loss: Loss, target: Tensor
) -> Callable[[Tensor], Tensor]:
    """α ↦ α k_j(α) − v_j for a vector of scales, j the largest entry of v."""
    j = int(v.abs().argmax())

    def equation(alpha: Tensor) -> Tensor:
        outputs, slopes = _tail(stage, stage.affine.forward(alpha[:, None] * u))
        k = loss.cotangent(outputs, target.expand_as(outputs)) * slopes
        if loss.reduction == "mean":  # the scales are a batch here; the client's batch was one
            k = k * outputs.shape[0]
        return alpha * k[:, j] - v[j]

    return equation


def _targets(loss: Loss, v: Tensor) -> list[Tensor]:
    """Dense one-hot or 0–1 targets whose cotangent can have the signs of v."""
    classes = v.numel()
    outputs = torch.zeros(1, classes, dtype=torch.float64)
    if loss.name == "binary_cross_entropy_with_logits":
        return [(v < 0).double()[None]]
    if loss.label_smoothing == 0 and classes > 2:
        negative = torch.nonzero(v < 0).flatten()
        choices = negative.tolist() if len(negative) == 1 else []
    else:
        choices = list(range(classes))
    return [loss.dense(torch.tensor([c]), outputs) for c in choices]


def _zeros(function: Callable[[Tensor], Tensor], grid: Tensor) -> list[float]:
    """Roots of a function along a grid: sign changes, and pairs hidden at a local extremum."""
    values = function(grid)
    brackets = _changes(grid, values)
    size = values.abs()
    dips = torch.nonzero(
        (size[1:-1] < size[:-2])
        & (size[1:-1] < size[2:])
        & (values[1:-1] * values[:-2] > 0)
        & (values[1:-1] * values[2:] > 0)
    ).flatten()
    for i in dips.tolist():
        fine = torch.linspace(float(grid[i]), float(grid[i + 2]), 2001, dtype=torch.float64)
        brackets += _changes(fine, function(fine))

    def scalar(alpha: float) -> float:
        return float(function(torch.tensor([alpha], dtype=torch.float64)))

    return [float(brentq(scalar, *ends, xtol=1e-300, rtol=1e-15)) for ends in brackets]


def _changes(grid: Tensor, values: Tensor) -> list[tuple[float, float]]:
    where = torch.nonzero(values[:-1] * values[1:] < 0).flatten().tolist()
    return [(float(grid[i]), float(grid[i + 1])) for i in where]
