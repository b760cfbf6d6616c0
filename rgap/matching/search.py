"""Matching the whole update by a candidate batch: Gauss–Newton, and published optimisers.

No chain of layers and no closed form is needed, and nothing is certified: the answer is the batch
whose update came nearest.  Where :func:`rgap.invert` recovers exactly, use it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, prod

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.completion.complete import PriorSchedule, grey
from rgap.jacobian.module_update import ModuleUpdate
from rgap.machine import memory
from rgap.matching.checkpoint import Checkpoint, Ended, Progress, digest
from rgap.matching.first_order import first, iterate, random_rows
from rgap.matching.gauss_newton import search
from rgap.matching.objective import Objective
from rgap.matching.presets import PRESETS, Preset
from rgap.matching.problem import Callback, Limits, SearchProblem
from rgap.progress import Progress as Line
from rgap.progress import Shown
from rgap.recovery import Candidate, Recovery, Status
from rgap.solvers.gauss_newton import Schedule
from rgap.solvers.priors import Prior
from rgap.update.local_training import LocalTraining
from rgap.update.preflight import ClientView, device_of
from rgap.update.update import Update

__all__ = ["METHODS", "Checkpoint", "Ended", "Matching", "Progress", "match"]

NEWTON = "gauss_newton"


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

COPIES = 4  # of the update that a step holds: as sent, of the answer, their gap, a product
MET = 1e-3  # normalised residual up to which an answer reproduces the update
ROUNDED = 30.0  # the same in units of the update's rounding, where that is coarser
UNCERTIFIED = "matching certifies nothing: other batches may send the same update"


@dataclass(frozen=True, eq=False, repr=False)
class Matching(Recovery):
    """A recovery by search; ``COMPLETED`` where the update is met, never ``EXACT``.

    ``inputs`` is None where the nearest batch does not reproduce the update to a thousandth,
    parameter by parameter, to its rounding, or to its stated noise; that batch is
    :attr:`~rgap.Recovery.nearest` then, the only candidate.

    Attributes:
        method: name.
        ended: why it stopped.
        objective: the method's own, at the answer.
        misfit: ``Σ_j ‖G_j(x) − G_j‖²/‖G_j‖²`` there.
        iterations: made.
        checkpoint: to go on from, or None where nothing was begun.
    """

    method: str = ""
    ended: Ended = Ended.DONE
    objective: float = inf
    misfit: float = inf
    iterations: int = 0
    checkpoint: Checkpoint | None = None

    def summary(self) -> dict[str, object]:
        """As plain numbers, for JSON."""
        own = {
            "method": self.method,
            "ended": self.ended.name,
            "objective": self.objective if isfinite(self.objective) else None,
            "misfit": self.misfit if isfinite(self.misfit) else None,
            "iterations": self.iterations,
        }
        return {**super().summary(), **own}


def match(
    model: nn.Module,
    update: Update,
    *,
    method: str | Preset = "gauss_newton",
    labels: Tensor | None = None,
    batch_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    start: Tensor | Recovery | None = None,
    prior: Prior | str | None = None,
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

    Args:
        model: the network that the update was computed on, in the client's mode: in train mode
            batch norms take the statistics of the whole candidate batch.  It is left as it is.
        update: what the client sent.
        method: a name of :data:`METHODS`, or a :class:`~rgap.matching.presets.Preset` of your own.
        labels: the targets; else the update's, else read off it; ``dlg`` searches them too.
        batch_size: overrides ``update.batch_size``.
        input_shape: shape of one sample, as for :func:`rgap.invert`.
        start: a batch to begin with, or a recovery that holds one, in place of the first random
            start.  The objective of the answer is never larger than that of the start.
        prior: of the data, itself or by its name in :data:`rgap.priors.PRIORS`; by default the
            total variation, for ``gauss_newton`` that of pictures
            (:func:`rgap.solvers.priors.natural`) or, without neighbours, the distance from the
            middle.  ``dlg`` has none.
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
            steps without ``local``, a start of another shape, a checkpoint of another call.

    >>> import rgap
    >>> model = rgap.models.lenet(seed=0)
    >>> update = rgap.capture(model, rgap.photos.load(1).float(), torch.tensor([3]))
    >>> found = rgap.match(model, update, method="ig", iterations=3)
    >>> found.status.name, found.nearest.shape, found.nearest_labels, found.ended.name
    ('UNDERDETERMINED', torch.Size([1, 3, 32, 32]), tensor([3]), 'DONE')
    """
    began = time.perf_counter()
    preset = _preset(method, time_limit, prior, patience)
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
    problem = SearchProblem.of(client, preset, start, prior, local)
    starts, usual = (preset.restarts, preset.iterations) if preset else (1, Schedule.steps)
    limits = Limits(
        validation.count("restarts", starts if restarts is None else restarts),
        validation.count("iterations", usual if iterations is None else iterations),
        patience,
        seed=validation.seed(seed),
    )
    settings = _settings(problem, preset, limits)
    if checkpoint is not None:
        checkpoint.require(settings)
    deadline = began + time_limit if time_limit < inf else None
    with Line(progress, deadline) as show:
        limits = replace(
            limits,
            seconds=time_limit + began - time.perf_counter(),
            callback=_told(show, callback, None if preset is None else limits.iterations),
            settings=settings,
            checkpoint=checkpoint,
        )
        answer = _published(problem, preset, limits) if preset else _newton(problem, limits)
    return replace(answer, seconds=time.perf_counter() - began)


