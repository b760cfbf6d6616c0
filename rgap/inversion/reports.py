"""Layer reports from what the recursion did and what it did not reach."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rgap.constraints.nullspace import null_directions
from rgap.constraints.ranks import weight_row_spaces
from rgap.inversion.problem import Problem
from rgap.network.chain import Stage
from rgap.recovery import LayerReport, Route
from rgap.recursion.descend import Descent
from rgap.solvers.rank import Rank


def layer_reports(problem: Problem, descent: Descent | None) -> tuple[LayerReport, ...]:
    """One report per stage, in forward order."""
    return tuple(_report(problem, descent, stage) for stage in problem.chain.stages)


def _report(problem: Problem, descent: Descent | None, stage: Stage) -> LayerReport:
    affine, batch = stage.affine, problem.batch
    read = int(affine.reads.sum())
    unknowns, unread = batch * read, batch * (affine.reads.numel() - read)

    def weight_rank() -> int:
        active = affine.weight.new_ones(batch, *affine.out_shape, dtype=torch.bool)
        step = None if descent is None else descent.solutions.get(stage.index)
        spaces = weight_row_spaces(affine, active if step is None else step.active)
        return sum(space.rank.rank for space in spaces)

    halt = None if descent is None else descent.halt
    note = halt.reason if halt is not None and halt.stage == stage.name else ""
    if descent is None or stage.index not in descent.cotangents:
        step = None if descent is None else descent.solutions.get(stage.index)
        if step is None:
            return LayerReport(
                stage.name,
                affine.kind,
                unknowns,
                None,
                None,
                None,
                inf,
                inf,
                inf,
                0.0,
                Route.NOT_REACHED,
                note,
                unread,
                weight_rank,
            )
    assert descent is not None
    known = descent.features.get(stage.index)
    predicted = None if known is None else float(known.error.square().mean().sqrt())
    step = descent.solutions.get(stage.index)
    if step is None:  # where the recursion started: all of u was read off the gradient
        route = Route.HEAD_EQUATIONS if affine.bias_name is None else Route.BIAS_ATTACK
        return LayerReport(
            stage.name,
            affine.kind,
            unknowns,
            unknowns,
            unknowns,
            0,
            inf,
            1.0,
            0.0,
            0.0,
            route,
            note,
            unread,
            weight_rank,
            lambda count: affine.weight.new_empty(0, batch, *affine.in_shape),
            predicted,
        )
    stats = step.solution.stats
    cotangent, active = step.cotangent, step.active

    def null_space(count: int) -> Tensor:
        nullity = count if stats.joint is None else stats.joint.nullity + unread
        if nullity == 0:
            return affine.weight.new_empty(0, batch, *affine.in_shape)
        return null_directions(affine, cotangent, active, nullity, count)

    return LayerReport(
        stage.name,
        affine.kind,
        unknowns,
        stats.block_rank,
        None if stats.joint is None else stats.joint.rank,
        None if stats.joint is None else stats.joint.nullity,
        stats.joint.gap if isinstance(stats.joint, Rank) else inf,
        stats.condition,
        stats.residual,
        step.seconds,
        Route(stats.route),
        note,
        unread,
        weight_rank,
        null_space,
        predicted,
    )
