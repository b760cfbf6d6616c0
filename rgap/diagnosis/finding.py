"""What a check returns: findings, each a measured number and the line that mends it, ranked."""

from __future__ import annotations

import html
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

from rgap.remedy import Remedy, trained


class Kind(StrEnum):
    """What an update may be that it was not declared to be."""

    NAMES = "names"
    PARAMETERS = "parameters"
    ABSENT = "absent layer"
    OPTIMISER = "optimiser"
    COMPRESSION = "compression"
    PRECISION = "precision"
    SIGN = "sign"
    REDUCTION = "reduction"
    ACCUMULATION = "accumulation"
    CLIPPING = "clipping"
    SCALE = "scale"
    LOSS = "loss"
    LABELS = "labels"
    MODE = "mode"
    DROPOUT = "dropout"
    STEPS = "steps"
    BATCH_SIZE = "batch size"
    DECAY = "weight decay"
    NOISE = "noise"
    ENTRY = "entry"
    WEIGHTS = "weights"
    UNDECIDED = "undecided"

    @property
    def claim(self) -> str:
        """The finding in half a sentence."""
        return _CLAIMS[self]


_CLAIMS = {
    Kind.NAMES: "the tensors are not named, or not ordered, as the model's parameters",
    Kind.PARAMETERS: "the tensors look like parameters of the model, not like gradients",
    Kind.ABSENT: "a layer's gradient is missing: it was frozen at the client, or set to zero",
    Kind.OPTIMISER: "the client's optimiser is not SGD: its step is no multiple of the gradient",
    Kind.COMPRESSION: "the update is compressed",
    Kind.PRECISION: "the values were rounded to a coarser precision than the declared one",
    Kind.SIGN: "the sign is reversed: before and after were exchanged",
    Kind.REDUCTION: "the loss was reduced in another way than declared",
    Kind.ACCUMULATION: "the samples do not weigh the same: micro-batches of unequal size were "
    "averaged",
    Kind.CLIPPING: "the update was clipped",
    Kind.SCALE: "the update is off by a factor: another learning rate, or a scaled loss",
    Kind.LOSS: "the client minimised another loss than the declared one",
    Kind.LABELS: "the stated labels are not those of the batch",
    Kind.MODE: "batch norm was in another mode on the client than in the model",
    Kind.DROPOUT: "dropout was on at the client",
    Kind.STEPS: "the update is that of several local steps",
    Kind.BATCH_SIZE: "the batch has another size than declared",
    Kind.DECAY: "weight decay is in the update: it is no gradient of the loss alone",
    Kind.NOISE: "noise was added that is not stated",
    Kind.ENTRY: "a few entries of one tensor, or one channel of it, are not those of the gradient "
    "which all others are of",
    Kind.WEIGHTS: "the model does not have the weights that the update was computed on, or whole "
    "tensors of it were changed afterwards",
    Kind.UNDECIDED: "one of several mistakes, which no equation of this network and batch tells "
    "apart",
}
MENDING: dict[Kind, Remedy | str] = {
    Kind.SCALE: "dataclasses.replace(update, gradients=gradients) divided by the client's factor",
    Kind.CLIPPING: "gradients that the client did not clip",
    Kind.LOSS: "dataclasses.replace(update, loss=loss) with the client's loss",
    Kind.MODE: Remedy("rgap.match(model.train(), update)", "a MODEL in train mode").then(
        ", which follows the statistics of the batch; the equations take an update of a client "
        "that wrote model.eval() before its gradient"
    ),
    Kind.DROPOUT: "model.eval() on the client before it computes the gradient",
    Kind.STEPS: trained("steps", "rate").then(" with the client's steps and rate"),
    Kind.BATCH_SIZE: "dataclasses.replace(update, batch_size=size) with the client's size",
    Kind.LABELS: "labels=None to have them found",
    Kind.DECAY: "rgap.Update.from_delta(..., weight_decay=rate) with the client's rate",
    Kind.NOISE: "rgap.invert(model, update, noise=level) with the client's standard deviation",
    Kind.ENTRY: "the update again, as the client computed it: this entry was changed on its way",
    Kind.WEIGHTS: Remedy("model.load_state_dict(weights)", "--weights FILE").then(
        " with the weights that the server sent for this round"
    ),
    Kind.OPTIMISER: "a step of torch.optim.SGD on the client",
    Kind.COMPRESSION: "rgap.match(model, update); the equations need the gradient as it was",
}
"""The line that mends each, where no trial gives its number."""
UNSEEN = {
    Kind.STEPS: "those on other samples each look like one on a larger batch",
}
"""Why an update may be that and show nothing, where that is no lack of equations."""
CERTIFIED = Remedy("rgap.invert(model, update)", "rgap invert")


