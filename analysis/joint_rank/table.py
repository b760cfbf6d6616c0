"""What `identifiability` found: ranks by layer, null directions as pictures, words and numbers."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from math import inf, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rgap.analysis.finding import Finding, data_frame
from rgap.analysis.joint_rank.nullspace import determined
from rgap.limits import ROW
from rgap.recovery import plain
from rgap.solvers.limits import SMALL_GAP

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


PROOFS = {
    "structured": (
        "layer by layer; every rank from singular values of the equations that were left, "
        "no Jacobian formed"
    ),
    "dense": "singular values of the whole Jacobian, every layer scaled to norm one",
    "sketch": (
        "layer by layer on a random sketch: never above the rank, and equal to it with "
        "probability close to one"
    ),
}


@dataclass(frozen=True)
class IdentifiabilityRow:
    """One layer: what it says by itself, and what it and all above it say together.

    Attributes:
        layer: module path.
        kind: "linear", "conv2d", or the class of another module with parameters.
        equations: entries of its gradient.
        own_unknowns: entries of its input, None where the audit does not cover the layer.
        own_nullity: what its own equations leave open of its input once its output is known.
        rank: of the update of this layer and all above it, as a function of the data.
        nullity: entries of the data minus ``rank``.
        gain: what this layer adds to the rank of those above it.
        gap: σ_r/σ_{r+1} where this layer's rank was decided.
        exact: False where ``rank`` is an upper bound.
    """

    layer: str
    kind: str
    equations: int
    own_unknowns: int | None
    own_nullity: int | None
    rank: int
    nullity: int
    gain: int
    gap: float
    exact: bool = True


@dataclass(frozen=True, eq=False, kw_only=True)
class Identifiability(Finding):
    """Rank and null space of the update as a function of the data, at one batch.

    ``method`` is "structured", "dense" or "sketch"; J has ``equations`` rows and ``unknowns``
    columns.

    Attributes:
        joint_rank: rank of J.
        gap: σ_r/σ_{r+1} of the least clear decision; infinite where nothing was cut.
        cutoff: absolute cutoff of that decision, in the units of its scaled equations.
        condition: largest σ_1/σ_r of the decisions.
        rows: one per layer, in forward order.
        null_basis: orthonormal null directions ``[joint_nullity, B, *input_shape]``; None where
            only ranks were asked for (``null_space=False``).
        spectra: (name, singular values) of the decisions, for `plot`.
    """

    joint_rank: int
    gap: float
    cutoff: float
    condition: float
    rows: tuple[IdentifiabilityRow, ...]
    null_basis: Tensor | None = field(repr=False)
    spectra: tuple[tuple[str, Tensor], ...] = field(default=(), repr=False)

    @property
    def joint_nullity(self) -> int:
        """Directions of the data that change nothing in the update, to first order."""
        return self.unknowns - self.joint_rank

    @property
    def sequential_nullity(self) -> int | None:
        """Sum of what the layers leave open one by one; None where one of them was not audited."""
        own = [row.own_nullity for row in self.rows if row.own_nullity is not None]
        return sum(own) if own else None

    @property
    def identifiable(self) -> bool:
        """True when J has full column rank, with a clear gap: the batch is locally unique."""
        return self.joint_nullity == 0 and self.clear

    @property
    def clear(self) -> bool:
        """True when every decision was between well separated singular values."""
        return self.gap >= SMALL_GAP

    @property
    def proof(self) -> str:
        """How the rank was found and what that shows."""
        return PROOFS[self.method]

    @property
    def share(self) -> Tensor:
        """Share of every entry's variance that is determined, ``[B, *input_shape]``, in [0, 1].

        ``1 − Σ_j n_j²`` over orthonormal null directions: the squared length of what remains of
        the entry's unit vector outside the null space.
        """
        return determined(self._basis())

    @property
    def determined(self) -> Tensor:
        """True where an entry is the same along every null direction, ``[B, *input_shape]``."""
        basis = self._basis()
        if len(basis) == 0:
            return basis.new_ones(basis.shape[1:], dtype=torch.bool)
        return basis.square().sum(0).sqrt() < ROW

    def pictures(self, count: int = 8) -> Tensor:
        """The smoothest null directions, ``[≤ count, B, *input_shape]``, largest entry ±1.

        A null space has no basis of its own.  These are the unit directions in it of least total
        squared difference between neighbouring pixels, each orthogonal to those before: the
        pictures that a smoothness prior finds hardest to tell from nothing.

        Args:
            count: at most so many.

        Raises:
            ValueError: a count below 1, or only ranks were asked for.
        """
        if count < 1:
            raise ValueError(f"expected count >= 1, got {count}; write pictures(count=8)")
        basis = self._basis()
        if len(basis) == 0:
            return basis
        steps = [
            basis.diff(dim=axis).flatten(1)
            for axis in range(3, basis.ndim)
            if basis.shape[axis] > 1
        ]
        if not steps:  # not pictures: nothing is next to anything
            chosen = basis[:count]
        else:
            gram = sum(step @ step.T for step in steps)
            _, vectors = torch.linalg.eigh(torch.as_tensor(gram))
            chosen = torch.tensordot(vectors[:, :count].T, basis, 1)
        peak = chosen.flatten(1)
        at = peak.abs().argmax(1, keepdim=True)
        return chosen / peak.gather(1, at).reshape(-1, *(1 for _ in chosen.shape[1:]))

    def explain(self) -> str:
        """The finding in plain words: what is determined, by which layers, how surely."""
        missing = self.joint_nullity
        lines = [
            f"{self.model} at B = {self.batch_size}: the update determines {self.joint_rank} of "
            f"{self.unknowns} directions of the batch ({self.method})."
        ]
        if missing == 0:
            lines.append(
                "No other batch near this one gives the same update. That is local: another batch "
                "far away is not excluded."
            )
        else:
            lines.append(
                f"{missing} directions ({missing / self.unknowns:.1%}) change nothing in it, to "
                "first order. That alone does not prove the batch lost: equal pictures in a batch "
                "make the Jacobian singular and can still be recovered."
            )
        if missing and self.null_basis is not None:
            fixed, share = int(self.determined.sum()), self.share
            lines.append(
                f"{fixed} of {self.unknowns} entries are the same along all of these directions; "
                f"of an entry's variance, {float(share.min()):.1%} to {float(share.max()):.1%} is "
                "determined."
            )
        sequential = self.sequential_nullity
        if sequential is not None and sequential != missing:
            lines.append(
                f"Layer by layer, {sequential} are missing: what is left open above is not always "
                "left open by the layers below."
                if sequential > missing
                else f"Layer by layer, only {sequential} are missing: each layer by itself takes "
                "its output as known, which here it is not."
            )
        best = max(self.rows, key=lambda row: row.gain, default=None)
        if best is not None and best.gain:
            lines.append(f"The largest part comes from '{best.layer}': {best.gain} directions.")
        gap = "nothing was cut" if self.gap == inf else f"the least clear gap is {self.gap:.1e}"
        lines.append(f"Decided from {self.proof}; {gap}, condition {self.condition:.1e}.")
        if not self.clear:
            lines.append(
                "That gap is small: read the rank as a statement about this precision, and try "
                "noise=, dtype= or other pictures."
            )
        return "\n".join([*lines, *self.notes])

    def _numbers(self) -> dict[str, Any]:
        rows = [asdict(row) | {"gap": plain(row.gap)} for row in self.rows]
        return {
            "joint_rank": self.joint_rank,
            "joint_nullity": self.joint_nullity,
            "sequential_nullity": self.sequential_nullity,
            "identifiable": self.identifiable,
            "determined_entries": None if self.null_basis is None else int(self.determined.sum()),
            "gap": plain(self.gap),
            "cutoff": self.cutoff,
            "condition": plain(self.condition),
            "rows": rows,
        }

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a pandas data frame.

        Raises:
            ImportError: pandas is not installed; it is the extra ``frames``.
        """
        return data_frame([asdict(row) for row in self.rows])

    def _repr_html_(self) -> str:
        names = ("layer", "kind", "equations", "own_nullity", "rank", "nullity", "gain")
        head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
        body = ""
        for row in self.rows:
            cells = [html.escape(str(getattr(row, name))) for name in names]
            if not row.exact:  # of this layer and all above, only a bound is known
                cells[4], cells[5] = f"≤ {row.rank}", f"≥ {row.nullity}"
            body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        return f"<table><tr>{head}</tr>{body}</table>"

    def plot(self) -> Figure:
        """Null directions as pictures where there are any, the singular spectra otherwise."""
        from rgap.analysis.plots.null_space import null_pictures, spectra

        shape = self.input_shape
        pictures = len(shape) == 3 and shape[0] in (1, 3) and prod(shape[1:]) > 1
        drawn = self.null_basis is not None and self.joint_nullity > 0
        return null_pictures(self) if drawn and pictures else spectra(self)

    def _basis(self) -> Tensor:
        if self.null_basis is None:
            raise ValueError(
                "expected null directions, got ranks alone (null_space=False); write "
                "identifiability(..., null_space=True)"
            )
        return self.null_basis
