"""Searches over what a generator makes: codes, then its features or its weights.

Domains are gone through one after another, each from the best that the one before it has found; the
answer is the batch of the lowest objective of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rgap.matching.checkpoint import Checkpoint, Ended, Progress
from rgap.matching.evolution import evolved
from rgap.matching.first_order import first, iterate
from rgap.matching.objective import Objective
from rgap.matching.presets import Domain, Preset
from rgap.matching.problem import Limits
from rgap.priors.generator import Decoder, FromBlock, FromWeights, Generator
from rgap.solvers.first_order import State

__all__ = ["Found", "searched", "within"]

Project = Callable[[Tensor], Tensor]
EVOLVING = 0.25  # share of the time that an evolution strategy may take


@dataclass(frozen=True, eq=False)
class Found:
    """Where a search over domains ended.

    Attributes:
        ended: why.
        data: the best batch, or None.
        objective: there.
        iterations: over all domains.
        checkpoint: to go on from.
    """

    ended: Ended
    data: Tensor | None
    objective: float
    iterations: int
    checkpoint: Checkpoint


@dataclass(frozen=True, eq=False)
class _Position:
    """Where a search stands between two iterations, beside the state of its domain.

    Attributes:
        number: of the domain.
        made: iterations of those before it.
        begin: what it begins with: rows of codes or of features [R, n].
        best: the best batch of those before it; zeros for none.
        lowest: the objective there.
    """

    number: int
    made: int
    begin: Tensor
    best: Tensor
    lowest: float = inf

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {
            "domain": torch.tensor([self.number, self.made]),
            "domain.begin": self.begin,
            "domain.best": self.best,
            "domain.lowest": torch.tensor(self.lowest, dtype=torch.float64),
        }

    @classmethod
    def taken(cls, held: dict[str, Tensor]) -> _Position:
        """What :meth:`tensors` made of it, out of a checkpoint's."""
        number, made = map(int, held.pop("domain").tolist())
        begin, best = held.pop("domain.begin"), held.pop("domain.best")
        return cls(number, made, begin, best, float(held.pop("domain.lowest")))