@dataclass(frozen=True)
class Finding:
    """One mistake that a trial found.

    Attributes:
        kind: which.
        value: its number: the factor, the standard deviation, the rate, the number of steps …
        evidence: what was measured, with its numbers.
        remedy: one line of Python that mends it; ``update`` and ``model`` are what was checked.
        strength: how clearly: the misfit as declared over that which the finding leaves, or over
            what rounding explains.  Findings are ranked by it.
        rivals: other kinds that would explain the same, and that no equation of this network and
            batch tells from it; of ``UNDECIDED`` all that are possible.
    """

    kind: Kind
    value: float
    evidence: str
    remedy: str
    strength: float
    rivals: tuple[Kind, ...] = ()

    @property
    def claim(self) -> str:
        """What is found, in half a sentence: with what no equation here tells from it."""
        if self.kind is Kind.UNDECIDED:
            return f"{self.kind.claim}: {'; or '.join(kind.claim for kind in self.rivals)}"
        return ", or ".join([self.kind.claim, *(kind.claim for kind in self.rivals)])

    @classmethod
    def among(
        cls, kinds: tuple[Kind, ...], value: float, evidence: str, strength: float
    ) -> Finding:
        """The mistake if one alone is possible; else ``UNDECIDED``, with a line for each."""
        if len(kinds) == 1:
            return cls(kinds[0], value, evidence, str(MENDING[kinds[0]]), strength)
        lines = "; or ".join(f"{MENDING[kind]} (if {kind})" for kind in kinds)
        return cls(Kind.UNDECIDED, value, evidence, lines, strength, kinds)

    @property
    def sentence(self) -> str:
        """The finding in one sentence, with the line that mends it."""
        return f"{self.claim} ({self.evidence}); write {self.remedy}"

    def summary(self) -> dict[str, object]:
        """As plain numbers and words, for JSON."""
        return {
            "kind": self.kind.value,
            "value": self.value if isfinite(self.value) else None,
            "claim": self.claim,
            "rivals": [kind.value for kind in self.rivals],
            "evidence": self.evidence,
            "remedy": self.remedy,
            "strength": self.strength if isfinite(self.strength) else None,
        }


@dataclass(frozen=True)
class Check:
    """What :func:`rgap.check` found.

    Attributes:
        findings: the clearest first; empty where no trial contradicts what was declared.
        tested: kinds of which some equation could have shown a mistake.
        seconds: wall time.
        unrun: trials that did not run, and why.
    """

    findings: tuple[Finding, ...]
    tested: frozenset[Kind]
    seconds: float = 0.0
    unrun: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if nothing was found by the trials that ran: :attr:`unrun` names the others."""
        return not self.findings

    @property
    def best(self) -> Finding | None:
        """The first finding, or None."""
        return self.findings[0] if self.findings else None

    @property
    def untested(self) -> tuple[Kind, ...]:
        """Kinds of which no equation of this network and batch says anything."""
        return tuple(k for k in Kind if k not in self.tested and k is not Kind.UNDECIDED)

    def explain(self) -> str:
        """All findings in words, and what could not be tested."""
        lines = []
        for number, finding in enumerate(self.findings, 1):
            lines += [
                f"{number}. {finding.kind}: {finding.claim}",
                f"   {finding.evidence}",
                f"   write {finding.remedy}",
            ]
        if not lines and not self.unrun:
            lines = ["Nothing found: no trial contradicts the update as it is declared."]
        elif not lines:
            lines = ["Not all trials ran; those that did contradict nothing that is declared."]
        lines += [f"Not run: {words.removesuffix('.')}." for words in self.unrun]
        if self.untested:
            names = ", ".join(f"{k} ({UNSEEN[k]})" if k in UNSEEN else k for k in self.untested)
            asked = "No trial that ran" if self.unrun else "No equation of this network and batch"
            lines.append(f"{asked} tests: {names}.")
        if not self.findings:
            lines.append(f"No trial is a certificate: {CERTIFIED} may still contradict the update.")
        return "\n".join(lines)

    __str__ = explain

    def summary(self) -> dict[str, object]:
        """As plain numbers and words, for JSON."""
        return {
            "ok": self.ok,
            "findings": [finding.summary() for finding in self.findings],
            "untested": [kind.value for kind in self.untested],
            "unrun": list(self.unrun),
            "seconds": self.seconds,
        }

    def _repr_html_(self) -> str:
        head = "<tr><th>finding</th><th>value</th><th>evidence</th><th>write</th></tr>"
        rows = "".join(
            f"<tr><td>{html.escape(f.claim)}</td><td>{f.value:.6g}</td>"
            f"<td>{html.escape(f.evidence)}</td><td><code>{html.escape(f.remedy)}</code></td></tr>"
            for f in self.findings
        )
        if not rows:
            return f"<div>{html.escape(self.explain())}</div>"
        return f"<table>{head}{rows}</table>"
