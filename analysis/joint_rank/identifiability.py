"""The local truth of what a gradient determines: the rank of ∂(update)/∂(data) at a batch.

The recursion's nullity is an upper bound: a layer below can fix what a layer above left open.  The
rank of the whole Jacobian J cannot be improved by any method that looks at a neighbourhood of the
batch: directions in its null space change nothing in the update, to first order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rgap import memory
from rgap.allowance import Timed
from rgap.analysis.joint_rank.blocks import FORMED, eliminate_blocks
from rgap.analysis.joint_rank.cumulative import cumulative_ranks
from rgap.analysis.joint_rank.elimination import NotStructuredError, chain_nullspace
from rgap.analysis.joint_rank.nullspace import orthonormal
from rgap.analysis.joint_rank.sampled import chain_ranks
from rgap.analysis.joint_rank.stage import TooLargeError
from rgap.analysis.joint_rank.table import Identifiability, IdentifiabilityRow
from rgap.analysis.probe import probe_batch, probe_targets, require_evaluation
from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.update_map import UpdateMap
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

    The methods:

    * ``"structured"``: chains whose activations have no dead parts.  Eliminates layer by layer
      without forming J; see `rgap.analysis.joint_rank.elimination`.
    * ``"dense"``: any module.  Singular values of J, every layer scaled to norm one.
    * ``"sketch"``: any module.  Layers with more equations than unknowns are compressed by random
      signs, which keeps ranks with probability close to one and never raises them.
    * ``"auto"``: dense up to 1024 unknowns, then structured where it applies, else sketch.

    Args:
        model: in eval mode; left as it was.  Frozen parameters give no equation; one that is used
            twice gives the equations of the sum.
        inputs: the batch ``[B, *input_shape]``, or the shape of one sample for a random batch.
        batch_size: B, with a shape; 1 if left out.
        loss: of the client.
        labels: targets as the loss wants them; drawn, and different as far as possible, if None.
        method: as above.
        rcond: relative cutoff of singular values; None: rounding, ``dtype`` and ``noise`` decide.
        noise: relative error of the update's entries: what it hides counts as undetermined.
        dtype: precision in which the update is known; the arithmetic is always float64.
        sequential: also run `rgap.analysis.audit`, for the nullity of each layer by itself.
        null_space: also find the null directions; False for the ranks alone, which costs a
            fraction where many directions are open.
        memory_budget: bytes to take on top of the model; by default half of what the machine has
            free.  Where it does not hold the whole Jacobian, ``"auto"`` sketches it; what needs
            more is refused before anything is allocated.
        time_limit: seconds, kept within a tenth; None for none.
        seed: of the random batch, the labels and the sketch.
        progress: True for a line on a terminal, or a function that is told; see
            :mod:`rgap.progress`.
        device: where to compute; default the CPU.

    Returns:
        The :class:`Identifiability`.

    Raises:
        ValueError: no trained parameters, train mode, a shape or labels that do not fit, more
            unknowns than the budget allows (:class:`rgap.memory.OutOfMemory`),
            ``method="structured"`` for a model without structure; no answer within the time
            (:class:`rgap.allowance.OutOfTime`).
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
    chosen = Loss.of(loss)
    pictures = probe_batch(inputs, batch_size, seed, device)
    require_evaluation(model)
    room = memory.budget_of(memory_budget, pictures.device)
    memory.require_copies(model, COPIES, room)
    targets = probe_targets(model, pictures, chosen, labels, seed)
    update = UpdateMap(model, pictures, targets, chosen, room)
    with shown:
        shown.stage("sequential nullity")
        own, notes = dict[str, tuple[int, int]](), list[str]()
        if sequential:
            own, notes = _sequential(model, update, chosen, seed, shown, room)
        route = method
        found: Identifiability | None = None
        if method == "structured" or (method == "auto" and update.unknowns > SMALL):
            shown.stage("null space, layer by layer")
            try:
                found = _structured(
                    model, update, targets, chosen, own, rcond, noise, dtype, room,
                    null_space, shown,
                )  # fmt: skip
            except (NotStructuredError, TooLargeError) as reason:
                if method == "structured":
                    raise ValueError(
                        f"expected a model that method='structured' can go back through, got "
                        f"{type(model).__name__}: {reason}; write method='sketch'"
                    ) from reason
                notes.append(f"Not structured ({reason}), so the Jacobian was sketched.")
        if found is None:
            if method in ("auto", "structured"):
                small = update.unknowns <= SMALL
                dense = 8.0 * update.equations * update.unknowns
                route = "dense" if small and FORMED * dense + update.held <= room else "sketch"
            shown.stage(f"Jacobian, {route}")
            found = _general(
                model, update, own, route, rcond, noise, dtype, room, seed, null_space,
                shown,
            )  # fmt: skip
    return replace(
        found,
        loss=chosen.name,
        notes=(*notes, *found.notes),
        seconds=time.perf_counter() - start,
    )


def _structured(
    model: nn.Module,
    update: UpdateMap,
    targets: Tensor,
    loss: Loss,
    own: dict[str, tuple[int, int]],
    rcond: float | None,
    noise: float,
    dtype: torch.dtype,
    room: float,
    null_space: bool,
    shown: Timed,
) -> Identifiability:
    shape = tuple(update.inputs.shape[1:])
    chain = parse(model, shape).to(update.inputs.device)
    if chain.barrier is not None:
        raise NotStructuredError(
            f"'{chain.barrier.node}' ({chain.barrier.kind}) is no link of a chain"
        )
    covered = {
        name
        for stage in chain.stages
        for name in (stage.affine.weight_name, stage.affine.bias_name)
        if name is not None
    }
    trained = {name for block in update.blocks for name in block.names}
    if not trained <= covered:
        raise NotStructuredError(f"{sorted(trained - covered)} belong to no linear layer")
    outputs = chain.forward(update.inputs)
    batch = BatchLoss(loss, loss.dense(targets, outputs), outputs.new_ones(len(outputs)))
    linear = Linearisation(chain, update.inputs, batch)
    ranks = chain_nullspace if null_space else chain_ranks
    null = ranks(
        linear, trained, rcond=rcond, noise=noise, dtype=dtype, memory=room,
        watch=shown.stage, ahead=shown.ahead,
    )  # fmt: skip
    cumulative = cumulative_ranks(linear, null)
    equations = {block.layer: block.equations for block in update.blocks}
    rows = []
    for at, (stage, node) in enumerate(zip(null.stages, linear.nodes, strict=True)):
        rank, exact = cumulative[at]
        above = cumulative[at + 1][0] if at + 1 < len(cumulative) else 0
        size, left = own.get(stage.layer, (None, None))
        rows.append(
            IdentifiabilityRow(
                stage.layer,
                node.stage.affine.kind,
                equations.get(stage.layer, 0),
                size,
                left,
                rank,
                update.unknowns - rank,
                rank - above,
                stage.rank.gap,
                exact,
            )
        )
    weakest = min((stage.rank for stage in null.stages), key=lambda rank: rank.gap)
    return Identifiability(
        model=type(model).__name__,
        input_shape=shape,
        batch_size=len(update.inputs),
        method="structured",
        unknowns=update.unknowns,
        equations=update.equations,
        joint_rank=update.unknowns - null.stages[0].nullity,
        gap=weakest.gap,
        cutoff=weakest.cutoff,
        condition=max(stage.rank.condition for stage in null.stages),
        rows=tuple(rows),
        null_basis=None if null.directions is None else orthonormal(null.directions),
        spectra=tuple((s.layer, s.values) for s in null.stages if len(s.values)),
    )


def _general(
    model: nn.Module,
    update: UpdateMap,
    own: dict[str, tuple[int, int]],
    method: str,
    rcond: float | None,
    noise: float,
    dtype: torch.dtype,
    room: float,
    seed: int,
    null_space: bool,
    shown: Timed,
) -> Identifiability:
    found = eliminate_blocks(
        update,
        sketch=method == "sketch",
        rcond=rcond,
        noise=noise,
        dtype=dtype,
        room=room,
        watch=shown.stage,
        ahead=shown.ahead,
        seed=seed,
    )
    rows = []
    rank = found.joint.rank if found.joint is not None else found.ranks[0]
    for at, block in enumerate(update.blocks):
        above = found.ranks[at + 1] if at + 1 < len(found.ranks) else 0
        size, left = own.get(block.layer, (None, None))
        rows.append(
            IdentifiabilityRow(
                block.layer,
                block.kind,
                block.equations,
                size,
                left,
                found.ranks[at],
                update.unknowns - found.ranks[at],
                found.ranks[at] - above,
                found.decisions[at].gap,
                True,
            )
        )
    weakest: Rank = found.joint or min(found.decisions, key=lambda decision: decision.gap)
    return Identifiability(
        model=type(model).__name__,
        input_shape=tuple(update.inputs.shape[1:]),
        batch_size=len(update.inputs),
        method=method,
        unknowns=update.unknowns,
        equations=update.equations,
        joint_rank=rank,
        gap=weakest.gap,
        cutoff=weakest.cutoff,
        condition=weakest.condition,
        rows=tuple(rows),
        null_basis=found.basis if null_space else None,
        spectra=found.spectra,
        notes=found.notes,
    )


def _sequential(
    model: nn.Module, update: UpdateMap, loss: Loss, seed: int, shown: Timed, room: float
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """(unknowns, nullity) of every layer by itself, from the audit, and what to know of it."""
    from rgap.analysis.discard.audit import audit

    if any(not p.requires_grad for p in model.parameters()):
        return {}, ["No sequential nullity: the audit counts the gradients of all parameters."]
    try:
        table = audit(
            model,
            tuple(update.inputs.shape[1:]),
            (len(update.inputs),),
            loss=loss,
            inputs=update.inputs,
            seed=seed,
            device=update.inputs.device,
            progress=shown.within,
            memory_budget=room,
            time_limit=shown.left / 2,  # the answer itself is what was asked for
        )
    except ValueError as reason:
        return {}, [f"No sequential nullity: {reason}."]
    own: dict[str, tuple[int, int]] = {}
    for row in table.rows:
        before = own.get(row.layer, (0, 0))  # a layer used twice has a row for every use
        own[row.layer] = (before[0] + row.unknowns, before[1] + row.nullity)
    return own, []
