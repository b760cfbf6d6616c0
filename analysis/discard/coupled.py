"""Layers below a batch norm that takes the statistics of the batch: all samples are one system.

Let s = W∗u + b be the output of a layer and ``y = γ x̂ + β``, ``x̂ = (s − μ)/σ``, σ² = v + ε, with
μ and v the mean and the variance of a channel over the N positions of the whole batch.  From above
y and its cotangent k come down.  The cotangent of s is

    ``κ = γ/σ (k − mean(k) − x̂ mean(k x̂))``,

so that Σ_p κ_p = 0 in every channel, and ``Σ_p κ_p x̂_p = γ/σ Σ_p k_p x̂_p ε/σ²``, next to 0.  The
gradient ``G_f = Σ_p κ_{f,p} u_p`` still holds, but κ is not known before s is: σ is one unknown
number a channel, and x̂ of the units that a rectifier above turns off enters κ linearly.  Counted is
therefore the local rank of both equations as functions of u,

    ``u ↦ (y(u) where k ≠ 0,  ∂⟨k, y(u)⟩/∂W)``,  the statistics differentiated.

It is at most that of K and W with κ and s known everywhere, the bound where it is too large to be
formed: a direction that moves neither s nor Σ_p κ_p u_p with κ fixed moves none of the above.  Nor
does one that moves s by a constant a channel: the same for all samples below a fully connected
layer, a constant of every channel below a convolution without a border.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor, nn

from rgap.analysis.calls.uses import Recording, Use
from rgap.analysis.discard.table import AuditRow
from rgap.jacobian.update_map import UpdateMap
from rgap.machine import memory
from rgap.network.batch_statistics import mixes, mixing
from rgap.network.isolation import bare_copy
from rgap.network.running import run
from rgap.network.watching import LayerCall, watched
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.update.losses import Loss

__all__ = ["BOUNDED", "COUPLED", "Coupling", "coupling"]

COUPLED = "measured, statistics differentiated"  # the route of a row that is counted so
BOUNDED = "bounded, statistics taken as known"  # of one that is not
LARGEST = 3072  # unknowns of a layer up to which its matrix is formed: a minute of one core
FORMED = 4 * 8.0  # bytes of an entry: matrices of its size that are held at a time


@dataclass(frozen=True, eq=False)
class Coupling:
    """Which uses of weights a batch norm couples over the batch.

    Attributes:
        mixed: numbers of the uses between which and the next ones there is such a norm.
        direct: of these, by number, the path of the norm that alone reads the layer's output.
        norms: the norms that are called once, in float64, each with the cotangent of its output.
        ahead: paths of norms that stand between the data and every layer.
    """

    mixed: frozenset[int] = frozenset()
    direct: dict[int, str] = field(default_factory=dict)
    norms: dict[str, tuple[nn.Module, Tensor]] = field(default_factory=dict)
    ahead: tuple[str, ...] = ()

    def ranks(self, number: int, use: Use, room: float) -> tuple[Rank, Rank, Rank] | None:
        """Ranks of a layer's gradient, of what is known of its outputs, and of both.

        Args:
            number: of the use.
            use: it.
            room: bytes.

        Returns:
            None where they are not formed: the norm does not read the layer alone, the layer is no
            plain module, or it is too large.
        """
        found = self.norms.get(self.direct.get(number, ""))
        if found is None or use.module is None or use.shown or use.inputs.numel() > LARGEST:
            return None
        norm, k = found
        stage = nn.Sequential(copy.deepcopy(use.module), copy.deepcopy(norm))
        with torch.no_grad():
            made = stage[0](use.inputs)
        if made.shape != use.outputs.shape or not torch.allclose(made, use.outputs):
            return None
        rows = int((k != 0).sum()) + prod(stage[0].weight.shape)  # type: ignore[arg-type]
        if FORMED * rows * use.inputs.numel() > max(room, memory.LEAST):
            return None
        return _ranks(stage, use.inputs, k)

    def notes(self, recording: Recording) -> tuple[str, ...]:
        """What the reader should know of the norms, a sentence each."""
        below: dict[str, list[str]] = {}
        for number, path in self.direct.items():
            below.setdefault(path, []).append(f"'{recording.uses[number].name}'")
        said = [
            f"'{path}' takes the statistics of the batch: the samples of {', '.join(layers)} are "
            "one system, cotangents there sum to 0 over the batch, and a common factor of its "
            "input is fixed by ε alone."
            for path, layers in below.items()
        ]
        others = [recording.uses[n].name for n in sorted(self.mixed) if n not in self.direct]
        if others:
            names = ", ".join(map(repr, dict.fromkeys(others)))
            said.append(f"Behind {names} a batch norm takes the statistics of the batch.")
        return (*said, *(
            f"'{path}' takes means and spreads of the data away; its output is what is unknown "
            "in the layers that read it." for path in self.ahead
        ))  # fmt: skip

    def rows(self, batch: int, recording: Recording) -> list[AuditRow]:
        """A row for every norm that reads the data alone: the mean of a channel is lost there."""
        unknowns = recording.nodes[0].entries * batch
        rows = []
        for path in self.ahead:
            channels = len(self.norms[path][1][0]) if path in self.norms else 1
            counts = (unknowns, 0, unknowns - channels, unknowns - channels, channels)
            rows.append(
                AuditRow(path, "step", batch, *counts, channels / unknowns, None, BOUNDED, False)
            )
        return rows

    def counted(self, row: AuditRow) -> AuditRow:
        """The row of a layer whose :meth:`ranks` are formed: κ is not known, no κ is told apart."""
        return replace(row, by_gradient=None, by_shifts=None)

    def bounded(self, row: AuditRow, number: int, use: Use) -> AuditRow:
        """The row of a mixed layer whose joint rank is that of known statistics: a bound.

        Args:
            row: of the layer.
            number: of the use.
            use: it.
        """
        joint = row.joint_rank
        if number in self.direct and not row.beside and not use.shown:
            free = use.inputs.shape[-1] if use.geometry is None else 0
            if use.geometry is not None and not any(map(any, use.geometry.padding)):
                free = use.inputs.shape[1]
            joint = min(joint, row.unknowns - free)
        nullity = row.unknowns - joint
        cut = replace(row, joint_rank=joint, nullity=nullity, discard=nullity / row.unknowns)
        return replace(self.counted(cut), route=BOUNDED, exact=False)


def coupling(
    model: nn.Module, recording: Recording, inputs: Tensor, targets: Tensor, loss: Loss
) -> Coupling:
    """What batch norms of a model that take the statistics of the batch do to a recorded forward.

    Args:
        model: left as it was.
        recording: of its forward on the same batch.
        inputs: [B, *input_shape].
        targets: as the loss wants them.
        loss: of the client.

    >>> import torch
    >>> from rgap.analysis.probe import probed
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> x, y = torch.rand(3, 3).double(), torch.tensor([0, 1, 1])
    >>> found = coupling(net, probed(net, x, y, Loss())[1], x, y, Loss())
    >>> sorted(found.mixed), found.direct
    ([0], {0: '1'})
    """
    if not any(mixing(model)):
        return Coupling()
    modules = dict(model.named_modules())
    norms = {
        number
        for number, node in enumerate(recording.nodes)
        if "batch_norm" in node.op and _mixing(modules.get(node.module))
    }
    readers = recording.readers()
    mixed, direct = set(), {}
    for number, use in enumerate(recording.uses):
        if not _before(recording, readers, use.node) & norms:
            continue
        mixed.add(number)
        alone = readers[use.node]
        if len(alone) == 1 and alone[0] in norms:
            direct[number] = recording.nodes[alone[0]].module
    data = 0
    while len(readers[data]) == 1 and recording.nodes[readers[data][0]].use is None:
        data = readers[data][0]
        if data in norms:
            break
    ahead = (recording.nodes[data].module,) if data in norms else ()
    outputs = _outputs(model, inputs, targets, loss)
    return Coupling(frozenset(mixed), direct, outputs, ahead)


def _mixing(module: nn.Module | None) -> bool:
    """False for a norm in eval mode alone: of what a function does nothing is known."""
    return module is None or mixes(module) or not hasattr(module, "running_mean")


def _before(recording: Recording, readers: list[list[int]], start: int) -> set[int]:
    """Nodes that are reached from one without the use of a further weight."""
    seen, rest = set[int](), [start]
    while rest:
        for reader in readers[rest.pop()]:
            if reader not in seen and recording.nodes[reader].use is None:
                seen.add(reader)
                rest.append(reader)
    return seen


def _outputs(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss
) -> dict[str, tuple[nn.Module, Tensor]]:
    """Every norm that mixes and is called once, with the cotangent of its output."""
    twin = bare_copy(model, inputs.device)
    norms = dict(mixing(twin))
    calls: list[LayerCall] = []
    with torch.enable_grad(), watched(norms, leave=calls.append):
        x = inputs.detach().double().requires_grad_()
        value = loss(run(twin, x), targets.to(inputs.device))
    slopes = torch.autograd.grad(value, [call.made for call in calls], materialize_grads=True)
    names = [call.name for call in calls]
    return {
        call.name: (norms[call.name], k)
        for call, k in zip(calls, slopes, strict=True)
        if names.count(call.name) == 1
    }


def _ranks(stage: nn.Sequential, u: Tensor, k: Tensor) -> tuple[Rank, Rank, Rank]:
    """Ranks of ``∂⟨k, y⟩/∂W``, of y where k is not 0, and of both, as functions of u.

    Args:
        stage: the layer and the norm.
        u: input, [B, ...].
        k: cotangent of the output.
    """
    layer = stage[0]
    trained = layer.weight.requires_grad
    stage.requires_grad_(False)
    layer.weight.requires_grad_(True)
    own = Loss.of(lambda outputs, targets: (outputs * targets).sum())
    update = UpdateMap(stage, u, k, own)
    unit = torch.eye(u.numel(), dtype=u.dtype, device=u.device).reshape(-1, *u.shape)
    on = (k != 0).flatten().nonzero().squeeze(1)

    def known(x: Tensor) -> Tensor:
        return update.run(x).flatten()[on]

    def moved(direction: Tensor) -> Tensor:
        product: Tensor = torch.func.jvp(known, (u,), (direction,))[1]
        return product

    pieces = [(columns, torch.vmap(moved)(unit[at])) for at, columns in update.chunks(unit)]
    gradient, outputs = (torch.cat(parts).T for parts in zip(*pieces, strict=True))
    gradient = gradient if trained else gradient[:0]
    blocks = [block / block.norm() for block in (gradient, outputs) if bool(block.any())]
    both = torch.cat(blocks) if blocks else gradient[:0]
    return _rank(gradient), _rank(outputs), _rank(both)


def _rank(matrix: Tensor) -> Rank:
    matrix = matrix.detach()
    rows, size = matrix.shape
    if not matrix.numel() or not bool(matrix.any()):
        return Rank.none(size)
    if rows > size:
        matrix = torch.linalg.qr(matrix, mode="r").R
    values = torch.linalg.svdvals(matrix)
    return numerical_rank(values, size, resolve_rcond(None, (rows, size), torch.float64))
