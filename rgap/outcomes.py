"""Recoveries that are no certificate: where the equations end, contradict, or are filled in."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rgap.capture import capture
from rgap.problem import Problem
from rgap.recovery import Recovery, Status
from rgap.recursion import Descent
from rgap.reports import layer_reports
from rgap.symptoms import compression, warnings

CHOSEN = (
    "a prior chose what the equations leave open: details of these pictures may be its own and not "
    "the client's; the layer reports say how much is open"
)


def stopped(problem: Problem, status: Status, reason: str, descent: Descent | None) -> Recovery:
    """A recovery without inputs; a compressed update gets the compression as part of its reason."""
    looks = compression(problem.update.gradients)
    if looks is not None:
        reason += f"; the update itself looks compressed, which no equation here models: {looks}"
    return Recovery(
        inputs=None,
        labels=problem.labels,
        status=status,
        layers=layer_reports(problem, descent),
        residual=None,
        predicted_error=None,
        error_bound=None,
        reason=reason,
        warnings=warnings(problem),
    )


def contradiction(problem: Problem, descent: Descent) -> Recovery:
    """INCONSISTENT, naming the layer whose equations do not fit."""
    index, misfit = descent.worst
    stage = problem.chain.stages[index]
    relative = descent.solutions[index].solution.stats.residual
    return stopped(
        problem,
        Status.INCONSISTENT,
        f"the gradient of '{stage.name}' contradicts the layers above it: residual "
        f"{misfit:.2g} standard errors ({relative:.1e} of the gradient); is the update from "
        "another model, loss or precision?",
        descent,
    )


def completed(
    problem: Problem, descent: Descent, inputs: Tensor, labels: Tensor, reason: str
) -> Recovery:
    """A batch of which a prior chose a part: no error is predicted, and none is bounded."""
    recovery = stopped(problem, Status.COMPLETED, reason, descent)
    return replace(
        recovery,
        inputs=inputs,
        labels=labels,
        residual=replayed(problem, inputs, labels)[0],
        warnings=(*recovery.warnings, CHOSEN),
    )


def replayed(problem: Problem, inputs: Tensor, labels: Tensor) -> tuple[float, dict[str, float]]:
    """Relative difference between the update and the gradient of a batch, in all and by name."""
    sender = partial(capture, problem.model, inputs, labels, problem.update.loss, value_range=None)
    try:
        again = sender(dtype=torch.float64)
    except ValueError:  # a forward that casts to a precision of its own
        again = sender(dtype=problem.update.dtype)
    parts, total, scale = {}, 0.0, 0.0
    for name, sent in problem.gradients.items():
        gap = float((again.gradients[name].to(sent) - sent).norm())
        size = float(sent.norm())
        parts[name] = gap / size if size > 0 else gap
        total, scale = total + gap**2, scale + size**2
    return (total / scale) ** 0.5 if scale > 0 else total**0.5, parts
