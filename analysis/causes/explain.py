"""Why a batch was not recovered: the causes in plain words, ranked, each with its number."""

from __future__ import annotations

import html
from dataclasses import dataclass
from math import isfinite, log10
from typing import Any

from torch import Tensor, nn

from rgap import validation
from rgap.analysis.causes.cause import Cause
from rgap.analysis.causes.causes import causes
from rgap.analysis.causes.head import Pair, same_class_pairs
from rgap.analysis.causes.joint import DECIDED, SECONDS, advised, joint_count
from rgap.analysis.joint_rank.table import Identifiability
from rgap.labels import head_features
from rgap.network.chain import parse
from rgap.progress import Shown
from rgap.recovery import Recovery, Status, plain
from rgap.update.targets import CROSS_ENTROPY
from rgap.update.update import Update

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """Ranked causes of a recovery that is not exact; of an exact one, what limits its accuracy.

    Attributes:
        status: of the recovery.
        summary: one sentence.
        causes: the heaviest first; empty for an exact recovery.
        pairs: samples of one class at the head, the hardest to tell apart first; empty where their
            features are not known.
        joint: what all equations together determine, where that decides the advice; None where it
            does not, or was not counted (the advice says why).
    """

    status: Status
    summary: str
    causes: tuple[Cause, ...]
    pairs: tuple[Pair, ...] = ()
    joint: Identifiability | None = None

    @property
    def text(self) -> str:
        """Plain text, a numbered list."""
        lines = [f"{self.status.name}: {self.summary}"]
        for number, cause in enumerate(self.causes, 1):
            lines.append(f"{number}. {cause.words}")
            if cause.changes:
                lines.append(f"   What would change it: {'; '.join(cause.changes)}.")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        items = "".join(
            f"<li>{html.escape(cause.words)}"
            + (f"<br><i>What would change it:</i> {html.escape('; '.join(cause.changes))}."
               if cause.changes else "")
            + "</li>"
            for cause in self.causes
        )  # fmt: skip
        head = f"<b>{self.status.name}</b> {html.escape(self.summary)}"
        return f"<div>{head}{f'<ol>{items}</ol>' if items else ''}</div>"

    def numbers(self) -> dict[str, Any]:
        """Plain numbers and words, for JSON; None where a number is not finite."""
        return {
            "status": self.status.name,
            "summary": self.summary,
            "causes": [
                {
                    "kind": cause.kind,
                    "place": cause.place,
                    "number": plain(cause.number),
                    "words": cause.words,
                    "changes": list(cause.changes),
                }
                for cause in self.causes
            ],
            "joint": None
            if self.joint is None
            else {
                "rank": self.joint.joint_rank,
                "unknowns": self.joint.unknowns,
                "identifiable": self.joint.identifiable,
            },
        }


