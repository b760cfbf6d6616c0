"""What in an update tests the precision that its answer is certified at.

Rounding, pruning and noise that nobody stated show in the equations beyond those that an answer was
fitted to.  One sample at a fully connected layer, ``[G | ∂b] = k [xᵀ | 1]``: the first row gives x,
every other row tests it, unless it is the same up to its sign or a power of two, for then whatever
was done to one was done to the other; and so with columns.  Below, the recursion has more equations
than unknowns; above, the layer's outputs are read off the next layer's gradient; at a head,
``k = κ(W x + b, y)`` tests x through its logits, but only where y is not free to take up the
difference.

Of d tests that look honest, errors can be s times what is assumed by a chance of

    ``P(χ²_d ≤ d/s²) ≤ (d/2)^{d/2} / (s^d Γ(d/2 + 1))``,

so an error bound on few of them is s times as wide, and none at all is left without one.
"""

from __future__ import annotations

import math
from math import inf, lgamma, log

import torch
from torch import Tensor

from rgap.head.target import Reading
from rgap.head.target_error import rounding_of_cotangent
from rgap.inversion.problem import Problem
from rgap.inversion.replay import sent_for
from rgap.limits import FALSELY, FREE, PARTED, ROUNDED, ROWS, SPARE, VANISHING
from rgap.network.chain import Stage
from rgap.precision import Estimate
from rgap.recursion.reached import Descent

LOOKED = 1000  # sizes that are compared: more of them would be near each other by chance
MEMBERS = 4  # of the ensemble of an answer that are replayed
STEP = 1e-6  # by which a sample is made longer, as a share of it
DEAF = 1e-2  # change of tensors with the length of a sample, as a share, that says nothing of it
SCALED = 16  # samples of which each is: of more the replays' own tolerance is taken

__all__ = ["backing", "of_features", "of_prefix", "of_replay", "widening"]


def widening(tests: int) -> float:
    """Times that an error bound is wider for so few tests of its scale; infinite for none.

    >>> [round(widening(d), 1) for d in (1, 2, 5, 20, 100)]
    [3989.4, 50.0, 3.9, 1.2, 1.0]
    """
    if tests <= 0:
        return inf
    half = tests / 2
    spread = (half * log(half) - lgamma(half + 1) - log(FALSELY)) / tests
    return max(1.0, math.exp(spread) / SPARE)


def backing(
    problem: Problem, descent: Descent, reading: Reading | None, misfits: dict[str, float]
) -> float:
    """Times that the errors of an answer may be longer than its update shows; infinite: untested.

    Args:
        problem: the update, and the chain that the answer is of.
        descent: that reached the data.
        reading: of the target at the end of that chain; None where nothing above it counts.
        misfits: weighted rms residual by parameter.
    """
    start = max(descent.cotangents, default=None)
    if start is None:  # a batch that was separated at its lowest layer
        return 1.0
    k, features = descent.cotangents[start].value.flatten(1), descent.features[start]
    stages = problem.chain.stages
    if len(k) > 1 or stages[start].affine.geometry is not None:
        free = len(k) * k.shape[1] if reading is not None and _dense(problem) else 0
        return widening(_whole(problem, start, k) - _unknowns(descent) - free)
    alone = reading is None or (_dense(problem) and start + 1 == len(stages))
    if start == 0 and alone and _may_be_missing(features.value, k[0]):
        return inf
    rows = _apart(k[0]) - 1
    columns = features.value.flatten()
    if stages[start].affine.bias_name is not None:
        columns = torch.cat([columns, columns.new_ones(1)])  # ∂b is the column of an input of 1
    own = rows * (_apart(columns) - 1)
    below = _sent(problem, range(start)) + features.value.numel()
    below -= _unknowns(descent)
    tests = own + max(below, 0) * (start > 0)
    if start + 1 < len(stages) and reading is not None:
        free = stages[-1].affine.weight.shape[0] if _dense(problem) else 0
        above = _sent(problem, range(start + 1, len(stages))) - free
        tests += max(0, min(int((k[0] != 0).sum()), above))
    if tests == 0 and reading is not None and not _dense(problem):
        return _by_logits(problem, stages[start], features, descent.cotangents[start], reading)
    if own == 0:
        return widening(tests)
    # Rows that are fitted leave no residual: a misfit of the others is diluted.
    misfit = misfits.get(stages[start].affine.weight_name, 0.0) * math.sqrt(k.shape[1] / rows)
    return widening(tests) * max(1.0, misfit / max((1.0, *misfits.values())))


