"""How much of its input each layer's gradient discards, as a function of the batch size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod
from operator import index

import torch
from torch import Tensor, nn

from rgap.affine import Affine
from rgap.analysis.overlap import shared_equations
from rgap.analysis.probe import Probe, probe_layers
from rgap.analysis.table import Audit, AuditRow
from rgap.losses import Loss
from rgap.network import parse
from rgap.solvers.subspace import RowSpace
from rgap.systems import gradient_constraint
from rgap.systems.ranks import stage_joint_rank, weight_row_spaces
from rgap.validation import require_finite

log = logging.getLogger(__name__)
METHODS = ("exact", "formula")
LARGEST = 20_000  # inputs of a layer; a basis of its weight constraints then takes 3 GB


def audit(
    model: nn.Module,
    input_shape: Sequence[int],
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    *,
    loss: str | Loss = "cross_entropy",
    inputs: Tensor | None = None,
    method: str = "exact",
    seed: int = 0,
) -> Audit:
    """Measure which part of its input every layer's gradient determines.

    Per layer and batch size: rank of the gradient constraints ``Σ k ⊗ u = G``, of the weight
    constraints ``W u = z − b``, and of both together, at the inputs and cotangents of a probe
    batch.  Works on any network, chain or not.  A unit whose cotangent is exactly 0 (a ReLU that
    is off, a place that lost a max-pool) has no known z and so no weight constraint.

    Args:
        model: in eval mode; left as it was.
        input_shape: of one sample, for example (3, 32, 32).
        batch_sizes: the batch sizes B to audit.
        loss: of the client.
        inputs: probe pictures ``[N, *input_shape]``, N ≥ max(batch_sizes); random if None.
        method: "exact" (numerical rank by principal angles between row spaces) or "formula"
            (closed-form upper bound on the joint rank from the ranks of the two blocks).
        seed: of the probe.

    Returns:
        The :class:`Audit`.

    Raises:
        ValueError: a layer too large for exact ranks, batch size below 1, unknown method, too few
            probe pictures, a shape that does not fit, train mode.

    >>> import rgap
    >>> table = audit(rgap.models.lenet(seed=0), (3, 32, 32), batch_sizes=(1,))
    >>> table.largest_exact_batch
    1
    """
    shape = tuple(int(n) for n in input_shape)
    batches = _checked(batch_sizes)
    if method not in METHODS:
        raise ValueError(
            f"expected method in {list(METHODS)}, got {method!r}; write method='exact'"
        )
    loss = Loss.of(loss)
    chain = parse(model, shape)
    before = {stage.name: prod(stage.in_shape) for stage in chain.stages}
    pictures = _pictures(inputs, shape, max(batches), seed)
    spaces: dict[str, RowSpace] = {}
    rows = []
    for batch in batches:
        targets = _targets(model, pictures[:batch], loss, seed)
        for probe in probe_layers(model, pictures[:batch], targets, loss):
            _refuse_large(probe.affine, method)
            rows.append(_row(probe, batch, method, before.get(probe.affine.name), spaces))
    return Audit(type(model).__name__, method, tuple(rows), _notes(rows, method))


def _row(
    probe: Probe, batch: int, method: str, before: int | None, spaces: dict[str, RowSpace]
) -> AuditRow:
    affine = probe.affine
    samples = len(probe.inputs)  # more than the batch for a layer applied along a sequence
    kronecker = gradient_constraint(affine, probe.cotangents)
    gradient = kronecker.rank()
    weight = _weight_spaces(affine, probe.active, spaces)
    weight_rank = sum(space.rank.rank for space in weight)
    own = samples * prod(affine.in_shape)
    if method == "exact":
        joint = stage_joint_rank(affine, kronecker, weight).rank
    else:
        shared = shared_equations(affine, probe.cotangents, probe.active)
        joint = min(own, gradient.rank + weight_rank - shared)
    # A pool that leads into the layer discards too: its input is the unknown, of higher dimension.
    unknowns = max(own, batch * (before or 0))
    nullity = unknowns - joint
    return AuditRow(
        affine.name,
        affine.kind,
        batch,
        unknowns,
        gradient.rank,
        weight_rank,
        joint,
        nullity,
        nullity / unknowns,
        gradient.condition,
    )


def _refuse_large(affine: Affine, method: str) -> None:
    size = prod(affine.in_shape)
    if size > LARGEST:
        raise ValueError(
            f"expected layers of at most {LARGEST} inputs for method={method!r}, got "
            f"'{affine.name}' with {size}: its weight constraints alone would be a matrix of "
            f"{8e-9 * size**2:.0f} GB; audit a smaller input_shape, whose layers have the same "
            "structure"
        )


def _weight_spaces(affine: Affine, active: Tensor, spaces: dict[str, RowSpace]) -> list[RowSpace]:
    """Row spaces per sample; the one of a layer with no unit off is kept from audit to audit."""
    if not bool(active.all()):
        return weight_row_spaces(affine, active)
    if affine.name not in spaces:
        spaces[affine.name] = weight_row_spaces(affine, active[:1])[0]
    return [spaces[affine.name]] * len(active)


def _checked(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    try:
        batches = tuple(index(b) for b in batch_sizes)
    except TypeError:
        batches = ()
    if not batches or min(batches) < 1:
        raise ValueError(
            f"expected batch sizes, whole numbers >= 1, got {batch_sizes!r}; write "
            "batch_sizes=(1, 2, 4, 8)"
        )
    return batches


def _pictures(inputs: Tensor | None, shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    if inputs is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    inputs = torch.as_tensor(inputs)
    if tuple(inputs.shape[1:]) != shape or len(inputs) < count:
        raise ValueError(
            f"expected inputs of shape [{count} or more, {', '.join(map(str, shape))}], got "
            f"{list(inputs.shape)}; give one probe picture per sample of the largest batch"
        )
    require_finite("inputs", inputs, "give probe pictures of finite numbers, or write inputs=None")
    return inputs.double()


def _targets(model: nn.Module, pictures: Tensor, loss: Loss, seed: int) -> Tensor:
    """Targets that differ from sample to sample as far as the classes go."""
    parameter = next(model.parameters())
    with torch.no_grad():
        outputs = model(pictures.to(parameter))
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"expected one tensor from {type(model).__name__}.forward, got a "
            f"{type(outputs).__name__}; wrap it in a module whose forward returns the logits only"
        )
    classes = outputs.shape[-1] if outputs.ndim > 1 else 1
    generator = torch.Generator().manual_seed(seed)
    if loss.name == "cross_entropy":
        return (
            torch.randperm(max(classes, len(pictures)), generator=generator)[: len(pictures)]
            % classes
        )
    if loss.name == "mse_loss":
        return torch.rand(outputs.shape, generator=generator, dtype=torch.float64)
    return (torch.rand(outputs.shape, generator=generator) < 0.5).double()


def _notes(rows: Sequence[AuditRow], method: str) -> tuple[str, ...]:
    notes = []
    if method == "formula":
        notes.append(
            "joint_rank is the closed-form upper bound, as a rule equal to the rank; "
            "method='exact' measures it."
        )
    dead = sorted({row.layer for row in rows if row.gradient_rank == 0})
    if dead:
        notes.append(f"No gradient at all reaches {dead}: their cotangents are zero.")
    return tuple(notes)
