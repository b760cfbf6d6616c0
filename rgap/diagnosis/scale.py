"""Sign, reduction, accumulation, clipping, scale and loss: all read from the factors λ.

A factor that all samples share is a sign, another reduction, a clipped norm, or a rate; factors
that differ from sample to sample are micro-batches of other sizes (``λ_i = B/(M b_m)`` for the
b_m samples of micro-batch m of M) or norms that were clipped sample by sample (λ_i ≤ 1).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf, log2, prod

import torch
from torch import Tensor

from rgap.diagnosis.evidence import Evidence
from rgap.diagnosis.factors import EQUAL, Factors, measured, smallest_misfit
from rgap.diagnosis.finding import Finding, Kind
from rgap.diagnosis.samples import Samples
from rgap.jacobian.batch_loss import loss_scale
from rgap.network.activations import Activation
from rgap.remedy import Remedy
from rgap.update.losses import Loss
from rgap.update.targets import BINARY, CROSS_ENTROPY, SQUARED

ROUND = 4e-6  # relative distance of a norm from a bound of two digits that clipping left
LARGEST = 8  # batches whose copies are tried
SUM = 0.05  # relative distance of a factor from the number of steps that a client summed
SIMPLE = 1e-4  # relative distance from a simple number within which a factor is taken for it
WHOLE = 64  # largest factor, or inverse of one, that is simple as a whole number
TELLING = 3  # logits from which the equations of a sample overdetermine its factor
FLAT, PLACES = 8.0, 64  # arguments of an activation at which its slope is looked at
GRADES = (Kind.SIGN, Kind.REDUCTION, Kind.SCALE, Kind.CLIPPING, Kind.LOSS)


def read(evidence: Evidence, samples: Samples) -> list[Finding]:
    """Findings at the head; empty where λ = 1, or where no target of the loss fits."""
    loss = evidence.loss
    factors = measured(evidence, samples, loss)
    stated = evidence.labels is not None and len(samples.logits) == 1
    if stated and (factors is None or factors.common != 1.0):
        other = _other_label(evidence, samples, factors)
        if other is not None:
            return [other]
    if factors is None:
        return _other_loss(evidence, samples)
    if evidence.presumed and not factors.unique:
        return []  # a mixture of the two targets has any factor
    evidence.tested.update(GRADES)
    if _under_both_targets(factors, evidence.batch or 1):
        return []
    common, logits = factors.common, samples.logits
    if len(logits) > 1:
        evidence.tested.add(Kind.ACCUMULATION)
        if (logits.shape[1] if common is None else logits.numel()) >= TELLING:
            evidence.tested.add(Kind.STEPS)  # no sample was seen by other weights
    if common is None:
        return _unequal(evidence, samples, factors)
    return _uniform(evidence, samples, factors, common)


def _other_label(evidence: Evidence, samples: Samples, factors: Factors | None) -> Finding | None:
    """Another class than the stated one that fits with λ = 1, where that one does not."""
    right = factors is not None and _one(factors)
    if right or evidence.loss.targets == "index":  # of the other kinds one-hot ones alone are tried
        evidence.tested.add(Kind.LABELS)
    free = None if right else measured(replace(evidence, labels=None), samples, evidence.loss)
    if free is None or not _one(free):
        return None
    if not free.unique and factors is not None:
        return None  # of two classes one fits with any factor
    said = (
        f"label {free.label(0)} gives the head's cotangent with λ = {free.common:.6g}, misfit "
        f"{free.misfit:.1e}; the stated one does not"
    )
    target, loss = free.targets[0], evidence.loss
    label = target if loss.own else loss.read(target)[0]
    line = Remedy(
        f"dataclasses.replace(update, labels=torch.tensor({label.tolist()}))",
        f"--labels {','.join(f'{number:g}' for number in label.flatten().tolist())}",
    )
    number = label if len(label.flatten()) == 1 else label.argmax()
    return Finding(Kind.LABELS, float(number), said, str(line), inf)


def _one(factors: Factors) -> bool:
    near = max(EQUAL, factors.tolerance)
    return factors.common is not None and abs(factors.common - 1.0) <= near


def _under_both_targets(factors: Factors, batch: int) -> bool:
    """True for fewer samples than the batch has, of which some occur under either of two targets.

    The cotangents of m and n copies are ``m r_0 + n r_1``, which has a factor of its own for either
    target, ``λ_0 = m + n r_1/r_0``, and these say how many there are: ``m/λ_0 + n/λ_1 = 1``.
    """
    if len(factors.values) >= batch or any(len(own) != 2 for own in factors.either):
        return False
    near = max(EQUAL, factors.tolerance)
    sums = {0}
    for first, second in factors.either:
        copies = set()
        for m, n in product(range(batch), repeat=2):
            shares = m / first, n / second
            if abs(sum(shares) - 1.0) <= near * sum(map(abs, shares)):
                copies.add(m + n)
        sums = {told + own for told in sums for own in copies}
    return batch in sums


def _uniform(
    evidence: Evidence, samples: Samples, factors: Factors, common: float
) -> list[Finding]:
    near = max(EQUAL, factors.tolerance)
    findings = []
    size = abs(common)
    if common < 0:
        negated = "{n: -g for n, g in update.gradients.items()}"
        said = (
            f"k = λ(∂ℓ/∂z) at the head with λ = {common:.6g} for {_samples(samples)}, misfit "
            f"{factors.misfit:.1e}"
        )
        line = Remedy(f"dataclasses.replace(update, gradients={negated})", "--factor -1")
        rivals = () if evidence.labels is None else (Kind.LABELS,)
        findings.append(Finding(Kind.SIGN, common, said, str(line), 2.0 / near, rivals))
    if abs(size - 1.0) <= near or (evidence.presumed and _repeated(evidence.loss, size, near)):
        return findings
    count, size_of = len(samples.logits), evidence.batch or 1
    if evidence.loss.reduction == "sum" and abs(size * count / size_of - 1.0) <= near:
        return findings  # each occurs as often as the others, of which a sum does not know
    findings.append(_of_factor(evidence, samples, factors, size, abs(size - 1.0) / near))
    return findings


def _repeated(loss: Loss, size: float, near: float) -> bool:
    """True for a factor of a copies of one sample in a batch whose other cotangents vanish."""
    batches = range(1, LARGEST + 1) if loss.reduction == "mean" else (1,)
    return any(
        round(size * b) >= 1 and abs(size * b / round(size * b) - 1.0) <= near for b in batches
    ) and (size < 1.0 or loss.reduction == "sum")


def _samples(samples: Samples) -> str:
    count = len(samples.logits)
    return "the sample" if count == 1 else f"each of {count} samples"


def _of_factor(
    evidence: Evidence, samples: Samples, factors: Factors, size: float, strength: float
) -> Finding:
    """What a positive factor most likely is."""
    loss, near = evidence.loss, max(EQUAL, factors.tolerance)
    said = f"λ = {size:.6g} at the head for {_samples(samples)}, misfit {factors.misfit:.1e}"
    outputs, batch = samples.logits.shape[1], evidence.batch or 1
    ratio = 1.0 / loss_scale(replace(loss, reduction="mean"), batch, outputs)
    for reduction, expected in (("sum", ratio), ("mean", 1.0 / ratio)):
        if ratio > 1 and loss.reduction != reduction and abs(size / expected - 1.0) <= near:
            told = Remedy(
                "dataclasses.replace(update, loss=dataclasses.replace(update.loss, "
                f'reduction="{reduction}"))',
                f"--reduction {reduction}",
            )
            said += f"; a {reduction} has {expected:.6g} times the gradient of a {loss.reduction}"
            return Finding(Kind.REDUCTION, size, said, str(told), strength)
    by = f"{_simple(size, factors.tolerance):.9g}"
    divided = Remedy(
        f"dataclasses.replace(update, gradients={{n: g / {by} for n, g in "
        f"update.gradients.items()}}{_noise(evidence, by)})",
        f"--factor {by}",
    )
    line = str(divided)
    count = len(samples.logits)
    if count < batch and loss.reduction == "mean" and abs(size * count / batch - 1.0) <= near:
        said += (
            f"; a mean over {batch} of {count} samples has this factor: a batch of {count}, or "
            f"{batch} samples of which each occurs {batch / count:g} times, or a scaled update, "
            f"for which write {line}"
        )
        line = f"dataclasses.replace(update, batch_size={count})"
        return Finding(Kind.BATCH_SIZE, float(count), said, line, strength, (Kind.SCALE,))
    total = sum(float(g.double().square().sum()) for g in evidence.update.gradients.values()) ** 0.5
    bound = float(f"{total:.1e}")
    if size < 1.0 and abs(total / bound - 1.0) <= ROUND + 8 * evidence.unit:
        said += f"; the norm of the whole update is {total:.6g}"
        return Finding(Kind.CLIPPING, bound, said, line, strength)
    power = log2(size)
    if abs(power) > 3.5 and abs(power - round(power)) < near:
        said += f", 2^{round(power)} as mixed precision scales a loss"
    elif outputs > 1 and loss.name != CROSS_ENTROPY and abs(size / outputs - 1.0) <= near:
        said += f", the {outputs} outputs of a sample: a mean over samples of sums over outputs"
    elif size < 1.0:
        said += f"; the norm of the whole update is {total:.6g}, a bound if it was clipped"
    else:
        said += f"; a rate declared as η was {size:.6g} η"
    rivals = _rivals(evidence, samples.logits.numel())
    if evidence.head is not None and evidence.head[2] is None and count == 1:
        rivals += tuple(k for k in (Kind.WEIGHTS, Kind.ENTRY) if k not in rivals)  # of one tensor
    whole = round(size)
    if Kind.STEPS not in (*rivals, *evidence.tested) and whole > 1 and abs(size / whole - 1) < SUM:
        rivals += (Kind.STEPS,)  # a sum of so many
    if size < 1.0:
        rivals += (Kind.CLIPPING,)
    if evidence.labels is not None and loss.targets == "value":
        rivals += (Kind.LABELS,)
    return Finding(Kind.SCALE, size, said, line, strength, rivals)


def _rivals(evidence: Evidence, logits: int) -> tuple[Kind, ...]:
    """What a factor may be besides where its sample's equations are no more than it is."""
    if logits >= TELLING:
        return ()
    return (Kind.LOSS, *(k for k in (Kind.STEPS, Kind.WEIGHTS) if k not in evidence.tested))


