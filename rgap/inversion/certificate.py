"""The certificate: what may be called exact, and what every other outcome is called.

``EXACT`` needs all of: (a) every alternative label, root or sign refuted, (b) every stage with
nothing open, by the rule for what says so (:func:`rgap.constraints.determined.doubt`), (c) the
whole update reproduced within the tolerance of its precision, (d) an error bound, from noise
sampled through the whole update, that is small against the data.  All numbers are those of
:mod:`rgap.limits`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from rgap.inversion.altered import UNSEEN, shows_changes
from rgap.inversion.answer import Answer
from rgap.inversion.backing import backing
from rgap.inversion.batch_rows import BatchRows
from rgap.inversion.batch_size import merged
from rgap.inversion.kinks import at_kinks
from rgap.inversion.outcomes import layer_reports, stopped
from rgap.inversion.problem import Problem
from rgap.inversion.replay import replay, replayed
from rgap.inversion.symptoms import warnings
from rgap.inversion.verdict import lost, verdict
from rgap.limits import (
    FITS,
    NEAREST,
    REFUTED,
    SAFETY,
    STATED,
    UNTOLD,
    USEFUL,
)
from rgap.recovery import Candidate, Recovery, Status


def certify(problem: Problem, answers: Sequence[Answer]) -> Recovery:
    """Decide the status of the candidates that reached the data.

    Args:
        problem: the update, in float64.
        answers: every root, sign or label that no equation has refuted so far.

    Returns:
        ``EXACT``, or what (a) to (d) lack: ``AMBIGUOUS`` for several answers that fit,
        ``INCONSISTENT`` for none, ``UNDERDETERMINED`` for one that could be another; the inputs
        may then be certified alone.
    """
    scored = [(backed(problem, a), *replayed(problem, *_batch(problem, a))) for a in answers]
    fitting = [
        s
        for s in scored
        if s[0].polished.misfit <= REFUTED and (s[0].reading.fits or s[0].reading.open)
    ]
    if not fitting:
        nearest = min(scored, key=lambda s: s[0].polished.misfit)
        contradicted = _misfit(problem, nearest)
        return _inputs_alone(problem, nearest[0], contradicted) or contradicted
    if problem.labels is not None:
        fitting = [s for s in fitting if s[0].reading.open or _same_labels(s[0], problem.labels)]
        if not fitting:
            told = _sent(scored[0][0]).flatten().tolist()
            return stopped(
                problem,
                Status.INCONSISTENT,
                f"the stated labels {problem.labels.flatten().tolist()} contradict the update, "
                f"whose head gradient says {told}; write labels=None to take those",
                scored[0][0].descent,
            )
    inside = [s for s in fitting if problem.excess(s[0].inputs, s[0].bound) <= problem.slack]
    low, high = problem.value_range or (-inf, inf)
    if not inside and problem.slack == 0:
        first = fitting[0][0]
        return stopped(
            problem,
            Status.INCONSISTENT,
            f"the stated value_range [{low:g}, {high:g}] contradicts the update, which determines "
            f"values in [{float(first.inputs.min()):.3g}, {float(first.inputs.max()):.3g}]; write "
            "the range of the data as the network sees them",
            first.descent,
        )
    kept = inside or fitting
    best, residual, _ = min(kept, key=lambda s: s[0].polished.misfit)
    if len(kept) > 1:
        return _several(problem, best, residual, kept)
    status, reason = verdict(problem, best)
    if status is Status.EXACT:
        open_ = _open(problem, best)
        if open_:
            said = stopped(problem, Status.UNDERDETERMINED, open_, best.descent)
            said = replace(said, residual=residual)
            return _inputs_alone(problem, best, said) or said
    if status is Status.EXACT and best.rows is not None and bool((best.rows.copies > 1).any()):
        status, reason = Status.AMBIGUOUS, _copies(best.rows)
    if status is Status.EXACT and best.reading.scale != 1.0:
        reason += f"; the update is {best.reading.scale:.6g} times that of the declared loss"
    if len(kept) < len(fitting):
        reason += f"; others would send this update too, with values outside [{low:g}, {high:g}]"
    listed = (_listed(best, residual),) if status is Status.AMBIGUOUS else ()
    return _assemble(problem, best, residual, status, reason, listed)


def _listed(answer: Answer, residual: float) -> Candidate:
    """A batch among several, every picture once with how often it occurs."""
    if answer.rows is None:
        return Candidate(answer.inputs, answer.labels, residual)
    copies = answer.rows.copies if bool((answer.rows.copies > 1).any()) else None
    return Candidate(answer.inputs[answer.rows.picture], answer.labels, residual, copies)


def _several(
    problem: Problem,
    best: Answer,
    residual: float,
    kept: Sequence[tuple[Answer, float, Mapping[str, float]]],
) -> Recovery:
    """Of answers that all fit: that they send the update, or why it cannot be said."""
    missed = max(gap for _, gap, _ in kept)
    if not missed <= USEFUL:
        reason = (
            f"{len(kept)} batches fit within their errors, but one sends another update, off by "
            f"{missed:.1e} of its size"
        )
        return _assemble(problem, best, residual, Status.UNDERDETERMINED, reason, ())
    reason = f"{len(kept)} batches send exactly this update; no equation tells them apart"
    candidates = tuple(_listed(answer, gap) for answer, gap, _ in kept)
    return _assemble(problem, best, residual, Status.AMBIGUOUS, reason, candidates)


def _open(problem: Problem, answer: Answer) -> str:
    """Why the targets of an answer whose inputs are certified are not, or ""."""
    reading, head = answer.reading, problem.chain.stages[-1]
    if not problem.precision.sent(head.affine.weight_name):
        return f"the gradient of the last layer '{head.name}' was not sent (frozen on the client)"
    if reading.open:
        return reading.open
    # Real-valued targets have a size of their own.
    unit = max(1.0, float(reading.target.abs().max()))
    off = answer.targets_bound or 0.0
    if reading.tolerance > UNTOLD * unit or reading.distance > NEAREST or off > USEFUL * unit:
        return (
            "at the rounding and noise of this update the target is only known to "
            f"{off or reading.tolerance:.1g}: several fit the gradient of the last layer"
        )
    again = replay(problem, *_batch(problem, answer), _errors(problem, answer))
    if again.deaf:
        return "what rounding makes of this answer explains any update of this size"
    if again.fits:
        return ""
    name = again.worst
    return (
        f"the model's own update for this answer differs from '{name}' by {again.parts[name]:.1e} "
        f"of it, where rounding, noise and the errors of the inputs explain "
        f"{again.allowed[name]:.1e}; is the loss, its reduction or the model another one?"
    )


def _inputs_alone(problem: Problem, answer: Answer, said: Recovery) -> Recovery | None:
    """The inputs certified where the targets are not, for the reason that ``said`` has.

    None where they are not certified, or depend on the targets.
    """
    if not answer.apart or answer.polished.misfit > FITS or _merged(problem, answer):
        return None
    if said.status is Status.INCONSISTENT:
        if not shows_changes(problem, answer.descent):
            name = problem.chain.stages[max(answer.descent.cotangents)].name
            return replace(said, reason=f"{said.reason}; {UNSEEN.format(name)}")
        answer = backed(problem, answer, whole=False)
    status, reason = verdict(problem, answer)
    if status is not Status.EXACT or problem.excess(answer.inputs, answer.bound) > problem.slack:
        return None
    shown = _assemble(problem, answer, said.residual, Status.EXACT, reason, ())
    return replace(
        shown,
        labels=None,
        targets_error_bound=None,
        status=said.status,
        certified=frozenset({"inputs"}),
        scale=None,
        reason=f"the inputs are certified, no entry is off by more than {answer.bound:.1e}; "
        f"targets not certified: {said.reason}",
    )


def backed(problem: Problem, answer: Answer, whole: bool = True) -> Answer:
    """The answer with an error bound as wide as what tests it asks for.

    Args:
        problem: the update and the chain that the answer is of.
        answer: that fits.
        whole: False where the layers above its inputs, and the loss, contradict it.
    """
    reading, misfits = answer.reading if whole else None, answer.polished.misfits
    return replace(answer, widened=backing(problem, answer.descent, reading, misfits))


def inputs_only(problem: Problem, answer: Answer, reason: str) -> Recovery:
    """The certified inputs of an answer above which nothing names the targets.

    Args:
        problem: with the chain that the answer is of.
        answer: whose verdict is EXACT.
        reason: why its targets are open, in words.
    """
    return Recovery(
        inputs=answer.inputs,
        labels=None,
        status=Status.UNDERDETERMINED,
        layers=layer_reports(problem, answer.descent),
        residual=None,
        predicted_error=answer.predicted,
        error_bound=answer.bound,
        reason=reason,
        certified=frozenset({"inputs"}),
    )


def as_candidate(recovery: Recovery, reason: str) -> Recovery:
    """The same inputs uncertified, where a batch size that nobody states leaves them open."""
    assert recovery.inputs is not None
    listed = (Candidate(recovery.inputs, None, float("nan")),)
    return replace(recovery, inputs=None, certified=frozenset(), candidates=listed, reason=reason)


def _copies(rows: BatchRows) -> str:
    """Copies cannot be certified: their like, moved apart where no layer looks, send the same."""
    many = [(row, m) for row, m in enumerate(rows.copies.tolist()) if m > 1]
    number, m = len(rows.copies), max(m for _, m in many)
    each = " and ".join(f"picture {row} occurs {m} times" for row, m in many)
    of = f"{number} different pictures, of which {each}"
    of = of if number > 1 else f"{m} copies of one picture"
    around = f"{m} pictures around it" if len(many) == 1 else "as many pictures around each"
    mean = "their mean is" if len(many) == 1 else "their means are"
    return (
        f"the update is that of {of}; {around} that differ only in directions no layer sees send "
        f"the same, only {mean} certain"
    )


def _merged(problem: Problem, answer: Answer) -> float:
    """How far entries may be apart in pictures that an answer in parts shows as copies of one.

    0 where it has none, and for whole pictures: what is shown, and bounded, is their mean then.
    """
    rows, partial = answer.rows, answer.descent.partial
    if rows is None or partial is None or not bool((rows.copies > 1).any()):
        return 0.0
    known = partial.known.reshape(answer.inputs.shape)
    try:
        return merged(problem, rows, answer.inputs, answer.reading.scale, known)
    except (ValueError, TypeError, RuntimeError):  # a forward that takes this batch only
        return inf


def _sent(answer: Answer) -> Tensor:
    """The labels of the whole batch; sorted where the order is not in the update."""
    if answer.rows is None:
        return answer.labels
    labels = answer.rows.expanded(answer.inputs)[1]
    return labels.sort().values if answer.rows.labels.ndim == 1 else labels


def _same_labels(answer: Answer, stated: Tensor) -> bool:
    """Class indices agree exactly, soft and real-valued targets within what they may be off by."""
    sent = _sent(answer)
    if answer.rows is not None and sent.ndim == 1:
        stated = stated.flatten().sort().values
    off = 0.0
    if sent.is_floating_point():  # SAFETY standard errors: a tolerance is REFUTED of them
        off = max(STATED, answer.reading.tolerance * SAFETY / REFUTED)
    return sent.numel() == stated.numel() and torch.allclose(
        sent.flatten().double().cpu(), stated.flatten().double().cpu(), rtol=STATED, atol=off
    )


def _misfit(problem: Problem, scored: tuple[Answer, float, dict[str, float]]) -> Recovery:
    answer, residual, by_name = scored
    excuse = answer.descent.doubt
    if not answer.reading.fits and answer.polished.misfit <= REFUTED:
        stage = problem.chain.stages[-1].name
        excuse = excuse or at_kinks(problem, answer.descent)
        reason = (
            f"the gradient of '{stage}' fits no admissible target of {problem.update.loss.name}: "
            f"the nearest one is {answer.reading.distance:.2g} away (tolerance "
            f"{answer.reading.tolerance:.1e}); "
            f"{excuse or 'is the loss, its reduction or the model another one?'}"
        )
    else:
        name = max(answer.polished.misfits, key=lambda n: answer.polished.misfits[n])
        excuse = excuse or lost(answer) or at_kinks(problem, answer.descent)
        reason = (
            f"no batch reproduces the update: '{name}' misses by "
            f"{answer.polished.misfits[name]:.2g} standard errors ({by_name.get(name, 0):.1e} "
            f"relative); "
            f"{excuse or 'is the update from another model, loss or precision?'}"
        )
    # The polish moves the inputs alone: targets that were read with an error refute nothing.
    free = answer.rows is not None and problem.update.loss.targets != "index"
    status = Status.UNDERDETERMINED if free or excuse else Status.INCONSISTENT
    return replace(stopped(problem, status, reason, answer.descent), residual=residual)


def _batch(problem: Problem, answer: Answer) -> tuple[Tensor, Tensor, float | Tensor]:
    """Inputs, targets and factors of the whole batch, every copy a row of its own."""
    inputs = answer.inputs.reshape(problem.batch, *problem.chain.input_shape)
    if answer.rows is None:
        return inputs, answer.labels, answer.reading.scale
    return *answer.rows.expanded(inputs), answer.reading.scale


def _errors(problem: Problem, answer: Answer) -> Tensor:
    """Ensemble of the errors of the inputs of the whole batch."""
    error = answer.polished.data.error
    error = error.reshape(len(error), problem.batch, *problem.chain.input_shape)
    if answer.rows is None:
        return error
    return error[:, answer.rows.picture.repeat_interleave(answer.rows.copies)]


def _assemble(
    problem: Problem,
    answer: Answer,
    residual: float | None,
    status: Status,
    reason: str,
    candidates: tuple[Candidate, ...],
) -> Recovery:
    show = status in (Status.EXACT, Status.AMBIGUOUS)
    inputs, predicted, copies = answer.inputs, answer.predicted, None
    if answer.rows is not None:
        inputs, predicted = inputs[answer.rows.picture], predicted[answer.rows.picture]
        copies = answer.rows.copies if bool((answer.rows.copies > 1).any()) else None
    return Recovery(
        inputs=inputs if show else None,
        labels=answer.labels if show else None,
        status=status,
        layers=layer_reports(problem, answer.descent),
        residual=residual,
        predicted_error=predicted,
        error_bound=answer.bound + _merged(problem, answer),
        targets_error_bound=answer.targets_bound if show else None,
        reason=reason,
        candidates=candidates,
        warnings=warnings(problem),
        multiplicities=copies if show else None,
        certified=frozenset({"inputs", "targets"} if status is Status.EXACT else ()),
        scale=answer.reading.scale if show else None,
    )
