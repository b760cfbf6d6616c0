"""The scale of the features under a head without a bias: every root of one scalar equation.

``G = k xᵀ`` fixes x = α u up to α, and the loss fixes α: ``α k(α) = G u``.  Different targets and
signs give different equations, each with up to two roots; all of them are found.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log10

import torch
from torch import Tensor

from rgap.limits import ROOT, ROUNDED, SAFETY, SIGN
from rgap.network.chain import Stage
from rgap.precision import Precision
from rgap.update.losses import Loss
from rgap.update.targets import BINARY, CROSS_ENTROPY

__all__ = ["cotangent_rounding", "entry", "reproduced", "roots", "scale_equation", "sign_slack"]

BELOW, ABOVE = 1e-4, 1e7  # range of the scale α around its natural sizes, see ``_scales``
GRID = 215  # scales a decade
UNSURE = 1e-2  # of a scale that may be its error
DRAWS, NUDGE = 4, 1e-6  # of relative errors of the logits, and their size


def reproduced(
    stage: Stage,
    u: Tensor,
    v: Tensor,
    alpha: float,
    target: Tensor,
    loss: Loss,
    precision: Precision,
) -> bool:
    """True if α k(α) is v in every row, within what rounding and noise explain."""
    k = loss.cotangent(stage.affine.forward((alpha * u)[None]), target)[0]
    slack = ROUNDED * abs(alpha) * cotangent_rounding(stage, alpha * u, target, loss, precision)
    slack = slack + ROUNDED * precision.floor * u.numel() ** 0.5
    # u turns with the noise too, and α k(α u) with u: bounded by the norm of all of the noise.
    slack = slack + SAFETY * added_noise(stage, precision).norm()
    relative = torch.maximum(ROUNDED * precision.unit * v.abs(), ROOT * v.norm())
    slack = torch.maximum(slack, relative)
    # α solves one entry: where two roots are near each other that one hardly fixes it.
    j = entry(v, loss, target)
    ends = alpha * u.new_tensor([[1 + NUDGE], [1 - NUDGE]])
    z = stage.affine.forward(ends * u)
    high, low = ends * loss.cotangent(z, target.expand(2, *target.shape[1:]))
    slope = (high - low).abs() / (2 * NUDGE * abs(alpha))
    moved = min(float(slack[j] / slope[j].clamp_min(1e-300)), UNSURE * abs(alpha))
    return bool(((alpha * k - v).abs() <= slack + slope * moved).all())


def added_noise(stage: Stage, precision: Precision) -> Tensor:
    """Standard deviation of the noise added to each entry of the stage's gradient, [m, n]."""
    return precision.noise_std(stage.affine.weight_name, stage.affine.weight)


def sign_slack(stage: Stage, u: Tensor, precision: Precision) -> Tensor:
    """Size up to which noise may have turned the sign of a row of v = G u, [m]."""
    out: Tensor = SIGN * (added_noise(stage, precision).square() @ u.square()).sqrt()
    return out


def cotangent_rounding(
    stage: Stage, x: Tensor, target: Tensor, loss: Loss, precision: Precision
) -> Tensor:
    """Standard error [m] of the client's own k at features x [n].

    Its logits z round relatively, so p is off by unit·|z| of itself; p − y rounds to ``unit`` in
    absolute terms where y is not 0: next to a softmax that is sure of itself the row of the label
    says little, the other rows still all.  What is behind the layer, a temperature say, may make
    the logits many times as large: k is therefore also looked at where each z is off by its own
    rounding.
    """
    z = stage.affine.forward(x[None])
    k = loss.cotangent(z, target)[0]
    own = loss.rounding(z, target)[0]
    draw = torch.Generator().manual_seed(precision.seed)
    signs = torch.randint(0, 2, (DRAWS, z.shape[1]), generator=draw).to(z) * 2 - 1
    moved = [loss.cotangent(z * (1 + NUDGE * s), target)[0] - k for s in signs]
    turned = torch.stack(moved).square().mean(0).sqrt() / NUDGE
    return precision.unit * (torch.maximum(k.abs() * (1 + float(z.abs().max())), turned) + own)


