"""The answer to an update: its status, the batch, its bounds, and the reasons for each."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, log10
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from rgap.halt import Halt
from rgap.recovery.layers import LayerReport, Route, sentence
from rgap.solvers.solution import Explained

if TYPE_CHECKING:
    from rgap.page import Page

__all__ = ["Candidate", "Recovery", "Status", "plain"]


class Status(Explained):
    """How far the update determines the batch; the value says what the status promises."""

    EXACT = (
        "the update determines the batch: every other answer is refuted and the error is bounded"
    )
    COMPLETED = "a prior filled the dimensions that the equations leave open"
    UNDERDETERMINED = "the equations leave some of the batch open"
    AMBIGUOUS = "several batches send exactly this update; all of them are in `candidates`"
    INCONSISTENT = "the update does not fit the model as declared"
    UNSUPPORTED = "a step of this network has no inverse in closed form"


@dataclass(frozen=True, eq=False)
class Candidate:
    """One of several batches that send the same update, or come nearest to it.

    Attributes:
        inputs: ``[B, *input_shape]``.
        labels: that go with them, or None.
        residual: relative difference between the update and the replayed one.
        multiplicities: how often each row occurs in the batch [B'], or None where every one
            occurs once.
    """

    inputs: Tensor
    labels: Tensor | None
    residual: float
    multiplicities: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Recovery:
    """The answer to one update; two recoveries are equal only if they are the same object.

    Attributes:
        inputs: recovered batch ``[B, *input_shape]``, or None when it is not determined.
        labels: recovered labels [B] (soft or real-valued targets [B, C]), or None.
        status: see :class:`Status`.
        layers: one :class:`LayerReport` per stage, in forward order.
        residual: relative difference between the update and the replayed one.  The replay is in
            float64, so that it holds what rounding took from a client's own cotangents: with a
            saturated softmax in float32 it is not small for the client's data either.
        predicted_error: rms error per picture, from sampled noise through the whole update.
        error_bound: largest error of any entry that the certificate allows, or None.  Where copies
            of one picture are shown as their mean (the reason says so) it is that of the mean.
            With ``determined`` it is that of the determined entries alone: what a prior chose has
            none.
        candidates: the alternatives when ``AMBIGUOUS``; the nearest batch where a completion was
            asked for and did not reproduce the update.
        reason: one sentence that says why the status is what it is.
        warnings: what the reader should know (underflow, small gaps).
        seconds: wall time.
        separation: which equations told the samples of a batch apart, and where; "" for one sample.
        multiplicities: how often each row of ``inputs`` occurs in the batch [B'], or None where
            every one occurs once.  The order of a batch is not in its gradient: rows are sorted
            by label.
        halt: where and why the recursion ended before the data, with its kind and numbers, or
            None.  ``reason`` is made from it, never the other way round.
        certified: which of "inputs" and "targets" are certified; ``EXACT`` means both.
        scale: the positive factor λ between the update and that of the declared loss, one a sample
            [B] where they differ; 1 for an update as declared, None where it was not looked at.
        determined: where only some entries of the data are determined: True at these, of the shape
            that ``inputs`` would have; else None.
        partial: the data where ``determined``, NaN elsewhere; ``error_bound`` is theirs then.
        features: where the recursion ended before the data: certified inputs of layers by layer
            name, from the lowest one up, ``[B, *in_shape]``, one row a sample.  Of one sample also
            those of the fully connected layers above; of a residual or concatenating network those
            that wide layers determine below the place where branches meet.  Of a batch only where
            every sample occurs once and its own equations outnumber its unknowns, so that no
            mixture is taken for one.  Empty where the data themselves were found.
        features_error: rms standard error of each of ``features``, by the same names.
        targets_error_bound: of soft and real-valued ``labels``: the largest error of any entry that
            the certificate allows.  None for classes and 0/1 labels, which are right or open.
    """

    inputs: Tensor | None
    labels: Tensor | None
    status: Status
    layers: tuple[LayerReport, ...]
    residual: float | None
    predicted_error: Tensor | None
    error_bound: float | None
    reason: str
    candidates: tuple[Candidate, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    separation: str = ""
    multiplicities: Tensor | None = None
    halt: Halt | None = None
    certified: frozenset[str] = frozenset()
    determined: Tensor | None = None
    scale: float | Tensor | None = None
    partial: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    features_error: Mapping[str, float] = field(default_factory=dict)
    targets_error_bound: float | None = None

    searched: ClassVar[bool] = False
    """Whether a search found what is in it, which certifies nothing."""

    @property
    def exact(self) -> bool:
        """True if the status is ``EXACT``."""
        return self.status is Status.EXACT

    @property
    def nearest(self) -> Tensor | None:
        """The batch that comes nearest to the update: ``inputs``, else that of the first candidate.

        Where ``inputs`` is None it is no answer, only a start for another method.
        """
        if self.inputs is None and self.candidates:
            return self.candidates[0].inputs
        return self.inputs

    @property
    def nearest_labels(self) -> Tensor | None:
        """The labels that go with :attr:`nearest`."""
        if self.inputs is None and self.candidates:
            return self.candidates[0].labels
        return self.labels

    def uncertified(self, **changes: Any) -> Recovery:
        """The same without its inputs and what was certified of them; ``changes`` go on top."""
        none = dict.fromkeys(("inputs", "error_bound", "predicted_error"))
        return replace(self, **{**none, "certified": frozenset(), **changes})

    def layer(self, name: str) -> LayerReport:
        """The report of one layer by module path.

        Raises:
            KeyError: naming the layers there are.
        """
        for report in self.layers:
            if report.layer == name:
                return report
        raise KeyError(f"expected one of {[r.layer for r in self.layers]}, got {name!r}")

    def null_space(self, name: str, count: int = 8) -> Tensor:
        """Directions of a stage's input that its equations do not see, ``[≤count, B, *in_shape]``.

        Orthonormal, chosen at random in the null space.  Empty for a determined stage.

        Raises:
            KeyError: unknown layer.
            ValueError: the recursion did not reach the layer, a count below 1, or a recovery that
                was copied or unpickled (the equations do not travel along).
        """
        report = self.layer(name)
        if count < 1:
            raise ValueError(f"count: expected at least 1 direction, got {count}; write count=8")
        if report._null_space is None and report.route is not Route.NOT_REACHED:
            raise ValueError(
                f"expected a recovery as rgap.invert returned it, got one that was copied or "
                f"unpickled: the equations of {name!r} did not travel along; call "
                "rgap.invert(model, update) again"
            )
        if report._null_space is None:
            raise ValueError(
                f"expected a layer that the recursion reached, got {name!r} "
                f"(route: {report.route}); the reached ones are "
                f"{[r.layer for r in self.layers if r._null_space is not None]}"
            )
        return report._null_space(count)

    def explain(self) -> str:
        """The recovery in plain words, layer by layer from the output down."""
        lines = [f"{self.status.name}: {self.reason}"]
        if self.separation:
            lines.append(f"Samples told apart: {self.separation}.")
        if self.layers:
            lines.append("The input of each layer, from the output down:")
        for report in reversed(self.layers):
            lines.append("  " + sentence(report, self.halt, report.layer in self.features))
        given = self.inputs is not None
        if self.determined is not None and self.error_bound is not None:
            lines.append(
                f"Of the data {int(self.determined.sum())} of {self.determined.numel()} values are "
                f"determined (`partial`), none of them off by more than {self.error_bound:.2g}."
            )
        if given and self.error_bound is not None and self.predicted_error is not None:
            rms = float(self.predicted_error.max())
            of = "the certified bound for every entry"
            if "inputs" not in self.certified:
                of = "the bound for every entry, of copies for that of their mean,"
            lines.append(
                f"The predicted error is {rms:.2g} rms (PSNR {_decibel(rms)} for pictures in "
                f"[0, 1]); {of} is {self.error_bound:.2g}."
            )
        if given and self.targets_error_bound is not None:
            lines.append(
                f"The bound for every entry of the targets: {self.targets_error_bound:.2g}."
            )
        if self.residual is not None:
            which = "answer" if given else "nearest answer (not returned)"
            if self.partial is not None:
                which = "determined values, with others in the open places,"
            lines.append(
                f"Replaying the {which} through the model gives the update up to a relative "
                f"difference of {self.residual:.2g}."
            )
        for name, value in self.features.items():
            error = self.features_error.get(name)
            known = "" if error is None else f", predicted error {error:.1e} rms"
            lines.append(
                f"Certified: the input of '{name}', {value.numel()} values{known} "
                f"(recovery.features[{name!r}])."
            )
        if self.multiplicities is not None:
            for row, m in enumerate(self.multiplicities.tolist()):
                if m > 1:
                    lines.append(f"Picture {row} occurs {m} times in the batch.")
        for number, candidate in enumerate(self.candidates):
            copies = plain(candidate.multiplicities)
            lines.append(
                f"Candidate {number}: labels {plain(candidate.labels)}, "
                + (f"copies of each {copies}, " if copies else "")
                + f"replay residual {candidate.residual:.2g}."
            )
        lines += [f"Note: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """The recovery as plain numbers, for JSON; None where a number is not finite."""
        fields = (
            "layer", "kind", "unknowns", "gradient_rank", "joint_rank", "nullity", "gap",
            "condition", "residual", "seconds", "route", "note", "unread", "predicted_error",
        )  # fmt: skip
        numbers = {
            "status": self.status.name,
            "reason": self.reason,
            "labels": self.labels,
            "residual": self.residual,
            "predicted_error": self.predicted_error,
            "error_bound": self.error_bound,
            "targets_error_bound": self.targets_error_bound,
            "multiplicities": self.multiplicities,
            "separation": self.separation,
            "halt": None if self.halt is None else self.halt.numbers,
            "certified": sorted(self.certified),
            "scale": self.scale,
            "determined": None if self.determined is None else int(self.determined.sum()),
            "features": {name: list(value.shape) for name, value in self.features.items()},
            "features_error": dict(self.features_error),
            "candidates": [
                {
                    "labels": plain(c.labels),
                    "residual": c.residual,
                    "multiplicities": plain(c.multiplicities),
                }
                for c in self.candidates
            ],
            "warnings": list(self.warnings),
            "seconds": self.seconds,
            "layers": [{f: getattr(r, f) for f in fields} for r in self.layers],
        }
        return {name: plain(value) for name, value in numbers.items()}

    def report(
        self, originals: Tensor | None = None, value_range: tuple[float, float] | None = (0.0, 1.0)
    ) -> Page:
        """A page for people, one HTML file: verdict, pictures, equations layer by layer.

        ``rgap report`` adds what is found of the update and of the network.

        Args:
            originals: the client's data, where they are known: shown beside what came back, each
                beside the one that is nearest.
            value_range: of the data; None for the smallest and largest value of each picture.

        Returns:
            The :class:`~rgap.page.Page`; ``.save("report.html")`` writes it.

        >>> import rgap, torch
        >>> model = rgap.models.mlp((8,), 3, input_shape=(1, 4, 4), seed=0)
        >>> x = rgap.photos.load(1, 4).mean(1, keepdim=True).float()
        >>> page = rgap.invert(model, rgap.capture(model, x, torch.tensor([1]))).report(x)
        >>> page.verdict.word, page.html().count("<img ")
        ('EXACT', 2)
        """
        from rgap.recovery.page import page

        return page(self, originals, value_range, {}, getattr(self, "prior", ""))

    def __repr__(self) -> str:
        shape = None if self.inputs is None else tuple(self.inputs.shape)
        return (
            f"Recovery({self.status.name}, inputs={shape}, labels={plain(self.labels)}, "
            f"error_bound={self.error_bound}, "
            f"targets_error_bound={self.targets_error_bound}, reason={self.reason!r})"
        )

    def _repr_html_(self) -> str:
        head = "<tr><th>layer</th><th>unknowns</th><th>rank</th><th>missing</th><th>route</th></tr>"
        rows = "".join(
            f"<tr><td>{html.escape(r.layer)}</td><td>{r.unknowns}</td>"
            f"<td>{'–' if r.joint_rank is None else r.joint_rank}</td>"
            f"<td>{'–' if r.nullity is None else r.nullity}</td>"
            f"<td>{html.escape(r.route)}</td></tr>"
            for r in self.layers
        )
        return (
            f"<div><b>{self.status.name}</b> {html.escape(self.reason)}"
            f"<table>{head}{rows}</table></div>"
        )


def _decibel(rms: float) -> str:
    return "∞ dB" if rms <= 0 else f"{-20 * log10(rms):.0f} dB"


def plain(value: Any) -> Any:
    """What JSON has: lists for tensors and tuples, None for a number that is not finite.

    >>> plain({"gap": float("inf"), "ranks": (1, float("nan"), 2.5)})
    {'gap': None, 'ranks': [1, None, 2.5]}
    """
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
