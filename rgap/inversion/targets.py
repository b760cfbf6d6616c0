"""Targets of one known input under a network that no equation covers: they are tried.

The update is affine in the target where the loss's cotangent is, so one backward pass a class at
one small parameter ranks the labels, and a replay of the whole update decides.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgap.head.target import unseen_of
from rgap.inversion.problem import Problem
from rgap.inversion.replay import replay
from rgap.limits import ROUNDED, SAFETY, USEFUL, VANISHING
from rgap.network.agreement import by_mode
from rgap.precision import Estimate
from rgap.remedy import FUNCTION
from rgap.update.targets import CLASSES

__all__ = ["Trial", "try_targets"]

MOST = 1000  # labels that are tried
MOVED = 4  # errors of the input that a dense target is read again with
REPLAYED = 2  # of these the whole update is computed for: the nearest, and what refutes the next


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
    if again.deaf:
        return Trial(None, again.residual, "what it rounds to explains any update of this size")
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
    kappa = loss.cotangent(z, target)
    blur = SAFETY * (_logits_rounded(problem, known, z) + precision.unit * z.abs())
    seen = [loss.targets_from(z + sign * blur, kappa) - target for sign in (1.0, -1.0)]
    carried = SAFETY * max((float(m.abs().max()) for m in moved), default=0.0)
    carried += max(float(gap.abs().max()) for gap in seen)
    bound = float(shift.abs().max()) + carried + unseen_of(loss)
    if not bound <= USEFUL * max(1.0, float(target.abs().max())):
        return (
            f"a target is known to {bound:.1e} only: the cotangent at the outputs follows "
            f"from the gradient of '{parameter}' no better"
        )
    return target, bound


def _logits_rounded(problem: Problem, known: Estimate, z: Tensor) -> Tensor:
    """How far the logits are off that the model computes in the client's precision, or float32."""
    coarse = torch.finfo(problem.precision.dtype).eps > torch.finfo(torch.float32).eps
    dtype = torch.float32 if coarse else problem.precision.dtype
    model = copy.deepcopy(problem.model).to(dtype)
    with torch.no_grad():
        own: Tensor = model(known.value.to(next(model.parameters()))).to(z)
    return (own - z).abs()