def explain(
    recovery: Recovery,
    model: nn.Module | None = None,
    update: Update | None = None,
    *,
    inputs: Tensor | None = None,
    labels: Tensor | None = None,
    memory_budget: float | None = None,
    time_limit: float | None = SECONDS,
    progress: Shown = False,
) -> Explanation:
    """Rank the causes why a batch is not recovered, in plain words, each with its number.

    From the recovery alone: missing equations layer by layer, steps without an inverse, precision,
    ambiguity.  With the model and the update also what the head's gradient tells apart, noise that
    nobody stated, compression, and counted changes that would help.  Where layer by layer does not
    decide, `rgap.analysis.identifiability` counts what all equations determine together: at the
    batch if it is known, else at a random one.  The advice follows that count.

    Args:
        recovery: what `rgap.invert` returned.
        model: the network of the update.
        update: what the client sent; with ``model``.
        inputs: the true batch where an auditor has it; the recovered one otherwise.
        labels: its labels; the recovered ones otherwise.
        memory_budget: bytes that the joint count may take; by default half of what is free.
        time_limit: seconds that it may take, after which it is left out; 0 for no count.
        progress: True for a line on a terminal, or a function; see :mod:`rgap.progress`.

    Returns:
        The :class:`Explanation`; print it.

    Raises:
        TypeError: something that is no recovery.
        ValueError: one of model and update without the other, or an update of another model.

    >>> import rgap, torch
    >>> model = rgap.models.lenet(channels=4, input_shape=(3, 16, 16), seed=0)
    >>> picture = rgap.photos.load(1, 16)
    >>> update = rgap.capture(model, picture, torch.tensor([3]), dtype=torch.float64)
    >>> found = explain(rgap.invert(model, update, complete=False), model, update)
    >>> found.causes[0].kind, found.causes[0].place, found.causes[0].number
    ('missing equations', 'conv1', 228.0)
    >>> found.causes[0].changes[2]
    '6 output channels (now 4)'
    >>> found.joint.joint_rank, found.joint.unknowns
    (540, 768)
    """
    if not isinstance(recovery, Recovery):
        raise TypeError(
            f"expected a Recovery, got {type(recovery).__name__}; write "
            "explain(rgap.invert(model, update), model, update)"
        )
    if (model is None) is not (update is None):
        missing = "model" if model is None else "update"
        raise ValueError(
            f"expected model and update together, got no {missing}; write "
            "explain(recovery, model, update)"
        )
    if model is not None and update is not None:
        update.check(model)
    pairs = _pairs(recovery, model, update, inputs, labels)
    ranked = causes(recovery, model, update, pairs)
    summary, joint = _summary(recovery, ranked), None
    open_ = any(one.kind in DECIDED for one in ranked)
    if open_ and model is not None and update is not None and time_limit != 0:
        found = joint_count(
            recovery,
            model,
            update,
            (inputs, labels),
            memory_budget=memory_budget,
            time_limit=time_limit,
            progress=progress,
        )
        ranked = advised(ranked, recovery, found)
        joint = None if isinstance(found, str) else found
    return Explanation(recovery.status, summary, ranked, pairs, joint)


def _summary(recovery: Recovery, ranked: tuple[Cause, ...]) -> str:
    if not recovery.exact:
        count = "one cause" if len(ranked) == 1 else f"{len(ranked)} causes, the first decides"
        if "inputs" in recovery.certified:
            return f"the inputs are recovered and certified, their targets are not; {count}."
        return f"the batch is not recovered for certain; {count}."
    words = "the batch is recovered, with nothing left open."
    solved = [r for r in recovery.layers if isfinite(r.condition)]
    if solved and recovery.predicted_error is not None:
        worst = max(solved, key=lambda r: r.condition)
        rms = float(recovery.predicted_error.max())
        level = f" ({-20 * log10(rms):.0f} dB)" if rms > 0 else ""
        words += (
            f" Its predicted error of {rms:.1e} rms{level} is decided by the precision of the "
            f"update and the condition of '{worst.layer}', {worst.condition:.1e}."
        )
    return words


def _pairs(
    recovery: Recovery,
    model: nn.Module | None,
    update: Update | None,
    inputs: Tensor | None,
    labels: Tensor | None,
) -> tuple[Pair, ...]:
    """Samples of one class whose head features lie close together, if features are known."""
    pictures = recovery.inputs if inputs is None else inputs
    classes = recovery.labels if labels is None else labels
    if model is None or update is None or pictures is None or classes is None:
        return ()
    if update.loss.name != CROSS_ENTROPY or update.loss.targets != "index":
        return ()
    shape = update.input_shape
    if inputs is not None and (shape is None or tuple(inputs.shape[1:]) != tuple(shape)):
        raise ValueError(
            f"inputs: expected [B, {', '.join(map(str, shape or ()))}], got {list(inputs.shape)}; "
            "write the batch that the update was computed on"
        )
    checked = validation.labels(classes, len(pictures))
    assert checked is not None
    if len(pictures) < 2 or shape is None:
        return ()
    chain = parse(model, shape, mixing=True)
    if not chain.stages or chain.stages[-1].affine.geometry is not None or chain.stages[-1].tail:
        return ()
    features = head_features(model, update, pictures)
    if features is None:
        return ()
    predictions = chain.stages[-1].affine.forward(features).softmax(1)
    return same_class_pairs(features, predictions, checked, update.loss)
