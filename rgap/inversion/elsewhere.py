"""Whether a batch that was searched for has others beside it: the same entries in other places.

What a recursion solves has one solution; a search ends at one of several. Symmetries of a network
with pools leave others isolated, each with a Jacobian of full rank
(:mod:`rgap.completion.rearranged`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from rgap.completion.rearranged import Rearranged, rearrangements, steps_of, unmoved
from rgap.inversion import certificate
from rgap.inversion.answer import Run, answers_of
from rgap.inversion.problem import Problem
from rgap.inversion.replay import sent_for
from rgap.precision import Estimate
from rgap.recovery import Candidate, Recovery, Status

__all__ = ["elsewhere"]

OTHERS = 3  # of a sample, that are polished
UPDATES = 64  # pictures of a sample, of which the update is computed


def elsewhere(problem: Problem, run: Run, recovery: Recovery) -> Recovery:
    """``AMBIGUOUS`` with both where another batch sends the update too, else the recovery.

    Args:
        problem: the update.
        run: a completed one, whose data the recovery was polished from.
        recovery: certified.
    """
    data, labels, bound = recovery.inputs, recovery.labels, recovery.error_bound
    if recovery.status is not Status.EXACT or data is None or labels is None or bound is None:
        return recovery
    chain = problem.chain
    steps = steps_of(chain.input_shape, [stage.affine.out_shape for stage in chain.stages])
    off = 2.0 * bound

    def above(pictures: Tensor) -> Tensor:
        u = chain.trace(pictures)[-1][0]
        for op in chain.stages[-1].lead:
            u = op.forward(u)
        return u.flatten(1)

    for row, x in enumerate(data):

        def update(pictures: Tensor, row: int = row) -> Tensor:
            return torch.stack([_sent(problem, _with(data, row, one), labels) for one in pictures])

        near = unmoved(above, x, rearrangements(x, steps, off))
        for other in islice(unmoved(update, x, near[:UPDATES]), OTHERS):
            again = _polished(problem, run, _with(data, row, other.value))
            if again.status is not Status.EXACT or again.inputs is None:
                continue
            if float((again.inputs[row] - x).abs().max()) > off + (again.error_bound or 0.0):
                return _both(recovery, again, row, other)
    return recovery


def _with(data: Tensor, row: int, picture: Tensor) -> Tensor:
    other = data.clone()
    other[row] = picture
    return other


def _sent(problem: Problem, inputs: Tensor, labels: Tensor) -> Tensor:
    """The update of a batch, each tensor over its own norm."""
    sent = sent_for(problem, inputs, labels)
    return torch.cat([g.flatten() / max(float(problem.sent[n].norm()), 1e-300)
                      for n, g in sent.items() if n in problem.sent])  # fmt: skip


def _polished(problem: Problem, run: Run, inputs: Tensor) -> Recovery:
    known = run.descent.require_data()
    data = Estimate(inputs, known.error)
    return certificate.certify(
        problem, answers_of(problem, run._replace(descent=replace(run.descent, data=data)))
    )


def _both(recovery: Recovery, again: Recovery, row: int, other: Rearranged) -> Recovery:
    listed = [
        Candidate(one.inputs, one.labels, one.residual or 0.0, one.multiplicities)
        for one in (recovery, again)
        if one.inputs is not None
    ]
    return replace(
        recovery,
        status=Status.AMBIGUOUS,
        certified=frozenset(),
        candidates=tuple(listed),
        reason=f"sample {row} {other.words} sends this update too: no equation tells the batches "
        "in candidates apart, and there may be more",
    )
