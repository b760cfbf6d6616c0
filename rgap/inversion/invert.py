"""The one way through the house: update → head → recursion → polish → certificate → Recovery."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from rgap import priors, validation
from rgap.completion.complete import PriorSchedule
from rgap.halt import Halt, HaltKind
from rgap.head.mapped import Mapped
from rgap.inversion import begin, outcomes
from rgap.inversion.answer import Run
from rgap.inversion.batch_rows import batch_of
from rgap.inversion.batch_size import counted
from rgap.inversion.conclude import concluded
from rgap.inversion.fallback import searched
from rgap.inversion.problem import Problem, prepare
from rgap.inversion.several import beside_targets
from rgap.machine.allowance import Until
from rgap.precision import Estimate
from rgap.priors import Likely
from rgap.progress import Progress, Shown
from rgap.recovery import Recovery, Route, Status
from rgap.seeding import start_as
from rgap.separation.batch import Unseparated
from rgap.separation.route import mixed, separate
from rgap.update.preflight import ClientView
from rgap.update.update import Update

__all__ = ["Head", "invert"]

WAITING = 60.0  # seconds of a completion or a search, where no limit is given
COUNTING = 0.5  # share of a limit for the equations, where a completion follows


@dataclass(frozen=True)
class Head:
    """Known features of the last layer, for studies that start below the head.

    Attributes:
        features: input of the last affine map, [B, n].
        cotangents: k at its output, [B, m].
    """

    features: Tensor
    cotangents: Tensor


def invert(
    model: nn.Module,
    update: Update,
    *,
    labels: Tensor | None = None,
    batch_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    head: Head | None = None,
    complete: bool = False,
    prior: Likely | None = None,
    start: Tensor | Recovery | None = None,
    value_range: tuple[float, float] | None = None,
    noise: float = 0.0,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Shown = False,
    memory_budget: float | None = None,
    time_limit: float | None = None,
) -> Recovery:
    """Recover from an update what its equations determine, and certify it.

    The head gives features and label of a single sample (B = 1); the samples of a batch are told
    apart below two fully connected layers or at a softmax head, whatever their labels.  The
    recursion solves one linear system a stage down to the data, Gauss–Newton on the whole update
    polishes, a replay through the model certifies.  The model is left as it was found.

    Args:
        model: the network that the update was computed on, in eval mode.  A batch norm in train
            mode ends the equations: what stands above it comes back, the status is UNSUPPORTED.
        update: what the client sent.
        labels: the labels if they are known, [B]; found from the update otherwise.
        batch_size: overrides ``update.batch_size``; where neither says it, it is found.
        input_shape: shape of one sample, where the update does not state it, or states another;
            not needed where the layers fix it (a fully connected first layer, a convolution below
            a fully connected one that only one square size fits).
        head: known head features, to study the recursion of a batch below the head.
        complete: go on where the recursion ends: what the equations leave open below is chosen
            by the prior (``COMPLETED``), or found to be determined by all of them together.  Where
            no closed form begins, the whole update is matched (:func:`rgap.match`).
        start: a batch that a completion begins with in place of grey noise, rows in any order, or a
            recovery that holds one: what an inverse of :mod:`rgap.learned` makes of the update.
        prior: of a completion, its name in :data:`rgap.priors.PRIORS`, or a generator of such data
            (``nn.Module``): the distance from what it draws, :class:`rgap.priors.drawn.Drawn`.  By
            default "natural": that of pictures, for inputs without neighbours the distance from
            the middle.
        value_range: range of the data.  Candidates that leave it by more than their error are
            refuted; the range that the update declares, the default, refutes only those that
            leave it by more than its full width.
        noise: standard deviation of noise added to every entry of the update.
        device: where to compute; default the CPU.
        seed: of the sampled errors; the global random state is not touched.
        progress: True for a line on a terminal, or a function that is told; see
            :mod:`rgap.progress`.
        memory_budget: bytes to take on top of model and update; by default half of what the
            machine has free.  A layer whose equations need more is solved without forming any
            matrix, by LSMR (by default from 4 GB on, beyond which that is faster); what fits no
            budget is refused before it is allocated.
        time_limit: seconds of the whole call after which no equations of a layer are solved and no
            ranks counted (with ``complete`` after half of them: the rest is the completion's), and
            neither a completion nor a search for data that give known features begins a further
            step.  A layer for which there is no time is not determined; the halt names it, its
            kind is ``LATE``.  What comes on top: telling samples apart, values below branches that
            gradients alone determine, and the polish of an answer that all equations determine.
            None: no limit for the equations, 60 s for the rest.

    Returns:
        A :class:`Recovery`; its ``status`` and ``reason`` say how far the update determines the
        batch, and ``explain()`` says it layer by layer.  The order of a batch is not in its
        gradient: rows come by label, or in the order of stated labels.

    Raises:
        ValueError: the update does not belong to a model of this shape, the input shape is
            unknown, labels are out of range, dropout is in train mode, a prior is given without
            ``complete``, or the budget is too small (:class:`rgap.machine.memory.OutOfMemory`,
            which says for what).

    >>> import rgap, torch
    >>> model = rgap.models.lenet(seed=0)
    >>> picture = rgap.photos.load(count=1, dtype=torch.float32)
    >>> update = rgap.capture(model, picture, torch.tensor([3]))
    >>> recovery = rgap.invert(model, update)
    >>> recovery.status.name, recovery.labels.tolist()
    ('EXACT', [3])
    """
    began = time.perf_counter()
    seconds = WAITING if time_limit is None else time_limit
    validation.seconds("time_limit", seconds)
    if prior is not None and not complete:
        raise ValueError(
            f"prior: expected none where nothing is completed, got {prior!r}; write complete=True "
            "as well"
        )
    if start is not None and not complete:
        raise ValueError(
            "start: expected none where nothing is completed; write complete=True as well"
        )
    if head is not None and not isinstance(head, Head):
        raise TypeError(
            f"head: expected a Head, got {head!r}; write "
            "rgap.Head(features, cotangents), or head=None to have it read off the update"
        )
    client = ClientView.of(
        model, update, batch_size=batch_size, labels=labels, input_shape=input_shape, noise=noise,
        device=device, ready=False,
    )  # fmt: skip
    problem = prepare(client, value_range, validation.seed(seed), memory_budget)
    problem = replace(problem, deadline=began + seconds)
    if time_limit is not None:
        share, place = COUNTING if complete else 1.0, str(problem.gradients.device)
        problem = replace(problem, ahead=Until(began, seconds, share, place))
    if complete:
        filling = PriorSchedule.of(
            prior, seconds, problem.chain.input_shape, problem.value_range, began
        )
        priors.require(filling.prior, problem.batch, problem.room)
        if start is not None:
            size = None if problem.stated is None else problem.batch
            filling = replace(filling, start=start_as(start, size, problem.chain.input_shape))
        problem = replace(problem, filling=filling)
    with Progress(progress) as show:
        recovery = _run(problem, head, show)
        recovery = counted(problem, recovery) if head is None else recovery
        recovery = searched(problem, recovery, show)
        recovery = outcomes.explained(problem, recovery) if head is None else recovery
    return replace(recovery, seconds=time.perf_counter() - began)


def _run(problem: Problem, head: Head | None, show: Progress) -> Recovery:
    chain = problem.chain
    if head is None and (early := begin.at_data(problem, show)) is not None:
        return early
    if problem.unready:
        raise ValueError(problem.unready)
    if not chain.stages:
        assert chain.barrier is not None
        words = chain.barrier.words
        halt = Halt(HaltKind.BARRIER, chain.barrier.node, words)
        return outcomes.stopped(problem, Status.UNSUPPORTED, words, None, halt)
    if head is not None:
        show.stage("recursion from the given head")
        top = chain.stages[-1].affine
        x = _given("features", head.features, top.in_shape, problem)
        kappa = _given("cotangents", head.cotangents, top.out_shape, problem)
        descent = problem.descend(len(chain.stages) - 1, x, kappa, show.stage)
        recovery = concluded(problem, [Run(descent, kappa)], show)
        *below, last = recovery.layers
        return replace(recovery, layers=(*below, replace(last, route=Route.GIVEN)))
    if begin.over_positions(problem):
        return outcomes.over_positions(problem)
    if problem.stated != 1 and not isinstance(problem.update.loss, Mapped):
        separated = separate(batch_of(problem), show.stage)
        # One sample of a batch of unknown size has routes of its own where this one has none.
        single = problem.stated is None and not mixed(batch_of(problem))
        if not (single and isinstance(separated, Unseparated)):
            recovery = begin.at_batch(problem, separated, show)
            if isinstance(separated, Unseparated) and separated.factor is not None:
                recovery = begin.at_scaled_batch(problem, separated.factor, show) or recovery
            return beside_targets(problem, recovery, show)
    if not problem.update.loss.equations:
        return outcomes.no_equations(problem)
    lowest = begin.lowest_fully_connected(problem)
    if lowest is not None:
        return begin.at_bias(problem, lowest, show)
    return begin.at_head(problem, show)


def _given(name: str, value: Tensor, shape: tuple[int, ...], problem: Problem) -> Estimate:
    """A given value, known to the precision of the client's arithmetic."""
    if value.ndim < 2 or len(value) != problem.batch or value[0].numel() != prod(shape):
        raise ValueError(
            f"expected head.{name} of shape {[problem.batch, *shape]}, got {list(value.shape)}; "
            f"write rgap.Head(features, cotangents) with the input of the last layer and the "
            "cotangent at its output, one row per sample"
        )
    value = value.detach().to(problem.chain.stages[-1].affine.weight).reshape(-1, *shape)
    return Estimate(value, problem.precision.rounding(value))
