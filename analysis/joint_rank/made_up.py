"""What of a completed batch the equations fixed, and what a prior made up.

At the recovered batch x̂ let N be an orthonormal basis of the null space of J = ∂(update)/∂(data).
Along N the update says nothing, to first order: what stands there came from the prior.  Of entry i
that is the share ``Σ_j N_ij²``, and the error of a batch falls into two parts that are orthogonal,

    x̂ − x = (1 − NNᵀ)(x̂ − x) + NNᵀ(x̂ − x).

Of copies of one picture in a batch J has equal columns: that they differ by opposite amounts is
always in its null space.  The share of a picture that is known to occur m times is what is open
where its copies move together: with P the mean over copies, ``m Σ_j (P N)_ij²``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rgap.analysis.joint_rank.identifiability import identifiability
from rgap.analysis.joint_rank.table import Identifiability
from rgap.analysis.scoring import score
from rgap.progress import Shown
from rgap.recovery import Recovery
from rgap.seeding import batch_of
from rgap.update.capture import capture
from rgap.update.losses import Loss
from rgap.update.update import Update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MadeUp", "made_up"]

AGREE, ROUNDED = 3.0, 1e-3  # of the residual that a recovery states, and of the update's rounding


@dataclass(frozen=True, eq=False)
class MadeUp:
    """The share of every entry of a recovered batch that no equation fixes.

    Attributes:
        recovery: with the batch, or the one that came nearest.
        inputs: its rows, copies as often as they occur, ``[B, *input_shape]``.
        share: of each entry, in [0, 1]: 0 where equations fix it, 1 where they say nothing of it.
        found: the null space at the batch.
        value_range: of the data; None: it is not known.
    """

    recovery: Recovery = field(repr=False)
    inputs: Tensor = field(repr=False)
    share: Tensor = field(repr=False)
    found: Identifiability
    value_range: tuple[float, float] | None = None

    @property
    def samples(self) -> Tensor:
        """The share of each row, [B]."""
        return self.share.flatten(1).mean(1)

    def apart(self, truth: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of the error, rms over the entries of each sample of the truth.

        Args:
            truth: the client's batch, in any order, ``[B, *input_shape]``.

        Returns:
            ``‖(1 − NNᵀ)(x̂ − x)‖/√n`` and ``‖NNᵀ(x̂ − x)‖/√n``, [B] each.  The null space is that of
            x̂: far from x the first holds how the equations bend on the way, too.

        Raises:
            ValueError: another batch size or shape than was recovered.
        """
        if truth.shape != self.inputs.shape or not bool(torch.isfinite(truth).all()):
            raise ValueError(
                f"truth: expected finite entries {list(self.inputs.shape)}, as recovered, got "
                f"{list(truth.shape)}; give the client's batch as the model read it"
            )
        basis = self.found.null_basis
        assert basis is not None  # it was asked for
        order = score(self.recovery, truth).order
        gap = torch.empty_like(self.share)
        gap[order] = self.inputs[order] - truth.detach().cpu().double()
        free = torch.tensordot(basis.flatten(1) @ gap.flatten(), basis, 1)
        fixed, made = (
            part.flatten(1).square().mean(1).sqrt()[order] for part in (gap - free, free)
        )
        return fixed, made

    def explain(self) -> str:
        """How much of the batch, and of each of its rows, was made up."""
        groups, unknowns = _copies(self.inputs, _labels(self.recovery)), self.found.unknowns
        first = [rows[0] for rows in groups]
        free, unknowns = float(self.share[first].sum()), self.share[first].numel()
        words = [
            f"{free:,.0f} of {unknowns:,} unknowns are open at this batch: the update leaves "
            f"{free / unknowns:.1%} of it to something else"
        ]
        words += [
            f"  rows {', '.join(map(str, rows))} are copies of one picture, counted once"
            for rows in groups
            if len(rows) > 1
        ]
        if self.recovery.inputs is None:
            words.append(
                f"  this batch does not answer the update ({self.recovery.status.name}): that the "
                "rest of it is fixed does not say that it is right"
            )
        words += [f"  row {b}: {share:.1%}" for b, share in enumerate(self.samples.tolist())]
        return "\n".join(words)

    def plot(self) -> Figure:
        """Every picture, and below it the share of each pixel that was made up.

        Raises:
            ValueError: inputs that are no pictures.
        """
        from rgap.analysis.plots.null_space import made_up_shares

        return made_up_shares(self.inputs, self.share, self.value_range)


