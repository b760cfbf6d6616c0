"""From a recursion that ended early to a batch that a prior completes, or to one that is exact."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from rgap import certificate
from rgap.activations import Activation
from rgap.batches import rows_of
from rgap.batchloss import BatchLoss
from rgap.completion import complete, grey, inside
from rgap.module_update import ModuleUpdate
from rgap.network import Chain
from rgap.precision import Known
from rgap.problem import Problem
from rgap.progress import Progress
from rgap.readout import head_cotangent, read_answer, read_batch
from rgap.recovery import Recovery, Status
from rgap.recursion import Descent
from rgap.solvers.gauss_newton import Minimum, Step

SURE, SHARE = 16, 0.01  # surplus of equations, also relative, from which a solution is the only one
LOOSE = 0.1  # normalised residual from which a completion has not found what the update asks for
NEAR = 12  # steps of a completion that a polish follows
ROUGH = 1e-2  # error, in widths of the range, that a completion is assumed to have before a polish


def filled(
    problem: Problem,
    descent: Descent,
    kappa: Known | BatchLoss | None,
    show: Progress,
) -> Recovery:
    """Complete the batch below the stage at which the recursion ended.

    Where all equations together determine the data, though no stage alone does, the answer is
    polished on the whole update and certified like any other.
    """
    filling = problem.filling
    assert filling is not None
    halt = descent.require_halt()
    chain = problem.chain
    found_inside = inside(chain, descent.reached, problem.gradients, problem.precision)
    shape = (problem.batch, *chain.input_shape)
    update = ModuleUpdate(problem.model, problem.gradients, found_inside, shape)
    name = chain.stages[descent.reached.index].name
    show.stage(f"completion below {name}")

    def watch(step: Step, _: Tensor) -> None:
        show.stage(f"completion below {name}: step {step.number + 1}, misfit {step.misfit:.1e}")

    unknowns = prod(shape)
    surplus = update.equations - unknowns
    start = grey(problem.batch, chain.input_shape, problem.value_range, problem.precision.seed)
    schedule = filling.schedule
    sure = surplus >= max(SURE, SHARE * unknowns) and _followed(chain)
    if sure:  # the polish takes over once the solution is near
        schedule = replace(schedule, steps=min(schedule.steps, NEAR))
    found = complete(
        update,
        start,
        filling.prior,
        schedule,
        problem.value_range,
        kinked=_kinked(chain, descent.reached.index),
        watch=watch,
    )
    low, high = problem.value_range or (0.0, 1.0)
    rough = problem.precision.normal(torch.full_like(found.value, ROUGH * (high - low)))
    reached = replace(descent, data=Known(found.value, rough), halt=None, completed=True)
    if sure:
        show.stage("polish on the whole update")
        recovery = certificate.certify(problem, [_read(problem, reached, kappa)])
        if recovery.status in (Status.EXACT, Status.AMBIGUOUS):
            return recovery
    reason = _words(halt.reason, -surplus, unknowns, found)
    if isinstance(kappa, BatchLoss):
        inputs, labels = rows_of(kappa, problem.labels).expanded(found.value)
    else:
        inputs, labels = found.value, _label(problem, reached, kappa)
    return certificate.completed(problem, descent, inputs, labels, reason)


def _label(problem: Problem, descent: Descent, kappa: Known | None) -> Tensor:
    """The target whose cotangent is nearest to the head's."""
    if problem.labels is not None:
        return problem.labels
    known = head_cotangent(problem, descent) if kappa is None else kappa
    with torch.no_grad():
        model = copy.deepcopy(problem.model).double()
        outputs = model(descent.require_data().value)
    loss = problem.update.loss
    dense = loss.targets_from(outputs, known.value.reshape(outputs.shape))
    return loss.read(dense)[0]


def _followed(chain: Chain) -> bool:
    """True if every step of the network has a derivative that a polish can follow."""
    ops = [op for stage in chain.stages for op in (*stage.lead, *stage.tail)]
    return chain.complete and all(op.affine or isinstance(op, Activation) for op in ops)


def _kinked(chain: Chain, index: int) -> bool:
    """True if an activation below a stage changes its slope at a point."""
    ops = [op for stage in chain.stages[:index] for op in stage.tail]
    return any(isinstance(op, Activation) and op.homogeneous for op in ops)


def _read(
    problem: Problem, descent: Descent, kappa: Known | BatchLoss | None
) -> certificate.Answer:
    if isinstance(kappa, BatchLoss):
        return read_batch(problem, descent, kappa)
    known = head_cotangent(problem, descent) if kappa is None else kappa
    return read_answer(problem, descent, known)


def _words(why: str, missing: int, unknowns: int, found: Minimum) -> str:
    open_ = (
        f"at least {missing} of {unknowns} unknowns were chosen by the prior"
        if missing > 0
        else "what they leave open, or leave too badly conditioned, was chosen by the prior"
    )
    far = found.misfit > LOOSE**2
    how = "does NOT reproduce the update: its" if far else "reproduces the update to a"
    return (
        f"{why}; with the layers below {open_}, and the answer {how} normalised residual "
        f"{'is' if far else 'of'} {found.misfit**0.5:.1e} ({len(found.steps)} steps: {found.ended})"
    )
