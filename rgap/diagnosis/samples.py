"""Logits and cotangents of the samples at the head, from ratios that no factor changes.

Whatever positive or negative factor λ a client's update carries, the features of a sample do not
depend on it: at B = 1 ``x = Gᵀ∂b/‖∂b‖²`` is a ratio, and for a batch the equations
``(I − PPᵀ) f(q) = 0`` with ``w·q = 1, w = S⁻¹Uᵀ∂b`` ask for ranges and ratios only.  With the
features X the head's own gradient gives the cotangents, ``G = KᵀX``, with λ in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import torch
from torch import Tensor

from rgap.diagnosis.evidence import Evidence
from rgap.head.behind import idle
from rgap.head.bias_attack import rank_one_residual
from rgap.head.features import features_from_bias
from rgap.limits import OUTSIDE
from rgap.network.chain import Chain
from rgap.network.reshape import Reshape
from rgap.separation.batch import Batch
from rgap.separation.identify import Identity as Target
from rgap.separation.identify import continuous, identify, top
from rgap.separation.mixture import Mixture
from rgap.separation.pair import Between, between, steps_between
from rgap.separation.peeling import LIKELY, SOLVED, Starts, collect, fresh_starts, rounding_cost
from rgap.separation.route import unfit_pair
from rgap.separation.softmax.equations import AtHead
from rgap.separation.softmax.separate import identify_classes, likely, opening, unfit
from rgap.separation.subspace import Consistency, restricted
from rgap.separation.targets import resolved
from rgap.solvers.least_squares import levenberg_marquardt
from rgap.update.losses import Loss
from rgap.update.targets import CLASSES, CROSS_ENTROPY

SAFETY = 30.0  # standard errors within which a cotangent may miss
LOOSEST = 0.02  # relative error of a cotangent above which it tests nothing
ROUNDS = 2  # of searches without a new sample
STARTS = 48  # of a search for any sample at all
LENIENT = 10.0  # times what a root may miss by, from which no start came near one
SHAKEN = 2  # times that they are told apart again with other rounding
SWING = 10.0  # times what that moves, that the client's own rounding may have moved
MOST = 16  # samples that are told apart for a check
ALONE = 4.0  # roundings by which the gradient of one sample misses rank one, at most
SEVERAL = 8.0  # times that, by which any two samples must miss it
FOREIGN = 10.0  # times what is explained of it, that other weights leave
REST = 0.05  # share of the head's gradient that its samples may leave


@dataclass(frozen=True)
class Samples:
    """The samples of a batch at the head, whatever factor the update carries.

    Attributes:
        features: x, [R, n].
        logits: z, [R, C].
        cotangents: k as sent, [R, C].
        width: error of a logit.
        tolerance: relative error of a cotangent.
        rest: ‖G − KᵀX‖/‖G‖ at the head.
        route: where they come from, in words.
        unit: roundoff of the client.
        inputs: x_i of the network, [R, ...], where they were told apart at the data.
        explained: what rounding explains of ``rest``.
    """

    features: Tensor
    logits: Tensor
    cotangents: Tensor
    width: float
    tolerance: float
    rest: float
    route: str
    unit: float = 0.0
    inputs: Tensor | None = None
    explained: float = inf

    @property
    def clear(self) -> bool:
        """True if they make the head's gradient, and their cotangents say something."""
        return self.rest <= REST and self.tolerance <= LOOSEST

    @property
    def foreign(self) -> bool:
        """True if they do not make it, whatever their cotangents: other weights are between."""
        return not self.clear and self.rest > FOREIGN * self.explained


def single(evidence: Evidence) -> Samples | None:
    """The sample of a batch of one, from the head's own gradients."""
    head = evidence.head
    if head is None:
        return None
    call, weight, bias = head
    if bias is None:
        return _without_bias(evidence, weight)
    if not bool((bias != 0).any()):
        return None
    x, k = features_from_bias(evidence.affine(call), weight, bias, evidence.precision)
    matrix, shift = _parameters(evidence, call.name)
    z = x.value @ matrix.T + shift
    width = float((x.error @ matrix.T).abs().max())
    width += float(z.abs().max()) * 16 * evidence.unit
    size = float(k.value.norm())
    tolerance = float(k.error.square().mean(0).sum().sqrt()) / size + 4 * evidence.unit
    rest = rank_one_residual(weight, x.value[0], k.value[0])
    return Samples(
        x.value, z, k.value, width, SAFETY * tolerance, rest, f"∂b of '{call.name}'", evidence.unit
    )


