"""Does the network make the cotangents for which a count was proved?

A count for generic k and W is an upper bound in every network, because special k can only lower a
rank.  It is the rank where the network's own k are general enough.  Two ways to know:

* **Free cotangents.**  z is read by one smooth activation φ with φ'' ≠ 0, φ(z) only by layers with
  weights, through linear steps, and W maps onto the outputs that are read.  Then z is arbitrary,
  and k = φ'(z) ∘ κ.  Scale the weights that read φ(z) by ε: κ/ε tends to a constant without
  zeros, so that z ↦ k is a local diffeomorphism for almost all z at small ε, and, everything
  being analytic, k sweeps an open set for almost all weights.
* **Met at a point.**  The count is reached by the rank at weights, inputs and cotangents of this
  very network, drawn at random.  By lower semicontinuity almost all others have it; where
  activations are linear in pieces, the rank has to be met in the linear network too, in which all
  units are on one side.

Where units are off at the random point (ReLU, a lost maximum), the count is a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from rgap.analysis.calls.recorder import record, structural_twin
from rgap.analysis.calls.step_kinds import CURVED, PASSING, PIECES
from rgap.analysis.calls.steps import linear_reads
from rgap.analysis.calls.uses import Recording, Use
from rgap.analysis.generic_rank.sketched import sketched_rank
from rgap.analysis.generic_rank.together import as_samples, branch_rank, stacked_gradient
from rgap.analysis.probe import Probe, probe_targets
from rgap.network.affine import Affine
from rgap.network.modules import affine_map
from rgap.update.losses import Loss

__all__ = ["Met", "curved"]

ROOM = 3e7  # entries of all tensors of a forward
MOST = 1 << 25  # parameters of a network that is run at random weights
SAMPLES = 256  # largest batch that is run


def curved(recording: Recording, use: Use) -> bool:
    """True where nothing but a smooth activation reads z, and nothing but layers read that."""
    readers = recording.readers()
    place = use.node
    while len(readers[place]) == 1:
        reader = readers[place][0]
        op = recording.nodes[reader].op
        if recording.nodes[reader].use is not None or len(recording.nodes[reader].inputs) != 1:
            return False
        place = reader
        if op in CURVED:
            into = linear_reads(recording, place)
            if not into:
                return False
            above = [recording.uses[number] for number in into]
            return all(one.covered and one.weight is not use.weight for one in above)
        if op not in PASSING:
            return False
    return False


class Met:
    """The network at random weights and inputs, run when it is asked for.

    Args:
        model: left as it was.
        shape: of one sample.
        loss: of the client.
        effort: multiplications that one rank may take.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], loss: Loss, effort: float) -> None:
        self.shape, self.loss, self.effort = shape, loss, effort
        count = sum(p.numel() for p in model.parameters())
        self._make: Callable[[], nn.Module] | None = None
        if count <= MOST:
            self._make = lambda: structural_twin(model, seed=1)
        self._twin: nn.Module | None = None
        self._runs: dict[tuple[int, str], Recording | None] = {}

    def probes(self, numbers: Sequence[int], batch: int, mode: str) -> list[Probe] | None:
        """Inputs u and cotangents k of the numbered uses, for B random samples, or None."""
        recording = self._run(batch, mode)
        if recording is None:
            return None
        assert self._twin is not None
        names = {id(p): name for name, p in self._twin.named_parameters()}
        return [_as_probe(recording.uses[n], names, n) for n in numbers]

    def modes(self) -> tuple[str, ...]:
        """How the network is run: as it is, and linear where it is linear in pieces."""
        recording = self._run(1, "")
        if recording is not None and any(node.op in PIECES for node in recording.nodes):
            return "", "linear"
        return ("",)

    def on(self, numbers: Sequence[int], masks: Sequence[Tensor]) -> bool | None:
        """True if every output that is read has a cotangent; None if that takes too much."""
        recording = self._run(1, "")
        if recording is None:
            return None
        pairs = zip(numbers, masks, strict=True)
        return all(bool(recording.uses[n].read_outputs(1)[m].all()) for n, m in pairs)

    def gradient(self, numbers: Sequence[int], batch: int, count: int, kind: str) -> bool:
        """Whether rank ``K(k) ≥ count`` for B random samples, in every mode of the network."""
        return count == 0 or self._everywhere(numbers, batch, count, kind, self._gradient_rank)

    def joint(self, numbers: Sequence[int], batch: int, count: int, kind: str) -> bool:
        """Whether rank ``[I_C ⊗ K; I_B ⊗ W] ≥ count`` for B random samples, in every mode."""
        return self._everywhere(numbers, batch, count, kind, self._joint_rank)

    def _everywhere(
        self,
        numbers: Sequence[int],
        batch: int,
        count: int,
        kind: str,
        rank: Callable[[Sequence[Probe]], int],
    ) -> bool:
        """Whether ``rank(probes) ≥ count`` in every mode; False too where that costs too much."""
        for mode in self.modes():
            probes = self.probes(numbers, batch, mode)
            if probes is None:
                return False
            if rank([as_samples(probes)] if kind == "shared" else probes) < count:
                return False
        return True

    def _gradient_rank(self, probes: Sequence[Probe]) -> int:
        """Rank of the gradient constraints of all probes; -1 where that takes too much."""
        affine = probes[0].affine
        rows = sum(prod(p.affine.weight.shape[1:]) * p.affine.out_shape[0] for p in probes)
        rows //= affine.weight.shape[1]
        columns = len(probes[0].inputs) * prod(affine.in_shape[1:])
        if float(rows) * columns * min(rows, columns) > self.effort:
            return -1
        system = stacked_gradient([p.affine for p in probes], [p.cotangents for p in probes])
        return sketched_rank(system).rank

    def _joint_rank(self, probes: Sequence[Probe]) -> int:
        """Rank of all constraints of all probes together; -1 where that takes too much."""
        size = prod(probes[0].affine.in_shape)
        rows = sum(prod(p.affine.out_shape) for p in probes)
        if float(len(probes[0].inputs)) * size**2 * min(rows, size) > self.effort:
            return -1
        return branch_rank(probes).rank

    def _run(self, batch: int, mode: str) -> Recording | None:
        if (batch, mode) in self._runs:
            return self._runs[batch, mode]
        recording = None
        if self._make is not None and batch <= SAMPLES and self._fits(batch):
            self._twin = self._twin or self._make()
            generator = torch.Generator().manual_seed(batch)
            x = torch.randn(batch, *self.shape, generator=generator, dtype=torch.float64)
            targets = probe_targets(self._twin, x, self.loss, None, 0)
            recording = record(self._twin, x, lambda out: self.loss(out, targets), substitute=mode)
        self._runs[batch, mode] = recording
        return recording

    def _fits(self, batch: int) -> bool:
        one = self._runs.get((1, ""))
        if one is None:
            return batch == 1
        return batch * sum(node.entries for node in one.nodes) <= ROOM


def _as_probe(use: Use, names: dict[int, str], number: int) -> Probe:
    u, _, k = use.rows
    assert use.weight is not None
    affine = affine_map(use.name, use.weight, use.bias, tuple(u.shape[1:]), names, use.geometry)
    assert isinstance(affine, Affine)
    return Probe(affine, u, k, read=use.read[0], use=number)
