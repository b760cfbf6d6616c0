"""Whether one answer that reproduces the update is certified, and in words why it is not."""

from __future__ import annotations

from math import inf

import torch

from rgap.constraints.determined import doubt
from rgap.inversion.answer import Answer
from rgap.inversion.problem import Problem
from rgap.limits import CLEAR, DETERMINED, FITS, REFUTED, USEFUL
from rgap.network.prefix import reaches
from rgap.recovery import Status
from rgap.solvers.rank import Evidence, EvidenceKind

UNTESTED = (
    "every number of the update was used to find the answer and none is left to test it: an update "
    "that was rounded, pruned or had noise added would look the same"
)


def verdict_followed(problem: Problem, answer: Answer, name: str) -> tuple[Status, str]:
    """The verdict on inputs below the top of a network, which the model itself has to follow.

    Args:
        problem: the update, and the chain from the data to a layer below the top.
        answer: that fits.
        name: of the layer whose input the chain gives.
    """
    status, why = verdict(problem, answer)
    if status is not Status.EXACT or reaches(problem.model, problem.chain, answer.inputs):
        return status, why
    return (
        Status.UNDERDETERMINED,
        f"on the recovered {'input' if answer.rows is None else 'batch'} the model's own '{name}' "
        "takes in something else: its forward decides by the values of the data",
    )


def verdict(problem: Problem, answer: Answer) -> tuple[Status, str]:
    """Whether an answer is certified, and why not.

    Args:
        problem: the update and the chain that the answer is of.
        answer: that fits.
    """
    descent = answer.descent
    chosen = descent.completed and descent.partial is not None
    if chosen and not answer.polished.worst <= DETERMINED / CLEAR:
        # Every layer determines what it reads; of what none reads a completion chose the values.
        return Status.UNDERDETERMINED, "some values of the data are read by no equation"
    for index, step in answer.descent.solutions.items():
        if answer.polished.worst <= DETERMINED / CLEAR:  # all equations together, nothing open
            break
        why = doubt(step.solution.stats.joint)
        if why:
            why = lost(answer) or f"'{problem.chain.stages[index].name}' {why}"
            return Status.UNDERDETERMINED, why
    if answer.polished.misfit > FITS:
        worst = max(answer.polished.misfits, key=lambda n: answer.polished.misfits[n])
        if answer.polished.misfit > REFUTED:
            return Status.UNDERDETERMINED, (
                f"the answer misses '{worst}' by {answer.polished.misfit:.1e} standard errors: it "
                "satisfies the equations that it was found with, and not those of the update"
            )
        return Status.UNDERDETERMINED, (
            f"the answer reproduces '{worst}' only to {answer.polished.misfit:.1f} standard "
            "errors: too far for a certificate, too near to be refuted; state the noise of the "
            "update"
        )
    if answer.widened == inf:
        return Status.UNDERDETERMINED, UNTESTED
    if not answer.bound <= USEFUL * problem.width:
        return Status.UNDERDETERMINED, (
            f"the equations have full rank but at this precision the error can reach "
            f"{answer.bound:.2g}"
        )
    return Status.EXACT, (
        f"every stage is determined, the update is reproduced, no entry is off by more than "
        f"{answer.bound:.1e}"
    )


def lost(answer: Answer) -> str:
    """What is not known where rounding empties a direction of the samples; "" where none is."""
    joints = (step.solution.stats.joint for step in answer.descent.solutions.values())
    errors = [j.value for j in joints if isinstance(j, Evidence) and j.kind is EvidenceKind.ERROR]
    if len(answer.inputs) < 2 or inf not in errors:
        return ""
    x = answer.inputs.flatten(1)
    apart = float(torch.pdist(x).min() / x.norm(dim=1).max().clamp_min(1e-300))
    return (
        f"samples nearly coincide, two differ by {apart:.1e} of their norm: rounding leaves "
        "nothing of a direction that tells them apart, and how far along it they lie is not known"
    )