def presumed(evidence: Evidence) -> Evidence | None:
    """The evidence with a batch of one that nobody stated; None where there may be more samples.

    Cotangents of several samples add up: a head of one logit, of two classes, or above features
    that are the same for any input has rank one for any batch, and says nothing of their number.
    Where two random samples, of the same target and of others, leave rank two, the samples of a
    gradient of rank one have the same features.
    """
    alone, head = single(evidence), evidence.head
    if alone is None or head is None or alone.rest > ALONE * evidence.unit:
        return None
    if head[0].made.shape[1] < 3:
        return None  # with two, a cross-entropy that was declared as another loss
    features, logits = head[0].given[:2], head[0].made[:2]
    if head[2] is not None:
        features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    loss = evidence.loss if evidence.loss.known else Loss()
    for targets in _pairs(loss, logits):
        try:
            values = torch.linalg.svdvals(loss.cotangent(logits, targets).T @ features)
        except Exception:  # a loss of one's own that wants other targets
            return None
        if len(values) < 2 or not values[1] > SEVERAL * ALONE * evidence.unit * values[0]:
            return None
    return replace(evidence, batch=1, presumed=True)


def _pairs(loss: Loss, logits: Tensor) -> list[Tensor]:
    """Targets of two samples: the same, and others."""
    if loss.own or (loss.name in CLASSES and loss.targets == "index"):
        last = min(1, logits.shape[1] - 1)
        return [torch.tensor([0, c], device=logits.device) for c in (0, last)]
    one = torch.arange(loss.outputs(logits.shape[1]), device=logits.device) % 2
    return [torch.stack([one, other]).to(logits) for other in (one, 1 - one)]


def _without_bias(evidence: Evidence, weight: Tensor) -> Samples | None:
    """A softmax head without a bias: ``ln|v_j| = α (Wu)_j + const`` for every class but one.

    ``G = k xᵀ = v uᵀ`` with x = αu, v = k α, and ``k_j = λ p_j`` except at the label: the slope of
    a straight line is α, whatever λ.  The label is the class whose sign is the odd one.
    """
    if evidence.loss.name != CROSS_ENTROPY or evidence.loss.label_smoothing:
        return None
    head = evidence.head
    assert head is not None
    matrix, shift = _parameters(evidence, head[0].name)
    u = torch.linalg.svd(weight, full_matrices=False).Vh[0]
    v, slope = weight @ u, matrix @ u
    if len(v) < 4 or not bool((v != 0).all()):
        return None
    positive = v > 0
    few = positive if int(positive.sum()) == 1 else ~positive
    if int(few.sum()) != 1:
        return None
    others = ~few
    table = torch.stack([slope[others], torch.ones_like(slope[others])], 1)
    value = (v[others].abs().log() - shift[others])[:, None]
    alpha, _ = torch.linalg.lstsq(table, value).solution.flatten().tolist()
    if alpha == 0.0:
        return None
    spread = float((slope[others] - slope[others].mean()).norm())
    fit = float((table @ torch.linalg.lstsq(table, value).solution - value).abs().max())
    blur = SAFETY * (
        8 * evidence.unit + evidence.added(f"{head[0].name}.weight") / float(v.abs().min())
    )
    if spread == 0.0 or fit > max(blur, 1e-3):
        return None
    z = alpha * slope + shift
    off = (blur + fit) / spread  # of α
    width, relative = off * float(slope.norm()), off / abs(alpha)
    rest = rank_one_residual(weight, u, v)
    where = f"the rows of '{head[0].name}'"
    return Samples(
        alpha * u[None], z[None], v[None] / alpha, width, relative, rest, where, evidence.unit
    )


def _parameters(evidence: Evidence, name: str) -> tuple[Tensor, Tensor]:
    """W and b of a fully connected layer, float64."""
    weight = evidence.model.get_parameter(f"{name}.weight").detach().double()
    module = evidence.model.get_submodule(name)
    bias = getattr(module, "bias", None)
    shift = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    return weight, shift