@dataclass(frozen=True, eq=False)
class _DomainLimits(Limits):
    """Limits of one domain, whose checkpoints say which and from where."""

    position: Mapping[str, Tensor] | None = None

    def saved(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """With the position of the domain."""
        return super().saved({**(self.position or {}), **tensors})


class _Stage(NamedTuple):
    """A domain, and the block that its rows go into."""

    domain: Domain
    block: int


def searched(
    generator: Generator,
    objective: Callable[[Decoder, Preset], Objective],
    preset: Preset,
    shape: Sequence[int],
    limits: Limits,
) -> Found:
    """The best batch that the generator makes, over the domains of a preset.

    Args:
        generator: fitted to the data.
        objective: of the rows of a decoder.
        preset: with its domains.
        shape: of the batch, [B, *input_shape].
        limits: iterations of each domain at most, and of the whole search.
    """
    deadline, batch = time.perf_counter() + limits.seconds, shape[0]
    stages = list(_stages(preset.domains, len(generator.blocks)))
    state: State | None = None
    if limits.checkpoint is None or not limits.checkpoint.tensors:
        begin = _codes(generator, batch, limits)
        if preset.evolution:
            codes = FromBlock(_part(generator, 0), (batch, *generator.latent_shape))
            begin, stopped = _evolved(objective(codes, preset), begin, preset.evolution, limits)
            if stopped:
                return Found(Ended.STOPPED, None, inf, 0, limits.saved({}))
        at = _Position(0, 0, begin, torch.zeros(*shape))
    else:
        place = generator.like.device
        state = {n: t.to(place) for n, t in limits.checkpoint.tensors.items()}
        at = _Position.taken(state)
    while True:
        stage = stages[at.number]
        decoder, rows, project = _opened(generator, stage, batch, at.begin)
        function = objective(decoder, replace(preset, rule=stage.domain.rule))
        share = stage.domain.iterations / sum(s.domain.iterations for s in stages[at.number :])
        here = _DomainLimits(
            len(rows), min(limits.iterations, stage.domain.iterations), limits.patience,
            share * (deadline - time.perf_counter()), limits.seed, limits.callback,
            limits.settings, position=at.tensors(),
        )  # fmt: skip
        ended, state = iterate(function, state or first(function, rows), project, here)
        winner = int(state["best_values"].argmin())
        row, value = state["best"][winner], float(state["best_values"][winner])
        lowest, best = at.lowest, at.best
        if value < lowest:
            lowest, best = value, function.data(row).detach()
        made = at.made + int(state["iteration"])
        last = at.number + 1 == len(stages) or not value < inf or ended is Ended.STOPPED
        if last or time.perf_counter() > deadline:
            data = best if lowest < inf else None
            return Found(ended, data, lowest, made, here.saved(state))
        begin = _handed_on(generator, stages[at.number + 1], stage, batch, row)
        at, state = _Position(at.number + 1, made, begin, best, lowest), None


def _evolved(
    objective: Objective, begin: Tensor, generations: int, limits: Limits
) -> tuple[Tensor, bool]:
    """First codes by an evolution strategy, and whether the callback stopped it.

    Its checkpoints hold nothing: whoever goes on from one begins anew, to the same codes.
    """
    until, lowest, stopped = time.perf_counter() + EVOLVING * limits.seconds, inf, False

    def ends(number: int, values: Tensor) -> bool:
        nonlocal lowest, stopped
        lowest = min(lowest, float(values.min()))
        if limits.callback is not None:
            point = Progress("generation", number, values, lowest, limits.saved({}))
            stopped = bool(limits.callback(point))
        return stopped or time.perf_counter() > until

    with objective.kernels():
        return evolved(objective.values, begin, generations, limits.seed, ends), stopped


def _stages(domains: Sequence[Domain], blocks: int) -> Iterator[_Stage]:
    """Domains in their order; features block by block, with balls that grow."""
    for domain in domains:
        if domain.over != "features":
            yield _Stage(domain, 0)
            continue
        for block in range(1, blocks):
            radius = domain.radius + (block - 1) * domain.growth
            yield _Stage(replace(domain, radius=radius), block)


def _codes(generator: Generator, batch: int, limits: Limits) -> Tensor:
    """Starts from N(0, 1), [R, n]."""
    draw = torch.Generator().manual_seed(limits.seed)
    shape = (limits.restarts, batch, *generator.latent_shape)
    codes = torch.randn(shape, generator=draw, dtype=torch.float64)
    return codes.flatten(1).to(generator.like)


def _opened(
    generator: Generator, stage: _Stage, batch: int, begin: Tensor
) -> tuple[Decoder, Tensor, Project | None]:
    """What makes the batch of a domain's rows, where they begin, and what they are kept in."""
    if stage.domain.over == "weights":
        codes = begin[0].reshape(batch, *generator.latent_shape)
        weights = FromWeights(generator.blocks, codes)
        return weights, weights.begin()[None], None
    shape = (batch, *_fed(generator, stage.block))
    decoder = FromBlock(_part(generator, stage.block), shape)
    if stage.domain.radius == inf:
        return decoder, begin, None

    def project(rows: Tensor) -> Tensor:
        off = (rows - begin).reshape(len(rows) * batch, -1)
        return begin + within(off, stage.domain.radius).reshape(rows.shape)

    return decoder, begin, project


def _fed(generator: Generator, block: int) -> torch.Size:
    """Shape of what goes into a block, of one sample."""
    code = torch.zeros(1, *generator.latent_shape).to(generator.like)
    with torch.no_grad():
        fed: Tensor = _part(generator, 0, block)(code)
    return fed.shape[1:]


def _part(generator: Generator, first_block: int, end: int | None = None) -> nn.Sequential:
    """Some of its blocks; none of them hand on what they get."""
    return nn.Sequential(*list(generator.blocks)[first_block:end])


def _handed_on(
    generator: Generator, following: _Stage, stage: _Stage, batch: int, row: Tensor
) -> Tensor:
    """What the next domain begins with, of the best row of this one, [1, n]."""
    if following.domain.over == "weights":
        return row[None]
    values = row.reshape(batch, *_fed(generator, stage.block))
    with torch.no_grad():
        made: Tensor = _part(generator, stage.block, following.block)(values)
    return made.reshape(1, -1)


def within(rows: Tensor, radius: float) -> Tensor:
    """The nearest rows with ``‖·‖₁ ≤ radius``.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra (2008).

    >>> within(torch.tensor([[3.0, 1.0], [0.5, 0.25]]), 2.0).tolist()
    [[2.0, 0.0], [0.5, 0.25]]
    """
    sizes = rows.abs()
    ordered = sizes.sort(1, descending=True).values
    excess = ordered.cumsum(1) - radius
    counts = torch.arange(1, rows.shape[1] + 1).to(rows)
    kept = (ordered * counts > excess).sum(1, keepdim=True).clamp_min(1)
    cut = (excess.gather(1, kept - 1) / kept).clamp_min(0.0)
    return rows.sign() * (sizes - cut).clamp_min(0.0)