def _simple(size: float, error: float) -> float:
    """The whole number, inverse of one or power of two that a factor is within its error.

    What an estimate is off by contradicts the equations of a batch, so the factor itself is named.

    >>> _simple(1.99999418, 1e-3), _simple(0.249998, 1e-3), _simple(65536.2, 1e-3)
    (2.0, 0.25, 65536.0)
    >>> _simple(1.99, 1e-3), _simple(2.0001, 1e-6)
    (1.99, 2.0001)
    """
    near = min(max(error, 1e-9), SIMPLE)
    power = 2.0 ** round(log2(size))
    whole, inverse = float(round(size)), float(round(1.0 / size))
    options = [power]
    options += [whole] if 1 <= whole <= WHOLE else []
    options += [1.0 / inverse] if 1 <= inverse <= WHOLE else []
    best = min(options, key=lambda value: abs(size / value - 1.0))
    return best if abs(size / best - 1.0) <= near else size


def _noise(evidence: Evidence, by: str) -> str:
    """The noise that was stated entry by entry, as part of a line that divides the gradients."""
    if not evidence.update.noise:
        return ""
    return f", noise={{n: s / {by} for n, s in (update.noise or {{}}).items()}}"


def _some_silent(evidence: Evidence) -> bool:
    """True if a step stops cotangents somewhere: samples may send to the head, and not below it."""
    if evidence.chain is None:
        return True
    ops = [op for s in evidence.chain.stages for op in (*s.lead, *s.tail)]
    like = next(iter(evidence.gradients.values()))
    return any(isinstance(op, Activation) and _flat(op, like) for op in ops)


