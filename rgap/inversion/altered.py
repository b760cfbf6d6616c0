"""Whether an update that contradicts its declaration would show a change of what the inputs are of.

``x = Gᵀ∂b/‖∂b‖²`` holds whatever the loss, and to another loss an update is as good as to the
declared one.  But one whose declaration is refuted may as well have been changed: where ∂b is c
times what it was, x is 1/c of what it was, and if no other equation takes part in that, all of them
are met.  Such an x is that of no batch, and its bound would be false.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from rgap.arithmetic.doubles import Doubles
from rgap.inversion.answer import polished_from
from rgap.inversion.problem import Problem
from rgap.inversion.top import from_bias, head_cotangent
from rgap.limits import FITS, REFUTED, ROUNDED, SAFETY
from rgap.network.agreement import by_mode
from rgap.network.chain import Chain
from rgap.network.recording import record
from rgap.precision import Estimate
from rgap.recursion.reached import Descent

__all__ = ["OTHER", "UNSEEN", "heard_above", "shows_changes"]

OTHER = (
    "the inputs are not certified: a layer above '{}' took in something else than the model makes "
    "of them, so that a gradient of one of the two is not the client's, or the weights are others"
)
FACTOR = 2.0  # exact in every format, and far beyond what any error explains
MEMBERS = 4  # of the ensemble that are sent through the model

UNSEEN = (
    "the inputs are not certified: the update contradicts what was declared, and if what is wrong "
    "is not the loss but one gradient of '{}', no other equation would show it; write "
    "loss='unknown' to have them under that condition"
)


def shows_changes(problem: Problem, descent: Descent) -> bool:
    """True if no gradient of the layer where a sample was read can be a multiple of what it was.

    The weight's and the bias's gradient are doubled in turn, and the sample is read again.

    Args:
        problem: the update, with the chain that the descent is of.
        descent: to the data, from a fully connected layer with a bias.
    """
    start = max(descent.cotangents)
    stage = problem.chain.stages[start]
    for name in (stage.affine.weight_name, stage.affine.bias_name):
        own = problem.gradients.original
        changed = {n: FACTOR * g if n == name else g for n, g in own.items()}
        again = replace(problem, gradients=Doubles(changed, problem.gradients.device, problem.room))
        x, k, mixed = from_bias(again, stage)
        if mixed:
            continue
        other = again.descend(start, x, k)
        if other.refuted:
            continue
        if other.data is None:
            return False
        if polished_from(again, other, head_cotangent(again, other)).misfit <= FITS:
            return False
    return True


def heard_above(problem: Problem, prefix: Chain, known: Estimate) -> bool | None:
    """True if layers above a prefix took in what the model makes of the data, and of no multiple.

    False if one of them took in something else; None if none tells, or a step draws at random.

    Rows of a fully connected layer's gradient ``Σ_p k_p h_pᵀ`` lie in the span of its inputs h_p,
    whatever the loss: none may stick out by more than rounding, noise and the errors of the data
    explain, and with a multiple of the data some must.

    Args:
        problem: with the whole network.
        prefix: the layers that gave the data.
        known: the data, [1, *input_shape].
    """
    held = {stage.affine.weight_name for stage in prefix.stages}
    if any(map(by_mode, problem.model.modules())):
        return None
    model = copy.deepcopy(problem.model).double()
    weights = {n: id(p) for n, p in model.named_parameters() if n in problem.sent and n not in held}
    value = known.value
    points = [value, FACTOR * value, *(value + e for e in known.error[:MEMBERS])]
    runs = [record(model, prefix.input_shape, x) for x in points]
    told = False
    for name, at_weight in weights.items():
        taken = [run.taken.get(at_weight) for run in runs if run is not None]
        sent = problem.gradients[name]
        if len(taken) < len(points) or None in taken or not bool((sent != 0).any()):
            continue
        at, doubled, *moved = [_sticks_out(sent, rows) for rows in taken if rows]
        own = ROUNDED * problem.precision.unit * float(sent.norm())
        own += SAFETY * float(problem.precision.noise_std(name, sent).square().sum()) ** 0.5
        allowed = own + SAFETY * max((float((m - at).norm()) for m in moved), default=0.0)
        if float(at.norm()) > allowed:
            return False
        told = told or float(doubled.norm()) > REFUTED / SAFETY * allowed
    return told or None


def _sticks_out(gradient: Tensor, taken: list[Tensor]) -> Tensor:
    """What of the rows of a gradient is not in the span of a layer's inputs."""
    rows = gradient.flatten(1)
    inputs = torch.cat([h.reshape(-1, rows.shape[1]) for h in taken]).to(rows)
    basis, values, _ = torch.linalg.svd(inputs.T, full_matrices=False)
    kept = basis[:, values > torch.finfo(values.dtype).eps * len(inputs) * values[:1]]
    inside: Tensor = (rows @ kept) @ kept.T
    return rows - inside
