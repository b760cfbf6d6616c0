"""Errors of separated samples: what the rounding of the client's sums does to X and K.

To first order, with L = Kᵀ, an error E of G and e of ∂b moves the samples by ``dX = L⁺E`` across
the row space of G; inside it each q follows its own consistency equations, whose subspace moves
too.  K follows from X through the layers above and the loss: reading it off Kᵀ = G X⁺ would divide
by the smallest singular value.  Every member of the ensemble is one draw of all rounding errors
together.

Pictures that count as copies of one may in truth be apart: two samples x ± δ with one label send
the gradient of two copies of x up to second order, ``2 (∂k/∂x δ) δᵀ``.  Where that is below the
noise no equation sees it: repeated labels are no defect of rank but of conditioning,
‖x_a − x_b‖·‖k_a − k_b‖.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.jacobian.batch_loss import BatchLoss
from rgap.limits import CLOSE, SETTLED, STILL
from rgap.network.chain import Chain
from rgap.precision import Estimate, Precision
from rgap.separation.identify import pullback
from rgap.separation.mixture import Mixture
from rgap.separation.subspace import Consistency, Restricted, restricted
from rgap.solvers.least_squares import levenberg_marquardt
from rgap.solvers.tall import tall_qr

EPS = 2 * torch.finfo(torch.float64).eps  # norm of what a decomposition in float64 rounds
SETTLING = 4  # times that a root is sent back to the solver
DRAWS = 4  # directions in which copies of a picture are moved apart


@dataclass(frozen=True)
class Spread:
    """Samples with their errors.

    Attributes:
        roots: Q, polished once more, [R, R].
        features: X, [R, *in_shape].
        across: the part of the errors across the row space of G, [S, R, n].
        worst: the largest standard error of any direction that a sample could move along, in
            units of that sample's norm; infinite where a direction is open.
        restless: the longest last step of a root, in its standard errors; 0 where all settled.
    """

    roots: Tensor
    features: Estimate
    across: Tensor
    worst: float
    restless: float


def spread(
    consistency: Consistency,
    roots: Tensor,
    chain: Chain,
    head: BatchLoss,
    precision: Precision,
) -> Spread:
    """X of all roots, polished once more, with an ensemble of their errors.

    Args:
        consistency: f and P.
        roots: Q, [R, R].
        chain: the network.
        head: targets and multiplicities.
        precision: of the update.
    """
    samples = consistency.samples
    affine = samples.stage.affine
    x = roots @ samples.right.T
    k = cotangents(chain, samples.stage.index, _shaped(x, affine.in_shape), head).flatten(1)
    w = samples.weights
    f, scaled = consistency.derivative(roots, (w / (w @ w))[:, None])
    share = f @ consistency.basis  # P^T f, [R, p]
    own = consistency.rounding(x, precision)
    above = k
    if consistency.source is not samples.stage:  # f is the input of another layer
        affine_above = consistency.source.affine
        above = cotangents(chain, consistency.source.index, _shaped(f, affine_above.in_shape), head)
    wobble = consistency.basis_errors(above, f, precision)
    back = roots / samples.values  # rows of Q S^-1
    std = precision.update_std(affine.weight_name, k.square().T @ x.square(), k.T @ x)
    std_bias = precision.update_std(affine.bias_name or "", k.square().sum(0), k.sum(0))
    own_arithmetic = float(samples.values[0]) * EPS / (len(k[0]) + len(x[0])) ** 0.5
    std = (std.square() + own_arithmetic**2).sqrt()
    push = consistency.pusher(x)
    shifts, moves, leaks = [], [], []
    for _ in range(precision.samples):
        e = precision.normal(std, samples=1)[0]
        e_bias = precision.normal(std_bias, samples=1)[0]
        across = _across(samples, back, e)
        along = back @ (samples.left.T @ (e @ (samples.right @ w) - e_bias))
        moved = along[:, None] * scaled[:, :, 0] + push(across)
        moved = moved + precision.normal(own, samples=1)[0]
        moves.append(moved - share @ wobble(e))
        shifts.append(along[:, None] * w / (w @ w))
        leaks.append(across)
    roots, steps, smallest, restless = _solved(consistency, roots, torch.stack(moves, 1))
    # A standard error of f along each direction, for the verdict on the worst of them.
    entries = (own.square().mean() + _blur(consistency, share).square().mean()).sqrt()
    worst = float(entries) / max(smallest, 1e-300)
    across = torch.stack(leaks)
    errors = (torch.stack(shifts) + steps.transpose(0, 1)) @ samples.right.T + across
    x = samples.inputs(roots)
    features = Estimate(x, _shaped(errors, affine.in_shape, 2))
    return Spread(roots, features, across, worst, restless)


def across_errors(samples: Mixture, roots: Tensor, k: Tensor, precision: Precision) -> Tensor:
    """Errors of the samples across the row space of G, where nothing else is known, [S, R, n]."""
    x = roots @ samples.right.T
    name = samples.stage.affine.weight_name
    std = precision.update_std(name, k.square().T @ x.square(), k.T @ x)
    back = roots / samples.values
    drawn = (precision.normal(std, samples=1)[0] for _ in range(precision.samples))
    return torch.stack([_across(samples, back, e) for e in drawn])


def _across(samples: Mixture, back: Tensor, e: Tensor) -> Tensor:
    """L⁺E (I − VVᵀ), with rows Q S⁻¹ in ``back``."""
    moved: Tensor = back @ (samples.left.T @ e)
    return moved - (moved @ samples.right) @ samples.right.T


def cotangents(chain: Chain, index: int, u: Tensor, head: BatchLoss) -> Tensor:
    """Cotangent k of stage ``index`` for its inputs u [R, *in_shape], from the loss down."""
    logits, pull = pullback(chain, index, chain.stages[index].affine.forward(u))
    return pull(head.cotangent(logits))


def cotangents_above(
    chain: Chain, index: int, features: Estimate, head: BatchLoss, kappa: Tensor | None = None
) -> Estimate:
    """K with the errors that it inherits, by finite differences.

    Args:
        chain: the network.
        index: of the stage.
        features: its inputs.
        head: the loss.
        kappa: errors of the cotangents at the head, [S, R, C], where these were unknowns of their
            own; else they follow from the features at targets that are known.
    """
    affine = chain.stages[index].affine
    logits, pull = pullback(chain, index, affine.forward(features.value))
    held = head.cotangent(logits)
    k = pull(held)
    size = features.error.abs().max().clamp_min(1e-300)
    step = 1e-6 * features.value.abs().max() / size
    moved = []
    for i, e in enumerate(features.error):
        logits, pull = pullback(chain, index, affine.forward(features.value + step * e))
        moved.append(pull(head.cotangent(logits) if kappa is None else held + step * kappa[i]))
    return Estimate(k, (torch.stack(moved) - k) / step)


def _shaped(x: Tensor, shape: tuple[int, ...], leading: int = 1) -> Tensor:
    out: Tensor = x.reshape(*x.shape[:leading], *shape)
    return out


def _blur(consistency: Consistency, share: Tensor) -> Tensor:
    out: Tensor = torch.linalg.vector_norm(share * consistency.blur, dim=1)
    return out


def _solved(
    consistency: Consistency, roots: Tensor, moved: Tensor
) -> tuple[Tensor, Tensor, float, float]:
    """Roots after a last step, what errors of f do to them, σ_min of their equations.

    By QR: the normal equations that led here lose half the digits where two samples are alike.  A
    root whose step is long beside its errors was none yet: it goes back to the solver.

    Args:
        consistency: of the roots.
        roots: Q, [R, R].
        moved: errors of f of every root, [R, S, m].

    Returns:
        Q, errors of its rows [R, S, R], σ_min, and the longest last step in standard errors.
    """
    steps, polished, smallest, restless = [], [], float("inf"), 0.0
    whole = restricted(consistency)
    for i, q in enumerate(roots):
        alone = replace(whole, consistency=consistency.at(torch.tensor([i], device=roots.device)))
        t = alone.coordinates(q[None])
        if t.shape[1] == 0:
            polished.append(alone.rows(t)[0])
            steps.append(moved.new_zeros(moved.shape[1], len(q)))
            continue
        for attempt in range(SETTLING + 1):
            out, least = _last_step(alone, t, moved[i])
            length = float(out[0].norm())
            error = float(out[1:].square().sum(1).mean().sqrt())
            settled = length <= max(SETTLED * error, STILL * float(q.norm()))
            if settled or attempt == SETTLING:
                break
            t = levenberg_marquardt(alone, t).value
        others = [*(done[None] for done in polished), roots[i + 1 :]]  # two may meet at a third
        if attempt and _twice(alone.rows(t)[0], torch.cat(others)):
            settled = False
        if not settled:
            restless = max(restless, length / max(error, 1e-300))
        trial = t - out[:1]
        if bool(alone.cost(trial) < alone.cost(t)):
            t = trial
        polished.append(alone.rows(t)[0])
        steps.append(-out[1:] @ whole.directions.T)
        smallest = min(smallest, least)
    return torch.stack(polished), torch.stack(steps), smallest, restless


def _twice(q: Tensor, others: Tensor) -> bool:
    """True if a root that moved is now another one."""
    return bool(((others - q).norm(dim=1) < CLOSE * q.norm()).any())


def _last_step(alone: Restricted, t: Tensor, moved: Tensor) -> tuple[Tensor, float]:
    """Gauss–Newton step of one root and of the errors of its f [1 + S, n], and σ_min of J."""
    residual, jacobian = alone.linear(t)
    basis, upper = tall_qr(jacobian[0])
    size = float(torch.linalg.vector_norm(alone.consistency.value(alone.rows(t))))
    rhs = torch.cat([residual, alone.consistency.project(moved) / size])
    out = torch.linalg.solve_triangular(upper, (rhs @ basis).T, upper=True).nan_to_num(0.0).T
    return out, size * float(torch.linalg.svdvals(upper)[-1])


def hidden_distance(
    chain: Chain,
    samples: Mixture,
    head: BatchLoss,
    features: Tensor,
    precision: Precision,
) -> Tensor:
    """Largest ‖δ‖ that the rank of G leaves unseen, [R]; 0 for pictures that occur once.

    For directions drawn at random; one that the layers above do not see at all is never seen.
    That each picture of an unstated batch size may stand for several is looked at in the data.
    """
    index = samples.stage.index
    k = cotangents(chain, index, features, head).flatten(1)
    size = features.flatten(1).norm(dim=1).clamp_min(1e-300)
    gain = torch.full_like(size, torch.inf)
    for _ in range(DRAWS):
        draw = precision.normal(torch.ones_like(features), samples=1)[0].flatten(1)
        draw = draw / draw.norm(dim=1, keepdim=True)
        step = (1e-6 * size)[:, None]
        moved = cotangents(chain, index, features + (step * draw).reshape(features.shape), head)
        change = (moved.flatten(1) - k) / step / head.copies[:, None]
        gain = gain.minimum(change.norm(dim=1))
    cutoff = max(samples.triplets.rank.cutoff, samples.noise * float(samples.values[0]))
    distance = (cutoff / (2.0 * gain.clamp_min(1e-300))).sqrt()
    return torch.where(head.copies > 1, distance, torch.zeros_like(distance))


def widened(known: Estimate, distance: Tensor, precision: Precision) -> Estimate:
    """The features with that distance as an error of their own."""
    entries = known.value[0].numel()
    std = (distance / entries**0.5).reshape(-1, *([1] * (known.value.ndim - 1)))
    return Estimate(known.value, known.error + precision.normal(std.expand_as(known.value)))


def remark_restless(samples: Mixture, restless: float) -> str:
    """Why samples of which one does not settle are none; ``restless`` as :class:`Spread` has it."""
    return (
        f"a sample at '{samples.stage.name}' does not settle: its last step is {restless:.1e} "
        f"standard errors long (σ_B/σ_1 {samples.ratio:.1e})"
    )


def remark(samples: Mixture, head: BatchLoss, distance: Tensor, features: Tensor) -> str:
    """What to tell a reader about pictures that may be several; empty where there are none."""
    if not bool((head.copies > 1).any()):
        return ""
    apart = float((distance / features.flatten(1).norm(dim=1).clamp_min(1e-300)).max())
    total, rank = int(head.copies.sum()), samples.rank
    beneath = samples.triplets.beneath
    ratio = float(beneath[0] / samples.values[0]) if len(beneath) else 0.0
    return (
        f"the gradient of '{samples.stage.name}' tells {rank} of {total} samples apart (the next "
        f"singular value is {ratio:.1e} of the largest, within its noise): the others are copies, "
        f"or what it reads of them differs from what it reads of the one shown by less than "
        f"{apart:.1e} of its norm; their data may differ by more"
    )
