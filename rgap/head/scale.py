"""The scale of the features under a head without a bias: every root of one scalar equation.

``G = k xᵀ`` fixes x = α u up to α, and the loss fixes α: ``α k(α) = G u``.  Different targets and
signs give different equations, each with up to two roots; all of them are found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log10

import torch
from torch import Tensor

from rgap.arithmetic.doubles import BLOCK, row_blocks
from rgap.limits import FOUND, ROOT, ROUNDED, SAFETY, SIGN
from rgap.network.chain import Stage
from rgap.precision import Estimate, Precision
from rgap.update.losses import Loss
from rgap.update.targets import BINARY, CROSS_ENTROPY

__all__ = ["ScaleEquation"]

BELOW, ABOVE = 1e-4, 1e7  # range of the scale α around its natural sizes, see ``_scales``
GRID = 215  # scales a decade
HALVINGS = 2200  # of a bracket: all exponents of float64, where a root is far below its upper end
UNSURE = 1e-2  # of a scale that may be its error
DRAWS, NUDGE = 4, 1e-6  # of relative errors of the logits, and their size


@dataclass(frozen=True)
class ScaleEquation:
    """``α k_j(α) = v_j`` of one sample at a head without a bias.

    Attributes:
        stage: the head.
        gradient: ∂L/∂W = k xᵀ, [m, n], float64.
        u: unit vector along the features, [n]: x = α u.
        v: G u, [m]: k = v/α.
        loss: the client's loss.
        precision: of the update.
    """

    stage: Stage
    gradient: Tensor
    u: Tensor
    v: Tensor
    loss: Loss
    precision: Precision

    def reproduced(self, alpha: float, target: Tensor) -> bool:
        """True if α k(α) is v in every row, within what rounding and noise explain."""
        u, v, stage, precision = self.u, self.v, self.stage, self.precision
        k = self.loss.cotangent(stage.affine.forward((alpha * u)[None]), target)[0]
        slack = ROUNDED * abs(alpha) * self._cotangent_rounding(alpha, target)
        slack = slack + ROUNDED * precision.floor * u.numel() ** 0.5
        # u turns with the noise too, and α k(α u) with u: bounded by the norm of all of the noise.
        slack = slack + SAFETY * self._added_noise().norm()
        relative = torch.maximum(ROUNDED * precision.unit * v.abs(), ROOT * v.norm())
        slack = torch.maximum(slack, relative)
        # α solves one entry: where two roots are near each other that one hardly fixes it.
        j = self._entry(target)
        ends = alpha * u.new_tensor([[1 + NUDGE], [1 - NUDGE]])
        z = stage.affine.forward(ends * u)
        high, low = ends * self.loss.cotangent(z, target.expand(2, *target.shape[1:]))
        slope = (high - low).abs() / (2 * NUDGE * abs(alpha))
        moved = min(float(slack[j] / slope[j].clamp_min(1e-300)), UNSURE * abs(alpha))
        return bool(((alpha * k - v).abs() <= slack + slope * moved).all())

    def _added_noise(self) -> Tensor:
        """Standard deviation of the noise added to each entry of the gradient, [m, n]."""
        return self.precision.noise_std(self.stage.affine.weight_name, self.stage.affine.weight)

    def sign_slack(self) -> Tensor:
        """Size up to which noise may have turned the sign of a row of v = G u, [m]."""
        out: Tensor = SIGN * (self._added_noise().square() @ self.u.square()).sqrt()
        return out

    def _cotangent_rounding(self, alpha: float, target: Tensor) -> Tensor:
        """Standard error [m] of the client's own k at the features α u.

        Its logits z round relatively, so p is off by unit·|z| of itself; p − y rounds to ``unit``
        in absolute terms where y is not 0: next to a softmax that is sure of itself the row of the
        label says little, the other rows still all.  What is behind the layer, a temperature say,
        may make the logits many times as large: k is therefore also looked at where each z is off
        by its own rounding.
        """
        z = self.stage.affine.forward((alpha * self.u)[None])
        k = self.loss.cotangent(z, target)[0]
        own = self.loss.rounding(z, target)[0]
        draw = torch.Generator().manual_seed(self.precision.seed)
        signs = torch.randint(0, 2, (DRAWS, z.shape[1]), generator=draw).to(z) * 2 - 1
        moved = [self.loss.cotangent(z * (1 + NUDGE * s), target)[0] - k for s in signs]
        turned = torch.stack(moved).square().mean(0).sqrt() / NUDGE
        near = torch.maximum(k.abs() * (1 + float(z.abs().max())), turned)
        return self.precision.unit * (near + own)

    def roots(self) -> list[tuple[float, Tensor]]:
        """Scales α and dense targets with α k_j(α) = v_j in one entry j of v."""
        pairs: list[tuple[float, Tensor]] = []
        slack = self.sign_slack()
        for sign in (1.0, -1.0):
            for target in _targets(self.loss, sign * self.v, slack):
                grid = self._scales(target)
                pairs += [(root, target) for root in _zeros(self._misfit(target), sign * grid)]
        return pairs

    def _scales(self, target: Tensor) -> Tensor:
        """Positive scales to look for roots at.

        α has two natural sizes: 1/‖W u‖, at which the logits are of order one, and |v_j / k_j(0)|,
        the root where they are small (weights of 0, or orthogonal to the features).
        """
        u, affine = self.u, self.stage.affine
        logits = float(affine.linear(u[None]).abs().max())
        rest = self.loss.cotangent(affine.forward(0.0 * u[None]), target)[0]
        sizes = [float(self.v.abs().max() / rest.abs().max().clamp_min(1e-300))]
        if logits > 1e-100 * float(affine.weight.abs().max()):
            sizes.append(1.0 / logits)
        low, high = log10(BELOW * min(sizes)), log10(ABOVE * max(sizes))
        return torch.logspace(low, high, int(GRID * (high - low)), dtype=u.dtype, device=u.device)

    def _misfit(self, target: Tensor) -> Callable[[Tensor], Tensor]:
        """α ↦ α k_j(α) − v_j for a vector of scales, j from ``_entry``."""
        j = self._entry(target)

        def equation(alpha: Tensor) -> Tensor:
            z = self.stage.affine.forward(alpha[:, None] * self.u)
            k = self.loss.cotangent(z, target.expand(len(z), -1))
            if self.loss.reduction == "mean":  # the scales are a batch; the client's was one
                k = k * len(z)
            return alpha * k[:, j] - self.v[j]

        return equation

    def _entry(self, target: Tensor) -> int:
        """Entry of v that fixes the scale: the largest one not rounded to absolute precision.

        In the row of the label the client's p − 1 cancels; the largest other row is p itself.
        """
        size = self.v.abs()
        if self.loss.name == CROSS_ENTROPY and self.loss.plain:
            size = size.masked_fill(target[0] > 0.5, 0.0)
        return int((size if bool((size > 0).any()) else self.v.abs()).argmax())

    def features(self, alpha: float, target: Tensor) -> tuple[Estimate, Estimate]:
        """X = αu and k = v/α with errors: of the gradient's entries, and of α through the loss."""
        u, v, gradient, precision = self.u, self.v, self.gradient, self.precision
        own = precision.noise_std(self.stage.affine.weight_name, gradient)
        std = (gradient.abs() * precision.unit + precision.floor).square() + own.square()
        vv = v.square().sum()
        du, dv = u.new_zeros(precision.samples, len(u)), v.new_zeros(precision.samples, len(v))
        for rows, block in row_blocks(std, std, BLOCK // precision.samples):  # du and dv share it
            noise = precision.normal(block.sqrt())
            du += torch.einsum("smn,m->sn", noise, v[rows]) / vv
            dv[:, rows] = noise @ u
        du = du - (du @ u)[:, None] * u
        # α from one entry: f(α) = α k_j(α) − v_j, so dα = (dv_j + α·rounding of k) / f'(α)
        j = self._entry(target)
        high, low = self._misfit(target)(alpha * u.new_tensor([1 + NUDGE, 1 - NUDGE]))
        derivative = float((high - low) / (2 * NUDGE * alpha))
        narrowed = FOUND * abs(alpha * derivative)  # what the search for α has left of f
        rounding = 2 * abs(alpha) * self._cotangent_rounding(alpha, target)[j] + narrowed
        rounding = precision.normal(rounding)
        dalpha = (dv[:, j] + rounding) / (derivative if derivative else 1e-300)
        dx = dalpha[:, None] * u + alpha * du
        dk = dv / alpha - dalpha[:, None] * v / alpha**2
        return Estimate((alpha * u)[None], dx[:, None]), Estimate((v / alpha)[None], dk[:, None])


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

    # One scale at a time rounds otherwise than many: next to a root a sign may be another.
    turns = [ends for ends in brackets if scalar(ends[0]) * scalar(ends[1]) < 0]
    near = [ends[0] for ends in brackets if ends not in turns]
    options = {"xtol": 1e-300, "rtol": FOUND, "maxiter": HALVINGS}
    return near + [float(brentq(scalar, *ends, **options)) for ends in turns]


def _changes(grid: Tensor, values: Tensor) -> list[tuple[float, float]]:
    where = torch.nonzero(values[:-1] * values[1:] < 0).flatten().tolist()
    return [(float(grid[i]), float(grid[i + 1])) for i in where]
