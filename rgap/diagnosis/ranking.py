"""Preflight: is an update what it is declared to be?  Trials, ranked by how clear they are."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.diagnosis import (
    decay,
    dropout,
    entries,
    mode,
    names,
    noise,
    optimiser,
    parameters,
    samples,
    scale,
    silent,
    steps,
    values,
    weights,
)
from rgap.diagnosis.evidence import Evidence, gather
from rgap.diagnosis.finding import Check, Finding, Kind
from rgap.precision import Precision
from rgap.update import targets
from rgap.update.update import Update

EXPLAIN = frozenset((
    Kind.MODE, Kind.DROPOUT, Kind.STEPS, Kind.NOISE, Kind.BATCH_SIZE, Kind.LOSS, Kind.DECAY,
    Kind.LABELS,
))  # fmt: skip
"""Findings that break identities between layers: other weights are not needed to explain these."""
SAME = 1e3  # roundings by which the gradient of one sample may miss rank one


def check(
    model: nn.Module,
    update: Update,
    *,
    batch_size: int | None = None,
    labels: Tensor | None = None,
    input_shape: tuple[int, ...] | None = None,
    noise: float = 0.0,
    seed: int = 0,
    time_limit: float = 20.0,
) -> Check:
    """Look for the mistakes that make an update look like that of another model.

    Each finding rests on a trial: an identity that the update breaks as it is declared, and
    satisfies (or breaks in a known way) under the finding.  Where no equation of the network says
    anything of a mistake, it is not found, and listed in :attr:`Check.untested`.

    Args:
        model: the network, its batch norms in the mode that the client is said to have had; it is
            left as it was.
        update: what the client sent; its names need not be the model's.
        batch_size: overrides ``update.batch_size``.
        labels: targets of the batch, if they are known.
        input_shape: overrides ``update.input_shape``; of one sample.
        noise: standard deviation of noise that is known to be in every entry.
        seed: of the sampled errors; the global random state is not touched.
        time_limit: seconds after which no further trial begins.

    Returns:
        A :class:`Check`; ``best`` is the clearest finding, ``ok`` says that there is none.

    Raises:
        TypeError: no module, no update, or an argument that is none of its kind.
        ValueError: a model without shapes or finite values, a batch size below 1, noise or a time
            that is none, labels that are none of the loss's.

    >>> import dataclasses, rgap, torch
    >>> model = rgap.models.mlp((32, 32), classes=5, seed=0)
    >>> update = rgap.capture(model, torch.rand(1, 3, 32, 32), torch.tensor([3]))
    >>> rgap.check(model, update).ok
    True
    >>> flipped = {name: -g for name, g in update.gradients.items()}
    >>> found = rgap.check(model, dataclasses.replace(update, gradients=flipped)).best
    >>> found.kind.name, round(found.value, 3)
    ('SIGN', -1.0)
    """
    began = time.perf_counter()
    validation.module(model)
    if not isinstance(update, Update):
        raise TypeError(
            f"update: expected an Update, got {type(update).__name__}; write rgap.Update(gradients)"
        )
    validation.refuse_broken(model)
    validation.noise(noise)
    validation.seconds("time_limit", time_limit)
    size = update.batch_size if batch_size is None else validation.count("batch_size", batch_size)
    if input_shape is not None:
        input_shape = validation.shape(input_shape)
    known = update.labels if labels is None else validation.labels(labels, size)
    size = len(known) if size is None and known is not None else size
    seed = validation.seed(seed)
    tested: set[Kind] = {Kind.NAMES}
    unrun: list[str] = []
    renamed, misnamed = names.mended(model, update)
    findings = [misnamed] if misnamed else []
    if renamed is not None:
        tested.update((Kind.PARAMETERS, Kind.COMPRESSION, Kind.PRECISION))
        weights_sent = parameters.sent(model, renamed)
        if weights_sent is not None:
            findings.append(weights_sent)
        else:
            rounded = values.rounded(renamed)
            plain, update = renamed, renamed.as_rounded()[0]
            quotient = values.divided(update) if rounded is None else None
            if quotient is not None:
                update, rounded = quotient
            precision = Precision(update.dtype, noise, seed=seed, entries=update.noise or {})
            deadline = began + time_limit
            evidence = gather(model, update, size, known, input_shape, precision, deadline)
            _require_targets(evidence)
            found = _examine(model, evidence, plain, rounded)
            findings += mode.as_declared(model, evidence, found)
            tested |= evidence.tested
            unrun = evidence.unrun
            if evidence.late and not findings:
                unrun.append(
                    f"what was left after {time_limit:g} seconds; write a larger time_limit="
                )
    tested |= {finding.kind for finding in findings}
    ranked = tuple(sorted(findings, key=lambda finding: -finding.strength))
    return Check(ranked, frozenset(tested), time.perf_counter() - began, tuple(unrun))


def _require_targets(evidence: Evidence) -> None:
    """Raise unless stated targets are those of the loss and of the model's outputs."""
    loss, known, outputs = evidence.update.loss, evidence.labels, evidence.outputs
    if known is None or outputs is None or loss.own or not loss.known:
        return
    try:
        targets.check(
            loss.name, loss.targets, outputs[:1].expand(len(known), *outputs.shape[1:]), known
        )
    except (TypeError, ValueError) as error:
        words = str(error).replace("targets:", "labels:", 1)
        raise type(error)(f"{words} Or write labels=None to have them found.") from None


