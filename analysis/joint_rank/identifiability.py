"""The local truth of what a gradient determines: the rank of ∂(update)/∂(data) at a batch.

The recursion's nullity is an upper bound: a layer below can fix what a layer above left open.  The
rank of the whole Jacobian J cannot be improved by any method that looks at a neighbourhood of the
batch: directions in its null space change nothing in the update, to first order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rgap.analysis.joint_rank.blocks import FORMED, eliminate_blocks
from rgap.analysis.joint_rank.cumulative import cumulative_ranks
from rgap.analysis.joint_rank.elimination import NotStructuredError, chain_nullspace
from rgap.analysis.joint_rank.nullspace import RankOptions, orthonormal
from rgap.analysis.joint_rank.sampled import chain_ranks
from rgap.analysis.joint_rank.stage import TooLargeError
from rgap.analysis.joint_rank.table import Identifiability, IdentifiabilityRow
from rgap.analysis.probe import ProbePoint, probe_batch
from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.linearisation import Linearisation
from rgap.machine.allowance import Timed
from rgap.network.chain import parse
from rgap.progress import Shown
from rgap.solvers.rank import Rank
from rgap.update.losses import Loss

METHODS = ("auto", "structured", "dense", "sketch")
COPIES = 2  # of the model in float64: as a module, and as a chain
SMALL = 1024  # unknowns up to which "auto" takes the singular values of the whole Jacobian


def identifiability(
    model: nn.Module,
    inputs: Tensor | Sequence[int],
    batch_size: int | None = None,
    *,
    loss: str | Loss | nn.Module = "cross_entropy",
    labels: Tensor | None = None,
    method: str = "auto",
    rcond: float | None = None,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float64,
    sequential: bool = True,
    null_space: bool = True,
    memory_budget: float | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    progress: Shown = False,
    device: torch.device | str | None = None,
) -> Identifiability:
    """Rank and null space of the update as a function of the data, at a batch.

    ``J = ∂(∂L/∂θ)/∂x`` has one row per trained parameter and one column per entry of the batch,
    and κ at the head moves with the data.  Full column rank proves that no other batch *near* this
    one gives the same update; it says nothing about batches far away.  A rank below does not prove
    that the batch is lost: two equal pictures make J singular and can be recovered.

    Args:
        model: left as it was.  Batch norms in train mode take the statistics of this batch, which
            are differentiated: J is then no block a sample.  Frozen parameters give no equation;
            one that is used twice gives the equations of the sum.
        inputs: the batch ``[B, *input_shape]``, or the shape of one sample for a random batch.
        batch_size: B, with a shape; 1 if left out.
        loss: of the client.
        labels: targets as the loss wants them; drawn, and different as far as possible, if None.
        method: "structured" eliminates layer by layer without J, on chains whose activations have
            no dead parts (`rgap.analysis.joint_rank.elimination`); "dense" takes the singular
            values of J, every layer scaled to norm one; "sketch" compresses layers with more
            equations than unknowns by random signs, which never raises a rank; "auto" is dense up
            to 1024 unknowns, then structured where it applies, else sketch.
        rcond: relative cutoff of singular values; None: rounding, ``dtype`` and ``noise`` decide.
        noise: relative error of the update's entries: what it hides counts as undetermined.
        dtype: precision in which the update is known; the arithmetic is always float64.
        sequential: also run `rgap.analysis.audit`, for the nullity of each layer by itself.
        null_space: also find the null directions; the ranks alone can cost a fraction.
        memory_budget: bytes to take on top of the model; by default half of what is free.  Where
            it does not hold J, "auto" sketches it; what needs more is refused beforehand.
        time_limit: seconds, kept within a tenth; None for none.
        seed: of the random batch, the labels and the sketch.
        progress: True for a line on a terminal, or a function; see :mod:`rgap.progress`.
        device: where to compute; default the CPU.

    Returns:
        The :class:`Identifiability`.

    Raises:
        ValueError: no trained parameters, dropout in train mode, a shape or labels that do not
            fit, more unknowns than the budget allows (:class:`rgap.machine.memory.OutOfMemory`),
            ``method="structured"`` for a model without structure; no answer within the time
            (:class:`rgap.machine.allowance.OutOfTime`).
        TypeError: inputs that are neither a floating tensor nor whole numbers.

    >>> import rgap
    >>> found = identifiability(rgap.models.mlp((8,), 3, input_shape=(1, 4, 4), seed=0), (1, 4, 4))
    >>> found.joint_rank, found.unknowns, found.identifiable
    (16, 16, True)
    """
    start = time.perf_counter()
    shown = Timed(progress, time_limit, device or "cpu")
    if method not in METHODS:
        raise ValueError(f"expected method in {list(METHODS)}, got {method!r}; write method='auto'")
    pictures = probe_batch(inputs, batch_size, seed, device)
    point = ProbePoint.of(
        model,
        pictures,
        loss,
        seed if labels is None else labels,
        memory_budget=memory_budget,
        copies=COPIES,
        time_limit=time_limit,
        mixing=True,
    )
    options = RankOptions(rcond, noise, dtype, point.room, shown.stage, shown.ahead)
    question = _Question(point, options, method, null_space, seed, shown)
    with shown:
        own, notes = question.layers_alone() if sequential else (dict[str, _Own](), list[str]())
        answer = question.answered(own, notes)
    notes = [*notes, *answer.notes]
    return replace(answer, notes=tuple(notes), seconds=time.perf_counter() - start)


_Own = tuple[int, int]  # unknowns and nullity of a layer by itself


@dataclass(frozen=True)
class _Question:
    """Which rank is asked for, at which point, and how it is to be decided.

    Attributes:
        point: the network at its batch.
        options: of every decision.
        method: as for :func:`identifiability`.
        null_space: whether the null directions are asked for.
        seed: of the audit and of a sketch.
        shown: progress and time limit.
    """

    point: ProbePoint
    options: RankOptions
    method: str
    null_space: bool
    seed: int
    shown: Timed

    def answered(self, own: Mapping[str, _Own], notes: list[str]) -> Identifiability:
        """The answer by the method asked for, or by the first that applies; adds to ``notes``."""
        update, method = self.point.update, self.method
        if method == "structured" or (method == "auto" and update.unknowns > SMALL):
            self.shown.stage("null space, layer by layer")
            try:
                return self._structured(own)
            except (NotStructuredError, TooLargeError) as reason:
                if method == "structured":
                    raise ValueError(
                        f"expected a model that method='structured' can go back through, got "
                        f"{type(self.point.model).__name__}: {reason}; write method='sketch'"
                    ) from reason
                notes.append(f"Not structured ({reason}), so the Jacobian was sketched.")
        if method == "auto":
            small = update.unknowns <= SMALL
            dense = 8.0 * update.equations * update.unknowns
            fits = FORMED * dense + update.held <= self.point.room
            method = "dense" if small and fits else "sketch"
        self.shown.stage(f"Jacobian, {method}")
        return self._by_blocks(method, own)

    def _structured(self, own: Mapping[str, _Own]) -> Identifiability:
        update = self.point.update
        linear, trained = self._chain()
        ranks = chain_nullspace if self.null_space else chain_ranks
        with self.shown.every_operation():
            null = ranks(linear, trained, self.options)
            cumulative = cumulative_ranks(linear, null)
        equations = {block.layer: block.equations for block in update.blocks}
        measured = [
            _Measured(
                stage.layer,
                node.stage.affine.kind,
                equations.get(stage.layer, 0),
                rank,
                stage.rank.gap,
                exact,
            )
            for stage, node, (rank, exact) in zip(
                null.stages, linear.nodes, cumulative, strict=True
            )
        ]
        weakest = min((stage.rank for stage in null.stages), key=lambda rank: rank.gap)
        return Identifiability(
            **self.point.about,
            method="structured",
            equations=update.equations,
            joint_rank=update.unknowns - null.stages[0].nullity,
            gap=weakest.gap,
            cutoff=weakest.cutoff,
            condition=max(stage.rank.condition for stage in null.stages),
            rows=_rows(measured, own, update.unknowns),
            null_basis=None if null.directions is None else orthonormal(null.directions),
            spectra=tuple((s.layer, s.values) for s in null.stages if len(s.values)),
        )

    def _chain(self) -> tuple[Linearisation, frozenset[str]]:
        """The update of the chain, linearised at the batch, and the parameters that are sent.

        Raises:
            NotStructuredError: the model is no chain, or other parameters than its layers' train.
        """
        update, loss = self.point.update, self.point.loss
        chain = parse(self.point.model, tuple(update.inputs.shape[1:]), mixing=True)
        chain = chain.to(update.inputs.device)
        if chain.barrier is not None:
            raise NotStructuredError(
                f"'{chain.barrier.node}' ({chain.barrier.kind}) is no link of a chain"
            )
        layers = [stage.affine for stage in chain.stages]
        covered = {name for layer in layers for name in (layer.weight_name, layer.bias_name)}
        trained = frozenset(name for block in update.blocks for name in block.names)
        if not trained <= covered:
            raise NotStructuredError(f"{sorted(trained - covered)} belong to no linear layer")
        outputs = chain.forward(update.inputs)
        targets = loss.dense(self.point.targets, outputs)
        batch = BatchLoss(loss, targets, outputs.new_ones(len(outputs)))
        return Linearisation(chain, update.inputs, batch), trained

    def _by_blocks(self, method: str, own: Mapping[str, _Own]) -> Identifiability:
        update = self.point.update
        with self.shown.every_operation():
            null = eliminate_blocks(update, self.options, sketch=method == "sketch", seed=self.seed)
        measured = [
            _Measured(block.layer, block.kind, block.equations, rank, decision.gap)
            for block, rank, decision in zip(update.blocks, null.ranks, null.decisions, strict=True)
        ]
        weakest: Rank = null.joint or min(null.decisions, key=lambda decision: decision.gap)
        return Identifiability(
            **self.point.about,
            method=method,
            equations=update.equations,
            joint_rank=null.ranks[0] if null.joint is None else null.joint.rank,
            gap=weakest.gap,
            cutoff=weakest.cutoff,
            condition=weakest.condition,
            rows=_rows(measured, own, update.unknowns),
            null_basis=null.basis if self.null_space else None,
            spectra=null.spectra,
            notes=null.notes,
        )

    def layers_alone(self) -> tuple[dict[str, _Own], list[str]]:
        """Every layer by itself, from the audit, and what to know of it."""
        from rgap.analysis.discard.audit import audit

        if any(not p.requires_grad for p in self.point.model.parameters()):
            return {}, ["No sequential nullity: the audit counts the gradients of all parameters."]
        self.shown.stage("sequential nullity")
        try:
            table = audit(
                self.point.model,
                tuple(self.point.inputs.shape[1:]),
                (len(self.point.inputs),),
                loss=self.point.loss,
                inputs=self.point.inputs,
                seed=self.seed,
                device=self.point.inputs.device,
                progress=self.shown.within,
                memory_budget=self.point.room,
                time_limit=self.shown.left / 2,  # the answer itself is what was asked for
            )
        except ValueError as reason:
            return {}, [f"No sequential nullity: {reason}."]
        own: dict[str, _Own] = {}
        for row in table.rows:
            before = own.get(row.layer, (0, 0))  # a layer used twice has a row for every use
            own[row.layer] = (before[0] + row.unknowns, before[1] + row.nullity)
        return own, []


@dataclass(frozen=True)
class _Measured:
    """A layer's part of the joint rank: of itself and all above it, and how clear that is."""

    layer: str
    kind: str
    equations: int
    rank: int
    gap: float
    exact: bool = True


def _rows(
    measured: Sequence[_Measured], own: Mapping[str, _Own], unknowns: int
) -> tuple[IdentifiabilityRow, ...]:
    rows = []
    above = [*(layer.rank for layer in measured[1:]), 0]
    for layer, known in zip(measured, above, strict=True):
        size, left = own.get(layer.layer, (None, None))
        rows.append(
            IdentifiabilityRow(
                layer.layer,
                layer.kind,
                layer.equations,
                size,
                left,
                layer.rank,
                unknowns - layer.rank,
                layer.rank - known,
                layer.gap,
                layer.exact,
            )
        )
    return tuple(rows)
