"""What a defender has to change: one row per change, in words, frames and tables."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rgap.analysis.finding import data_frame

if TYPE_CHECKING:
    import pandas

__all__ = ["Change", "Hardening"]


@dataclass(frozen=True)
class Change:
    """One change of the system, the smallest of its kind that reaches the fraction.

    Attributes:
        kind: "batch size", "channels", "stride", "noise" or the name of a defence.
        layer: module path, "" for a change of the whole system.
        before: batch size, channels, stride, standard deviation or strength of the defence as it
            is (the strength at which it does nothing).
        after: what it has to be.
        missing: directions of the data that are not identifiable then.
        unknowns: entries of the data then.
        fraction: missing / unknowns.
    """

    kind: str
    layer: str
    before: float
    after: float
    missing: int
    unknowns: int
    fraction: float


@dataclass(frozen=True)
class Hardening:
    """What each kind of change costs.

    Attributes:
        model: name of the network's class.
        input_shape: of one sample.
        batch_size: B as it is.
        wanted: fraction of the data that shall not be identifiable.
        missing: directions that are not identifiable as it is.
        unknowns: entries of the data as it is.
        changes: those that reach the fraction; per kind the smallest relative change first.
        failed: what does not reach it, one sentence each.
        seconds: wall time.
    """

    model: str
    input_shape: tuple[int, ...]
    batch_size: int
    wanted: float
    missing: int
    unknowns: int
    changes: tuple[Change, ...]
    failed: tuple[str, ...] = ()
    seconds: float = 0.0

    def of(self, kind: str) -> Change | None:
        """The smallest change of a kind; None where none was found."""
        return next((change for change in self.changes if change.kind == kind), None)

    def explain(self) -> str:
        """The answer in words."""
        share = self.missing / self.unknowns
        lines = [
            f"{self.model} at B = {self.batch_size}: {self.missing} of {self.unknowns} directions "
            f"({share:.1%}) of the batch are not in the update. Wanted: {self.wanted:.1%}."
        ]
        if share >= self.wanted:
            lines.append("Nothing has to be changed.")
        for change in self.changes:
            where = f" of '{change.layer}'" if change.layer else ""
            lines.append(
                f"{change.kind}{where}: {change.before:.4g} -> {change.after:.4g} leaves "
                f"{change.missing} of {change.unknowns} ({change.fraction:.1%})."
            )
        lines += self.failed
        lines.append(
            "Local and to first order, at a random batch and without a prior: what is not "
            "identifiable from the equations may still be guessed."
        )
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        numbers = asdict(self)
        return {**numbers, "input_shape": list(self.input_shape), "failed": list(self.failed)}

    def to_frame(self) -> pandas.DataFrame:
        """The changes as a pandas data frame.

        Raises:
            ImportError: pandas is not installed; it is the extra ``frames``.
        """
        return data_frame([asdict(change) for change in self.changes])

    def _repr_html_(self) -> str:
        names = ("kind", "layer", "before", "after", "missing", "unknowns")
        head = "".join(f"<th>{name}</th>" for name in (*names, "share"))
        body = ""
        for change in self.changes:
            cells = [html.escape(str(getattr(change, name))) for name in names]
            cells.append(f"{change.fraction:.1%}")
            body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        return f"<table><tr>{head}</tr>{body}</table>"
