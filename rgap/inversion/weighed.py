"""Targets of separated samples whose inputs are known, read at the last layer.

With u_i the inputs of the last layer ``G = Σ κ_i u_iᵀ`` and ``∂b = Σ κ_i``: linear in κ, and for
linearly independent u_i it gives every κ_i.  Under the declared loss ``κ_i = λ_i s ∂ℓ(z_i, y_i)``,
s the scale of the batch, z_i known from the input: sample by sample the head fixes y_i and λ_i > 0
together.  Clipping sample by sample sends one λ_i a sample, a factor on the loss the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from rgap.head.behind import lifted
from rgap.head.target import Reading, read_weighed
from rgap.inversion.batch_rows import in_order
from rgap.inversion.problem import Problem
from rgap.inversion.replay import Replay, replay
from rgap.inversion.top import top_features
from rgap.limits import COPIED, ENSEMBLE, FITS
from rgap.precision import Estimate
from rgap.update.losses import Loss

__all__ = ["Named", "Weighed", "named", "weighed", "weighed_at"]


@dataclass(frozen=True)
class Weighed:
    """What the gradient of the last layer says of separated samples.

    Attributes:
        labels: of the batch, as the loss takes them.
        scale: λ, one number where it is the same for all, else one a sample [B].
        spread: its standard error.
    """

    labels: Tensor
    scale: float | Tensor
    spread: float | Tensor


def weighed(problem: Problem, data: Estimate) -> Weighed | str:
    """The target and the factor of every sample, or why they do not follow.

    Args:
        problem: the whole network, with the loss as it was declared.
        data: the samples, each of which occurs once, [B, *input_shape], with their errors.
    """
    chain, loss = problem.chain, problem.update.loss
    if not chain.complete or chain.stages[-1].affine.geometry is not None:
        return "the network above them is no chain that ends in a fully connected layer"
    if not loss.known:
        return "the loss is not known"
    if loss.targets != "index" or loss.own:
        if loss.own:
            return (
                f"the loss {loss.name} is a function, for which no equation reads the targets of "
                "several samples off the last layer"
            )
        return (
            f"with targets {loss.targets!r} of {loss.name} any factor on a sample can be part of "
            "its target, so neither is determined"
        )
    return weighed_at(problem, top_features(chain, data))


def weighed_at(problem: Problem, features: Estimate) -> Weighed | str:
    """The same from the input of the last layer, whatever stands below it.

    Args:
        problem: with index targets.
        features: of the samples, each of which occurs once, [B, *in_shape], with their errors.
    """
    chain, loss = problem.chain, problem.update.loss
    if len(chain.output_shape) > 1:
        return "their targets are those of a map, of which no factor is read sample by sample"
    chain, single = lifted(chain, replace(loss, reduction="sum"))
    stage = chain.stages[-1]
    flat = Estimate(features.value.flatten(1), features.error.flatten(2))
    kappa = _cotangents(problem, flat)
    if isinstance(kappa, str):
        return kappa
    readings = [
        read_weighed(
            stage,
            Estimate(features.value[i : i + 1], features.error[:, i : i + 1]),
            Estimate(kappa.value[i : i + 1], kappa.error[:, i : i + 1]),
            single,
            problem.precision,
        )
        for i in range(len(features.value))
    ]
    for row, reading in enumerate(readings):
        if reading.open or not reading.fits:
            missed = f"misses by {reading.distance:.1e} (tolerance {reading.tolerance:.1e})"
            why = reading.open or f"the nearest one with a factor of its own {missed}"
            return f"the target of sample {row} does not follow: {why}"
    return _together(stage.affine.forward(features.value), readings, loss)


@dataclass(frozen=True)
class Named:
    """Samples whose targets and factors give the update again.

    Attributes:
        order: the rows that are reported, [B]: in the order of stated labels, or by label.
        labels: of these.
        scale: λ of these.
        replay: of the whole update.
        words: what the update is beside that of the declared loss, or "".
    """

    order: Tensor
    labels: Tensor
    scale: float | Tensor
    replay: Replay
    words: str


def named(problem: Problem, data: Estimate, read: Weighed) -> Named | str:
    """The samples with the targets that were read, if the model sends the update for them.

    Args:
        problem: with the loss as it was declared.
        data: the samples, each of which occurs once, [B, *input_shape], with their errors.
        read: their targets.
    """
    labels, scale = read.labels, read.scale
    stated = problem.labels
    if stated is None:  # the order of a batch is not in its gradient: rows come by label
        stated = labels.sort().values if labels.ndim == 1 else labels
    order = in_order(labels, stated)
    if order is None or not torch.equal(labels[order], stated.reshape(labels.shape).to(labels)):
        return f"the stated labels contradict the update, whose head says {labels.tolist()}"
    again = replay(problem, data.value, labels, scale, data.error, read.spread)
    if not again.fits:
        name = again.worst
        return (
            f"with the targets {labels.tolist()} and the factors {scale} that the last layer "
            f"gives, the model's own update differs from '{name}' by {again.parts[name]:.1e} of "
            f"it, where {again.allowed[name]:.1e} is explained"
        )
    if isinstance(scale, Tensor) and (total := _of_copies(scale, read.spread)):
        return (
            f"the samples weigh {_times(scale)} what they should, as whole numbers of copies do in "
            f"a mean over {total}: near copies of one label send that too, each of which is off "
            f"what is shown; write batch_size={total} if it is that of the client"
        )
    plain = not isinstance(scale, Tensor) and scale == 1.0
    words = "" if plain else f"; the update is {_times(scale)} that of the declared loss"
    scale = scale[order] if isinstance(scale, Tensor) else scale
    return Named(order, labels[order], scale, again, words)


def _of_copies(scale: Tensor, spread: float | Tensor) -> int | None:
    """B' with ``λ_i = m_i B/B'`` for whole m_i ≥ 1 and ``Σ m_i = B'`` within errors, or None.

    Any factors with mean 1 are that for some B': up to twice the samples are looked at.
    """
    samples = len(scale)
    for total in range(samples + 1, 2 * samples + 1):
        copies = scale * total / samples
        whole = copies.round()
        off = (copies - whole).abs() <= COPIED + ENSEMBLE * spread * total / samples
        if bool((whole >= 1).all()) and int(whole.sum()) == total and bool(off.all()):
            return total
    return None


def _times(scale: float | Tensor) -> str:
    if isinstance(scale, Tensor):
        return f"{float(scale.min()):.6g} to {float(scale.max()):.6g} times, sample by sample,"
    return f"{scale:.6g} times"


def _together(z: Tensor, readings: list[Reading], loss: Loss) -> Weighed | str:
    """One factor where all agree; where a sample's own is not tested they have to."""
    labels = torch.cat([reading.labels for reading in readings])
    targets = torch.cat([reading.target for reading in readings])
    divisor = loss.divisor(targets, torch.ones_like(z[:, 0]))
    factors = z.new_tensor([reading.scale for reading in readings]) * divisor
    spread = z.new_tensor([reading.spread for reading in readings]) * divisor
    spread = spread.clamp_min(torch.finfo(z.dtype).eps * factors.abs())
    weights = spread.square().reciprocal()
    mean = float((weights @ factors) / weights.sum())
    if bool(((factors - mean).abs() <= ENSEMBLE * weights.rsqrt()).all()):
        if len(readings) == 1 and not readings[0].tested:
            return "one sample with one number at the head: a factor and the target are one unknown"
        error = float(weights.sum().rsqrt())
        near_one = abs(mean - 1.0) <= ENSEMBLE * error
        return Weighed(labels, 1.0 if near_one else mean, 0.0 if near_one else error)
    if not all(reading.tested for reading in readings):
        return (
            f"the samples weigh {float(factors.min()):.3g} to {float(factors.max()):.3g} times "
            "what they should, and a head with one direction tests no factor of its own"
        )
    return Weighed(labels, factors, spread)


