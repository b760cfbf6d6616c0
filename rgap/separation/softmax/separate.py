"""Samples of a batch from a softmax head alone.

The cotangent p − e_c of every sample lies in the range of the head's gradient: for each class c
about C − B equations in B − 1 unknowns, one sample at a time.  Repeated labels are no defect of
rank; they only make samples hard to tell apart, by how little their probabilities differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rgap.jacobian.batch_loss import loss_scale
from rgap.labels.best import best
from rgap.labels.gradient import HeadGradient
from rgap.separation.batch import Batch, Separated, Unseparated
from rgap.separation.finish import finish, finish_together
from rgap.separation.identify import Identity, choose, similar
from rgap.separation.mixture import Mixture
from rgap.separation.peeling import GROWTH, IDLE, Collected, Starts, collect
from rgap.separation.softmax.coupled import SCATTERS, SMALL, Coupled, agreement, refined, rivals
from rgap.separation.softmax.equations import AtHead
from rgap.separation.softmax.turns import solve_turns
from rgap.separation.subspace import Consistency, restricted
from rgap.separation.targets import admissible, contradicted, near_copies, resolved
from rgap.separation.weights import all_weighed
from rgap.separation.whole import short_of
from rgap.solvers.least_squares import geodesic, levenberg_marquardt
from rgap.update.targets import CROSS_ENTROPY

FEWEST = 8  # classes that are always tried
NEAR = 0.1  # share of p − e_c outside the range of G up to which class c may well occur
PER_CLASS = 4  # starts at once for each class of the pool, at most ``MOST`` in all
LEAST, MOST = 16, 40
STARTS = 64
ROUNDS = 3  # of them
FEW = 32  # samples up to which all scatters are tried
HASTY = 3  # rounds without a new sample where rounding hides some of them anyway
BURIED = 10.0  # ε of the client: σ_B/σ_1 below which a search among many samples is in vain
CROWD = 32  # samples beyond which those lost to rounding leave no copies to be told
STEPS = 60  # of all samples together
FEW_STEPS = 12  # of a batch too large for accelerated ones: it ends fast or in a valley
RESCUED = 48  # samples up to which all are solved together where one by one failed
CHORDS = 40  # steps with the slope of the mean, at most
UNSEEN = 1e-4  # relative σ of that slope below which a direction waits for its own slope
FAR = 16.0  # reach of the starts where labels repeat: samples of one label share their basins
STALLED = 0.81  # decrease of the cost below which those steps go on
AGREE = 2  # starts that have to end at the same batch
TURNED = 6  # starts by turns of a batch of one label
STRONG = 1e-6  # σ_B/σ_1 above which turns are faster than one sample after the other


def unfit(batch: Batch, head: Mixture) -> Unseparated | None:
    """Why the head alone cannot separate the batch, or None if it can."""
    name, classes = head.stage.name, head.gradient.shape[0]
    loss = batch.loss
    if loss.name != CROSS_ENTROPY or loss.targets != "index" or not loss.plain:
        return Unseparated(
            f"the head '{name}' under {loss.name} with targets {loss.targets!r} leaves samples and "
            f"targets free to mix: {head.rank}×{head.rank} numbers that no equation fixes"
        )
    if head.bias_gradient is None:
        return Unseparated(
            f"the head '{name}' has no bias: nothing fixes the scale of a sample of its row space"
        )
    if head.rank == 0 or not bool(head.bias_gradient.any()):
        return Unseparated(f"the gradient of '{name}' or of its bias is zero")
    if not bool((head.weights != 0).any()):
        return Unseparated(
            f"the bias gradient of '{name}' has no part in the range of its weight's"
        )
    if batch.size is not None and batch.size >= classes and head.rank == classes - 1:
        return Unseparated(
            f"a softmax head with {classes} classes has a gradient of rank at most {classes - 1}: "
            f"it cannot tell {batch.size} samples apart, whatever they are"
        )
    if head.rank == classes - 1 and batch.size is None:
        return Unseparated(
            f"the gradient of '{name}' has the largest rank that {classes} classes allow, "
            f"{classes - 1}: the batch may be larger, state its size"
        )
    return None


def separate_head(
    batch: Batch, head: Mixture, watch: Callable[[str], None] | None = None
) -> Separated | Unseparated:
    """All samples of a batch at the head.

    Args:
        batch: the update.
        head: mixture of the last stage; :func:`unfit` must have passed it.
        watch: told of the progress.
    """
    began = time.perf_counter()
    if batch.size is not None and head.rank > batch.size:
        return Unseparated(
            f"the gradient of the head '{head.stage.name}' has rank {head.rank}, more than the "
            f"stated batch_size={batch.size} sends, σ_{batch.size + 1}/σ_1 "
            f"{float(head.values[batch.size] / head.values[0]):.1e}: what noise or rounding may "
            "add to it hides how the samples mix; write the noise of the update, or its batch_size"
        )
    hidden = _hidden(batch, head)
    if hidden is not None:
        return hidden
    if head.spare(1) < 0:
        return _together(batch, head, began, watch)
    pool, clear = likely(head)
    consistency = AtHead.of(head, batch.loss.label_smoothing, pool, clear, batch.precision)
    consistency = consistency.sketched()
    most = max(LEAST, min(MOST, PER_CLASS * len(consistency.pool)))
    collected = collect(
        consistency,
        partial(identify_classes, head),
        partial(admissible, batch, head.rank),
        Starts(
            batch.precision.seed,
            batch.starts(head.rank, most, GROWTH),
            first=_all_at_once(batch, consistency) or opening(consistency),
            reach=FAR if 2 * clear < head.rank else 1.0,
            rounds=IDLE if resolved(batch, head) else HASTY,
            deadline=batch.deadline,
        ),
        watch,
    )
    if collected.complete:
        answer = conclude(batch, consistency, collected, began)
    else:
        answer = batch.short(_shortfall(consistency, collected))
        if not batch.late:
            collected = all_weighed(batch, consistency, collected)
            near = near_copies(head, [*collected.identities, *collected.refused])
            answer = replace(answer, reason=answer.reason + near)
            answer = contradicted(batch, head, collected) or answer
    done = isinstance(answer, Separated) or not answer.consistent
    if done or head.rank > RESCUED or batch.late:
        return answer
    if batch.size != head.rank or not resolved(batch, head):
        return answer
    # Rounding may move one sample's own root as far as the samples are apart.
    whole = _together(batch, head, began, watch)
    return whole if isinstance(whole, Separated) else answer


def _together(
    batch: Batch, head: Mixture, began: float, watch: Callable[[str], None] | None
) -> Separated | Unseparated:
    """Near the limit B = C − 1: all samples at once, with the likeliest labels."""
    name, rank, classes = head.stage.name, head.rank, head.gradient.shape[0]
    equations = classes * rank
    if batch.size is not None and batch.size != rank:
        return Unseparated(
            f"the gradient of the head '{name}' tells {rank} of {batch.size} samples apart, and "
            f"its {classes} classes leave too few equations to say which of them are copies"
        )
    estimate = best(_labels_of(batch, head))
    if estimate.counts is None or rank == 1:
        return Unseparated(f"the labels at the head '{name}' are not determined: {estimate.reason}")
    place = head.gradient.device
    counts = estimate.counts.to(place)
    labels = torch.repeat_interleave(torch.arange(len(counts), device=place), counts)
    scale = loss_scale(batch.loss, rank, classes)
    problem = Coupled(head, labels, scale, batch.loss.label_smoothing, batch.precision)
    generator = torch.Generator().manual_seed(batch.precision.seed)
    if watch is not None:
        watch(f"separating {rank} samples at '{name}' together")
    floor = problem.floor()
    alone = rank > SMALL and bool((labels == labels[0]).all())
    runs, ends = _turned(batch, problem, generator) if alone else (0, _none(problem))
    answer: Tensor | str = "no search by turns of the differences ended at a batch"
    if len(ends):
        answer = agreement(problem, ends, floor)
    if isinstance(answer, str) and not batch.late and (not alone or rank <= RESCUED):
        # A batch whose labels all differ is solved from the means of its classes at once.
        first = problem.starts(len(SCATTERS) if rank <= FEW else 2, generator)
        runs += len(first)
        steps = STEPS if rank <= RESCUED else FEW_STEPS
        solved = levenberg_marquardt(problem, first, tolerance=floor, max_iterations=steps)
        answer = agreement(problem, refined(problem, solved.value), floor)
    ends = _none(problem)
    for _ in range(ROUNDS):
        if not isinstance(answer, str) or rank > SMALL or batch.late:
            break
        runs += STARTS
        begin = problem.starts(STARTS, generator)
        many = geodesic(
            problem, begin, tolerance=floor, enough=AGREE / STARTS, follow=problem.follow
        )
        ends = torch.cat([ends, refined(problem, many.value)])
        answer = agreement(problem, ends, floor)
    if isinstance(answer, str):
        return batch.short(
            f"{runs} starts at the head '{name}' ({equations} equations for {rank * (rank - 1)} "
            f"unknowns, σ_B/σ_1 {head.ratio:.1e}, labels {labels.tolist()}): {answer}; samples of "
            "one label differ by the curvature of the softmax alone"
        )
    consistency = AtHead.of(
        head, batch.loss.label_smoothing, labels, len(labels), batch.precision
    ).labelled(labels)
    route = (
        f"K(Q)ᵀQ = US for all samples of '{name}' together: {equations} equations for "
        f"{rank * (rank - 1)} unknowns"
    )

    def ended(roots: Tensor) -> Separated | Unseparated:
        identities = identify_classes(head, roots, consistency)
        gathered = Collected(roots, identities, runs, 1.0)
        return finish_together(batch, consistency, gathered, route, began)

    first_of = ended(answer)
    if isinstance(first_of, Unseparated):
        return first_of
    others = [ended(roots) for roots in rivals(problem, answer, floor)]
    told = tuple(other for other in others if isinstance(other, Separated))
    untold = [other.reason for other in others if isinstance(other, Unseparated)]
    return replace(first_of, others=told, beside=untold[0] if untold else "")


def _all_at_once(batch: Batch, consistency: AtHead) -> tuple[AtHead, Tensor] | None:
    """Starts at all samples of a large batch of one label, found by turns of their differences."""
    head = consistency.samples
    rank, classes = head.rank, len(consistency.shift)
    if consistency.clear != 1 or rank <= CROWD or head.ratio < STRONG:
        return None
    labels = consistency.pool[:1].expand(rank)
    scale = loss_scale(batch.loss, rank, classes)
    problem = Coupled(head, labels, scale, consistency.smoothing, batch.precision)
    generator = torch.Generator().manual_seed(batch.precision.seed)
    _, ends = _turned(batch, problem, generator, 1)
    return (consistency.labelled(labels), problem.rows(ends)[0]) if len(ends) else None


def _none(problem: Coupled) -> Tensor:
    """No end, [0, R(R − 1)]."""
    rank = problem.head.rank
    return problem.origin.new_zeros(0, rank * (rank - 1))


def _turned(
    batch: Batch, problem: Coupled, generator: torch.Generator, enough: int = AGREE
) -> tuple[int, Tensor]:
    """How many starts of a batch of one label there were, and those ends that are a batch."""
    ends: list[Tensor] = []
    runs = 0
    for start in problem.starts(TURNED, generator):
        if len(ends) == enough or batch.late:
            break
        runs += 1
        end = solve_turns(problem, start, batch.deadline)
        ends += [] if end is None else [end]
    return runs, torch.stack(ends) if ends else _none(problem)


def _hidden(batch: Batch, head: Mixture) -> Unseparated | None:
    """Why a search would be in vain, for a large batch of which rounding hides some samples."""
    name, rank, ratio = head.stage.name, head.rank, head.ratio
    if rank <= CROWD or resolved(batch, head):
        return None
    if batch.size not in (None, rank):
        return Unseparated(
            f"the gradient of the head '{name}' tells {rank} of {batch.size} samples apart, "
            f"σ_{rank}/σ_1 {ratio:.1e}: what the client rounds hides the others, and no equation "
            "of the rest is free of them"
        )
    if ratio < BURIED * 2.0 * batch.precision.unit:
        return Unseparated(
            f"σ_{rank}/σ_1 {ratio:.1e} of the gradient of the head '{name}' is near the rounding "
            f"of the client, {2.0 * batch.precision.unit:.1e}: little of what tells the {rank} "
            "samples apart was sent"
        )
    return None


def _labels_of(batch: Batch, head: Mixture) -> HeadGradient:
    affine = head.stage.affine
    return HeadGradient(
        head.gradient, head.bias_gradient, head.rank, affine.weight, affine.bias, batch.loss
    )


def conclude(
    batch: Batch,
    consistency: AtHead,
    collected: Collected,
    began: float,
) -> Separated | Unseparated:
    """Samples from the roots and classes of a head."""
    place = consistency.samples.weights.device
    labels = torch.tensor([identity.label for identity in collected.identities], device=place)
    own = AtHead.of(
        consistency.samples, consistency.smoothing, labels, len(labels), batch.precision
    ).labelled(labels)
    name, rank = consistency.samples.stage.name, consistency.samples.rank
    made = finish(
        batch,
        own,
        collected,
        partial(identify_classes, consistency.samples),
        f"every cotangent p − e_c must lie in the range of the gradient of '{name}' "
        f"(for each {consistency.equations} equations, unknowns: {rank - 1})",
        began,
    )
    short = "" if isinstance(made, Unseparated) else short_of(made, batch.precision)
    return Unseparated(short) if short else made


def likely(head: Mixture) -> tuple[Tensor, int]:
    """Classes by how near p − e_c is to the range of G at the mean of the batch, nearest first.

    Two classes that both occur differ by a vector of that range, up to what p varies.  The number
    says how many of them are clearly nearer than the others.
    """
    classes = head.gradient.shape[0]
    w = head.weights
    middle = (w / (w @ w)) @ head.right.T
    p = torch.softmax(head.stage.affine.forward(middle[None]), 1)
    miss = head.outside(p - torch.eye(classes, dtype=p.dtype, device=p.device))
    order = miss.argsort()
    clear = int((miss < max(NEAR, 5.0 * float(miss.min()))).sum())
    return order[: max(FEWEST, 2 * head.rank)], clear


def opening(consistency: AtHead) -> tuple[AtHead, Tensor]:
    """A first start for each clearly likely class: Newton steps with the slope of the mean.

    Probabilities that vary little from sample to sample share their Jacobian, so that one
    decomposition serves all classes.  Directions that it hardly sees, differences of samples with
    one label, stay at the mean.
    """
    head = consistency.samples
    w = head.weights
    begun = consistency.labelled(consistency.pool[: max(consistency.clear, 1)])
    left = restricted(begun)
    t = w.new_zeros(len(begun.labels), left.directions.shape[1])
    if t.shape[1] == 0:
        return begun, left.rows(t)
    slope = begun.derivative(left.origin[None], left.directions)[1][0]
    if not bool(slope.isfinite().all()):  # a mean that is beyond all numbers
        return begun, left.rows(t)
    u, values, vt = torch.linalg.svd(begun.project(slope.T).T, full_matrices=False)
    seen = values > UNSEEN * values[0]
    back = vt[seen].T / values[seen]
    cost = left.cost(t)
    for _ in range(CHORDS):
        f = begun.value(left.rows(t))
        trial = t - (begun.project(f) @ u[:, seen]) @ back.T
        fresh = left.cost(trial).nan_to_num(torch.inf)
        better = fresh < cost
        if not bool((fresh < STALLED * cost).any()):
            break
        t = torch.where(better[:, None], trial, t)
        cost = torch.where(better, fresh, cost)
    return begun, left.rows(t)


def identify_classes(head: Mixture, roots: Tensor, at: Consistency) -> list[Identity]:
    """Class, dual and share of every root; its class is part of its equations."""
    assert isinstance(at, AtHead)
    p = torch.softmax(roots @ at.matrix.T + at.shift, 1)
    weights = (roots / head.values) @ head.left.T
    # Of the other classes only those of a similar weight come into question at all.
    uniform = at.smoothing * weights.mean(1, keepdim=True)
    shares = (p * weights).sum(1, keepdim=True) - (1.0 - at.smoothing) * weights - uniform
    identities = []
    for q, row, share, label in zip(roots, p, shares, at.labels.tolist(), strict=True):
        near = similar(share, share[label])
        near[label] = True
        listed = near.nonzero().flatten()
        k = row - at.labelled(listed).target
        best = int((listed == label).nonzero())
        identities.append(replace(choose(head, q, k, k, best), label=label))
    return identities


def _shortfall(consistency: AtHead, collected: Collected) -> str:
    head = consistency.samples
    where = f"at the head '{head.stage.name}'"
    if head.rank == 1:
        return (
            f"the gradient {where} has rank one, of one input alone, and of no class does its "
            f"cotangent satisfy the {consistency.equations} equations of cross_entropy"
        )
    return (
        f"{collected.tally(where)} ({consistency.equations} equations for {head.rank - 1} unknowns "
        f"a sample, σ_B/σ_1 {head.ratio:.1e})"
    )
