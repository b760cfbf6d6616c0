"""Targets by trying them: for inputs that are known, under a network that no equation covers.

The update is affine in the target where the loss's cotangent is: one backward pass a class at one
small parameter ranks the labels, a replay of the whole update decides.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rgap import outcomes
from rgap.capture import capture
from rgap.doubles import Doubles
from rgap.losses import Loss
from rgap.problem import Problem
from rgap.targets import CLASSES

__all__ = ["Trial", "try_targets"]

MOST = 1000  # labels that are tried
REPLAYED = 2  # of these the whole update is computed for: the nearest, and what refutes the next
ROUNDED = 100.0  # times the rounding of the client's arithmetic that a replay may be off by
REFUTED = 100.0  # times as much the next label has to miss by
SPAN = 1e-8  # σ_C/σ_1 below which a cotangent at the outputs does not follow from a gradient


@dataclass(frozen=True)
class Trial:
    """The target of a known input.

    Attributes:
        labels: the only target that reproduces the update, or None.
        residual: of the best replay, or None where none was possible.
        reason: why the targets are not certified, or "".
    """

    labels: Tensor | None
    residual: float | None
    reason: str


def try_targets(problem: Problem, inputs: Tensor, parameter: str) -> Trial:
    """The one target of a single known input that reproduces the whole update.

    Args:
        problem: the update and its model.
        inputs: [1, *input_shape], float64.
        parameter: name of a small one whose gradient ranks the labels: a bias.
    """
    loss = problem.declared
    if not loss.known:
        why = "the loss is not known"
        if loss.own:
            why = (
                f"the update was sent under {loss.name!r}, a function that a file cannot hold: "
                "write dataclasses.replace(update, loss=the_function)"
            )
        return Trial(None, None, why)
    for name, module in problem.model.named_modules():
        if module.training and _draws(module):
            return Trial(
                None,
                None,
                f"'{name or type(module).__name__}' ({type(module).__name__}) is in train mode: "
                "what it drew or mixed is not part of the update, so no replay gives it again",
            )
    try:
        options = _options(problem, inputs, parameter)
        if isinstance(options, str):
            return Trial(None, None, options)
        tries = [
            (outcomes.replayed(problem, inputs, target)[0], place)
            for place, target in enumerate(options[:REPLAYED])
        ]
        residual, place = min(tries)
        floor = _rounding(problem, inputs, options[place])
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return Trial(None, None, f"no replay was possible ({str(error).splitlines()[0]})")
    if residual > ROUNDED * floor:
        return Trial(
            None,
            residual,
            f"no target of {loss.name} reproduces the update: the nearest one misses by "
            f"{residual:.1e}, where rounding and noise explain {floor:.1e}",
        )
    rivals = [other for other, at in tries if at != place]
    if rivals and min(rivals) <= REFUTED * max(residual, floor):
        return Trial(None, residual, "several targets reproduce the update")
    return Trial(options[place], residual, "")


def _draws(module: Any) -> bool:
    drawn = isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0
    mixes = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    return drawn or mixes or isinstance(module, torch.nn.RReLU)


def _options(problem: Problem, inputs: Tensor, parameter: str) -> Sequence[Tensor] | str:
    """Targets worth a replay, the likeliest first, or why there are none."""
    if problem.labels is not None:
        return [problem.labels]
    model = copy.deepcopy(problem.model).double().requires_grad_()
    with torch.enable_grad():
        outputs = model(inputs.to(next(model.parameters())))
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
            found = _continuous(loss, outputs, weight, sent)
            return found if isinstance(found, str) else [loss.read(found)[0].cpu()]
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
    return [targets[place].cpu() for place in order]


def _continuous(loss: Loss, outputs: Tensor, weight: Tensor, sent: Tensor) -> Tensor | str:
    """The dense target whose cotangent at the outputs explains one parameter's gradient."""
    rows = [
        torch.autograd.grad(output, weight, retain_graph=True)[0].flatten()
        for output in outputs.flatten()
    ]
    matrix = torch.stack(rows, 1)
    values = torch.linalg.svdvals(matrix)
    if len(values) < matrix.shape[1] or float(values[-1]) < SPAN * float(values[0]):
        return "the cotangent at the outputs does not follow from the gradient: a target is open"
    kappa = torch.linalg.lstsq(matrix, sent.to(matrix).flatten()[:, None]).solution
    return loss.targets_from(outputs.detach(), kappa.reshape(outputs.shape))


def _rounding(problem: Problem, inputs: Tensor, target: Tensor) -> float:
    """Relative size of what the client's arithmetic and the stated noise do to the update."""
    update = problem.update
    sent = capture(
        problem.model, inputs, target, problem.declared, dtype=update.dtype, value_range=None
    )
    rounded = replace(problem, gradients=Doubles(sent.gradients, problem.gradients.device))
    own = outcomes.replayed(rounded, inputs, target)[0]
    scale = sum(float(g.square().sum()) for g in problem.gradients.values()) ** 0.5
    added = sum(
        float(problem.precision.noise_std(n, g).square().sum())
        for n, g in problem.gradients.items()
    )
    return max(own, problem.precision.unit) + float(added**0.5) / max(float(scale), 1e-300)
