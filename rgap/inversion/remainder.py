"""Samples that no search found, from what the others leave of the update.

Of samples that are known the own gradients are known too.  Without them the update is that of fewer
samples, whose gradients determine values further down: what is left of a batch of four is a batch
of one.  It leads to data; what is certified of them is asked of the whole update afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rgap.completion.preimage import Astray, Preimage, preimage
from rgap.completion.value_settling import Row
from rgap.inversion.batch_rows import in_order
from rgap.inversion.problem import Problem
from rgap.inversion.replay import replayed, sent_for
from rgap.inversion.weighed import Weighed, weighed_at
from rgap.limits import USEFUL
from rgap.network.flow import Flow
from rgap.precision import Precision
from rgap.progress import Watch
from rgap.recovery import Candidate
from rgap.recursion.graph import GraphDescent, descend_graph

__all__ = ["nearest", "without_found"]

COPIES = 40.0  # bytes a number: what is taken off, of one sample, what is left, its noise, a sum
ROUNDINGS = 2.0  # of the update and of what is taken off it, in their difference


def without_found(
    problem: Problem,
    flow: Flow,
    told: GraphDescent,
    astray: Astray,
    start: Callable[[int], Tensor],
    precision: Precision,
    watch: Watch,
) -> dict[int, Row | Tensor] | None:
    """Samples as they were found, and data near the others; None if none of these follows.

    Args:
        problem: the update.
        flow: the network up to its last layer.
        told: what gradients determine of its values.
        astray: where the search ended, with the samples that it found.
        start: the batch to begin with, by the number of the trial.
        precision: of the update, with as many errors as ``told`` has.
        watch: told which value is solved.
    """
    numbers = sum(g.numel() for g in problem.sent.values())
    read = _targets(problem, flow, told)
    if isinstance(read, str) or COPIES * numbers > problem.room:
        return None
    data, found = start(0), set(astray.found)
    for row, x in astray.nearest.items():
        data[row] = x
    for row, (sample, _) in astray.found.items():
        data[row] = sample.value[0]
    while 0 < len(found) < len(data) and not problem.clock.over:
        rest = [row for row in range(len(data)) if row not in found]
        known = torch.tensor([float(row in found) for row in range(len(data))]).to(data)
        own = sent_for(problem, data, read.labels, read.scale * known)
        left = {name: g - own[name] for name, g in problem.gradients.items()}
        noise = dict[str, Tensor]()
        for name, g in problem.gradients.items():
            rounded = ROUNDINGS * precision.unit * (g.abs() + own[name].abs())
            noise[name] = torch.hypot(precision.noise_std(name, g), rounded)
        fewer = descend_graph(
            flow,
            left,
            told.cotangents[len(flow.nodes) - 1].of(rest),
            replace(precision, noise=0.0, entries=noise),
            lambda name: watch(f"what '{name}' gives"),
            problem.room,
            told.of(rest),
            problem.deadline,
        )
        begin = partial(_rows, start, rest)
        made = preimage(flow, fewer, begin, watch, problem.clock, problem.room, left)
        if isinstance(made, Preimage):
            more = dict(enumerate(made.data.value))
        else:
            more = {number: end[0].value[0] for number, end in made.found.items()}
            for number, x in made.nearest.items():
                data[rest[number]] = x
        for number, x in more.items():
            data[rest[number]] = x
            found.add(rest[number])
        if not more:
            break
    if len(found) == len(astray.found):
        return None
    return {row: astray.found.get(row, data[row]) for row in range(len(data))}


def nearest(
    problem: Problem, flow: Flow, told: GraphDescent, data: Mapping[int, Tensor]
) -> Candidate | None:
    """Data that are not certified, with the targets that the known input of the last layer says.

    None where these do not follow, a sample is missing, or they send another update.

    Args:
        problem: the update.
        flow: the network up to its last layer.
        told: what gradients determine of its values.
        data: by the number of a sample, [*in_shape].
    """
    read = None if len(data) < problem.batch else _targets(problem, flow, told)
    if read is None or isinstance(read, str):
        return None
    labels = read.labels.sort().values if problem.labels is None else problem.labels
    order = in_order(read.labels, labels)
    if order is None:
        return None
    x = torch.stack([data[row] for row in range(len(data))])[order]
    if problem.value_range is not None:
        x = x.clamp(*problem.value_range)
    if not bool(torch.isfinite(x).all()):
        return None
    residual, _ = replayed(problem, x, labels)
    return Candidate(x, labels, residual) if residual <= USEFUL else None


def _targets(problem: Problem, flow: Flow, told: GraphDescent) -> Weighed | str:
    """Of all samples, where the input of the last layer is known."""
    [place] = flow.nodes[-1].sources
    affine = problem.chain.stages[-1].affine
    if place not in told.values or getattr(flow.nodes[-1].link, "name", "") != affine.name:
        return "the input of the last layer is not known"
    return weighed_at(problem, told.values[place].shaped(affine.in_shape))


def _rows(start: Callable[[int], Tensor], rows: list[int], number: int) -> Tensor:
    return start(number)[rows]
