"""One row of the audit, by each of its routes: measured, sketched, or counted from the sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, prod

from torch import Tensor, nn

from rgap.analysis.discard.coupled import COUPLED
from rgap.analysis.discard.table import AuditRow
from rgap.analysis.generic_rank.sketched import sketched_rank
from rgap.analysis.generic_rank.together import branch_rank
from rgap.analysis.probe import Probe
from rgap.analysis.symbolic import closed_form, symbolic
from rgap.constraints import gradient_constraint
from rgap.constraints.ranks import (
    gradient_blocks,
    joint_rank_work,
    shared_equations,
    stage_joint_rank,
    weight_row_spaces,
)
from rgap.machine import memory
from rgap.machine.allowance import PLAIN, factorisation
from rgap.network.affine import Affine
from rgap.network.batch_statistics import mixing
from rgap.solvers.rank import Rank
from rgap.solvers.subspace import RowSpace

LARGEST = 20_000  # inputs of a layer; a basis of its weight constraints then takes 3 GB
PROOF = 1e9  # effort of one step of a proof: a large network is counted in seconds

Spaces = dict[tuple[str, bytes], RowSpace]  # by layer and the units that are on


def measured_row(
    probe: Probe, batch: int, before: int, spaces: Spaces, room: float = inf
) -> AuditRow:
    """Numerical ranks; the joint one from the principal angles between the two row spaces.

    Args:
        probe: the layer with its inputs and cotangents.
        batch: B.
        before: entries of one sample ahead of a pool that leads into the layer, 0 without one.
        spaces: row spaces of the weights that are known; added to.
        room: bytes that its matrices may take.

    Raises:
        ValueError: a layer with more than 20,000 inputs, or without room for its matrices.
    """
    affine = probe.affine
    _refuse_large(affine, probe.active, room)
    kronecker = gradient_constraint(affine, probe.sent)
    gradient = kronecker.rank()
    weight = _weight_spaces(affine, probe.active, spaces)
    shared = probe.cotangents if probe.trained else None
    joint = stage_joint_rank(affine, kronecker, weight, cotangent=shared).rank
    of_weight = sum(space.rank.rank for space in weight)
    return _row(probe, batch, before, gradient, of_weight, joint, "measured", True)


def branch_rows(
    probes: Sequence[Probe],
    batch: int,
    before: int,
    spaces: Spaces,
    method: str,
    room: float = inf,
) -> list[AuditRow]:
    """Layers that read one input: each with its own two ranks, and all with the joint rank of all.

    Args:
        probes: the layers.
        batch: B.
        before: entries of one sample ahead of a step that leads into them, 0 without one.
        spaces: row spaces of the weights that are known; added to.
        method: "exact", or "sketch": the sum of what each determines, as a bound.
        room: bytes that their matrices may take.

    Raises:
        ValueError: a layer with more than 20,000 inputs, for "exact".
    """
    make = measured_row if method == "exact" else sketched_row
    rows = [make(probe, batch, before, spaces, room) for probe in probes]
    total = len(probes[0].inputs) * prod(probes[0].affine.in_shape)
    if method != "exact" or any(row.joint_rank == total for row in rows):
        return summed(rows, total)
    joint = branch_rank(probes).rank
    return [with_joint(row, joint, True) for row in rows]


def coupled_row(probe: Probe, batch: int, before: int, ranks: tuple[Rank, Rank, Rank]) -> AuditRow:
    """The row of a layer whose samples are one system; arguments as for :func:`measured_row`.

    Args:
        probe: the layer.
        batch: B.
        before: entries of one sample ahead of a pool that leads into the layer, 0 without one.
        ranks: of its gradient, of its outputs and of both (:class:`Coupling`).
    """
    gradient, outputs, both = ranks
    return _row(probe, batch, before, gradient, outputs.rank, both.rank, COUPLED, both.clear)


def summed(rows: Sequence[AuditRow], most: int) -> list[AuditRow]:
    """Rows with the sum of their joint ranks: a bound on what they determine together.

    Args:
        rows: of layers that read one input.
        most: entries of that input.
    """
    joint = min(most, sum(row.joint_rank for row in rows))
    exact = any(row.exact and row.joint_rank == joint for row in rows)
    return [with_joint(row, joint, exact) for row in rows]


def with_joint(row: AuditRow, joint: int, exact: bool) -> AuditRow:
    """The row with another joint rank, and what follows from it."""
    nullity = row.unknowns - joint
    return replace(
        row, joint_rank=joint, nullity=nullity, discard=nullity / row.unknowns, exact=exact
    )


def with_shown(row: AuditRow, shown: int) -> AuditRow:
    """The row of a layer whose input shows fewer values several times: bounds of what they are.

    With z = A P v, P the border, no rank is above that of A, and none above the entries of v.

    Args:
        row: that counts every entry as an unknown of its own.
        shown: entries of v in one sample; 0: the row stays as it is.
    """
    if not shown:
        return row
    most = min(row.unknowns, row.batch_size * shown)
    cut = replace(
        row, unknowns=most, gradient_rank=min(row.gradient_rank, most),
        weight_rank=min(row.weight_rank, most),
    )  # fmt: skip
    return with_joint(cut, min(row.joint_rank, most), False)


def _refuse_large(affine: Affine, active: Tensor, room: float) -> None:
    size = prod(affine.in_shape)
    if size > LARGEST:
        raise ValueError(
            f"expected layers of at most {LARGEST} inputs for method='exact', got "
            f"'{affine.name}' with {size}: its weight constraints alone would be a matrix of "
            f"{8e-9 * size**2:.0f} GB; write method='sketch' or method='formula', or audit a "
            "smaller input_shape, whose layers have the same structure"
        )
    memory.require(
        f"the measured ranks of '{affine.name}' at B = {len(active)}",
        sum(needs(affine, active)),
        room,
        "method='sketch' or method='formula', or smaller batch_sizes",
    )


def sketched_row(
    probe: Probe, batch: int, before: int, spaces: Spaces, room: float = inf
) -> AuditRow:
    """Gradient rank from a random compression of K; the overlap of the two blocks counted.

    The weight rank is measured up to 20,000 inputs and counted above.  The joint rank is an upper
    bound, unless one block alone, or none of the other, already decides it.  Arguments as for
    :func:`measured_row`.
    """
    affine = probe.affine
    gradient_bytes, weight_bytes, _ = needs(affine, probe.active)
    measured = prod(affine.in_shape) <= LARGEST
    memory.require(
        f"the sketch of '{affine.name}' at B = {batch}",
        gradient_bytes + (weight_bytes if measured else 0.0),
        room,
        "method='formula', which forms no matrix",
    )
    unknowns = len(probe.inputs) * prod(affine.in_shape)
    gradient = sketched_rank(gradient_constraint(affine, probe.sent))
    if prod(affine.in_shape) > LARGEST:
        counted = closed_form(affine, len(probe.inputs), probe.active)
        of_weight = counted.weight_rank
        bound = min(counted.joint_rank, unknowns, gradient.rank + of_weight)
        exact = bound == gradient.rank
        route = "gradient sketched, weights counted"
    else:
        of_weight = sum(s.rank.rank for s in _weight_spaces(affine, probe.active, spaces))
        shared = shared_equations(affine, probe.sent, probe.active)
        bound = min(unknowns, gradient.rank + of_weight - shared)
        exact = bound in (gradient.rank, of_weight)
        route = "gradient sketched, overlap counted"
    return _row(probe, batch, before, gradient, of_weight, bound, route, exact)


def needs(affine: Affine, active: Tensor) -> tuple[float, float, float]:
    """Bytes of the matrices of a layer: K, bases of its weights, and the angles between the two.

    Args:
        affine: the layer.
        active: True where z is known, [B, *out_shape].
    """
    batch, size = len(active), prod(affine.in_shape)
    groups, rows, positions = gradient_blocks(affine, batch)
    of_gradient = affine.in_shape[0] * min(rows, positions)
    of_weight = min(prod(affine.out_shape), size)
    different = len({mask.numpy().tobytes() for mask in active.flatten(1).cpu()})
    smaller = min(of_gradient, batch * of_weight)
    return (
        8.0 * 3 * groups * rows * positions,
        8.0 * ((2 + different) * of_weight * size + size**2),
        8.0 * (of_gradient * batch * of_weight + 3 * smaller**2),
    )


def work(affine: Affine, active: Tensor, method: str) -> float:
    """Work of a layer's ranks, as :func:`rgap.machine.allowance.factorisation` counts it.

    Args:
        affine: the layer.
        active: True where z is known, [B, *out_shape].
        method: "exact" or "sketch".
    """
    size = prod(affine.in_shape)
    groups, rows, positions = gradient_blocks(affine, len(active))
    total = groups * factorisation(rows, positions)
    if method == "exact":
        return total + joint_rank_work(affine, len(active))
    of_weight = min(prod(affine.out_shape), size)
    return total + (factorisation(of_weight, size, PLAIN) if size <= LARGEST else 0.0)


def counted_rows(
    model: nn.Module, shape: tuple[int, ...], batches: Sequence[int], loss: str
) -> tuple[list[AuditRow], tuple[str, ...]]:
    """Rows from the sizes alone, for generic weights and cotangents, and what they leave out.

    The network is counted once, as expressions in B; what takes long to prove is called a bound.

    Args:
        model: left as it was; its weights are not looked at.
        shape: of one sample.
        batches: the batch sizes.
        loss: name of the client's loss.
    """
    for path, module in mixing(model):
        raise ValueError(
            f"expected a model in eval mode for method='formula', got '{path}' "
            f"({type(module).__name__}), which takes the statistics of the batch; write "
            "method='exact' or method='sketch', or model.eval()"
        )
    network = symbolic(model, shape, loss=loss, effort=PROOF)
    rows = []
    for batch in batches:
        for layer in network.layers:
            if not layer.kind.startswith(("conv", "linear", "head", "step")):
                continue
            sizes = layer.at({"B": batch})
            # A step that leads into the layer discards too: its input is the unknown.
            unknowns, joint = max(sizes["unknowns"], batch * layer.ahead), sizes["joint_rank"]
            rows.append(
                with_shown(
                    AuditRow(
                        layer.name,
                        "linear" if layer.kind == "head" else layer.kind,
                        batch,
                        unknowns,
                        sizes["gradient_rank"],
                        sizes["weight_rank"],
                        joint,
                        unknowns - joint,
                        (unknowns - joint) / unknowns,
                        None,
                        "counted",
                        bool(layer.exact),
                        layer.step,
                        layer.beside,
                        layer.by_gradient,
                        layer.by_shifts,
                    ),
                    layer.shown,
                )
            )
    return rows, network.notes


def _row(
    probe: Probe,
    batch: int,
    before: int,
    gradient: Rank,
    weight: int,
    joint: int,
    route: str,
    exact: bool,
) -> AuditRow:
    affine = probe.affine
    # More samples than the batch has, for a layer applied along a sequence; and a pool that leads
    # into the layer discards too: its input is the unknown, of higher dimension.
    unknowns = max(len(probe.inputs) * prod(affine.in_shape), batch * before)
    nullity = unknowns - joint
    return AuditRow(
        affine.name,
        affine.kind,
        batch,
        unknowns,
        gradient.rank,
        weight,
        joint,
        nullity,
        nullity / unknowns,
        gradient.condition,
        route,
        exact,
    )


def _weight_spaces(affine: Affine, active: Tensor, spaces: Spaces) -> Sequence[RowSpace]:
    """Row spaces per sample; that of the first one's units is kept from audit to audit.

    All samples have the same units on where no unit can be off: those whose outputs are unread.
    """
    keys = [(affine.name, mask.numpy().tobytes()) for mask in active.flatten(1).cpu()]
    missing = [b for b, key in enumerate(keys) if key not in spaces]
    measured = weight_row_spaces(affine, active[missing]) if missing else []
    fresh = {keys[b]: space for b, space in zip(missing, measured, strict=True)}
    if keys[0] in fresh:
        spaces[keys[0]] = fresh[keys[0]]
    return [fresh[key] if key in fresh else spaces[key] for key in keys]