def _flat(op: Activation, like: Tensor) -> bool:
    """True if the slope is 0 somewhere on the way from -FLAT to FLAT."""
    steps = torch.linspace(-FLAT, FLAT, PLACES, dtype=torch.float64, device=like.device)
    at = steps[:, None].expand(-1, prod(op.out_shape)).reshape(-1, *op.out_shape)
    return bool((op.derivative(at) == 0).any())


def _unequal(evidence: Evidence, samples: Samples, factors: Factors) -> list[Finding]:
    """Factors that differ from sample to sample."""
    values, near = factors.values, max(EQUAL, factors.tolerance)
    copies = [round(v) for v in values]
    size = evidence.batch or len(values)
    if sum(copies) == size and all(
        c > 0 and abs(v / c - 1) <= near for v, c in zip(values, copies, strict=True)
    ):
        return []  # pictures that occur several times
    if len(values) < size and _some_silent(evidence):
        return []  # the head hears others, whose features may be those of a sample that was found
    listed = ", ".join(f"{v:.4g}" for v in sorted(values)[:8])
    strength = (max(values) - min(values)) / near
    split = _micro_batches(values, size, near)
    if split is not None:
        said = f"the samples weigh {listed}: {len(split)} micro-batches of {split}"
        line = (
            "sum(b / B * g for b, g in zip(sizes, gradients)) on the client: weigh each "
            "micro-batch by its size"
        )
        return [Finding(Kind.ACCUMULATION, float(len(split)), said, line, strength)]
    total = _of_copies(values, size, near)
    if total is not None:
        said = f"the samples weigh {listed}, as whole numbers of copies do in a mean over {total}"
        line = f"dataclasses.replace(update, batch_size={total})"
        return [Finding(Kind.BATCH_SIZE, float(total), said, line, strength, (Kind.SCALE,))]
    rivals = _rivals(evidence, samples.logits.shape[1])
    if min(values) > 0 and max(values) <= 1.0 + near:
        said = _each(factors, near)
        line = (
            "rgap.invert(model, update): below two fully connected layers it finds a factor a "
            "sample (Recovery.scale); elsewhere ask for the gradients of single samples"
        )
        return [Finding(Kind.CLIPPING, min(values), said, line, strength, rivals)]
    said = f"the samples weigh {listed}: class weights, a focal loss, or weights of samples"
    weighed = Remedy(
        "dataclasses.replace(update, loss=rgap.Loss(weight=weights))", "--class-weights X,X,…"
    )
    line = f"{weighed} with the client's class weights, or have it send a loss with equal weights"
    return [Finding(Kind.SCALE, max(values), said, line, strength, rivals)]


