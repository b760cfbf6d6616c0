"""Other weights: identities between layers that one gradient of this model satisfies.

Each holds for any target and any factor, so that nothing but the model is tested.

- **Prediction** (B = 1): the features that the gradient of one fully connected layer shows are
  those that the layers between make of the features of a lower one.
- **Batch norm**: ``∂b_f = γ_f/σ_f ∂β_f`` of :mod:`rgap.diagnosis.mode`.
- **Balance** (any B): between two affine maps with positively homogeneous steps (ReLU, LeakyReLU,
  pooling), ``φ'(z) z = φ(z)`` gives for every channel f of the lower one
  ``⟨W_f, G_f⟩ + b_f ∂b_f = Σ_p k_p·z_p = ⟨W'_{·f}, G'_{·f}⟩``, W' the weights that read it.
  A mask between the two keeps it: where it holds and another identity fails, dropout was on.
- **Target** (B = 1): some admissible target explains the cotangent at the head.
- **Replay** (:mod:`rgap.diagnosis.replay`): the data and the cotangents make the update.
- **Search** (B > 1): some sample of the row space of a layer satisfies ``(I − PPᵀ) f(q) = 0``.
- **Recursion** (B = 1): the equations of every stage of a chain agree with those above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from rgap.diagnosis import mode
from rgap.diagnosis.dropout import dropping, predicted, remedy
from rgap.diagnosis.evidence import Call, Evidence
from rgap.diagnosis.factors import smallest_misfit
from rgap.diagnosis.finding import MENDING, Finding, Kind
from rgap.diagnosis.noise import floors
from rgap.diagnosis.replay import replayed
from rgap.diagnosis.samples import Samples, nearest_sample
from rgap.diagnosis.stages import changed_entry, descended
from rgap.head.bias_attack import bias_attack, rank_one_residual
from rgap.limits import REFUTED
from rgap.network.activations.piecewise import Activation
from rgap.network.chain import Chain, Stage
from rgap.network.reshape import Op, Reshape
from rgap.update.targets import SQUARED

SAFETY = 100.0
WHOLE = 2.0  # relative misfit above which nothing was solved
COMMON = (Kind.DECAY, Kind.NOISE, Kind.STEPS)  # these break every identity
HOLDS = 10.0  # times the tolerance that a channel must be to say that an identity holds in it
FEWEST = 3  # rows and columns of which a changed entry is told
OTHERS = 3  # of such channels, at least
SPARSE = 0.45  # share of zeros that pruning may have left, where nothing proves that it did not


@dataclass(frozen=True)
class Contradiction:
    """An identity that the model does not satisfy.

    Attributes:
        what: the identity, in words.
        misfit: relative.
        tolerance: of the misfit, by rounding and stated noise.
        also: kinds that break it too, beside those of ``COMMON``.
        of: tensors whose gradients it is about.
        alone: of several channels the one in which it is broken, or None.
        recursion: it is that of the stages of a chain.
    """

    what: str
    misfit: float
    tolerance: float
    also: tuple[Kind, ...] = ()
    of: tuple[str, ...] = ()
    alone: int | None = None
    recursion: bool = False

    @property
    def strength(self) -> float:
        """How clearly it is broken."""
        return self.misfit / self.tolerance


def read(evidence: Evidence, samples: Samples | None) -> list[Finding]:
    """The finding that nothing else explains; searches and recursions only where need be."""
    mixed = _two_gradients(evidence)
    if mixed is not None:
        return [mixed]
    balances = _balances(evidence)
    identities = [*_predictions(evidence), *balances]
    identities += [_of_norm(pair) for pair in mode.pairs(evidence)]
    if samples is not None and len(samples.logits) == 1 and not evidence.presumed:
        loss = evidence.loss
        free = loss.name == SQUARED and evidence.labels is None  # every target is admissible
        target = None if free else smallest_misfit(evidence, samples, loss)
        if target is not None:
            what = f"the nearest target of {loss.name} at the head"
            stated = () if evidence.labels is None else (Kind.LABELS,)
            identities.append(Contradiction(what, *target, (Kind.LOSS, *stated)))
    again = None if samples is not None and samples.foreign else replayed(evidence, samples)
    if again is not None:
        what = f"the update of the data of '{again[2]}' and the cotangents of the head"
        identities.append(Contradiction(what, *again[:2], (Kind.DROPOUT,)))
    broken = [c for c in identities if c.strength > 1.0]
    alone = evidence.batch == 1
    if not evidence.late and not (broken and (alone or Kind.STEPS in evidence.tested)):
        further = _recursion(evidence) if alone else _search(evidence, samples)
        identities += further
        broken += [c for c in further if c.strength > 1.0]
    if identities:
        evidence.tested.add(Kind.WEIGHTS)
    if not broken:
        return []
    worst = max(broken, key=lambda c: c.strength)
    changed = _changed(identities, broken)
    if all(one.recursion for one in broken):
        changed = changed_entry(evidence)
    if changed is not None:
        evidence.tested.add(Kind.ENTRY)
        return [changed]
    if balances and not any(c.strength > 1.0 for c in balances):
        masked = _masked(evidence, balances, worst)
        if masked is not None:
            return [masked]
    said = (
        f"{worst.what}: relative misfit {worst.misfit:.1e}, rounding explains "
        f"{worst.tolerance:.1e}; {len(broken)} of {len(identities)} identities fail"
    )
    rivals = _rivals(evidence, broken)
    kinds = (Kind.WEIGHTS, *rivals, *((Kind.ENTRY,) if rivals else ()))
    return [Finding.among(kinds, worst.misfit, said, worst.strength)]


def _of_norm(pair: mode.Pair) -> Contradiction:
    """The identity of a batch norm in eval mode."""
    allowed = mode.tolerance(pair)
    gaps, sizes = (pair.sent - pair.evaluated).abs() / pair.size, pair.evaluated.abs() / pair.size
    what = f"∂b = γ/σ ∂β at '{pair.name}'"
    alone = _alone(gaps, sizes, allowed)
    return Contradiction(what, pair.eval_misfit, allowed, of=pair.of, alone=alone)


def _changed(identities: list[Contradiction], broken: list[Contradiction]) -> Finding | None:
    """A tensor that was changed in one channel: no mistake of the whole update spares the others.

    Every identity that fails does so in a single channel of several, and of the tensors that all
    of these are about some are in none that holds.
    """
    if any(one.alone is None for one in broken):
        return None
    named = set.intersection(*(set(one.of) for one in broken))
    named -= {name for one in identities if one not in broken for name in one.of}
    if not named:
        return None
    worst = max(broken, key=lambda one: one.strength)
    names = [f"'{name}'" for name in worst.of if name in named]
    said = (
        f"{worst.what} fails in channel {worst.alone} alone, of those of "
        f"{' or '.join(names)}: relative misfit {worst.misfit:.1e}, rounding explains "
        f"{worst.tolerance:.1e}, and holds in all others"
    )
    line = str(MENDING[Kind.ENTRY])
    return Finding(Kind.ENTRY, float(worst.alone or 0), said, line, worst.strength)


def _alone(gaps: Tensor, sizes: Tensor, tolerance: float) -> int | None:
    """The channel of several in which an identity fails, where it holds in all others.

    Args:
        gaps: of every channel, relative to all of them together.
        sizes: of its terms, likewise.
        tolerance: of a gap.
    """
    failing = gaps > tolerance
    if int(failing.sum()) != 1 or int((~failing & (sizes > HOLDS * tolerance)).sum()) < OTHERS:
        return None
    return int(gaps.argmax())


def _two_gradients(evidence: Evidence) -> Finding | None:
    """``∂W = k xᵀ`` and ``∂b = k`` of one sample have one k, under any weights."""
    if evidence.batch != 1 or evidence.presumed:
        return None
    for call, weight, bias in evidence.dense:
        if bias is None or not bool((bias != 0).any()) or not bool((weight != 0).any()):
            continue
        rest = rank_one_residual(weight, bias_attack(weight, bias), bias)
        rounding = SAFETY * _tolerance(evidence, call, weight, bias)
        if rest > rounding:
            said = (
                f"∂W and ∂b of '{call.name}' are not k xᵀ and k of one k: relative misfit "
                f"{rest:.1e}, rounding explains {rounding:.1e}"
            )
            few = min(weight.shape) < FEWEST  # to tell the entry itself
            kinds = (*COMMON, Kind.BATCH_SIZE, Kind.OPTIMISER, *((Kind.ENTRY,) if few else ()))
            return Finding.among(kinds, rest, said, rest / rounding)
    return None


def _rivals(evidence: Evidence, broken: list[Contradiction]) -> tuple[Kind, ...]:
    """What else breaks every one of these identities, and no trial excludes."""
    open_ = [k for k in COMMON if k not in evidence.tested]
    layers = floors(evidence)
    if not layers or max(f.rank for f in layers) > (evidence.batch or 1):
        open_.append(Kind.OPTIMISER)  # which divides entry by entry, and leaves no rank low
    shared = set.intersection(*(set(c.also) for c in broken))
    if Kind.LOSS in shared:
        open_.append(Kind.LOSS)  # of which only a few were tried
    if Kind.DROPOUT in shared - evidence.tested and dropping(evidence):
        open_.append(Kind.DROPOUT)
    open_ += [k for k in (Kind.BATCH_SIZE, Kind.LABELS) if k in shared - evidence.tested]
    sent = evidence.gradients.values()
    if sum(int((g == 0).sum()) for g in sent) > SPARSE * sum(g.numel() for g in sent):
        open_.append(Kind.COMPRESSION)
    return tuple(open_)


def _masked(
    evidence: Evidence, balances: list[Contradiction], worst: Contradiction
) -> Finding | None:
    """Dropout that was on: its masks keep the balance, which other weights do not."""
    layers = dropping(evidence)
    if not layers:
        return None
    evidence.tested.add(Kind.DROPOUT)
    rate = float(getattr(layers[0].module, "p", 0.0))
    held = max(balances, key=lambda c: c.misfit)
    said = (
        f"{held.what} holds to {held.misfit:.1e}, so the weights are right, but {worst.what} "
        f"misses by {worst.misfit:.1e}: '{layers[0].name}' (p = {rate:g}) was on"
    )
    return Finding(Kind.DROPOUT, rate, said, remedy(evidence), worst.strength)


def _predictions(evidence: Evidence) -> list[Contradiction]:
    """Features of fully connected layers, predicted from the next one below."""
    if evidence.batch != 1:
        return []
    known = []
    for call, weight, bias in evidence.dense:
        if bias is None or not bool((bias != 0).any()) or not bool((weight != 0).any()):
            continue  # of an input that is zero there is no relative error
        x = bias_attack(weight, bias)
        rest = rank_one_residual(weight, x, bias)
        known.append((call, x, _tolerance(evidence, call, weight, bias) + rest))
    identities = []
    for (lower, x, own), (upper, sent, other) in pairwise(known):
        expected = predicted(evidence, lower, upper, x)
        if expected is None or not bool((expected != 0).any()):
            continue
        gain = float(lower.given.norm() / lower.made.norm().clamp_min(1e-300))
        misfit = float((sent - expected).norm() / expected.norm())
        rounded = evidence.unit * float(lower.made.norm() / upper.given.norm().clamp_min(1e-300))
        tolerance = SAFETY * (max(1.0, gain) * own + other + rounded)  # steps may cancel
        what = f"the input of '{upper.name}' predicted from that of '{lower.name}'"
        identities.append(Contradiction(what, misfit, tolerance, (Kind.DROPOUT,)))
    return identities


def _tolerance(evidence: Evidence, call: Call, weight: Tensor, bias: Tensor) -> float:
    """Relative error of a feature vector that the bias attack gave."""
    noise = [evidence.added(f"{call.name}.{part}") for part in ("weight", "bias")]
    added = noise[0] * weight.shape[1] ** 0.5 / float(weight.norm()) + noise[1] / float(bias.norm())
    return float(16 * evidence.unit + added)


def _balances(evidence: Evidence) -> list[Contradiction]:
    """Consecutive stages of the chain with positively homogeneous steps in between."""
    chain = evidence.chain
    if chain is None:
        return []
    identities = []
    for lower, upper in pairwise(chain.stages):
        steps = (*lower.tail, *upper.lead)
        norms = [op for op in steps if op.kind.startswith("batch_norm")]
        rest = [op for op in steps if not op.kind.startswith("batch_norm")]
        if len(norms) > 1 or (norms and steps[0] is not norms[0]):
            continue
        if not all(_homogeneous(op) for op in rest):
            continue
        contradiction = _balance(evidence, chain, lower, upper, norms[0] if norms else None)
        if contradiction is not None:
            identities.append(contradiction)
    return identities


def _homogeneous(op: Op) -> bool:
    """True for steps with φ(cz) = cφ(z), c > 0, that keep channels apart and in order."""
    if isinstance(op, Activation):
        return bool(op.homogeneous)
    return isinstance(op, Reshape) or "max_pool" in op.kind or "avg_pool" in op.kind


def _balance(
    evidence: Evidence, chain: Chain, lower: Stage, upper: Stage, norm: Op | None
) -> Contradiction | None:
    gradients = evidence.gradients

    def product(name: str) -> Tensor:
        return evidence.model.get_parameter(name).detach().double() * gradients[name]

    below, above = lower.affine, upper.affine
    used = (below.weight_name, below.bias_name, above.weight_name)
    if not all(n in gradients and evidence.precision.sent(n) for n in used if n is not None):
        return None  # a frozen layer leaves its part of the balance open
    channels = below.out_shape[0]
    terms_of = [n for n in used if n is not None]
    if norm is None:
        terms = [product(below.weight_name).flatten(1)]
        if below.bias_name is not None:
            terms.append(product(below.bias_name)[:, None])
        left = torch.cat(terms, 1)
    else:
        names = (f"{norm.name}.weight", f"{norm.name}.bias")
        if any(n not in gradients for n in names):
            return None
        left = torch.stack([product(n) for n in names], 1)
        terms_of = [*names, above.weight_name]
    right = product(above.weight_name)
    groups = 1 if above.geometry is None else above.geometry.groups
    if groups != 1 or prod(above.in_shape) % channels:
        return None
    if above.geometry is None:
        right = right.reshape(len(right), channels, -1)
    if right.shape[1] != channels:
        return None
    right = right.transpose(0, 1).flatten(1)
    size = float(left.square().sum() + right.square().sum()) ** 0.5
    if size == 0.0:
        return None
    gaps = (left.sum(1) - right.sum(1)).abs() / size
    misfit = float(gaps.norm())
    # Of one channel the noise of all its terms adds up, no more than that of all channels does.
    carried = (evidence.model.get_parameter(n).detach().double() for n in terms_of)
    added = sum(
        float((w * evidence.precision.noise_std(n, gradients[n])).square().sum())
        for n, w in zip(terms_of, carried, strict=True)
    ) ** 0.5  # fmt: skip
    count = (left.shape[1] + right.shape[1]) ** 0.5
    # Samples whose cotangents cancel leave the rounding of each.
    whole = sum(
        (float(w.norm()) * evidence.usual.get(n, 0.0)) ** 2
        for n, w in ((n, evidence.model.get_parameter(n).detach()) for n in terms_of)
    ) ** 0.5  # fmt: skip
    tolerance = SAFETY * (4 * evidence.unit * count * max(1.0, whole / size) + added / size)
    what = f"the balance ⟨W, G⟩ between '{lower.name}' and '{upper.name}'"
    sizes = (left.square().sum(1) + right.square().sum(1)).sqrt() / size
    return Contradiction(
        what, misfit, tolerance, of=tuple(terms_of), alone=_alone(gaps, sizes, tolerance)
    )


def _search(evidence: Evidence, samples: Samples | None) -> list[Contradiction]:
    """The nearest that any sample comes to the equations that separate a batch."""
    if samples is not None and samples.foreign:
        what = f"the head's gradient from {samples.route}"
        return [Contradiction(what, samples.rest, samples.explained, (Kind.DROPOUT,))]
    if samples is not None:
        return []
    nearest = nearest_sample(evidence)
    if nearest is None:
        return []
    misfit, tolerance, name, softmax = nearest
    if misfit > tolerance:
        evidence.tested.add(Kind.STEPS)  # the samples of a first step satisfy these equations
    also = (Kind.LOSS if softmax else Kind.DROPOUT, Kind.BATCH_SIZE)
    return [Contradiction(f"the nearest sample at '{name}'", misfit, tolerance, also)]


def _recursion(evidence: Evidence) -> list[Contradiction]:
    """The equations of the stages below the head, for one sample."""
    descent = descended(evidence)
    if descent is None or evidence.chain is None:
        return []
    index, misfit = descent.worst
    relative = descent.solutions[index].solution.stats.residual
    if not relative < WHOLE:
        return []
    what = f"the equations of '{evidence.chain.stages[index].name}' below the head"
    tolerance = max(relative * REFUTED / max(misfit, 1e-300), SAFETY * evidence.unit)
    return [Contradiction(what, relative, tolerance, (Kind.DROPOUT,), recursion=True)]
