"""What all equations of an update say together, where a recovery ended before they were used."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rgap.analysis.causes.cause import Cause, CauseKind
from rgap.machine.allowance import OutOfTime, Until, factorisation
from rgap.machine.memory import OutOfMemory
from rgap.progress import Shown
from rgap.recovery import Recovery, Status
from rgap.update.update import Update

if TYPE_CHECKING:
    from rgap.analysis.joint_rank.table import Identifiability

__all__ = ["SECONDS", "advised", "joint_count"]

SECONDS = 20.0  # that a joint count may take where nothing else is asked for
SHARE = 0.5  # of these that the singular values may take: the entries of J take as long
DECIDED = frozenset(
    {
        CauseKind.MISSING,
        CauseKind.NO_INVERSE,
        CauseKind.UNCOUNTED,
        CauseKind.NOT_SEPARATED,
        CauseKind.HEAD_LIMIT,
    }
)
"""Causes of which another route than layer by layer may still recover the batch."""

_UNCOUNTED = (
    "rgap.analysis.identifiability tells whether the whole update determines the batch",
    "equations of the layers below, which this count leaves out",
)
"""What is advised where nobody counted; a joint count takes their place."""


def joint_count(
    recovery: Recovery,
    model: nn.Module,
    update: Update,
    batch: tuple[Tensor | None, Tensor | None],
    *,
    memory_budget: float | None = None,
    time_limit: float | None = SECONDS,
    progress: Shown = False,
) -> Identifiability | str:
    """The rank of ``J = ∂g/∂x`` at the batch, or at a random one where it is not known.

    Args:
        recovery: with the inputs and labels that are known.
        model: of the client.
        update: with the shape of a sample, the size of the batch and the precision.
        batch: inputs and labels that an auditor has, or None for each.
        memory_budget: bytes, as for :func:`rgap.analysis.identifiability`.
        time_limit: seconds; a count that takes longer is not made.
        progress: as everywhere.

    Returns:
        What was found, or why nothing was counted, in words.
    """
    from rgap.analysis.joint_rank.identifiability import SMALL, identifiability

    if update.local_steps != 1:
        return "the update comes from several local steps"
    if not update.loss.known:
        return "its loss is not declared"
    inputs, labels = batch
    inputs = recovery.inputs if inputs is None else inputs
    labels = recovery.labels if labels is None else labels
    size = update.batch_size if inputs is None else len(inputs)
    if update.input_shape is None or size is None:
        return "the size of the batch is not stated"
    if labels is not None and len(labels) != size:
        labels = None
    point = tuple(update.input_shape) if inputs is None else inputs.to(torch.float64)
    began, unknowns = time.perf_counter(), size * prod(update.input_shape)

    def counted(method: str) -> Identifiability:
        return identifiability(
            model,
            point,
            size if inputs is None else None,
            loss=update.loss,
            labels=labels,
            method=method,
            dtype=update.dtype,
            sequential=False,
            null_space=False,
            memory_budget=memory_budget,
            time_limit=time_limit,
            progress=progress,
        )

    try:
        if unknowns <= SMALL:
            return counted("auto")
        try:
            return counted("structured")
        except (OutOfMemory, OutOfTime):
            raise
        except ValueError:  # no such structure: J is sketched, if there is time for its rank
            if time_limit is not None:
                Until(began, time_limit, SHARE)(factorisation(unknowns, unknowns))
            return counted("sketch")
    except ValueError as reason:  # too large, too slow, or no function of each sample alone
        return str(reason)


def advised(
    causes: Iterable[Cause], recovery: Recovery, joint: Identifiability | str
) -> tuple[Cause, ...]:
    """The causes with advice that follows the joint count, where it decides."""
    advice = _advice(recovery, joint)
    return tuple(
        replace(one, changes=(advice, *(c for c in one.changes if c not in _UNCOUNTED)))
        if one.kind in DECIDED
        else one
        for one in causes
    )


def _advice(recovery: Recovery, joint: Identifiability | str) -> str:
    if isinstance(joint, str):
        return (
            "rgap.analysis.identifiability, which tells whether the whole update determines the "
            f"batch (not counted here: {joint})"
        )
    count = f"{joint.joint_rank:,} of {joint.unknowns:,} directions"
    clear = "" if joint.clear else ", though the rank is not clear at this precision"
    if joint.identifiable:
        move = "complete=True, which needs no prior"
        if recovery.status is Status.COMPLETED:
            move = "a completion with more time, whose answer needs no prior"
        return (
            f"{move}: all equations together determine {count}, so that no other batch near this "
            f"one sends the same update{clear}"
        )
    return (
        f"a prior for what no method finds without one: all equations together determine {count} "
        f"and leave {joint.joint_nullity:,} open{clear}"
    )
