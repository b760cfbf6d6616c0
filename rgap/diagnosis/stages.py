"""The stages of a chain below its head, for one sample: whether they agree, and all but one entry.

With what is known above it, a stage's equations are a linear least-squares problem with more
equations than unknowns.  A single wrong right-hand side has the largest residual in standard errors
of all (H and 1 − h_ii are those of the hat matrix), and the residual of an entry is linear in it:
a few solves say which value would make it vanish, and whether all others then agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from rgap.diagnosis.evidence import Evidence
from rgap.diagnosis.finding import MENDING, Finding, Kind
from rgap.head.features import features_from_bias
from rgap.limits import FITS, REFUTED
from rgap.recursion.descend import descend
from rgap.recursion.reached import Descent, Reached

ROUNDS = 12  # solves for the value of an entry
LARGEST = 20_000  # unknowns of a stage up to which the recursion is tried


def descended(evidence: Evidence, sent: Mapping[str, Tensor] | None = None) -> Descent | None:
    """The recursion from the head of a chain down; None where it does not run.

    Args:
        evidence: of the update.
        sent: gradients in place of the update's.
    """
    chain = evidence.chain
    if chain is None or evidence.batch != 1 or not chain.stages:
        return None
    last, gradients = chain.stages[-1], dict(evidence.gradients if sent is None else sent)
    name = last.affine.bias_name
    if last.affine.geometry is not None or name is None or len(chain.stages) < 2:
        return None
    if max(prod(stage.affine.in_shape) for stage in chain.stages[:-1]) > LARGEST:
        return None
    named = {n for s in chain.stages for n in (s.affine.weight_name, s.affine.bias_name) if n}
    if not named.issubset(gradients):
        return None
    weight, bias = last.affine.sent(gradients), gradients[name]
    if bool((bias.abs() < evidence.precision.noise_std(name, bias)).any()):
        return None  # as of pruning: an entry that is all noise is no small error of the cotangent
    x, k = features_from_bias(last.affine, weight, bias, evidence.precision)
    x = type(x)(
        x.value.reshape(-1, *last.affine.in_shape),
        x.error.reshape(len(x.error), -1, *last.affine.in_shape),
    )
    descent = descend(chain, gradients, Reached(last.index, k, x, None), evidence.precision)
    return None if descent.worst[0] < 0 else descent


def changed_entry(evidence: Evidence) -> Finding | None:
    """The entry of a weight's gradient without which all stages agree, or None."""
    descent, chain = descended(evidence), evidence.chain
    if descent is None or chain is None:
        return None
    refuted = [i for i, step in descent.solutions.items() if step.misfit > REFUTED]
    name = chain.stages[max(refuted)].affine.weight_name if refuted else ""
    rest = None if not refuted else _rest(evidence, descent, max(refuted))
    if rest is None:
        return None
    place = int(rest.abs().argmax())
    step = -float(rest.flatten()[place])

    def moved(amount: float) -> dict[str, Tensor]:
        own = evidence.gradients[name].clone()
        own.view(-1)[place] += amount
        return {**evidence.gradients, name: own}

    amount, left, mended = step, rest.flatten()[place], None
    for _ in range(ROUNDS):  # weights of equations follow the solution
        mended = descended(evidence, moved(amount))
        other = None if mended is None else _rest(evidence, mended, max(refuted))
        if mended is None or other is None or mended.worst[1] <= FITS:
            break
        now = other.flatten()[place] + amount
        slope = float(now - left) / step if step else 0.0
        if slope == 0.0:
            return None
        step, left = -float(now) / slope, now
        amount += step
    if mended is None or mended.worst[1] > FITS:
        return None
    shape = evidence.gradients[name].shape
    at = [int(n) for n in torch.unravel_index(torch.tensor(place), shape)]
    worst = descent.worst[1]
    said = (
        f"the equations of '{chain.stages[max(refuted)].name}' below the head contradict what is "
        f"known above them by {worst:.1e} standard errors; less {-amount:.3g} at {at} of '{name}' "
        f"all layers agree to {mended.worst[1]:.1e}"
    )
    return Finding(Kind.ENTRY, -amount, said, str(MENDING[Kind.ENTRY]), worst / FITS)


def _rest(evidence: Evidence, descent: Descent, index: int) -> Tensor | None:
    """What the solution of a stage leaves of its gradient, in the shape of its weight."""
    assert evidence.chain is not None
    affine = evidence.chain.stages[index].affine
    step = descent.solutions.get(index)
    if step is None or step.solution.value is None:
        return None
    own = affine.weight_gradient(step.solution.value.value, step.cotangent)
    return affine.sent(evidence.gradients) - own