def _cotangents(problem: Problem, features: Estimate) -> Estimate | str:
    """κ [B, C] with its errors, from ``[G | ∂b] = κᵀ [u | 1]``."""
    affine, precision = problem.chain.stages[-1].affine, problem.precision
    table, moved = [features.value], [features.error]
    sent = [affine.sent(problem.gradients)]
    if affine.bias_name is not None and precision.sent(affine.bias_name):
        table.append(torch.ones_like(features.value[:, :1]))
        moved.append(torch.zeros_like(features.error[..., :1]))
        sent.append(problem.gradients[affine.bias_name][:, None])
    u, du, g = torch.cat(table, 1), torch.cat(moved, 2), torch.cat(sent, 1)
    if len(u) > u.shape[1]:
        return f"{len(u)} samples share {u.shape[1]} numbers at the input of the last layer"
    values = torch.linalg.svdvals(u)
    lost = float(torch.linalg.matrix_norm(du, 2).max()) if len(du) else 0.0
    if not float(values[-1]) > FITS * lost:
        return "their features at the last layer are linearly dependent within their errors"
    back = torch.linalg.pinv(u.T)  # [B, d]
    kappa = back @ g.T
    # Features that are nearly alike: a product with the inverse leaves ε times their condition of
    # the gradient, where the misfit below is measured in ε.
    kappa = kappa + back @ (g.T - u.T @ kappa)
    squares = kappa.square().T @ features.value.square()
    std = [precision.update_std(affine.weight_name, squares, kappa.T @ features.value)]
    if len(sent) > 1:
        assert affine.bias_name is not None
        std.append(
            precision.update_std(affine.bias_name, kappa.square().sum(0), kappa.sum(0))[:, None]
        )
    sigma = torch.cat(std, 1)
    own = precision.normal((back.square() @ sigma.T.square()).sqrt(), len(features.error))
    carried = -torch.einsum("bd,sdc->sbc", back, du.mT @ kappa)
    gap = g.T - u.T @ kappa  # [d, C]
    slack = (du.mT @ kappa).square().mean(0) + sigma.T.square()
    misfit = float((gap.square() / slack.clamp_min(1e-300)).mean().sqrt())
    if misfit > FITS:
        return (
            f"the gradient of the last layer is not that of these samples (it misses by "
            f"{misfit:.1e} standard errors)"
        )
    return Estimate(kappa, own + carried) if misfit < inf else "not finite"