def batch(evidence: Evidence) -> Samples | None:
    """The samples of a larger batch, below two fully connected layers or at a softmax head.

    They come back where they do not make the head's gradient, too: see :attr:`Samples.foreign`.
    """
    chain = evidence.chain
    if chain is None or evidence.batch is None or evidence.batch > MOST:
        return None
    if not _plain_head(chain):
        return None
    for sign in (1.0, -1.0):
        if evidence.late:
            return None
        sent = {n: sign * g for n, g in evidence.sent.items()}
        mixed = Batch(chain, sent, evidence.loss, evidence.precision, evidence.batch)
        source = _source(mixed)
        samples = None if source is None else _collected(mixed, source)
        if source is None or samples is None:
            continue
        explained = samples.explained + evidence.stated / source.samples.ratio
        samples = replace(samples, explained=explained)
        if not samples.clear:
            return samples if samples.foreign else None
        for draw in range(SHAKEN):
            samples = _shaken(mixed, samples, draw)
            if samples is None:
                return None
        return replace(samples, cotangents=sign * samples.cotangents)
    return None


def _shaken(mixed: Batch, samples: Samples, draw: int) -> Samples | None:
    """The samples with the errors that another draw of the update's rounding shows.

    How much a root of the equations moves with them is measured: the update is changed by as much
    as its own rounding and noise, and the samples are told apart again.
    """
    precision = replace(mixed.precision, seed=mixed.precision.seed + 1 + draw)
    moved = {}
    for name, g in mixed.gradients.items():
        table = g.flatten(1) if g.ndim > 1 else g.reshape(-1, 1)
        size = table.norm(dim=1, keepdim=True) * table.norm(dim=0) / table.norm().clamp_min(1e-300)
        std = precision.update_std(name, size.square().reshape(g.shape))
        moved[name] = g + precision.normal(std, 1)[0] if precision.sent(name) else g
    again = Batch(mixed.chain, moved, mixed.loss, mixed.precision, mixed.size)
    source = _source(again)
    other = None if source is None else _collected(again, source)
    if other is None or not other.clear or len(other.logits) != len(samples.logits):
        return None
    apart = torch.cdist(samples.features, other.features)
    order = apart.argmin(1)
    if len(set(order.tolist())) < len(order):
        return None
    gap = (other.cotangents[order] - samples.cotangents).norm(dim=1)
    relative = float((gap / samples.cotangents.norm(dim=1).clamp_min(1e-300)).max())
    width = float((other.logits[order] - samples.logits).abs().max())
    tolerance = max(samples.tolerance, SWING * relative)
    return (
        None
        if tolerance > LOOSEST
        else replace(samples, width=max(samples.width, SWING * width), tolerance=tolerance)
    )


@dataclass(frozen=True)
class Source:
    """Equations that separate a batch.

    Attributes:
        samples: the mixture.
        consistency: f and P.
        naming: targets of roots.
        head: the same as ``consistency`` where it is the softmax head's.
    """

    samples: Mixture
    consistency: Consistency
    naming: Callable[[Tensor, Consistency], list[Target]]
    head: AtHead | None = None


def _source(mixed: Batch) -> Source | None:
    """The lowest equations that separate a batch of the stated size."""
    chain, size = mixed.chain, mixed.size or 1
    head = mixed.mixture(len(chain.stages) - 1)
    for index in range(len(chain.stages) - 1):
        steps = steps_between(chain, index)
        if isinstance(steps, str):
            continue
        lower, upper = mixed.mixture(index), mixed.mixture(index + 1)
        told = lower.rank == size or (lower.rank < size and resolved(mixed, lower))
        told = told and lower.rank > 1 and lower.spare() > 0
        if told and unfit_pair(lower, upper, steps) is None:
            pair = Between.of(lower, upper, steps, mixed.precision)

            def naming(roots: Tensor, _: Consistency, lower: Mixture = lower) -> list[Target]:
                if mixed.loss.own or not mixed.loss.known:
                    return continuous(chain, lower, roots, mixed.loss)
                return identify(chain, lower, head, roots, mixed.loss)

            return Source(lower, pair, naming)
    if unfit(mixed, head) is not None or head.spare(1) < int(head.rank < size):
        return None
    if not resolved(mixed, head) or not 1 < head.rank <= size:
        return None
    pool, clear = likely(head)
    at = AtHead.of(head, mixed.loss.label_smoothing, pool, clear, mixed.precision).sketched()
    return Source(head, at, partial(identify_classes, head), at)