def _each(factors: Factors, near: float) -> str:
    """What norms that were clipped sample by sample say of each: ``λ_i = min(1, c/‖g_i‖)``."""
    rows = sorted((value, factors.label(row)) for row, value in enumerate(factors.values))
    clipped = [(v, t) for v, t in rows if v < 1.0 - near]
    listed = ", ".join(f"{v:.4g} (label {t}, norm {1 / v:.3g} c)" for v, t in clipped[:8])
    said = (
        f"{len(clipped)} of {len(rows)} samples were clipped, sample by sample: to a bound c by "
        f"the factors {clipped[0][0]:.4g} to {clipped[-1][0]:.4g}: {listed}"
    )
    if len(clipped) > 8:
        said += f" and {len(clipped) - 8} more"
    if len(clipped) < len(rows):
        said += f"; {len(rows) - len(clipped)} not, of a norm below c"
    return said


def _of_copies(values: tuple[float, ...], size: int, near: float) -> int | None:
    """B with ``λ_i = m_i size/B`` for whole numbers m_i of copies, ``Σ m_i = B``, or None."""
    for total in range(len(values), LARGEST + 1):
        copies = [v * total / size for v in values]
        whole = [round(c) for c in copies]
        if sum(whole) == total and all(
            c > 0 and abs(m / c - 1) <= near for m, c in zip(copies, whole, strict=True) if c
        ):
            return None if min(whole) < 1 else total
    return None