def of_prefix(
    problem: Problem, own: Problem, descent: Descent, known: Estimate, labels: Tensor | None
) -> float:
    """The same of a prefix of the network, where what stands above it was only replayed.

    Args:
        problem: with the whole network.
        own: with the chain of the prefix.
        descent: down from the last layer of it.
        known: the data.
        labels: whose replay gives the update again, or None.
    """
    alone = backing(own, descent, None, {})
    if labels is None or alone == 1.0:
        return alone
    top = own.chain.stages[-1].affine
    held = [n for s in own.chain.stages for n in (s.affine.weight_name, s.affine.bias_name)]
    above = sum(g.numel() for name, g in problem.sent.items() if name not in held)
    k = descent.cotangents[max(descent.cotangents)].value
    dense = problem.declared.targets != "index"
    if above or dense or top.bias_name is None:
        above -= labels.numel() if dense else 0
        return min(alone, widening(min(int((k != 0).sum()), above)))
    again = sent_for(problem, known.value, labels)[top.bias_name]
    moved = [
        sent_for(problem, known.value + e, labels)[top.bias_name] - again
        for e in known.error[:MEMBERS]
    ]
    gap = again - problem.gradients[top.bias_name].to(again)
    seen = gap.square() + (problem.precision.unit * again).square()
    return min(alone, _by_few(torch.stack(moved).flatten(1), seen.flatten(), 0))


def of_replay(
    problem: Problem,
    stage: Stage,
    inputs: Tensor,
    labels: Tensor,
    scale: float | Tensor = 1.0,
) -> float:
    """By which share of its size a sample may be too long, says what was only replayed.

    ``∂b → c ∂b`` or ``G → c G`` of one layer makes ``x → x/c`` or ``c x``, and that layer's own
    gradient of rank one tests no c.  The update of a sample of another length does: with g the
    model's own, ``g(x_b (1 + ε_b))`` nearest to what was sent, tensor by tensor by its size, with
    all of them and without either of that layer's.

    Args:
        problem: with the whole network.
        stage: the layer off whose gradient the samples were read.
        inputs: [B, *input_shape].
        labels: of these.
        scale: factor on the update, or one a sample.

    Returns:
        The largest of twice |ε_b|.
    """
    if len(inputs) > SCALED:
        return 2.0 * ROUNDED * problem.precision.unit
    again = sent_for(problem, inputs, labels, scale)
    sizes = {n: float(g.norm()) for n, g in again.items() if problem.precision.sent(n)}
    longer = []
    for row in range(len(inputs)):
        moved = inputs.clone()
        moved[row] *= 1.0 + STEP
        longer.append(sent_for(problem, moved, labels, scale))
    largest = 0.0
    for out in (None, stage.affine.weight_name, stage.affine.bias_name):
        used = [n for n, size in sizes.items() if size > 0.0 and n != out]
        if not used:
            continue
        gap = torch.cat([((problem.sent[n] - again[n]) / sizes[n]).flatten() for n in used])
        along = [
            torch.cat([((there[n] - again[n]) / (STEP * sizes[n])).flatten() for n in used])
            for there in longer
        ]
        table = torch.stack(along, 1)
        if float(torch.linalg.svdvals(table)[-1]) > DEAF:
            shares = torch.linalg.lstsq(table, gap[:, None], driver="gelsd").solution
            largest = max(largest, 2.0 * float(shares.abs().max()))
    return largest


