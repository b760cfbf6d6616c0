"""Dropout that was on: features that are exactly zero, and others that are 1/(1 − p) too large.

A unit that dropout sets to zero in every sample leaves a column of zeros in the gradient of the
layer that reads it.  Where the model itself never makes a zero there (no probe has one), such
columns are no accident.  Where it does (ReLU), the features of a batch of one are compared with
those that the layer below predicts: 0 and ``1/(1 − p)`` times as large.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor, nn

from rgap.diagnosis.axes import by_input
from rgap.diagnosis.evidence import Call, Evidence
from rgap.diagnosis.finding import MENDING, Finding, Kind
from rgap.head.bias_attack import bias_attack, rank_one_residual
from rgap.remedy import Remedy

FEWEST = 2  # ratios that agree
MISSED = 10.0  # columns of zeros that are expected: e^-10 is the chance of none
WIDE = (-40.0, -1.0, 1.0, 40.0)  # times the probes' pre-activations that data may reach
AFFINE = (nn.Linear, nn.modules.conv._ConvNd)
RARE = 0.5  # of the zeros that are expected, below which they come from elsewhere
AGAIN = 1e3  # roundings up to which modules that are run again give the same
RATIO = 1e-3  # relative spread of the factor 1/(1 − p)

BELOW = Remedy("rgap.invert(model.train(), update)", "a MODEL in train mode").then(
    ": below the dropout a single sample's inputs may come back without the targets"
)


def read(evidence: Evidence) -> list[Finding]:
    """Dropout layers whose readers have columns of zeros that the model does not make."""
    findings = []
    for layer in dropping(evidence):
        for reader in evidence.calls:
            if not evidence.feeds(layer.made, reader.given) or reader is layer:
                continue
            finding = _zeros(evidence, layer, reader) or _scaled(evidence, layer, reader)
            if finding is not None:
                findings.append(finding)
    return findings[:1]


def remedy(evidence: Evidence) -> str:
    """The line that mends it; with what may be read as it is, where nothing mixes samples."""
    line = str(MENDING[Kind.DROPOUT])
    norm = nn.modules.batchnorm._BatchNorm
    if evidence.batch != 1 or any(isinstance(m, norm) for m in evidence.model.modules()):
        return line
    return f"{line}, or {BELOW}"


def dropping(evidence: Evidence) -> list[Call]:
    """Dropout layers that would drop something."""
    kind = nn.modules.dropout._DropoutNd
    return [c for c in evidence.calls if isinstance(c.module, kind) and c.module.p > 0]


def _columns(evidence: Evidence, reader: Call) -> tuple[Tensor, Tensor] | None:
    """Which input features leave no gradient, and which were zero on some probe, [n]."""
    name = f"{reader.name}.weight"
    if name not in evidence.gradients:
        return None
    g = evidence.gradients[name]
    if isinstance(reader.module, nn.Linear) and reader.given.ndim == 2:
        return (by_input(reader.module, g) == 0).all(1), (reader.given == 0).any(0)
    if isinstance(reader.module, nn.modules.conv._ConvNd) and reader.module.groups == 1:
        zero = (reader.given == 0).flatten(2).all(2).any(0)
        return (by_input(reader.module, g) == 0).all(1), zero
    return None


def _makes_zeros(evidence: Evidence, layer: Call) -> bool:
    """True if the steps below a dropout layer make zeros of other data than the probes.

    A GELU of a far negative number is zero, and so is a sigmoid in the end.
    """
    order = evidence.calls.index(layer)
    affine = [c for c in evidence.calls[:order] if isinstance(c.module, AFFINE)]
    if not affine:
        return True  # the data may be zero
    with torch.no_grad():
        value = torch.cat([affine[-1].made * factor for factor in WIDE])
        for call in evidence.calls[evidence.calls.index(affine[-1]) + 1 : order]:
            if not _follows(call, value):
                return True
            value = call.module.to(value)(value)
    return value.shape[1:] != layer.given.shape[1:] or bool(
        (value.abs() < torch.finfo(torch.float32).smallest_normal).any()
    )


def _zeros(evidence: Evidence, layer: Call, reader: Call) -> Finding | None:
    both = _columns(evidence, reader)
    if both is None or bool(both[1].any()) or _makes_zeros(evidence, layer):
        return None
    gone, count = both[0], len(both[0])
    zeros = int(gone.sum())
    rate = float(layer.module.p)  # type: ignore[arg-type]
    expected = rate ** (evidence.batch or 1) * count  # a column that no sample fills
    if expected > MISSED:
        evidence.tested.add(Kind.DROPOUT)
    if zeros < max(1, RARE * expected) or zeros == count:
        return None
    said = (
        f"{zeros} of the {count} inputs of '{reader.name}' are exactly zero ({zeros / count:.2f}); "
        f"without '{layer.name}' (p = {rate:g}) none would be"
    )
    return Finding(Kind.DROPOUT, zeros / count, said, remedy(evidence), inf)


def _scaled(evidence: Evidence, layer: Call, reader: Call) -> Finding | None:
    """Features of a batch of one beside those that the fully connected layer below predicts."""
    if evidence.batch != 1 or not isinstance(reader.module, nn.Linear):
        return None
    order = {c.name: i for i, c in enumerate(evidence.calls)}
    below = [
        (c, w, b)
        for c, w, b in evidence.dense
        if order[c.name] < order[layer.name] and b is not None and bool((b != 0).any())
    ]
    own = evidence.linear(reader)
    if not below or own is None or own[1] is None or not bool((own[1] != 0).any()):
        return None
    call, weight, bias = below[-1]
    assert bias is not None
    x = bias_attack(weight, bias)
    if rank_one_residual(weight, x, bias) > RATIO:
        return None
    expected = predicted(evidence, call, reader, x)
    if expected is None:
        return None
    evidence.tested.add(Kind.DROPOUT)
    sent = bias_attack(*own)  # type: ignore[arg-type]
    active = expected.abs() > 1e-6 * expected.abs().max()
    kept = active & (sent != 0)
    zeros, count = int((active & (sent == 0)).sum()), int(active.sum())
    if zeros < 1 or int(kept.sum()) < FEWEST:
        return None
    ratios = sent[kept] / expected[kept]
    factor = float(ratios.median())
    rate = 1.0 - 1.0 / factor if factor > 1 else 0.0
    if float((ratios / factor - 1).abs().max()) > RATIO or rate < 1e-3:
        return None
    said = (
        f"{zeros} of the {count} active inputs of '{reader.name}' are zero and the others "
        f"{factor:.6g} times what '{call.name}' predicts, 1/(1 − p) for p = {rate:.4g}"
    )
    return Finding(Kind.DROPOUT, rate, said, remedy(evidence), inf)


def predicted(evidence: Evidence, lower: Call, reader: Call, x: Tensor) -> Tensor | None:
    """What the model makes of an input x of a fully connected layer at the input of a later one.

    The modules in between are run again; None where they do not give what the model gave.
    """
    calls = evidence.calls
    first, last = calls.index(lower), calls.index(reader)
    with torch.no_grad():

        def rise(value: Tensor) -> Tensor | None:
            for call in calls[first:last]:
                if call is not lower and not _follows(call, value):
                    return None
                value = call.module.to(value)(value)
            return value.flatten(1)

        probe = rise(lower.given)
        if probe is None or probe.shape != reader.given.flatten(1).shape:
            return None
        gap = (probe - reader.given.flatten(1)).norm() / probe.norm().clamp_min(1e-300)
        if not float(gap) <= AGAIN * torch.finfo(probe.dtype).eps:
            return None  # a small branch leads past them
        made = rise(x[None])
    return None if made is None else made[0]


def _follows(call: Call, value: Tensor) -> bool:
    return call.given.shape[1:] == value.shape[1:]
