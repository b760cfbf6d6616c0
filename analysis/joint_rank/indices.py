"""Two published indices of how well a network leaks, beside the ranks that they stand for.

R-GAP's rank analysis counts, layer by layer, entries against equations; COPA's c(M) adds up the
rank deficits of the convolutions.  Both are restated here as this library reads them, with sizes
relative to the unknowns so that networks of different size compare, and both are shown beside what
they try to predict: the rank of the whole update as a function of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rgap.analysis.calls.layers import calls_of
from rgap.analysis.discard.audit import audit
from rgap.analysis.discard.table import Audit
from rgap.analysis.joint_rank.identifiability import identifiability
from rgap.analysis.probe import probe_pictures
from rgap.progress import Shown
from rgap.update.losses import Loss

__all__ = ["IndexRow", "LeakageIndices", "leakage_indices"]


@dataclass(frozen=True)
class IndexRow:
    """One layer as the indices see it, and its rank.

    Attributes:
        layer: module path.
        kind: "linear", "conv2d", ...
        unknowns: ``|X|``, entries of its input, times B.
        gradient: ``|W|``, entries of its weight's gradient: R-GAP's gradient constraints.
        outputs: ``|Z|``, entries of its output, times B: R-GAP's weight constraints.
        virtual: ``|V|``, surplus ``Σ max(|Z| − |X|, 0)`` of the layers below: R-GAP's virtual
            constraints.
        deficit: ``|X| − |W| − |Z| − |V|``; positive where the count falls short.
        rank: of the gradient and weight constraints together, measured.
    """

    layer: str
    kind: str
    unknowns: int
    gradient: int
    outputs: int
    virtual: int
    deficit: int
    rank: int

    @property
    def nullity(self) -> int:
        """Unknowns that the layer's own equations leave open, measured."""
        return self.unknowns - self.rank


@dataclass(frozen=True)
class LeakageIndices:
    """The two indices of a network at a batch size, and the ranks beside them.

    Attributes:
        model: name of the network's class.
        batch_size: B.
        rows: one per layer, in forward order.
        unknowns: entries of the batch.
        joint_rank: rank of the whole update as a function of the data; None if not asked for.
    """

    model: str
    batch_size: int
    rows: tuple[IndexRow, ...]
    unknowns: int
    joint_rank: int | None

    @property
    def rank_analysis(self) -> int:
        """R-GAP's index: the largest deficit of any layer; 0 or less reads as recoverable."""
        return max(row.deficit for row in self.rows)

    @property
    def rank_analysis_share(self) -> float:
        """The same with every deficit relative to the unknowns of its layer."""
        return max(row.deficit / row.unknowns for row in self.rows)

    @property
    def copa(self) -> float:
        """COPA's ``c(M) = Σ_i (d − i + 1)/d · (rank_i − n_i)`` over the d convolutions, i from 1.

        0 is the most vulnerable; 0 without convolutions.
        """
        rows = self._convolutions
        depth = len(rows)
        return sum(-(depth - i) / depth * row.nullity for i, row in enumerate(rows))

    @property
    def copa_share(self) -> float:
        """The same over ``Σ_i (d − i + 1)/d · n_i``: from −1 to 0, whatever the size."""
        rows = self._convolutions
        whole = sum((len(rows) - i) / len(rows) * row.unknowns for i, row in enumerate(rows))
        return self.copa / whole if whole else 0.0

    @property
    def _convolutions(self) -> list[IndexRow]:
        return [row for row in self.rows if row.kind.startswith("conv")]

    @property
    def nullity(self) -> int | None:
        """Directions of the batch that are not in the update; None if not asked for."""
        return None if self.joint_rank is None else self.unknowns - self.joint_rank

    @property
    def misleading(self) -> tuple[str, ...]:
        """Where an index and the rank of the whole update disagree, in words."""
        if self.nullity is None:
            return ()
        words = []
        true = "determines the batch" if self.nullity == 0 else f"leaves {self.nullity} open"
        if (self.rank_analysis <= 0) is not (self.nullity == 0):
            says = "recoverable" if self.rank_analysis <= 0 else "not recoverable"
            words.append(f"rank analysis says {says} ({self.rank_analysis:+d}), the update {true}")
        if (self.copa == 0) is not (self.nullity == 0):
            says = "no deficit" if self.copa == 0 else "a deficit"
            words.append(f"c(M) says {says} ({self.copa:.4g}), the update {true}")
        return tuple(words)

    def explain(self) -> str:
        """Both indices and the truth, in words."""
        lines = [
            f"{self.model} at B = {self.batch_size}: rank analysis {self.rank_analysis:+d} "
            f"({self.rank_analysis_share:+.1%} of its layer), c(M) {self.copa:.4g} "
            f"({self.copa_share:.1%})."
        ]
        if self.joint_rank is not None:
            lines.append(
                f"The update determines {self.joint_rank:,} of {self.unknowns:,} directions."
            )
        lines += [f"Misleading: {words}." for words in self.misleading]
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "rank_analysis": self.rank_analysis,
            "rank_analysis_share": self.rank_analysis_share,
            "copa": self.copa,
            "copa_share": self.copa_share,
            "unknowns": self.unknowns,
            "joint_rank": self.joint_rank,
            "misleading": list(self.misleading),
            "rows": [asdict(row) for row in self.rows],
        }


