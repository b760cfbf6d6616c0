"""The audit along training: one table per checkpoint, and how it moves."""

from __future__ import annotations

import copy
import html
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rgap.analysis.discard.audit import audit
from rgap.analysis.discard.table import Audit, AuditRow
from rgap.analysis.finding import data_frame
from rgap.network.running import first_line
from rgap.progress import Progress, Shown
from rgap.update.losses import Loss

if TYPE_CHECKING:
    import pandas

__all__ = ["TrainingAudit", "audit_training"]


@dataclass(frozen=True)
class TrainingAudit:
    """Audits of one network at several checkpoints.

    Attributes:
        names: of the checkpoints, in the order of training.
        audits: one per checkpoint.
    """

    names: tuple[str, ...]
    audits: tuple[Audit, ...]

    def series(self, layer: str, batch_size: int) -> tuple[AuditRow, ...]:
        """One layer at one batch size, checkpoint by checkpoint.

        Raises:
            KeyError: naming what there is.
        """
        return tuple(table.row(layer, batch_size) for table in self.audits)

    def explain(self) -> str:
        """What training does to every layer, in words."""
        first, last = self.audits[0], self.audits[-1]
        lines = [f"{first.model} over {len(self.audits)} checkpoints ({first.method})."]
        for start in first.rows:
            if start.batch_size != max(first.batch_sizes):
                continue
            rows = self.series(start.layer, start.batch_size)
            discards = [row.discard for row in rows]
            line = f"'{start.layer}' at B = {start.batch_size}: discard {discards[0]:.1%}"
            if len(set(discards)) > 1:
                low, high = min(discards), max(discards)
                line += f" -> {discards[-1]:.1%}, between {low:.1%} and {high:.1%}"
            else:
                line += " throughout"
            conditions = [row.condition for row in rows if row.condition is not None]
            if conditions:
                line += f"; condition {conditions[0]:.1e} -> {conditions[-1]:.1e}"
            lines.append(line + ".")
        return "\n".join([*lines, *last.notes])

    def to_frame(self) -> pandas.DataFrame:
        """All rows with the name of their checkpoint, as a pandas data frame.

        Raises:
            ImportError: pandas is not installed; it is the extra ``frames``.
        """
        return data_frame(
            [
                {"checkpoint": name, **asdict(row)}
                for name, table in zip(self.names, self.audits, strict=True)
                for row in table.rows
            ]
        )

    def summary(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        pairs = zip(self.names, self.audits, strict=True)
        return {"checkpoints": [{"name": name, **table.summary()} for name, table in pairs]}

    def _repr_html_(self) -> str:
        """Discard, and in brackets the condition, layer and batch size by checkpoint."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("layer", "B", *self.names))
        body = ""
        for row in self.audits[0].rows:
            cells = [html.escape(row.layer), str(row.batch_size)]
            for row_then in self.series(row.layer, row.batch_size):
                size = "" if row_then.condition is None else f" ({row_then.condition:.0e})"
                cells.append(f"{row_then.discard:.1%}{size}")
            body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        return f"<table><tr>{head}</tr>{body}</table>"


def audit_training(
    model: nn.Module,
    input_shape: Sequence[int],
    checkpoints: Mapping[str, Mapping[str, Tensor]] | Iterable[Mapping[str, Tensor]],
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    *,
    loss: str | Loss = "cross_entropy",
    inputs: Tensor | None = None,
    method: str = "exact",
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Shown = False,
) -> TrainingAudit:
    """Audit a network at every checkpoint, with the same probe batch.

    Args:
        model: in eval mode; left as it was.
        input_shape: of one sample.
        checkpoints: state dicts in the order of training, or a mapping from names to them; read
            one at a time.
        batch_sizes: as for `rgap.analysis.audit`.
        loss: of the client.
        inputs: probe pictures; random if None.
        method: "exact" or "sketch"; counting by formula does not look at weights.
        seed: of the probe.
        device: where to compute; default the CPU.
        progress: True for a line on a terminal, or a function that is told; see
            :mod:`rgap.progress`.

    Raises:
        ValueError: no checkpoints, one that does not fit, ``method="formula"``, or what
            `rgap.analysis.audit` raises.

    >>> import rgap
    >>> net = rgap.models.mlp((6,), 3, input_shape=(1, 2, 2), seed=0)
    >>> states = {"start": net.state_dict(), "end": net.state_dict()}
    >>> audit_training(net, (1, 2, 2), states, (2,)).names
    ('start', 'end')
    """
    if method == "formula":
        raise ValueError(
            "expected method 'exact' or 'sketch' along training, got 'formula', which does not "
            "look at weights; write rgap.analysis.audit(model, input_shape, method='formula')"
        )
    named = checkpoints.items() if isinstance(checkpoints, Mapping) else enumerate(checkpoints)
    twin = copy.deepcopy(model)
    names, audits = list[str](), list[Audit]()
    total = len(checkpoints) if isinstance(checkpoints, Sized) else None
    with Progress(progress) as show:
        for name, state in named:
            show.stage(f"checkpoint {name}", len(names) + 1, total)
            try:
                twin.load_state_dict(state)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"checkpoint {name!r} does not fit the {type(model).__name__}: "
                    f"{first_line(error)}; write the state_dict() of the same network"
                ) from error
            names.append(str(name))
            audits.append(
                audit(
                    twin,
                    input_shape,
                    batch_sizes,
                    loss=loss,
                    inputs=inputs,
                    method=method,
                    seed=seed,
                    device=device,
                    progress=show.within,
                )
            )
    if not audits:
        raise ValueError(
            "expected checkpoints, got none; write checkpoints=[model.state_dict(), ...]"
        )
    return TrainingAudit(tuple(names), tuple(audits))
