"""How much of its input each layer's gradient discards, as a function of the batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import index

import torch
from torch import Tensor, nn

from rgap.analysis.calls.recorder import uncounted
from rgap.analysis.discard.coupled import BOUNDED, COUPLED, coupling
from rgap.analysis.discard.layer_ranks import Spaces, counted_rows
from rgap.analysis.discard.probed_rows import AuditOptions, probed_rows
from rgap.analysis.discard.table import MEASURED, Audit, AuditRow
from rgap.analysis.probe import probe_pictures, probe_targets, probed
from rgap.machine import memory
from rgap.machine.allowance import OutOfTime, Timed
from rgap.network.chain import parse
from rgap.progress import Shown
from rgap.update.losses import Loss
from rgap.update.preflight import device_of

METHODS = ("exact", "sketch", "formula")
WEIGHTS = ("given", "random")


def audit(
    model: nn.Module,
    input_shape: Sequence[int],
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    *,
    loss: str | Loss = "cross_entropy",
    inputs: Tensor | None = None,
    method: str = "exact",
    weights: str = "given",
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Shown = False,
    memory_budget: float | None = None,
    time_limit: float | None = None,
) -> Audit:
    """Measure which part of its input every layer's gradient determines.

    Per layer and batch size: rank of the gradient constraints ``Σ k ⊗ u = G``, of the weight
    constraints ``W u = z − b``, and of both together, at the inputs and cotangents of a probe
    batch.  Works on any network, chain or not.  A unit whose cotangent is exactly 0 (a ReLU that
    is off, a place that lost a max-pool) has no known z and so no weight constraint.

    Args:
        model: left as it was.  Below a batch norm in train mode the samples are one system, whose
            rank is counted with the statistics of the batch differentiated.
        input_shape: of one sample, for example (3, 32, 32).
        batch_sizes: the batch sizes B to audit.
        loss: of the client.
        inputs: probe pictures ``[N, *input_shape]``, N ≥ max(batch_sizes); random if None.
        method: "exact": numerical ranks, the joint one by principal angles between row spaces.
            "sketch": gradient ranks from random compressions, weight ranks measured up to 20,000
            inputs and counted above, the joint rank as an upper bound; for layers of any size.
            "formula": counted from the sizes alone, for generic weights and cotangents, by
            `rgap.analysis.symbolic`; neither weights nor data are looked at.  Every row says its
            ``route`` and whether its rank is ``exact`` or a bound.
        weights: "given", or "random" to audit the architecture with weights drawn anew.
        seed: of the probe and of random weights.
        device: where to compute; default the CPU.
        progress: True for a line on a terminal, or a function; see :mod:`rgap.progress`.
        memory_budget: bytes to take on top of the model; by default half of what the machine has
            free.  A layer that needs more is refused by name before anything is allocated.
        time_limit: seconds, kept within a tenth; None for none.  The batch sizes that were finished
            are returned, and the first that was not is named.

    Returns:
        The :class:`Audit`.

    Raises:
        ValueError: a layer too large for exact ranks or for the budget, batch size below 1,
            unknown method or weights, too few probe pictures, a shape that does not fit, or
            dropout in train mode; no batch size finished within the time
            (:class:`rgap.machine.allowance.OutOfTime`).

    >>> import rgap
    >>> table = audit(rgap.models.lenet(seed=0), (3, 32, 32), batch_sizes=(1,))
    >>> table.largest_exact_batch
    1
    """
    shape = tuple(int(n) for n in input_shape)
    batches = _checked(batch_sizes, method, weights)
    chosen, place = Loss.of(loss), device_of(device)
    show = Timed(progress, time_limit, place)
    pictures = probe_pictures(inputs, shape, max(batches), seed, place)
    model = redrawn(model, seed) if weights == "random" else model
    if method == "formula":
        rows, notes = counted_rows(model, shape, batches, chosen.name)
    else:
        room = memory.budget_of(memory_budget, place)
        memory.require_copies(model, 2, room, "method='formula', which looks at no weight")
        parse(model, shape, mixing=True)  # refuses a shape that does not fit, and dropout
        options = AuditOptions(method, chosen, seed, room)
        with show:
            rows, notes = _measured(model, pictures, batches, options, show)
    return Audit(type(model).__name__, method, tuple(rows), (*_notes(rows), *notes))


def _measured(
    model: nn.Module, pictures: Tensor, batches: Sequence[int], options: AuditOptions, show: Timed
) -> tuple[list[AuditRow], tuple[str, ...]]:
    """Rows of every batch size that the time allows, and what was not measured or not counted."""
    rows: list[AuditRow] = []
    spaces: Spaces = {}
    late: tuple[str, ...] = ()
    for batch in batches:
        watched = replace(options, watch=partial(_told, show, batch), ahead=show.ahead)
        x = pictures[:batch]
        try:
            show.stage(f"probe of B = {batch}")
            targets = probe_targets(model, x, options.loss, None, options.seed)
            probes, recording = probed(model, x, targets, options.loss)
            mixed = coupling(model, recording, x, targets, options.loss)
            watched = replace(watched, coupling=mixed)
            with show.every_operation():
                rows += probed_rows(probes, recording, batch, spaces, watched)
        except OutOfTime as reason:
            if not rows:
                raise
            late = (f"B = {batch} and what follows was not measured ({reason}).",)
            break
    others = uncounted(model, recording)
    uncovered = (f"Not counted: {', '.join(others)}.",) if others else ()
    return rows, mixed.notes(recording) + uncovered + late


def _told(
    show: Timed, batch: int, what: str, number: int | None = None, total: int | None = None
) -> None:
    show.stage(f"{what} at B = {batch}", number, total, series=str(batch))


def redrawn(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with every parameter drawn anew, as PyTorch would initialise it.

    Parameters that no module of PyTorch knows how to draw come from a normal distribution of the
    size that they had.

    Args:
        model: left as it was.
        seed: of the weights.

    >>> net = nn.Linear(3, 2)
    >>> bool((redrawn(net, 0).weight == net.weight).any())
    False
    """
    twin = copy.deepcopy(model)
    drawn: set[int] = set()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in twin.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                drawn |= {id(p) for p in module.parameters(recurse=False)}
        for parameter in twin.parameters():
            if id(parameter) not in drawn:
                size = float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.normal_(0.0, size or 1.0)
    return twin