def _examine(
    model: nn.Module, evidence: Evidence, plain: Update, rounded: Finding | None
) -> list[Finding]:
    """The trials of an update under the model's names.

    Args:
        model: the caller's.
        evidence: of the update, with what its format rounds.
        plain: the update as it was sent.
        rounded: the finding that its values have a format of their own, or None.
    """
    evidence.tested.add(Kind.OPTIMISER)
    compressed = values.compressed(replace(evidence, update=plain))
    stepped = optimiser.read(evidence.update)
    if compressed is not None:
        return [replace(compressed, rivals=(Kind.OPTIMISER,) if stepped else ())]
    findings = [rounded] if rounded else []
    if stepped is not None and (rounded is None or rounded.kind is Kind.PRECISION):
        return [*findings, stepped]
    findings += silent.read(model, evidence)
    if evidence.update.local_steps > 1 or not evidence.gradients:
        steps_stated = evidence.update.local_steps > 1
        evidence.unrun.append(
            "the equations of one gradient: the update states that it is one of "
            f"{evidence.update.local_steps} local steps"
            if steps_stated
            else "the equations: every gradient is zero, or beneath its noise"
        )
        return findings
    return findings + _equations(evidence)


def _equations(evidence: Evidence) -> list[Finding]:
    """The trials that need the network."""
    if evidence.batch is None:
        one = samples.presumed(evidence)
        if one is None or any(f.rank > 1 for f in noise.floors(one)):
            evidence.unrun.append("those that take the batch size; write batch_size=")
            return mode.read(evidence) or weights.read(evidence, None)
        evidence = one
    layers = noise.floors(evidence)
    decayed, gradients = decay.read(evidence, layers)
    if decayed:
        unit, known = evidence.unit, evidence.precision.entries
        lost = {n: 2 * unit * (evidence.gradients[n] - g).abs() for n, g in gradients.items()}
        noisier = {n: torch.hypot(e, known[n]) if n in known else e for n, e in lost.items()}
        precision = replace(evidence.precision, entries={**known, **noisier})
        evidence = replace(evidence, gradients=gradients, precision=precision)
        layers = noise.floors(evidence)
    altered = entries.read(evidence)
    if altered:
        return [*decayed, *altered]
    findings = noise.read(evidence, layers)
    if findings:
        precision = replace(evidence.precision, noise=findings[0].value)
        evidence = replace(evidence, precision=precision)
    findings += decayed
    modes = [*mode.read(evidence), *dropout.read(evidence)]
    findings += modes
    if not any(f.kind is Kind.NOISE for f in findings):
        findings += _beside_entries(evidence, steps.read(evidence, layers))
    sent = None
    if not any(f.kind in (Kind.STEPS, Kind.BATCH_SIZE) for f in findings):
        sent = _sent(evidence)
    if sent is not None and not sent.foreign:
        findings += scale.read(evidence, sent)
    if any(f.kind in EXPLAIN for f in findings) or evidence.late:
        return findings
    other = weights.read(evidence, sent)
    if other and sent is not None and sent.logits.numel() < scale.TELLING:
        # Some factor always fits these.
        findings = [f for f in findings if f.kind not in scale.GRADES]
    return [*findings, *other]


def _beside_entries(evidence: Evidence, read: list[Finding]) -> list[Finding]:
    """Steps and batch sizes, with changed entries of one row or column where these do as well."""
    ranked = [f for f in read if f.kind in (Kind.STEPS, Kind.BATCH_SIZE)]
    if not ranked or not entries.in_line(evidence):
        return read
    return [replace(f, rivals=(*f.rivals, Kind.ENTRY)) if f in ranked else f for f in read]


def _sent(evidence: Evidence) -> samples.Samples | None:
    """The samples at the head, where they can be told apart."""
    if evidence.batch != 1:
        return samples.batch(evidence)
    alone, head = samples.single(evidence), evidence.head
    stated = head is not None and evidence.added(head[0].weight_name) > 0.0
    if alone is None or (alone.rest > SAME * evidence.unit and not stated):
        return None
    return alone
