"""Head equations at B = 1: features, cotangent and target of the last layer.

With a bias the features follow from the bias attack and the target from the loss.  Without one
``G = k xᵀ`` fixes x up to a factor α, and the loss fixes α: ``α k(α) = G u`` with x = α u.  Every
root and every admissible target is a candidate until an equation refutes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from rgap.arithmetic.doubles import row_blocks
from rgap.head.bias_attack import bias_attack, rank_one_residual
from rgap.head.scale import ScaleEquation
from rgap.head.target import Reading, read_target
from rgap.limits import DROWNED, ROUNDED, SCATTER
from rgap.network.chain import Stage
from rgap.precision import UNKNOWN, Estimate, Named, Precision
from rgap.update.losses import Loss
from rgap.update.targets import BINARY


@dataclass(frozen=True)
class HeadCandidate:
    """One solution of the head equations of a single sample.

    Attributes:
        features: input x of the last affine map, [1, n], with its errors.
        cotangent: k at its output, [1, m].
        reading: the target that k says of itself, and how certain it is.
        misfit: relative residual of ``G − k xᵀ``.
        scale: α with x = α u for the leading right singular vector u of G; 0 with a bias.
    """

    features: Estimate
    cotangent: Estimate
    reading: Reading
    misfit: float
    scale: float = 0.0

    @property
    def labels(self) -> Tensor:
        """The nearest admissible target."""
        return self.reading.labels

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
        return self.reading.fits


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
    layer: Named, weight_gradient: Tensor, bias_gradient: Tensor, precision: Precision
) -> tuple[Estimate, Estimate]:
    """Input x and cotangent k of a fully connected stage with a bias, with their errors.

    ∂b is k itself, as the client used it, so without noise it carries no error of its own.  With
    noise e in ∂b, ``Gᵀ∂b / ‖∂b‖²`` is too small on average by what e adds to ‖∂b‖²: its expectation
    Σσ² is taken out.  Where that is most of ‖∂b‖², nothing is known of x.
    """
    k = bias_gradient
    std_k = precision.noise_std(layer.bias_name or "", k)
    met = torch.where(k == 0, 0.0, std_k / k.norm())  # what rounded to 0 added nothing
    own = 1.0 - float(met.square().sum())  # share of ‖∂b‖² that is not noise
    x = bias_attack(weight_gradient, k) / max(own, DROWNED)
    noise_k = precision.normal(std_k)
    # dx = (δG − k-error·xᵀ)ᵀ k / (‖k‖² − Σσ²), up to second order.  The entries of δG are
    # independent, so δGᵀk is again normal, and independent from column to column: no δG is drawn.
    size = k.abs().max()
    scaled = k / size  # ‖∂b‖² underflows long before ∂b does
    scaled = scaled / scaled.square().sum() / size / max(own, DROWNED)
    top = scaled.abs().max()
    variance = torch.zeros_like(x)
    for rows, block in row_blocks(weight_gradient, k):
        std = block.abs() * precision.unit + precision.floor
        added = precision.noise_std(layer.weight_name, block, rows)
        variance += (scaled[rows] / top).square() @ (std.square() + added.square())
    dx = precision.normal(variance.sqrt() * top) - (noise_k @ scaled)[:, None] * x
    # The sums above round in float64: with many rows that is more than what is left of theirs.
    dx = dx + precision.normal(x.abs() * torch.finfo(torch.float64).eps)
    dx = dx.nan_to_num(UNKNOWN).clamp(-UNKNOWN, UNKNOWN)
    if own <= DROWNED:
        dx = torch.full_like(dx, UNKNOWN)
    return Estimate(x[None], dx[:, None]), Estimate(k[None], noise_k[:, None])


def rank_one_tolerance(
    layer: Named, weight_gradient: Tensor, bias_gradient: Tensor, x: Estimate, precision: Precision
) -> float:
    """Relative residual ‖G − k xᵀ‖/‖G‖ of one sample that rounding and noise explain.

    The residual is ``(I − P_k)G``: all of the noise E of G but one row's worth, and the noise e of
    k = ∂b times x.  Its square is expected at ``Σσ_E² + ‖x‖² Σσ_e²``; independent entries scatter
    about that by ``√(2Σσ⁴)``, of which ``SCATTER/√2`` are allowed.  Above 1 no residual is
    refused: the noise is as large as the gradient, and the test says nothing.
    """
    if not bool(x.known.all()):
        return inf  # the bias gradient is noise: nothing was read off it that could be tested
    added = precision.noise_std(layer.bias_name or "", bias_gradient.to(x.value)).square()
    square = total = scatter = 0.0
    for rows, block in row_blocks(weight_gradient, x.value):
        own = precision.noise_std(layer.weight_name, block, rows).square()
        square += float(block.square().sum())
        total, scatter = total + float(own.sum()), scatter + float(own.square().sum())
    if bool((added > 0).any()):
        # ‖x‖ = ‖G‖/‖k‖, and of ∂b no more than this is k; what was read off it may be shorter.
        heard = float(bias_gradient.to(x.value).square().sum() - added.sum())
        if heard <= 0.0:
            return inf
        lengthened = max(float(x.value.square().sum()), square / heard)
        total += lengthened * float(added.sum())
        scatter += lengthened**2 * float(added.square().sum())
    size = max(square**0.5, 1e-300)
    floor = precision.floor * weight_gradient.numel() ** 0.5
    rounding = ROUNDED * (precision.unit + floor / size)
    return float(rounding + (total + SCATTER * scatter**0.5) ** 0.5 / size)


def _with_bias(
    stage: Stage, gradient: Tensor, bias_gradient: Tensor, loss: Loss, precision: Precision
) -> list[HeadCandidate] | HeadFailure:
    if not bool((bias_gradient != 0).any()):
        if bool(precision.noise_std(stage.affine.bias_name or "", bias_gradient).any()):
            return _without_bias(stage, gradient, loss, precision)  # all of it lost in noise
        return HeadFailure(
            f"the bias gradient of '{stage.name}' is zero: the loss was already minimal, or it "
            "underflowed; nothing about the features was sent",
            consistent=not bool((gradient != 0).any()),
        )
    x, k = features_from_bias(stage.affine, gradient, bias_gradient, precision)
    return [_candidate(stage, gradient, x, k, loss, precision)]


def _candidate(
    stage: Stage, gradient: Tensor, x: Estimate, k: Estimate, loss: Loss, precision: Precision
) -> HeadCandidate:
    misfit = rank_one_residual(gradient, x.value[0], k.value[0])
    return HeadCandidate(x, k, read_target(stage, x, k, loss, precision), misfit)


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
    # Entry by entry to full relative precision, unlike singular vectors: what was off is 0.
    table = gradient / gradient.abs().max()  # whose squares do not underflow
    u = table.T @ (table @ torch.linalg.svd(table, full_matrices=False).Vh[0])
    u = u / u.norm()
    v = gradient @ u
    equation = ScaleEquation(stage, gradient, u, v, loss, precision)
    candidates = []
    for alpha, target in equation.roots():
        if equation.reproduced(alpha, target):
            x, cot = equation.features(alpha, target)
            candidate = _candidate(stage, gradient, x, cot, loss, precision)
            candidates.append(replace(candidate, scale=alpha))
    if not candidates:
        gone = int((gradient == 0).all(1).sum())
        lost = f": {gone} of its {len(v)} rows underflowed to 0 and tell neither" if gone else ""
        if not gone and loss.name == BINARY:  # each row's sign is a label
            gone = int((v.abs() <= equation.sign_slack()).sum())
            lost = f": noise leaves the sign of {gone} of its {len(v)} rows open" if gone else ""
        return HeadFailure(
            f"no size of the features and no target of {loss.name} reproduce the gradient of "
            f"'{stage.name}'{lost}",
            consistent=gone > 0,
        )
    return sorted(candidates, key=lambda candidate: candidate.uncertainty)