def _preset(
    method: str | Preset, time_limit: float, prior: Prior | str | None, patience: int | None
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
        "prior": repr(problem.prior),
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
    run = Run(NEWTON, ended, held.lowest, held.steps, limits.saved(held.state()))
    best = held.best if isfinite(held.lowest) else None
    return _answer(problem, run, best, problem.source.targets)


def _published(problem: SearchProblem, preset: Preset, limits: Limits) -> Matching:
    """One of the presets, all starts together."""
    bounds, start = problem.bounds, problem.start
    where = preset.coordinates(bounds)
    dtype = torch.float64 if problem.client.update.dtype == torch.float64 else torch.float32
    objective = Objective(
        problem.model, problem.gradients, problem.source, problem.shape, preset, where,
        problem.prior, dtype,
    )  # fmt: skip
    box = None
    if preset.boxed and bounds is not None:
        box = where.rows(bounds)
    rows = random_rows(objective, start, box, limits.restarts, limits.seed)
    if limits.checkpoint is None:
        state = first(objective, rows)
    else:
        state = {n: t.to(rows.device) for n, t in limits.checkpoint.tensors.items()}
    ended, state = iterate(objective, state, box, limits)
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
    run = Run(preset.name, ended, value, int(state["iteration"]), limits.saved(state))
    return _answer(problem, run, best, targets)


@dataclass(frozen=True, eq=False)
class Run:
    """How a search went; attributes as of :class:`Matching`."""

    method: str
    ended: Ended
    objective: float
    iterations: int
    checkpoint: Checkpoint


def _answer(
    problem: SearchProblem, run: Run, best: Tensor | None, targets: Tensor | None
) -> Matching:
    """The recovery, its status and why."""
    unknowns, numbers = prod(problem.shape), sum(g.numel() for g in problem.gradients.values())
    said = problem.notes
    if numbers < unknowns:
        said += (f"the update has {numbers} numbers for {unknowns} unknowns: most of the answer "
                 "is chosen by the start and the prior",)  # fmt: skip
    empty = Matching(
        inputs=None,
        labels=None if targets is None else targets.cpu(),
        status=Status.UNDERDETERMINED,
        layers=(),
        residual=None,
        predicted_error=None,
        error_bound=None,
        reason=f"{run.method} found no batch: {run.ended.value}",
        warnings=said,
        method=run.method,
        ended=run.ended,
        iterations=run.iterations,
        checkpoint=run.checkpoint,
    )
    if best is None or targets is None:
        return empty
    precision = problem.precision
    gradients = {n: g.double() for n, g in problem.gradients.items()}
    source = replace(problem.source, targets=targets)
    equations = ModuleUpdate(problem.model, gradients, source, problem.shape, precision=precision)
    gaps = equations.gaps(best)
    size = sum(size**2 for _, size in gaps.values())
    residual = (sum(gap**2 for gap, _ in gaps.values()) / size) ** 0.5
    # A tensor that was sent as zero has no norm to be measured by: it counts in the whole.
    normalised = sum((gap / size) ** 2 for gap, size in gaps.values() if size > 0)
    missed = sum((gap * equations.scales[n]) ** 2 for n, (gap, _) in gaps.items())
    misfit = max(normalised, residual**2)
    how = f"{run.iterations} iterations of {run.method}, {run.ended.value}"
    met = f"a normalised residual of {misfit**0.5:.1e}"
    answer = replace(empty, residual=residual, objective=run.objective, misfit=misfit)
    least = max(MET, ROUNDED * torch.finfo(problem.client.update.dtype).eps) ** 2
    blank = grey(problem.shape[0], problem.shape[1:], problem.bounds, 0).to(best)
    each, whole = equations.allowed(precision, blank)
    if max(missed, residual**2) <= max(least, each) and residual**2 <= max(least, whole):
        reason = f"the answer reproduces the update to {met} ({how}); {UNCERTIFIED}"
        return replace(answer, inputs=best.cpu(), status=Status.COMPLETED, reason=reason)
    reason = f"the nearest batch, in candidates, does not reproduce the update: {met} ({how})"
    if precision.noisy and not whole:
        reason += "; the stated noise would explain a blank batch too: no batch is told from others"
    nearest = Candidate(best.cpu(), answer.labels, residual)
    return replace(answer, labels=None, reason=reason, candidates=(nearest,))
