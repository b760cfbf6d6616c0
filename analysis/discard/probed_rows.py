"""The rows of one probe batch: layers, layers counted together, and steps that discard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

from rgap.analysis.calls.steps import Narrow, head_use, narrow_steps
from rgap.analysis.calls.uses import Recording
from rgap.analysis.closed_forms.own_gradient import alone
from rgap.analysis.discard.coupled import COUPLED, Coupling
from rgap.analysis.discard.layer_ranks import (
    Spaces,
    branch_rows,
    coupled_row,
    measured_row,
    sketched_row,
    summed,
    with_joint,
    with_shown,
    work,
)
from rgap.analysis.discard.table import AuditRow
from rgap.analysis.generic_rank.together import as_samples, together
from rgap.analysis.probe import Probe
from rgap.machine.allowance import Ahead, freely
from rgap.progress import Watch, silent
from rgap.update.losses import Loss
from rgap.update.targets import CROSS_ENTROPY

__all__ = ["AuditOptions", "probed_rows", "step_row"]


@dataclass(frozen=True)
class AuditOptions:
    """How the rows of a network are measured.

    Attributes:
        method: "exact" or "sketch".
        loss: of the client: the logits of a softmax are not known from above.
        seed: of the targets that are drawn.
        room: bytes that the matrices of a layer may take.
        coupling: what batch norms that take the statistics of the batch mix.
        watch: told of every layer.
        ahead: asked before every layer whether there is time.
    """

    method: str
    loss: Loss
    seed: int = 0
    room: float = inf
    coupling: Coupling = field(default_factory=Coupling)
    watch: Watch = silent
    ahead: Ahead = freely


def probed_rows(
    probes: Sequence[Probe],
    recording: Recording,
    batch: int,
    spaces: Spaces,
    options: AuditOptions,
) -> list[AuditRow]:
    """One row per use of a weight and per step that discards by itself, in forward order.

    Args:
        probes: the layers, of ``recording``.
        recording: of the forward.
        batch: B.
        spaces: row spaces of the weights that are known; added to.
        options: how they are measured.
    """
    narrow = narrow_steps(recording)
    head = head_use(recording) if options.loss.name == CROSS_ENTROPY else None
    into = {one.use: one for one in narrow if one.use is not None}
    method, room, coupling = options.method, options.room, options.coupling
    make = measured_row if method == "exact" else sketched_row
    placed: list[tuple[int, AuditRow]] = []
    mixed: dict[int, list[tuple[int, AuditRow]]] = {}
    groups = together(probes)
    for number, group in enumerate(groups, 1):
        own = [probes[i] for i in group.members]
        options.watch(own[0].affine.name, number, len(groups))
        options.ahead(sum(work(p.affine, p.active, method) for p in own))
        steps = [into[p.use] for p in own if p.use in into]
        before = max((_ahead(recording, s) for s in steps), default=0)
        if group.kind == "branches":
            rows = branch_rows(own, batch, before, spaces, method, room)
        elif group.kind == "shared":
            rows = [make(as_samples(own), batch, before, spaces, room)] * len(own)
        else:
            ranks = None
            if method == "exact" and own[0].use in coupling.direct:
                ranks = coupling.ranks(own[0].use, recording.uses[own[0].use], room)
            if ranks is None:
                rows = [make(own[0], batch, before, spaces, room)]
            else:
                rows = [coupled_row(own[0], batch, before, ranks)]
            if recording.uses[own[0].use] is head:
                rows = [with_joint(rows[0], rows[0].gradient_rank, True)]
        for probe, row in zip(own, rows, strict=True):
            names = dict.fromkeys(p.affine.name for p in _others(probes, own, probe, group.kind))
            step = into[probe.use].step if probe.use in into else ""
            row = with_shown(row, recording.uses[probe.use].shown)
            use = recording.uses[probe.use]
            by_gradient, by_shifts = alone(use, use is head)
            row = replace(row, layer=probe.affine.name, kind=probe.affine.kind, step=step,
                          beside=", ".join(names), by_gradient=by_gradient,
                          by_shifts=by_shifts)  # fmt: skip
            if probe.use in coupling.mixed:
                own_rank = row.route == COUPLED
                row = coupling.counted(row) if own_rank else coupling.bounded(row, probe.use, use)
            place = recording.uses[probe.use].node
            if group.kind == "mixed":
                mixed.setdefault(probe.read, []).append((place, replace(row, exact=False)))
            else:
                placed.append((place, row))
    for parts in mixed.values():
        rows = summed([row for _, row in parts], max(row.unknowns for _, row in parts))
        placed += [(place, replace(row, exact=False))
                  for (place, _), row in zip(parts, rows, strict=True)]  # fmt: skip
    placed += [(one.node, step_row(one, batch)) for one in narrow if one.use is None]
    placed += [(0, row) for row in coupling.rows(batch, recording)]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def _others(probes: Sequence[Probe], own: Sequence[Probe], probe: Probe, kind: str) -> list[Probe]:
    """The other layers whose equations are about the unknowns of ``probe``: they read its input."""
    if kind == "mixed":
        own = [p for p in probes if p.read == probe.read]
    return [p for p in own if p is not probe]


def step_row(one: Narrow, batch: int) -> AuditRow:
    """A step without weights that leads into no single layer: what comes through is known."""
    unknowns, known = batch * one.before, batch * one.after
    lost, exact = unknowns - known, one.independent
    counts = (unknowns, 0, known, known, lost, lost / unknowns)
    return AuditRow(one.step, "step", batch, *counts, None, "counted", exact)


def _ahead(recording: Recording, one: Narrow) -> int:
    """Entries of one sample that the layer would have to read if the step were not there."""
    assert one.use is not None
    use = recording.uses[one.use]
    return recording.nodes[use.read[0]].entries + one.lost