def _checked(batch_sizes: Sequence[int], method: str, weights: str) -> tuple[int, ...]:
    """The batch sizes; refuses them, a method and weights that are none."""
    try:
        batches = tuple(index(b) for b in batch_sizes)
    except TypeError:
        batches = ()
    if not batches or min(batches) < 1:
        raise ValueError(
            f"expected batch sizes, whole numbers >= 1, got {batch_sizes!r}; write "
            "batch_sizes=(1, 2, 4, 8)"
        )
    if method not in METHODS:
        raise ValueError(
            f"expected method in {list(METHODS)}, got {method!r}; write method='exact'"
        )
    if weights not in WEIGHTS:
        raise ValueError(
            f"expected weights in {list(WEIGHTS)}, got {weights!r}; write weights='random', or "
            "load the weights into the model"
        )
    return batches


def _notes(rows: Sequence[AuditRow]) -> tuple[str, ...]:
    notes = []
    for measured, why in (
        (True, "a weight is used again on an input that other layers read"),
        (False, "method='exact' measures it"),
    ):
        open_ = [r for r in rows if not r.exact and r.route not in (BOUNDED, COUPLED)]
        bounds = [r.layer for r in open_ if (r.route == MEASURED) == measured]
        names = list(dict.fromkeys(bounds))
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            shown = ", ".join(map(repr, names[:4])) + more
            notes.append(f"Of {shown} the joint rank is an upper bound: {why}.")
    taken = list(dict.fromkeys(r.layer for r in rows if r.route == BOUNDED))
    if taken:
        notes.append(
            f"Of {', '.join(map(repr, taken))} the joint rank is an upper bound: the statistics of "
            "the batch were taken as known."
        )
    notes += [
        f"'{row.step}' leads into '{row.layer}' and discards: its input of "
        f"{row.unknowns // row.batch_size} values a sample is what is unknown there."
        for row in _once(rows, lambda row: row.step)
    ]
    notes += [
        f"'{row.layer}' is a step without weights: of {row.unknowns // row.batch_size} values a "
        f"sample it passes {row.joint_rank // row.batch_size} on."
        for row in _once(rows, lambda row: row.kind == "step" and row.route != BOUNDED)
    ]
    notes += [
        f"'{row.layer}' is called more than once, and its calls are counted like samples."
        for row in _once(rows, lambda row: row.beside == row.layer)
    ]
    shared = {
        frozenset((row.layer, *row.beside.split(", "))): row
        for row in reversed(_once(rows, lambda row: row.beside not in ("", row.layer)))
    }
    notes += [
        f"'{row.layer}' is counted together with '{row.beside}': they read one input."
        for row in reversed(shared.values())
    ]
    dead = sorted({row.layer for row in rows if row.gradient_rank == 0 and row.kind != "step"})
    if dead:
        silent = ", ".join(map(repr, dead))
        notes.append(f"No gradient at all reaches {silent}: their cotangents are zero.")
    return tuple(notes)


def _once(rows: Sequence[AuditRow], chosen: Callable[[AuditRow], object]) -> list[AuditRow]:
    """The first row of every layer that has what is asked for."""
    return list({row.layer: row for row in reversed(rows) if chosen(row)}.values())[::-1]