def of_features(
    problem: Problem, stage: Stage, x: Estimate, k: Estimate, reading: Reading
) -> float:
    """The same of the input of the last layer alone, where the recursion ends before the data.

    Args:
        problem: the update.
        stage: the last layer.
        x: its input, [1, *in_shape], as its gradient carries it.
        k: the cotangent at its output, [1, *out_shape].
        reading: of the target.
    """
    columns = x.value.flatten()
    if stage.affine.bias_name is not None:
        columns = torch.cat([columns, columns.new_ones(1)])
    tests = (_apart(k.value.flatten()) - 1) * (_apart(columns) - 1)
    if tests > 0:
        return widening(tests)
    return inf if _dense(problem) else _by_logits(problem, stage, x, k, reading)


def _unknowns(descent: Descent) -> int:
    """Entries of the first affine map's input; of the data where a completion found them."""
    known = descent.features.get(0)
    return (descent.require_data() if known is None else known).value.numel()


def _dense(problem: Problem) -> bool:
    """True if a target may be any numbers: it takes up whatever κ is off by."""
    return problem.update.loss.targets != "index"


def _apart(values: Tensor) -> int:
    """Different sizes other than 0, up to powers of two, which rounding to a float keeps."""
    sizes = values[values.abs() > VANISHING * values.abs().max()].abs()
    if not len(sizes):
        return 0
    places = torch.linspace(0, len(sizes) - 1, min(len(sizes), LOOKED), device=sizes.device)
    folded = torch.frexp(sizes[places.long()]).mantissa.sort().values  # in [1/2, 1)
    round_again = folded.new_full((1,), 2.0 * float(folded[0]))
    gaps = torch.cat([folded, round_again]).diff()
    return max(1, int((gaps > ROWS).sum()))


def _may_be_missing(x: Tensor, k: Tensor) -> bool:
    """True if zeros of x may be entries of k xᵀ that were too small to be sent.

    None of them is left in a column that others are, so x would have no values between the
    smallest that is left and that times the ratio of the smallest to the largest of k.
    """
    sizes = k.abs()[k != 0]
    return bool((x == 0).any()) and float(sizes.max()) < PARTED * float(sizes.min())


def _sent(problem: Problem, places: range) -> int:
    """Numbers that were sent of the parameters of some stages."""
    total = 0
    for place in places:
        affine = problem.chain.stages[place].affine
        for name in (affine.weight_name, affine.bias_name):
            if name is not None and problem.precision.sent(name):
                total += problem.gradients[name].numel()
    return total


def _whole(problem: Problem, start: int, k: Tensor) -> int:
    """Numbers that were sent in all, rows of one size at the stage that was separated once."""
    total = _sent(problem, range(len(problem.chain.stages)))
    width = _sent(problem, range(start, start + 1)) // k.shape[1]
    return total - width * (k.shape[1] - _apart(k.norm(dim=0)))


def _by_logits(problem: Problem, stage: Stage, x: Estimate, k: Estimate, reading: Reading) -> float:
    """By the head alone: κ at the logits of x against what was sent, in units of what x moves."""
    loss = problem.update.loss
    z = stage.affine.forward(x.value)
    target = loss.dense(reading.labels, z) if loss.plain else reading.target
    kappa = loss.cotangent(z, target)
    bent = torch.stack(
        [loss.cotangent_jvp(z, stage.affine.linear(e), target)[0].flatten() for e in x.error]
    )
    fitted = (reading.scale != 1.0) + (stage.affine.bias_name is None)  # one number by each
    gap = (kappa - k.value / reading.scale).flatten()
    rounded = rounding_of_cotangent(loss, z, target, problem.precision).flatten()
    noise = (k.error / reading.scale).square().mean(0).flatten()
    return _by_few(bent, gap.square() + rounded.square() + noise, fitted)


def _by_few(moved: Tensor, seen: Tensor, fitted: int) -> float:
    """By a few values that move with the answer.

    Args:
        moved: by how much for each of its errors, [S, m].
        seen: squares of what the values are off by, and of their own rounding and noise, [m].
        fitted: numbers that were chosen so that they agree.
    """
    size = float(moved.square().sum()) / len(moved)
    if size == 0.0:
        return inf
    values = torch.linalg.svdvals(moved)
    tests = int((values > FREE**0.5 * values[0]).sum()) - fitted
    return widening(tests) * max(1.0, math.sqrt(float(seen.sum()) / size))