def _micro_batches(values: tuple[float, ...], size: int, near: float) -> list[int] | None:
    """Sizes of M micro-batches with λ_i = B/(M b_m), or None."""
    if len(values) != size:
        return None
    for count in range(2, size + 1):
        sizes = [size / (count * v) for v in values]
        whole = [round(b) for b in sizes]
        if any(b < 1 or abs(s / b - 1) > 4 * near for s, b in zip(sizes, whole, strict=True)):
            continue
        parts: list[int] = []
        for b in sorted(set(whole), reverse=True):
            if whole.count(b) % b:
                break
            parts += [b] * (whole.count(b) // b)
        else:
            if len(parts) == count and sum(parts) == size and len(set(parts)) > 1:
                return parts
    return None


def _other_loss(evidence: Evidence, samples: Samples) -> list[Finding]:
    """No target of the declared loss fits: one of another loss may."""
    declared = evidence.update.loss
    missed = None if evidence.folded else smallest_misfit(evidence, samples, declared)
    if missed is None or missed[0] <= missed[1]:
        return []
    outputs = samples.logits.shape[1]
    names = [CROSS_ENTROPY, BINARY] if outputs > 2 else [BINARY]
    names += [SQUARED] if outputs > 3 else []
    tried = [
        Loss(name, reduction)
        for name, reduction in product(names, ("mean", "sum"))
        if name != declared.name or declared.label_smoothing
    ]
    for loss in [*_smoothed(evidence, samples), *tried]:
        name, reduction = loss.name, loss.reduction
        options = f", label_smoothing={loss.label_smoothing:g}" if loss.label_smoothing else ""
        factors = measured(replace(evidence, labels=None), samples, loss)
        if factors is None or factors.common is None or not factors.unique:
            continue
        if abs(factors.common - 1.0) > max(EQUAL, factors.tolerance):
            continue
        evidence.tested.update(GRADES)
        said = (
            f"the nearest target of {declared.name} misses the head's cotangent by "
            f"{missed[0]:.1e}, that of {name}{options} by {factors.misfit:.1e} "
            f"with λ = {factors.common:.6g}"
        )
        stated = f'"{name}", reduction="{reduction}"{options}'
        flags = f"--loss {name} --reduction {reduction}"
        if loss.label_smoothing:
            flags += f" --label-smoothing {loss.label_smoothing:g}"
        line = Remedy(f"dataclasses.replace(update, loss=rgap.Loss({stated}))", flags)
        strength = missed[0] / max(factors.misfit, factors.tolerance) if factors.misfit else inf
        return [Finding(Kind.LOSS, missed[0], said, str(line), strength)]
    return []


def _smoothed(evidence: Evidence, samples: Samples) -> list[Loss]:
    """Cross-entropy with the smoothing ε that ``q = p − k/s = (1 − ε) e_c + ε/C`` shows."""
    loss = evidence.loss
    outputs = samples.logits.shape[1]
    if loss.name != CROSS_ENTROPY or loss.targets != "index" or outputs < 4 or not loss.plain:
        return []
    if loss.weight is not None:
        return []
    scale = loss_scale(loss, evidence.batch or 1, outputs)
    targets = samples.logits.softmax(1) - samples.cotangents / scale
    seen = float(outputs * targets.median())
    rates = dict.fromkeys((float(f"{seen:.2g}"), float(f"{seen:.4g}")))
    return [Loss(loss.name, loss.reduction, label_smoothing=e) for e in rates if 0.0 < e < 1.0]
