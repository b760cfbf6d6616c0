"""Past max-pools by the winners that the layers below give away; and pictures where that ends."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from rgap.completion.features import coarse
from rgap.completion.max_pool import PoolSearch, find_winners
from rgap.constraints.known_input import Standardised, Whole
from rgap.inversion.problem import Problem
from rgap.jacobian.module_update import KnownFeatures
from rgap.network.reshape import Op, Reshape
from rgap.precision import Estimate
from rgap.progress import Progress
from rgap.recursion.descend import Descent

SPARE = 2.0  # equations, in multiples of the unknowns, that a search takes below the first pool


def unpooled(
    problem: Problem, descent: Descent, seconds: float, show: Progress
) -> tuple[Descent, PoolSearch | None]:
    """The descent through max-pools whose winners the layers below give away, as far as it goes.

    A pool counts as passed where the equations of the stage below it determine that stage and do
    not contradict each other, as with wrong winners they do.  A search that ended near the first
    pool's winners is returned too.
    """
    chain, deadline = problem.chain, time.perf_counter() + seconds
    top, last = descent, list[PoolSearch]()

    def unpool(index: int, op: Op, u: Estimate, cot: Estimate) -> tuple[Estimate, Estimate] | None:
        if index != descent.reached.index:  # one at a time: what was passed before is kept
            return None
        show.stage(f"winners of {op.name}")
        found = find_winners(
            problem.model, chain, problem.sent, index, op, u, cot,
            deadline - time.perf_counter(), problem.precision.seed,
            surplus=0.0 if descent is top else SPARE,
        )  # fmt: skip
        if found is not None:
            last.append(found)
        return None if found is None else found.passed

    while (reached := descent.reached).u is not None and descent.halt is not None:
        last.clear()
        fresh = problem.descend(reached.index, reached.u, reached.k, show.stage, unpool)
        if reached.index - 1 not in fresh.inputs or fresh.refuted:
            break
        descent = replace(
            fresh,
            solutions={**descent.solutions, **fresh.solutions},
            inputs={**descent.inputs, **fresh.inputs},
            cotangents={**descent.cotangents, **fresh.cotangents},
        )
    return descent, last[0] if last and descent is top else None


def suggested(
    problem: Problem,
    descent: Descent,
    known: KnownFeatures,
    near: PoolSearch | None,
    seconds: float,
) -> Tensor | None:
    """A picture from known features, where no batch that meets the update was found."""
    filling, stage = problem.filling, problem.chain.stages[descent.reached.index]
    assert filling is not None
    if not isinstance(known.known, Whole):
        return None
    value = known.known.value
    if near is not None:
        stage, value = problem.chain.stages[descent.reached.index - 1], near.input
        size = tuple(value.shape)
        known = replace(known, layer=stage.name, shape=size, cotangent=torch.zeros_like(value))
    channels = value.shape[1]
    for op in stage.lead:
        if isinstance(op, Reshape) and len(op.in_shape) > 1:
            channels = op.in_shape[0]
    source = replace(known, known=Standardised.of(value, channels))
    shape = (problem.batch, *problem.chain.input_shape)
    return coarse(
        problem.model, problem.sent, source, shape, filling.prior, problem.value_range,
        seconds, follow=near is None, seed=problem.precision.seed,
    )  # fmt: skip
