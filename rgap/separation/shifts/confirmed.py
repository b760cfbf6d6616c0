"""Is a mask what the steps above a convolution let through?  Its gradient and its weights say.

With the mask the cotangent K is known, and ``G = K ⋆ X`` is a least-squares problem for the input
X.  Three things may then contradict: equations beyond the unknowns that are not met, an input
below 0 where a rectifier gives it, and a unit that X, forward through the layer, turns the other
way.  The first says nothing without enough such equations; the last only of units whose distance
from the kink is above its own error, in the scale of the step that has the kink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from rgap.constraints import gradient_constraint, gradient_rows, weight_constraint
from rgap.limits import FALSELY, FITS, OWN, SAFETY, SURPLUS, SURPLUS_SHARE, TOLD
from rgap.network.affine import Affine
from rgap.precision import Estimate, smoothed
from rgap.solvers.tall import tall_qr

__all__ = ["Solved", "Through", "confirmed", "short_of"]

MEMBERS = 4  # draws of an error that is smoothed over all entries
RESOLVED = 1e-7  # of the largest singular value: what a Gram matrix tells from 0


@dataclass(frozen=True)
class Through:
    """The steps above a convolution.

    Attributes:
        nearest: the mask that they allow nearest to shares [B, F, *out] of the cotangent above.
        mean: share of an entry before anything is known of it.
        forward: of the convolution's output, and how far off its entries may be, the mask that
            they are there, and which entries of it are decided all the same.
        nonnegative: True if no input of the convolution is negative.
    """

    nearest: Callable[[Tensor], Tensor]
    mean: float
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    nonnegative: bool


@dataclass(frozen=True)
class Solved:
    """The input of a convolution whose cotangent is taken for known.

    Attributes:
        inputs: X [B, C, *space] with its errors; 0 where no tap reads.
        misfits: rms of G − K ⋆ X in standard errors, by filter.
        allowed: one of these errors, by filter.
    """

    inputs: Estimate
    misfits: Tensor
    allowed: Tensor


def confirmed(
    affine: Affine,
    gradient: Tensor,
    open_: Tensor,
    above: Tensor,
    noise: float = 0.0,
    error: float = 0.0,
    through: Through | None = None,
    unit: float = 0.0,
) -> Solved | str:
    """The input that follows from a mask, or why the mask is wrong or not tested.

    Args:
        affine: the convolution, without groups.
        gradient: G [F, C, *kernel], float64.
        open_: the mask, bool [B, F, *out].
        above: k, the cotangent before the steps; where it is 0 nothing is asked.
        noise: standard error of an entry of G.
        error: of an entry of k.
        through: the steps; None where more than the convolution leads to them.
        unit: unit roundoff of the client's arithmetic.
    """
    if short := short_of(affine, gradient, above):
        return short
    eps = torch.finfo(gradient.dtype).eps
    noise = max(noise, eps * float(gradient.square().mean().sqrt()))
    found = solved(affine, gradient, above * open_, noise, error)
    worst = float(found.misfits.max())
    # Ten times what an answer is allowed: one wrong entry misses by thousands even in float32, and
    # who solves with the mask compares again, with the error of every row.
    if not worst <= FITS * SAFETY:
        place = int(found.misfits.argmax())
        return f"no mask met: filter {place} misses its gradient by {worst:.1e} standard errors"
    doubt = untested(affine, gradient, above, found)
    if through is not None and not doubt:
        doubt = contradiction(affine, open_, above, through, found.inputs, max(unit, eps))
    return doubt or found


def equations(affine: Affine, gradient: Tensor, above: Tensor) -> int:
    """How many a channel has: a filter that sends nothing has none, nor a tap beyond the border."""
    sends = (gradient.flatten(1) != 0).any(1).to(above)
    shown = sends.reshape(1, -1, *[1] * (above.ndim - 2)) * (above != 0)
    reached = affine.weight_gradient(above.new_ones(len(above), *affine.in_shape), shown)
    return int((reached[:, 0] > 0).sum())


def short_of(affine: Affine, gradient: Tensor, above: Tensor) -> str:
    """Why the gradient has too few equations to test a mask, or ""."""
    rows = equations(affine, gradient, above)
    unknowns = len(above) * int(affine.reads[0].sum())
    surplus = max(SURPLUS, SURPLUS_SHARE * unknowns)
    if rows - unknowns >= surplus:
        return ""
    return (
        f"{rows} equations of filters that send something for {unknowns} inputs of a channel, "
        f"{surplus:.0f} more are asked for: too few"
    )


def solved(
    affine: Affine, gradient: Tensor, k: Tensor, noise: float = 0.0, error: float = 0.0
) -> Solved:
    """X from K.

    Args:
        affine: the convolution, without groups.
        gradient: G [F, C, *kernel], float64.
        k: K [B, F, *out].
        noise: standard error of an entry of G, beside the rounding of float64.
        error: of an entry of k that is not 0; it reaches a filter through all that its taps read.
    """
    matrix = gradient_constraint(affine, k, read_only=True).matrix[0]
    coupling = weight_constraint(affine, len(k), read_only=True)
    basis, upper = tall_qr(matrix)

    def solve(rows: Tensor) -> Tensor:
        table = torch.linalg.solve_triangular(upper, basis.T @ rows.T, upper=True)
        return coupling.fold(table.T[None]).reshape(len(k), *affine.in_shape)

    def by_filter(gradient: Tensor) -> Tensor:
        return gradient.flatten(1).mean(1).clamp_min(0.0)

    x = solve(gradient_rows(affine, gradient))
    left = gradient - affine.weight_gradient(x, k)
    reached = error**2 * by_filter(affine.weight_gradient(x.square(), (k != 0).to(k)))
    eps = torch.finfo(k.dtype).eps
    own = (eps * by_filter(affine.weight_gradient(x.abs(), k.abs()))).square()
    allowed = (noise**2 + reached + own).sqrt()
    misfits = by_filter(left.square()).sqrt() / allowed
    # The rounding of our own solve adds up with one sign, and is no mean over the equations.
    wider = (noise**2 + reached + OWN**2 * own).sqrt()
    generator = torch.Generator(k.device).manual_seed(0)
    errors = []
    for _ in range(MEMBERS):
        drawn = torch.randn(gradient.shape, dtype=k.dtype, device=k.device, generator=generator)
        drawn *= wider.reshape(-1, *[1] * (gradient.ndim - 1))
        errors.append(solve(gradient_rows(affine, drawn)))
    misfits = torch.where(torch.isfinite(misfits), misfits, torch.inf)
    return Solved(Estimate(x, torch.stack(errors)), misfits, allowed)


def untested(affine: Affine, gradient: Tensor, above: Tensor, found: Solved) -> str:
    """Why some wrong mask may meet the gradient by chance, or "".

    Each of the 2ⁿ masks of n units meets one equation beyond the unknowns with a chance of what is
    allowed over the size of G; channels that are combinations of others repeat equations.
    """
    rows = equations(affine, gradient, above)
    surplus = rows - len(above) * int(affine.reads[0].sum())
    size = gradient.square().mean().sqrt()
    chance = FITS * SAFETY * float(found.allowed.square().mean().sqrt() / size)
    if not 0.0 < chance < 1.0:
        return "what is allowed for its errors is as large as the gradient"
    table = gradient_rows(affine, gradient)
    values = torch.linalg.eigvalsh(table @ table.T).clamp_min(0.0).sqrt()
    channels = int((values > max(chance, RESOLVED) * values[-1]).sum())
    units = int((above != 0).sum())
    if channels * surplus * log(1.0 / chance) >= units * log(2.0) + log(1.0 / FALSELY):
        return ""
    return (
        f"{surplus} equations more than unknowns in {channels} independent channels, met to "
        f"{chance:.1e}, do not rule out every other mask of {units} units"
    )


def contradiction(
    affine: Affine,
    open_: Tensor,
    above: Tensor,
    through: Through,
    inputs: Estimate,
    unit: float,
    least: float = TOLD,
) -> str:
    """Why the input refutes the mask, or leaves too much of it untested; "" if neither.

    Args:
        affine: the convolution.
        open_: the mask, bool [B, F, *out].
        above: k; where it is 0 nothing is asked.
        through: the steps.
        inputs: X that follows from the mask.
        unit: unit roundoff of the client's arithmetic.
        least: share of the units that has to be decided.
    """
    x, far = inputs.value, SAFETY * smoothed(inputs)
    if not bool(torch.isfinite(x).all() & torch.isfinite(far).all()):
        return "the input does not follow from the mask"
    if through.nonnegative:
        below = x < -(far + SAFETY * unit * float(x.abs().max()))
        if bool(below.any()):
            return f"{int(below.sum())} inputs of '{affine.name}' are below 0"
    z = affine.forward(x)
    moved = torch.stack([affine.linear(error) for error in inputs.error])
    terms = affine.squared().linear(x.square())
    if affine.bias is not None:
        terms = terms + affine.bias.square().reshape(-1, *[1] * (z.ndim - 2))
    own = smoothed(Estimate(z, moved)).square() + unit**2 * terms
    there, sure = through.forward(z, SAFETY * own.sqrt())
    known = above != 0
    other = (there != open_) & sure & known
    if bool(other.any()):
        return (
            f"{int(other.sum())} of {int(known.sum())} units of '{affine.name}' are not what its "
            "input gives"
        )
    told = int((sure & known).sum()) / max(int(known.sum()), 1)
    if told < least:
        return f"its input tells of {100 * told:.0f}% of the units of '{affine.name}' only"
    return ""
