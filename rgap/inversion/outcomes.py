"""Recoveries that are no certificate: where the equations end, contradict, or are filled in."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rgap.halt import Halt, HaltKind
from rgap.inversion.problem import Problem
from rgap.inversion.replay import sent_for
from rgap.inversion.reports import layer_reports
from rgap.inversion.symptoms import compressed, warnings
from rgap.recovery import Recovery, Status
from rgap.recursion.descend import Descent

CHOSEN = (
    "a prior chose what the equations leave open: details of these pictures may be its own and not "
    "the client's; the layer reports say how much is open"
)


def stopped(
    problem: Problem,
    status: Status,
    reason: str,
    descent: Descent | None,
    halt: Halt | None = None,
) -> Recovery:
    """A recovery without inputs; of a compressed update the reason begins with the compression.

    Args:
        problem: that was solved.
        status: why there are no inputs.
        reason: the same in words.
        descent: as far as the recursion went, or None.
        halt: what ended it; by default what ended the descent.
    """
    if halt is None and descent is not None:
        halt = descent.halt
    looks = compressed(problem)
    if looks is not None:
        told = f"the update itself looks compressed, which no equation here models: {looks}"
        reason = f"{told}; {reason}"
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
        halt=halt,
    )


def no_equations(problem: Problem) -> Recovery:
    """UNSUPPORTED: nothing is known of the loss, and no layer does without it."""
    return stopped(
        problem,
        Status.UNSUPPORTED,
        f"no equation covers the loss {problem.update.loss.name} with these options, and no fully "
        "connected layer with a bias that the data reach by a chain gives its input without it",
        None,
    )


def over_positions(problem: Problem) -> Recovery:
    """UNSUPPORTED: a target at every position of a map, with nothing that tells them apart."""
    chain = problem.chain
    last, shape = chain.stages[-1], list(chain.output_shape)
    if last.affine.geometry is not None:
        words = (
            f"the last layer '{last.name}' is a {last.affine.kind}, and the gradient of its "
            "kernel adds κ uᵀ up over all positions: the head equations need a fully connected "
            "layer, or one with a bias further down that gives its input; rgap.match searches for "
            "such data, and rgap.analysis.audit still measures every layer"
        )
    else:
        words = (
            f"the outputs are [B, {', '.join(map(str, shape))}] with a target at every position, "
            f"which is read for one sample and from a bias gradient: write batch_size=1 for an "
            "update of one sample; rgap.match searches for the others"
        )
    return stopped(problem, Status.UNSUPPORTED, words, None, Halt(HaltKind.HEAD, last.name, words))


def contradiction(problem: Problem, descent: Descent) -> Recovery:
    """INCONSISTENT, naming the layer whose equations do not fit, where their errors allow that."""
    index, misfit = descent.worst
    stage = problem.chain.stages[index]
    relative = descent.solutions[index].solution.stats.residual
    return stopped(
        problem,
        Status.UNDERDETERMINED if descent.doubt else Status.INCONSISTENT,
        f"the gradient of '{stage.name}' contradicts the layers above it: residual "
        f"{misfit:.2g} standard errors ({relative:.1e} of the gradient); "
        f"{descent.doubt or 'is the update from another model, loss or precision?'}",
        descent,
        Halt.contradiction(stage.name),
    )


def outside(problem: Problem, descent: Descent, inputs: Tensor) -> Recovery:
    """INCONSISTENT: the update determines values that the stated range does not hold.

    Args:
        problem: with the range, and the chain from the data.
        descent: that reached them.
        inputs: as they are determined.
    """
    low, high = problem.value_range or (0.0, 1.0)
    return stopped(
        problem,
        Status.INCONSISTENT,
        f"the value_range [{low:g}, {high:g}] contradicts the update, which determines values in "
        f"[{float(inputs.min()):.3g}, {float(inputs.max()):.3g}]; write the range of the data as "
        "the network sees them",
        descent,
        Halt.contradiction(problem.chain.stages[0].name),
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


def replayed(
    problem: Problem, inputs: Tensor, labels: Tensor, scale: float | Tensor = 1.0
) -> tuple[float, dict[str, float]]:
    """Relative difference between the update and the gradient of a batch, in all and by name."""
    again = sent_for(problem, inputs, labels, scale)
    parts, total, size = {}, 0.0, 0.0
    for name, sent in problem.sent.items():
        gap, own = float((again[name] - sent).norm()), float(sent.norm())
        parts[name] = gap / own if own > 0 else gap
        total, size = total + gap**2, size + own**2
    return (total / size) ** 0.5 if size > 0 else total**0.5, parts