def roots(
    stage: Stage, u: Tensor, v: Tensor, loss: Loss, precision: Precision
) -> list[tuple[float, Tensor]]:
    """Scales α and dense targets with α k_j(α) = v_j in one entry j of v."""
    pairs: list[tuple[float, Tensor]] = []
    slack = sign_slack(stage, u, precision)
    for sign in (1.0, -1.0):
        for target in _targets(loss, sign * v, slack):
            equation = scale_equation(stage, u, v, loss, target)
            grid = _scales(stage, u, v, loss, target)
            pairs += [(root, target) for root in _zeros(equation, sign * grid)]
    return pairs


def _scales(stage: Stage, u: Tensor, v: Tensor, loss: Loss, target: Tensor) -> Tensor:
    """Positive scales to look for roots at.

    α has two natural sizes: 1/‖W u‖, at which the logits are of order one, and |v_j / k_j(0)|,
    the root where they are small (weights of 0, or orthogonal to the features).
    """
    logits = float(stage.affine.linear(u[None]).abs().max())
    rest = loss.cotangent(stage.affine.forward(0.0 * u[None]), target)[0]
    sizes = [float(v.abs().max() / rest.abs().max().clamp_min(1e-300))]
    if logits > 1e-100 * float(stage.affine.weight.abs().max()):
        sizes.append(1.0 / logits)
    low, high = log10(BELOW * min(sizes)), log10(ABOVE * max(sizes))
    return torch.logspace(low, high, int(GRID * (high - low)), dtype=u.dtype, device=u.device)


def scale_equation(
    stage: Stage, u: Tensor, v: Tensor, loss: Loss, target: Tensor
) -> Callable[[Tensor], Tensor]:
    """α ↦ α k_j(α) − v_j for a vector of scales, j from ``entry``."""
    j = entry(v, loss, target)

    def equation(alpha: Tensor) -> Tensor:
        z = stage.affine.forward(alpha[:, None] * u)
        k = loss.cotangent(z, target.expand(len(z), -1))
        if loss.reduction == "mean":  # the scales are a batch here; the client's batch was one
            k = k * len(z)
        return alpha * k[:, j] - v[j]

    return equation


def entry(v: Tensor, loss: Loss, target: Tensor) -> int:
    """Entry of v that fixes the scale: the largest one that is not rounded to absolute precision.

    In the row of the label the client's p − 1 cancels; the largest other row is p itself.
    """
    size = v.abs()
    if loss.name == CROSS_ENTROPY and loss.plain:
        size = size.masked_fill(target[0] > 0.5, 0.0)
    return int((size if bool((size > 0).any()) else v.abs()).argmax())


def _targets(loss: Loss, v: Tensor, slack: Tensor) -> list[Tensor]:
    """Dense one-hot or 0–1 targets whose cotangent can have the signs of v, give or take noise."""
    classes = v.numel()
    outputs = v.new_zeros(1, classes)
    if not loss.plain:  # the steps behind the head may turn any sign
        options = loss.admissible(loss.outputs(classes)) or []
        return [loss.dense(torch.tensor([c], device=v.device), outputs) for c in options]
    if loss.name == BINARY:
        return [(v < 0).double()[None]]
    if loss.label_smoothing == 0 and classes > 2:
        # Only the label's row is negative, as large as all others together; where p = 1 in the
        # client's precision it is 0.
        rows = torch.arange(classes, device=v.device)
        least = torch.nonzero(v == v.min()).flatten()
        fits = [c for c in least if float(v[c]) <= 0 and bool((v >= -slack)[rows != c].all())]
        choices = [int(c) for c in fits]
    else:
        choices = list(range(classes))
    return [loss.dense(torch.tensor([c], device=v.device), outputs) for c in choices]


def _zeros(function: Callable[[Tensor], Tensor], grid: Tensor) -> list[float]:
    """Roots of a function along a grid: sign changes, and pairs hidden at a local extremum."""
    from scipy.optimize import brentq  # most of a second; heads with a bias never get here

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
        fine = torch.linspace(
            float(grid[i]), float(grid[i + 2]), 2001, dtype=grid.dtype, device=grid.device
        )
        brackets += _changes(fine, function(fine))

    def scalar(alpha: float) -> float:
        return float(function(grid.new_tensor([alpha])))

    return [float(brentq(scalar, *ends, xtol=1e-300, rtol=1e-15)) for ends in brackets]


def _changes(grid: Tensor, values: Tensor) -> list[tuple[float, float]]:
    where = torch.nonzero(values[:-1] * values[1:] < 0).flatten().tolist()
    return [(float(grid[i]), float(grid[i + 1])) for i in where]