def made_up(
    model: nn.Module,
    recovery: Recovery,
    *,
    update: Update | None = None,
    loss: str | Loss | nn.Module = "cross_entropy",
    noise: float = 0.0,
    time_limit: float | None = None,
    memory_budget: float | None = None,
    progress: Shown = False,
) -> MadeUp:
    """What of a batch that was completed, or searched, the update does not say.

    Args:
        model: that the update was computed on.
        recovery: of :func:`rgap.invert` or :func:`rgap.match`, with a batch.
        update: that it is of.  With it the loss and the range of the data are its own, and the
            model is held against it: its gradient at the batch must miss the update by what the
            recovery says.
        loss: of the client, where no update is given.
        noise: relative error of the update's entries: what it hides counts as made up.
        time_limit: seconds; None for none.
        memory_budget: bytes to take on top of the model.
        progress: see :mod:`rgap.progress`.

    Returns:
        The :class:`MadeUp`.

    Raises:
        TypeError: no recovery, or no update.
        ValueError: the recovery holds no batch or no targets; a model that does not send the
            update at it; what :func:`~rgap.analysis.identifiability` raises.

    >>> import rgap
    >>> model = rgap.models.mlp((4,), 3, "tanh", input_shape=(1, 3, 3), seed=0)
    >>> draw = torch.Generator().manual_seed(0)
    >>> x, y = torch.rand(6, 1, 3, 3, generator=draw), torch.arange(6) % 3
    >>> found = rgap.match(model, rgap.capture(model, x, y), labels=y, iterations=30)
    >>> share = made_up(model, found)
    >>> share.share.shape, share.found.joint_nullity > 0
    (torch.Size([6, 1, 3, 3]), True)
    """
    if not isinstance(recovery, Recovery):
        raise TypeError(
            f"recovery: expected a Recovery, got {type(recovery).__name__}; write "
            "rgap.invert(model, update, complete=True), or rgap.match(model, update)"
        )
    inputs, labels = batch_of(recovery)
    if labels is None:
        raise ValueError(
            "recovery: expected one with targets, got none beside its batch; write "
            "rgap.match(model, update, labels=...)"
        )
    inputs = inputs.detach().cpu().double()
    if update is not None:
        if not isinstance(update, Update):
            raise TypeError(
                f"update: expected an rgap.Update, got {type(update).__name__}; write update=, the "
                "one that the recovery is of"
            )
        loss = update.loss
        _require_sent(model, update, inputs, labels, recovery)
    found = identifiability(
        model, inputs, loss=loss, labels=labels.cpu(), noise=noise, dtype=torch.float64,
        sequential=False, time_limit=time_limit, memory_budget=memory_budget, progress=progress,
    )  # fmt: skip
    assert found.null_basis is not None  # it was asked for
    share = found.null_basis.square().sum(0)
    for rows in _copies(inputs, labels):
        if len(rows) > 1:
            together = found.null_basis[:, rows].mean(1)
            share[rows] = len(rows) * together.square().sum(0)
    return MadeUp(recovery, inputs, share, found, None if update is None else update.value_range)


def _labels(recovery: Recovery) -> Tensor | None:
    return batch_of(recovery)[1]


def _copies(inputs: Tensor, labels: Tensor | None) -> list[list[int]]:
    """Rows that are copies of each other, with equal targets, group by group."""
    groups: list[list[int]] = []
    for row in range(len(inputs)):
        for rows in groups:
            same = labels is None or torch.equal(labels[row], labels[rows[0]])
            if same and torch.equal(inputs[row], inputs[rows[0]]):
                rows.append(row)
                break
        else:
            groups.append([row])
    return groups


def _require_sent(
    model: nn.Module, update: Update, inputs: Tensor, labels: Tensor, recovery: Recovery
) -> None:
    """Raise unless the model's gradient at a batch misses the update as its recovery says."""
    if recovery.residual is None or update.local_steps > 1:
        return
    twin = copy.deepcopy(model).cpu().double()
    own = capture(twin, inputs, labels.cpu(), loss=update.loss, value_range=None).gradients
    both = [(own[n], g.cpu().double()) for n, g in update.gradients.items() if n in own]
    size, length, common = (
        sum(float((a * b).sum()) for a, b in pairs)
        for pairs in ([(g, g) for _, g in both], [(g, g) for g, _ in both], both)
    )
    scale = max(common, 0.0) / length if length else 0.0  # of an update that came with a factor
    apart = min(
        sum(float((c * mine - sent).square().sum()) for mine, sent in both) for c in (1.0, scale)
    )
    off = (apart / size) ** 0.5 if size else 0.0
    if not off <= AGREE * recovery.residual + ROUNDED:
        raise ValueError(
            f"recovery: expected one of this model and update, whose gradient at its batch is off "
            f"by {recovery.residual:.1e} of the update, here it is off by {off:.1e}; give the "
            "model, the update and the recovery that belong together"
        )