def _collected(mixed: Batch, source: Source) -> Samples | None:
    """All roots, and the cotangents that the head's gradient gives them."""
    seed, samples = mixed.precision.seed, source.samples
    first = None if source.head is None else opening(source.head)
    starts = Starts(seed, first=first, rounds=ROUNDS)
    roots = collect(source.consistency, source.naming, _any_weight, starts)
    pair = source.consistency
    if not roots.complete or (isinstance(pair, Between) and between(pair, roots.roots)):
        return None
    stage = samples.stage
    u = (roots.roots @ samples.right.T).reshape(-1, *stage.affine.in_shape)
    features, logits = top(mixed.chain, stage.index, u)
    last = mixed.chain.stages[-1].affine
    weight = last.sent(mixed.gradients)
    columns, sent = [features.flatten(1)], [weight]
    if last.bias_name is not None:
        columns.append(torch.ones_like(columns[0][:, :1]))
        sent.append(mixed.gradients[last.bias_name][:, None])
    table, right = torch.cat(columns, 1), torch.cat(sent, 1)
    k = torch.linalg.lstsq(table.T, right.T, driver="gelsd").solution
    rest = float((right - k.T @ table).norm() / right.norm())
    error = samples.entry_noise * (sum(samples.gradient.shape)) ** 0.5
    spread = torch.linalg.svdvals(table)  # features may be alike at the head
    apart = float(spread[-1] / spread[0].clamp_min(1e-300))
    rounding = 16 * mixed.precision.unit
    own = error / float(samples.values[-1]) + rounding
    relative = own + rest / samples.ratio + rounding / max(apart, 1e-300)
    width = SAFETY * relative * float(logits.abs().max())
    where = f"{len(k)} samples told apart at '{stage.name}'"
    data = mixed.chain.complete and stage.index == 0
    data = data and all(isinstance(op, Reshape) for op in stage.lead)
    return Samples(
        features.flatten(1), logits, k, width, SAFETY * relative, rest, where, mixed.precision.unit,
        u.reshape(-1, *mixed.chain.input_shape) if data else None, SAFETY * own,
    )  # fmt: skip


def nearest_sample(evidence: Evidence) -> tuple[float, float, str, bool] | None:
    """How near any point of the row space comes to the equations of a sample.

    Returns:
        ``‖(I − PPᵀ) f‖/‖f‖`` at the best end of many starts, what rounding explains of it, the
        layer, and whether the equations are those of its softmax; None where no equations separate
        the batch.
    """
    chain = evidence.chain
    if chain is None or not evidence.batch or evidence.batch > MOST:
        return None
    sent = evidence.sent
    mixed = Batch(chain, sent, evidence.loss, evidence.precision, evidence.batch)
    if not _plain_head(chain):
        return None
    source = _source(mixed)
    if source is None or not resolved(mixed, source.samples):
        return None
    if not source.samples.rank == source.consistency.basis.shape[1] == evidence.batch:
        return None  # cotangents that depend on each other leave no sample by itself
    w = source.samples.weights
    none = w.new_zeros(0, len(w))
    generator = torch.Generator().manual_seed(evidence.precision.seed)
    best = inf
    for reach in (1.0, 4.0):
        begun = source.consistency.begin(STARTS, 2, generator)
        left = restricted(begun)
        start = fresh_starts(left, none, none, STARTS, generator, reach)
        ends = levenberg_marquardt(left, start)
        best = min(best, float(ends.cost.min()))
    rounding = LIKELY * max(rounding_cost(left), SOLVED)
    name = source.samples.stage.name
    tolerance = LENIENT * rounding**0.5 + evidence.stated / source.samples.ratio
    return best**0.5, tolerance, name, source.head is not None


def _plain_head(chain: Chain) -> bool:
    """True if the logits are those of a fully connected layer, one a class."""
    last = chain.stages[-1]
    if len(chain.output_shape) != 1:
        return False  # the loss is one of positions
    return last.affine.geometry is None and all(idle(op) for op in last.tail)


def _any_weight(target: Target, lenient: bool) -> bool:
    """A root is a sample whatever it weighs: the weights are what is looked for."""
    if target.label is None:
        return target.accepted
    return target.outside <= OUTSIDE and target.outside < target.next and target.share > 0.0