def leakage_indices(
    model: nn.Module,
    input_shape: Sequence[int],
    batch_size: int = 1,
    *,
    loss: str | Loss = "cross_entropy",
    inputs: Tensor | None = None,
    joint: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Shown = False,
) -> LeakageIndices:
    """R-GAP's rank analysis and COPA's c(M) of a network, with the ranks that they stand for.

    Args:
        model: in eval mode; left as it was.  Every layer is called once.
        input_shape: of one sample.
        batch_size: B.
        loss: of the client.
        inputs: the probe batch ``[B, *input_shape]``; random if None.
        joint: also find the rank of the whole update.
        seed: of the probe.
        device: where to compute; default the CPU.
        progress: True for a line on a terminal, or a function that is told; see
            :mod:`rgap.progress`.

    Returns:
        The :class:`LeakageIndices`.

    Raises:
        ValueError: a layer that is called twice, and as `rgap.analysis.audit`.

    Source: Zhu and Blaschko (2021) and Chen and Campbell (2021), as restated in the docs.

    >>> import rgap
    >>> head = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval()
    >>> found = leakage_indices(head, (1, 4, 4), 4)
    >>> found.rank_analysis, found.nullity > 0  # counted as recoverable, and it is not
    (-16, True)
    """
    shape = tuple(input_shape)
    table = audit(
        model, shape, (batch_size,), loss=loss, inputs=inputs, seed=seed, device=device,
        progress=progress,
    )  # fmt: skip
    rows = _rows(table, _sizes(model, shape), batch_size)
    joint_rank = None
    if joint:
        pictures = probe_pictures(inputs, shape, batch_size, seed)
        joint_rank = identifiability(
            model, pictures, loss=loss, sequential=False, seed=seed, device=device,
            progress=progress,
        ).joint_rank  # fmt: skip
    unknowns = batch_size * prod(shape)
    return LeakageIndices(type(model).__name__, batch_size, rows, unknowns, joint_rank)


def _sizes(model: nn.Module, shape: tuple[int, ...]) -> dict[str, tuple[int, int, int]]:
    """Entries of a layer's input, of its weight and of its output at one sample, by layer."""
    sizes: dict[str, tuple[int, int, int]] = {}
    for call in calls_of(model, shape):
        if call.use is None or call.use.weight is None:
            continue
        if call.name in sizes:
            raise ValueError(
                f"expected every layer to be called once, got '{call.name}' twice: its "
                "gradient is a sum, which neither index covers; write "
                "rgap.analysis.identifiability(model, input_shape)"
            )
        sizes[call.name] = (prod(call.in_shape), call.use.weight.numel(), prod(call.out_shape))
    return sizes


def _rows(
    table: Audit, sizes: Mapping[str, tuple[int, int, int]], batch: int
) -> tuple[IndexRow, ...]:
    """``|X|, |W|, |Z|, |V|`` of every layer in forward order, and its measured rank."""
    rows: list[IndexRow] = []
    surplus = 0
    for row in table.rows:
        if row.kind == "step":
            continue
        own, gradient, outputs = sizes[row.layer]
        unknowns, made = batch * own, batch * outputs
        rows.append(
            IndexRow(
                row.layer,
                row.kind,
                unknowns,
                gradient,
                made,
                surplus,
                unknowns - gradient - made - surplus,
                min(row.joint_rank, unknowns),
            )
        )
        surplus += max(made - unknowns, 0)
    return tuple(rows)
