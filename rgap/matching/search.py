"""Matching the whole update by a candidate batch: Gauss–Newton, and published optimisers.

No chain of layers and no closed form is needed, and nothing is certified: the answer is the batch
whose update came nearest.  Where :func:`rgap.invert` recovers exactly, use it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from math import inf, isfinite, prod

import torch
from torch import Tensor, nn

from rgap import priors, validation
from rgap.completion.complete import PriorSchedule, grey
from rgap.jacobian.module_update import ModuleUpdate
from rgap.machine import memory
from rgap.matching.checkpoint import Checkpoint, Ended, Progress
from rgap.matching.first_order import first, iterate, random_rows
from rgap.matching.gauss_newton import search
from rgap.matching.generative import searched
from rgap.matching.objective import Objective
from rgap.matching.presets import PRESETS, UNTRAINED, Preset
from rgap.matching.problem import Callback, Limits, SearchProblem
from rgap.matching.result import Matching, Run, answer_of
from rgap.priors import Likely
from rgap.priors.generator import Decoder, Generator, untrained
from rgap.progress import Progress as Line
from rgap.progress import Shown
from rgap.recovery import Recovery
from rgap.remedy import Remedy
from rgap.solvers.gauss_newton import Schedule
from rgap.update.local_training import LocalTraining
from rgap.update.preflight import ClientView, device_of
from rgap.update.storage import digest
from rgap.update.update import Update

__all__ = ["METHODS", "Checkpoint", "Ended", "Matching", "Progress", "match"]

NEWTON = "gauss_newton"
SEARCHED = Remedy("method='gifd', or prior=generator to have it choose", "--method gifd")


class _Methods(Collection[str]):
    """Gauss–Newton and every preset that there is at the moment."""

    def __contains__(self, name: object) -> bool:
        return name == NEWTON or name in PRESETS

    def __iter__(self) -> Iterator[str]:
        return iter((NEWTON, *PRESETS))

    def __len__(self) -> int:
        return 1 + len(PRESETS)


METHODS = _Methods()
"""Names of the methods, those of installed distributions among them."""

WEIGHED = 8  # copies of the weights that a search over them holds: two moments, slopes, the best
COPIES = 4  # of the update that a step holds: as sent, of the answer, their gap, a product


def match(
    model: nn.Module,
    update: Update,
    *,
    method: str | Preset = "gauss_newton",
    generator: nn.Module | Generator | None = None,
    labels: Tensor | None = None,
    batch_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    start: Tensor | Recovery | None = None,
    prior: Likely | None = None,
    local: LocalTraining | None = None,
    noise: float = 0.0,
    restarts: int | None = None,
    iterations: int | None = None,
    patience: int | None = None,
    time_limit: float = inf,
    callback: Callback | None = None,
    checkpoint: Checkpoint | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Shown = False,
    memory_budget: float | None = None,
) -> Matching:
    """Search the batch whose update matches a client's, on any differentiable network.

    ``gauss_newton``: residuals ``(G_j(x) − G_j)/‖G_j‖`` of every parameter and a prior whose weight
    falls to 0, as in a completion, in float64; kinks are annealed; starts one after another.
    ``dlg``, ``ig`` and ``gradinversion``: published optimisers, all starts at once, in the
    precision of the update; :mod:`rgap.matching.presets` says where each constant is from.
    ``latent``, ``gias`` and ``gifd`` search what a generator makes, codes, then its weights or its
    features; ``untrained`` the weights of one that was trained on nothing.

    Args:
        model: the network that the update was computed on, in the client's mode: in train mode
            batch norms take the statistics of the whole candidate batch.  It is left as it is.
        update: what the client sent.
        method: a name of :data:`METHODS`, or a :class:`~rgap.matching.presets.Preset` of your own.
        generator: for ``latent``, ``gias``, ``gifd`` and, if it is to be another, ``untrained``: a
            network from codes to data, an ``nn.Sequential`` of its blocks, or a
            :class:`~rgap.priors.generator.Generator`.  It is left as it is.
        labels: the targets; else the update's, else read off it; ``dlg`` searches them too.
        batch_size: overrides ``update.batch_size``.
        input_shape: shape of one sample, as for :func:`rgap.invert`.
        start: a batch to begin with, or a recovery that holds one, in place of the first random
            start.  The objective of the answer is never larger than that of the start.
        prior: of the data, itself, by its name in :data:`rgap.priors.PRIORS`, or a generator: the
            distance from what it draws; by default the total variation, for ``gauss_newton`` that
            of pictures (:func:`rgap.solvers.priors.natural`) or, without neighbours, the distance
            from the middle.  ``dlg`` has none.
        local: how the client trains, for an update over several local steps.
        noise: standard deviation of noise that was added to every entry of the update:
            ``gauss_newton`` stops where the misfit is what noise and rounding explain, and an
            answer with at most twice that squared misfit reproduces the update.
        restarts: starts; default: the method's own.
        iterations: at most; default: the method's own.
        patience: iterations without progress after which a published optimiser stops.
        time_limit: seconds after which no further step is begun.
        callback: told after every iteration; True stops.
        checkpoint: of an earlier call, its :class:`Matching` or its callback: goes on to the result
            that the call would have had.
        device: where to compute; default the CPU.
        seed: of the starts; the global random state is not touched.
        progress: True for a line on a terminal, or a function that is told; see
            :mod:`rgap.progress`.
        memory_budget: bytes to take on top of model and update; by default half of what the
            machine has free.  A search that needs more is refused before it begins.

    Returns:
        A :class:`Matching`.  Rows are sorted by label, or in the order of stated labels.

    Raises:
        ValueError: an unknown method, labels that cannot be read off the update, several local
            steps without ``local``, a start of another shape, a checkpoint of another call, a
            method without its generator, or one that makes data of another shape.

    >>> import rgap
    >>> model = rgap.models.lenet(seed=0)
    >>> update = rgap.capture(model, rgap.photos.load(1).float(), torch.tensor([3]))
    >>> found = rgap.match(model, update, method="ig", iterations=3)
    >>> found.status.name, found.nearest.shape, found.nearest_labels, found.ended.name
    ('UNDERDETERMINED', torch.Size([1, 3, 32, 32]), tensor([3]), 'DONE')
    """
    began = time.perf_counter()
    preset = _preset(method, time_limit, prior, patience)
    if generator is not None and (preset is None or not preset.domains):
        raise ValueError(
            f"generator: expected a method that searches what a generator makes; write {SEARCHED}"
        )
    if preset is not None and preset.domains and start is not None:
        raise ValueError(f"start: {preset.name!r} begins with codes, not data; leave it out")
    validation.refuse_broken(model)  # a lazy layer has no count
    parameters = sum(p.numel() for p in model.parameters())
    memory.require(
        f"matching the {parameters:,} parameters of {type(model).__name__}",
        COPIES * parameters * (8.0 if preset is None else update.dtype.itemsize),
        memory.budget_of(memory_budget, device_of(device)),
    )
    client = ClientView.of(
        model, update, labels=labels, batch_size=batch_size, input_shape=input_shape, noise=noise,
        device=device,
    )  # fmt: skip
    until = began + time_limit
    problem = SearchProblem.of(client, preset, start, prior, local, until)
    if problem.prior is not None:
        room = memory.budget_of(memory_budget, client.place)
        priors.require(problem.prior, problem.shape[0], room)
    maker = None if preset is None else _generator(generator, preset, problem, seed, memory_budget)
    starts, usual = (preset.restarts, preset.iterations) if preset else (1, Schedule.steps)
    limits = Limits(
        validation.count("restarts", starts if restarts is None else restarts),
        validation.count("iterations", usual if iterations is None else iterations),
        patience,
        seed=validation.seed(seed),
    )
    settings = _settings(problem, preset, limits)
    if maker is not None:
        settings["generator"] = maker.identity
    if checkpoint is not None:
        checkpoint.require(settings)
    deadline = began + time_limit if time_limit < inf else None
    with Line(progress, deadline) as show:
        limits = replace(
            limits,
            seconds=time_limit + began - time.perf_counter(),
            callback=_told(show, callback, limits.iterations if preset and not maker else None),
            settings=settings,
            checkpoint=checkpoint,
        )
        if preset is None:
            answer = _newton(problem, limits)
        elif maker is None:
            answer = _published(problem, preset, limits)
        else:
            answer = _made(problem, preset, maker, limits)
    return replace(answer, seconds=time.perf_counter() - began)


def _preset(
    method: str | Preset, time_limit: float, prior: Likely | None, patience: int | None
) -> Preset | None:
    """The preset of a published method, None for ours; refuses what a method does not take."""
    if method not in METHODS and not isinstance(method, Preset):
        names = ", ".join(map(repr, METHODS))
        raise ValueError(f"method: expected one of {names}, got {method!r}; write method='ig'")
    named = None if method == NEWTON else method
    preset = PRESETS[named] if isinstance(named, str) else named
    validation.seconds("time_limit", time_limit)
    if preset is not None and preset.joint and prior is not None:
        raise ValueError(f"prior: {preset.name!r} has none; write method='ig'")
    if preset is None and patience is not None:
        raise ValueError(
            "patience: gauss_newton stops by itself where steps change nothing; leave it out"
        )
    return preset


def _settings(problem: SearchProblem, preset: Preset | None, limits: Limits) -> dict[str, str]:
    """What a checkpoint must agree on with the call that goes on from it."""
    source, start, name = problem.source, problem.start, NEWTON
    if preset is not None:
        name = preset.name if preset == PRESETS.get(preset.name) else repr(preset)
    return {
        "method": name,
        "shape": str(list(problem.shape)),
        "labels": str(None if source.targets is None else source.targets.tolist()),
        "restarts": str(limits.restarts),
        "iterations": str(limits.iterations),
        "seed": str(limits.seed),
        "prior": "None" if problem.prior is None else priors.identity(problem.prior),
        "model": digest(*problem.model.state_dict().values()),
        "local": repr(source.local),
        "noise": repr(problem.client.noise),
        "update": digest(*problem.gradients.values()),
        "start": "None" if start is None else digest(start),
    }


def _told(show: Line, callback: Callback | None, total: int | None) -> Callback | None:
    """The callback, after the progress was shown; None where nobody listens."""
    if not show.listened:
        return callback

    def told(point: Progress) -> bool | None:
        number = point.number + 1 if total is None else min(point.number + 1, total)
        show.stage(point.what, number, total, how=f"best {point.best:.2e}")
        return None if callback is None else callback(point)

    return told


def _newton(problem: SearchProblem, limits: Limits) -> Matching:
    """Gauss–Newton from one start after another; the lowest misfit wins."""
    shape, bounds = problem.shape, problem.bounds
    gradients = {n: g.double() for n, g in problem.gradients.items()}
    equations = ModuleUpdate(
        problem.model, gradients, problem.source, shape, precision=problem.precision
    )
    like = next(iter(gradients.values()))
    starts = [
        grey(shape[0], shape[1:], bounds, limits.seed + number).to(like)
        for number in range(limits.restarts)
    ]
    if problem.start is not None:
        starts[0] = problem.start.to(like)
    filling = PriorSchedule.of(problem.prior, 1.0, shape[1:], bounds)
    target = equations.expected(problem.precision)
    schedule = replace(
        filling.schedule, seconds=limits.seconds, steps=limits.iterations, target=target
    )
    ended, held = search(equations, starts, filling.prior, schedule, bounds, limits)
    run = Run(NEWTON, problem.chooser, ended, held.lowest, held.steps, limits.saved(held.state()))
    best = held.best if isfinite(held.lowest) else None
    return answer_of(problem, run, best, problem.source.targets)


def _published(problem: SearchProblem, preset: Preset, limits: Limits) -> Matching:
    """One of the presets, all starts together."""
    bounds, start = problem.bounds, problem.start
    where, objective = preset.coordinates(bounds), _objective(problem, preset)
    size, box = prod(problem.shape), None
    if preset.boxed and bounds is not None:
        box = where.rows(bounds)

    def boxed(rows: Tensor) -> Tensor:
        if box is not None:
            rows[:, :size] = rows[:, :size].clamp(*box)
        return rows

    rows = random_rows(objective, start, box, limits.restarts, limits.seed)
    if limits.checkpoint is None:
        state = first(objective, rows)
    else:
        state = {n: t.to(rows.device) for n, t in limits.checkpoint.tensors.items()}
    ended, state = iterate(objective, state, boxed, limits)
    values = state["best_values"]
    number = int(values.argmin())
    row, value = state["best"][number], float(values[number])
    best = objective.data(row).double() if isfinite(value) else None
    if best is not None and start is not None and number == int(state["best_at"][number]) == 0:
        best = start.to(best)  # it went through the optimiser's units and precision
    targets = problem.source.targets
    if best is not None and targets is None:
        targets = objective.goals(row).argmax(1)
        if targets.ndim == 1:  # one label a pixel has no order of its own
            order = targets.argsort(stable=True)
            best, targets = best[order], targets[order]
    run = Run(
        preset.name, problem.chooser, ended, value, int(state["iteration"]), limits.saved(state)
    )
    return answer_of(problem, run, best, targets)


def _objective(problem: SearchProblem, preset: Preset, decoder: Decoder | None = None) -> Objective:
    """Of a preset's rows, in the precision of the update."""
    dtype = torch.float64 if problem.client.update.dtype == torch.float64 else torch.float32
    return Objective(
        problem.model, problem.gradients, problem.source, problem.shape, preset,
        replace(preset.coordinates(problem.bounds), decoder=decoder), problem.prior, dtype,
    )  # fmt: skip


