"""From recovered data back up to the head: its cotangent, its target, its label."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rgap.batches import label_identity, rows_of
from rgap.batchloss import BatchLoss
from rgap.certificate import Answer
from rgap.doubles import row_blocks
from rgap.head import target_of
from rgap.network import Chain, Stage
from rgap.polish import Polished, polish
from rgap.precision import Known, carried
from rgap.problem import Problem
from rgap.recursion import Descent


def read_answer(problem: Problem, descent: Descent, kappa: Known) -> Answer:
    """Polish what the recursion recovered and read its label at the head."""
    polished = _polished(problem, descent, kappa)
    stage = problem.chain.stages[-1]
    features = top_features(problem.chain, polished.data)
    target, tolerance = target_of(stage, features, kappa, problem.update.loss, problem.precision)
    labels, distance = problem.update.loss.read(target)
    return Answer(descent, polished, target, labels, float(distance), tolerance)


def read_batch(problem: Problem, descent: Descent, head: BatchLoss) -> Answer:
    """Polish the pictures of a batch all together and check their labels by the identity."""
    lowest = descent.solutions.get(0)
    settled = lowest is not None and lowest.solution.stats.route == "separation"
    polished = _polished(problem, descent, head, settled)
    stage = problem.chain.stages[-1]
    features = top_features(problem.chain, polished.data)
    error = torch.stack([stage.affine.linear(e) for e in features.error])
    logits = Known(stage.affine.forward(features.value), error)
    _, distance, tolerance = label_identity(problem, head, logits)
    rows = rows_of(head, problem.labels)
    return Answer(descent, polished, head.targets, rows.labels, distance, tolerance, rows)


def _polished(
    problem: Problem, descent: Descent, kappa: Known | BatchLoss, settled: bool = False
) -> Polished:
    low, high = problem.value_range or (0.0, 1.0)
    return polish(
        problem.chain,
        problem.gradients,
        descent.require_data(),
        kappa,
        problem.precision,
        descent.preconditioner(problem.chain),
        high - low,
        settled,
    )


def head_cotangent(problem: Problem, descent: Descent) -> Known:
    """Cotangent at the head: known from the descent, or read off the head's own gradient."""
    last = len(problem.chain.stages) - 1
    if last in descent.cotangents:
        return descent.cotangents[last]
    stage = problem.chain.stages[-1]
    weight, bias = head_gradients(stage, problem.gradients)
    if bias is not None:
        return Known(
            bias[None],
            problem.precision.normal(torch.full_like(bias, problem.precision.noise))[:, None],
        )
    x = top_features(problem.chain, descent.require_data())
    scale = x.value[0].square().sum().clamp_min(1e-300)
    k = weight @ x.value[0] / scale
    variance = torch.cat(
        [
            ((g.abs() * problem.precision.unit).square() + problem.precision.noise**2)
            @ x.value[0].square()
            for _, g in row_blocks(weight, k)
        ]
    )
    error = problem.precision.normal(variance.sqrt()) / scale  # rows of G are independent
    return Known(k[None], error[:, None])


def top_features(chain: Chain, data: Known) -> Known:
    """Input of the last affine map, with the ensemble carried up."""

    def rise(x: Tensor) -> Tensor:
        for stage in chain.stages[:-1]:
            for op in stage.lead:
                x = op.forward(x)
            x = stage.affine.forward(x)
            for op in stage.tail:
                x = op.forward(x)
        for op in chain.stages[-1].lead:
            x = op.forward(x)
        return x

    return carried(rise, data)


def head_gradients(stage: Stage, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """∂L/∂W and ∂L/∂b (or None) of a stage."""
    name = stage.affine.bias_name
    return gradients[stage.affine.weight_name], None if name is None else gradients[name]
