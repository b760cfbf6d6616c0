"""Targets of samples whose inputs are known: at the last layer, or by trying them.

With u_i the inputs of the last layer ``G = Σ κ_i u_iᵀ`` and ``∂b = Σ κ_i``: linear in κ, and for
linearly independent u_i it gives every κ_i.  Under the declared loss ``κ_i = λ_i s ∂ℓ(z_i, y_i)``,
s the scale of the batch, z_i known from the input: sample by sample the head fixes y_i and λ_i > 0
together (:func:`weighed`).  Clipping sample by sample sends one λ_i a sample, a factor on the loss
the same for all.

Under a network that no equation covers targets are tried (:func:`try_targets`): the update is
affine in the target where the loss's cotangent is, so one backward pass a class at one small
parameter ranks the labels, and a replay of the whole update decides.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor, nn

from rgap.head.behind import lifted
from rgap.head.target import Reading, read_weighed, unseen_of
from rgap.inversion.problem import Problem
from rgap.inversion.replay import replay
from rgap.inversion.top import top_features
from rgap.limits import ENSEMBLE, FITS, ROUNDED, SAFETY, USEFUL, VANISHING
from rgap.network.agreement import by_mode
from rgap.precision import Estimate
from rgap.remedy import FUNCTION
from rgap.update.losses import Loss
from rgap.update.targets import CLASSES

__all__ = ["Trial", "Weighed", "try_targets", "weighed", "weighed_at"]

MOST = 1000  # labels that are tried
MOVED = 4  # errors of the input that a dense target is read again with
REPLAYED = 2  # of these the whole update is computed for: the nearest, and what refutes the next


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
        return f"under {loss.name} with targets {loss.targets!r} a factor is part of the target"
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


@dataclass(frozen=True)
class Trial:
    """The target of a known input.

    Attributes:
        labels: the only target that reproduces the update, or None.
        residual: of the best replay, or None where none was possible.
        reason: why the targets are not certified, or "".
        refuted: True if the update is that of no target that was tried.
        bound: largest error of a target that may be any numbers; None for others, and for stated
            ones where only the replay of all of them tests them.
    """

    labels: Tensor | None
    residual: float | None
    reason: str
    refuted: bool = False
    bound: float | None = None


def try_targets(problem: Problem, known: Estimate, parameter: str) -> Trial:
    """The one target of a single known input that reproduces the whole update.

    A target is reproduced if every tensor of its replay is within what rounding, noise and the
    errors of the input explain, and refuted if one is not: see
    :func:`rgap.inversion.replay.replay`.

    Args:
        problem: the update and its model.
        known: the input [1, *input_shape], float64, with its errors.
        parameter: name of a small one whose gradient ranks the labels: a bias.
    """
    loss = problem.declared
    if not loss.known:
        why = "the loss is not known"
        if loss.own:
            why = (
                f"the update was sent under {loss.name!r}, a function that a file cannot hold: "
                f"write {FUNCTION}"
            )
        return Trial(None, None, why)
    for name, module in problem.model.named_modules():
        if by_mode(module):
            return Trial(
                None,
                None,
                f"'{name or type(module).__name__}' ({type(module).__name__}) is in train mode: "
                "what it drew or mixed is not part of the update, so no replay gives it again",
            )
    try:
        listed = _options(problem, known, parameter)
        if isinstance(listed, str):
            return Trial(None, None, listed)
        options, bound = listed
        tries = [
            (replay(problem, known.value, target, 1.0, known.error), target)
            for target in options[:REPLAYED]
        ]
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return Trial(None, None, f"no replay was possible ({str(error).splitlines()[0]})")
    again, labels = min(tries, key=lambda tried: tried[0].residual)
    fitting = [target for tried, target in tries if tried.fits]
    if not fitting:
        name = again.worst
        return Trial(
            None,
            again.residual,
            f"no target of {loss.name} reproduces the update: the nearest one misses '{name}' by "
            f"{again.parts[name]:.1e} of it, where rounding, noise and the errors of the input "
            f"explain {again.allowed[name]:.1e}",
            refuted=True,
        )
    if len(fitting) > 1:
        return Trial(None, again.residual, "several targets reproduce the update")
    return Trial(labels if again.fits else fitting[0], again.residual, "", bound=bound)


def _options(
    problem: Problem, known: Estimate, parameter: str
) -> tuple[Sequence[Tensor], float | None] | str:
    """Targets worth a replay, the likeliest first, and their bound; or why there are none."""
    if problem.labels is not None:
        return [problem.labels], _bound_of_stated(problem, known, parameter, problem.labels)
    model = copy.deepcopy(problem.model).double().requires_grad_()
    with torch.enable_grad():
        outputs = model(known.value.to(next(model.parameters())))
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
            return (
                "the model does not return one tensor [B, C], so the targets that the loss takes "
                "are not known; state labels to have them tested"
            )
        weight = dict(model.named_parameters())[parameter]
        loss, count = problem.declared, outputs.shape[1]
        sent = problem.gradients[parameter]
        several = not loss.own and loss.name not in CLASSES and count > 1
        if loss.targets != "index" or several:
            dense = _continuous(problem, model, known, parameter)
            if isinstance(dense, str):
                return dense
            return [loss.read(dense[0])[0].cpu()], dense[1] if loss.targets != "index" else None
        labels = loss.admissible(count) if not loss.own else list(range(count))
        if labels is None or len(labels) > MOST:
            return f"{loss.name} admits too many targets to try"
        if loss.own and count == 1:  # a binary loss takes numbers of the outputs' shape
            targets = [outputs.new_full((1, 1), label) for label in (0.0, 1.0)]
        else:
            targets = [torch.tensor([label], device=outputs.device) for label in labels]
        misses = []
        for target in targets:
            value = loss(outputs, target)
            (g,) = torch.autograd.grad(value, weight, retain_graph=True)
            misses.append(float((g - sent.to(g)).norm()))
    order = sorted(range(len(targets)), key=misses.__getitem__)
    return [targets[place].cpu() for place in order], None


def _bound_of_stated(
    problem: Problem, known: Estimate, parameter: str, stated: Tensor
) -> float | None:
    """Largest error of stated targets that may be any numbers: their distance from those read."""
    loss = problem.declared
    if loss.own or loss.targets == "index":
        return None
    model = copy.deepcopy(problem.model).double().requires_grad_()
    try:
        read = _continuous(problem, model, known, parameter)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
        return None  # outputs that are no tensor [1, C]
    if isinstance(read, str):
        return None
    target, bound = read
    return float((stated.to(target).reshape(target.shape) - target).abs().max()) + bound


def _continuous(
    problem: Problem, model: nn.Module, known: Estimate, parameter: str
) -> tuple[Tensor, float] | str:
    """The dense target whose cotangent at the outputs explains one parameter's gradient; its bound.

    A replay does not see what lies along the weakest direction: the error has to be small.
    """
    loss, precision, sent = problem.declared, problem.precision, problem.gradients[parameter]
    weight = dict(model.named_parameters())[parameter]

    def fitted(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        outputs = model(inputs.to(weight))
        rows = [
            torch.autograd.grad(output, weight, retain_graph=True)[0].flatten()
            for output in outputs.flatten()
        ]
        matrix, z = torch.stack(rows, 1), outputs.detach()
        values = torch.linalg.svdvals(matrix)
        if len(values) < matrix.shape[1] or float(values[-1]) < VANISHING * float(values[0]):
            return None
        kappa = torch.linalg.lstsq(matrix, sent.to(matrix).flatten()[:, None]).solution
        return loss.targets_from(z, kappa.reshape(z.shape)), matrix, z

    with torch.enable_grad():
        first = fitted(known.value)
        if first is None:
            return (
                "the cotangent at the outputs does not follow from the gradient: a target is open"
            )
        target, matrix, z = first
        moved = [
            again[0] - target for e in known.error[:MOVED] if (again := fitted(known.value + e))
        ]
    rounded = ROUNDED * (sent.abs() * precision.unit + precision.floor)
    off = torch.hypot(rounded, SAFETY * precision.noise_std(parameter, sent)).flatten().to(matrix)
    own = (torch.linalg.pinv(matrix).square() @ off.square()).sqrt().reshape(z.shape)
    shift = loss.targets_from(z, own) - loss.targets_from(z, torch.zeros_like(own))
    carried = SAFETY * max((float(m.abs().max()) for m in moved), default=0.0)
    bound = float(shift.abs().max()) + carried + unseen_of(loss)
    if not bound <= USEFUL * max(1.0, float(target.abs().max())):
        return (
            f"a target is known to {bound:.1e} only: the cotangent at the outputs follows "
            f"from the gradient of '{parameter}' no better"
        )
    return target, bound