def _made(problem: SearchProblem, preset: Preset, generator: Generator, limits: Limits) -> Matching:
    """What a generator makes."""

    def objective(decoder: Decoder, own: Preset) -> Objective:
        return _objective(problem, own, decoder)

    found = searched(generator, objective, preset, problem.shape, limits)
    best = None if found.data is None else found.data.double()
    run = Run(
        preset.name,
        problem.chooser,
        found.ended,
        found.objective,
        found.iterations,
        found.checkpoint,
    )
    return answer_of(problem, run, best, problem.source.targets)


def _generator(
    generator: nn.Module | Generator | None,
    preset: Preset,
    problem: SearchProblem,
    seed: int,
    memory_budget: float | None,
) -> Generator | None:
    """The generator of a method that has domains, fitted to the data; None for others."""
    if not preset.domains:
        return None
    if generator is None and preset.name != UNTRAINED.name:
        raise ValueError(
            f"generator: {preset.name!r} searches what a generator makes, got none; write "
            "generator=, a network from codes to data, or method='untrained'"
        )
    shape, bounds = problem.client.input_shape, problem.bounds
    made = untrained(shape, seed) if generator is None else Generator.of(generator)
    double = problem.client.update.dtype == torch.float64
    like = torch.zeros((), dtype=torch.float64 if double else torch.float32)
    made = made.fitted(shape, bounds, like.to(problem.client.place))
    weights = sum(p.numel() for p in made.blocks.parameters())
    if any(domain.over == "weights" for domain in preset.domains):
        if not weights:
            raise ValueError(
                f"generator: {preset.name!r} searches its weights, it has none; write "
                "method='latent'"
            )
        memory.require(
            f"{problem.shape[0]} copies of a generator of {weights:,} weights",
            WEIGHED * problem.shape[0] * weights * like.element_size(),
            memory.budget_of(memory_budget, problem.client.place),
        )
    return made
