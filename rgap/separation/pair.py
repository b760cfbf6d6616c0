"""Samples of a batch from two consecutive fully connected layers.

Every sample x = V q of the lower layer's row space must map into the upper layer's,
``(I − PPᵀ) φ(W V q + b) = 0``: B − 1 unknowns a sample, width − B equations, whatever the
activation and the labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rgap.limits import FITS, OUTSIDE
from rgap.network.activations import Activation
from rgap.network.chain import Chain, Stage
from rgap.network.reshape import Op, Rearrange, Reshape
from rgap.precision import Precision
from rgap.separation.batch import Batch, Separated, Unseparated
from rgap.separation.finish import finish
from rgap.separation.identify import Identity, continuous, identify
from rgap.separation.mixture import Mixture
from rgap.separation.peeling import GROWTH, STARTS, Collected, Starts, collect
from rgap.separation.subspace import Consistency, along_directions, on_line
from rgap.separation.targets import admissible, contradicted, near_copies, single
from rgap.separation.weights import all_weighed

KINK = 1e-3  # distance of a pre-activation from a kink, in their rms, that is looked across
BENT = 1e-2  # change of φ' within that distance, of itself, that is a kink: smooth ones change less


@dataclass(frozen=True)
class Between(Consistency):
    """f(q) is the input of the next fully connected layer.

    Attributes:
        steps: what lies between the two affine maps, element by element.
        matrix: M = W V, [m, R].
        shift: b, [m].
        above: the mixture of that layer, whose row space P is.
    """

    steps: tuple[Op, ...]
    matrix: Tensor
    shift: Tensor
    above: Mixture

    @classmethod
    def of(
        cls, lower: Mixture, upper: Mixture, steps: tuple[Op, ...], precision: Precision
    ) -> Between:
        """The consistency of two mixtures with ``steps`` between them."""
        affine = lower.stage.affine
        shift = affine.forward(lower.gradient.new_zeros(1, *affine.in_shape))[0]
        blur = upper.entry_noise / upper.values
        matrix = affine.weight @ lower.right
        return cls(lower, upper.right, blur, precision.unit, steps, matrix, shift, upper)

    @property
    def source(self) -> Stage:
        """The upper layer."""
        return self.above.stage

    def value(self, q: Tensor) -> Tensor:
        """The next layer's input for samples V q."""
        y = q @ self.matrix.T + self.shift
        for op in self.steps:
            y = op.forward(y)
        return y.flatten(1)

    def derivative(self, q: Tensor, along: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``f`` and its derivative: one slope an entry, for nothing mixes entries."""
        y, slope, order = self._slopes(q @ self.matrix.T + self.shift)
        return y, slope[:, :, None] * along_directions(self.matrix, along)[order]

    def across_kinks(self, q: Tensor) -> Tensor:
        """Points next to q [R] with w·q as it is, on both sides of kinks of φ, [n, R]."""
        z = self.matrix @ q + self.shift
        reach = KINK * float(z.square().mean().sqrt())
        _, slopes, order = self._slopes(torch.stack([z - reach, z + reach]))
        bent = (slopes[0] - slopes[1]).abs() > BENT * slopes.abs().amax(0)
        rows, w = self.matrix[order[bent]], self.samples.weights
        rows = rows - (rows @ w)[:, None] * w / (w @ w)
        step = reach * rows / rows.square().sum(1, keepdim=True).clamp_min(1e-300)
        return torch.cat([q + step, q - step])

    def pusher(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """φ'(z) W dx."""
        affine = self.samples.stage.affine
        z = affine.forward(x.reshape(-1, *affine.in_shape))
        _, slope, order = self._slopes(z.flatten(1))

        def push(dx: Tensor) -> Tensor:
            return slope * affine.linear(dx.reshape(-1, *affine.in_shape)).flatten(1)[:, order]

        return push

    def rounding(self, x: Tensor, precision: Precision) -> Tensor:
        """Standard error of f: of the sum z, carried through φ, and of φ itself."""
        affine = self.samples.stage.affine
        u = x.reshape(-1, *affine.in_shape)
        y, slope, order = self._slopes(affine.forward(u).flatten(1))
        std = precision.sum_std(affine.squared().linear(u.square())).flatten(1)[:, order]
        return ((slope * std).square() + (y * precision.unit).square()).sqrt()

    def basis_errors(
        self, k: Tensor, f: Tensor, precision: Precision
    ) -> Callable[[Tensor], Tensor]:
        """S⁻¹UᵀE of the layer above, with draws of its own."""
        k = k.flatten(1)
        name = self.source.affine.weight_name
        std = precision.update_std(name, k.square().T @ f.square(), k.T @ f)

        def draw(_: Tensor) -> Tensor:
            e = precision.normal(std, samples=1)[0]
            return (self.above.left.T @ e) / self.above.values[:, None]

        return draw

    def _slopes(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The steps' output, their slope, and which pre-activation each output comes from."""
        slope = torch.ones_like(y)
        order = torch.arange(y.shape[1], dtype=y.dtype, device=y.device)[None]
        for op in self.steps:
            if isinstance(op, Activation):
                slope = slope * op.derivative(y)
            else:
                slope = op.linear(slope)
                order = op.linear(order) if isinstance(op, (Reshape, Rearrange)) else order
            y = op.forward(y)
        return y.flatten(1), slope.flatten(1), order.flatten().long()


def steps_between(chain: Chain, index: int) -> tuple[Op, ...] | str:
    """The steps from stage ``index`` to the next affine map, or why they mix entries."""
    lower, upper = chain.stages[index], chain.stages[index + 1]
    if lower.affine.geometry is not None or upper.affine.geometry is not None:
        return "not two fully connected layers in a row"
    steps = (*lower.tail, *upper.lead)
    for op in steps:
        if not (op.elementwise or isinstance(op, (Reshape, Rearrange))):
            return f"'{op.name}' ({op.kind}) between them mixes entries"
    return steps


def separate_pair(
    batch: Batch, consistency: Between, top: Mixture, watch: Callable[[str], None] | None = None
) -> Separated | Unseparated:
    """All samples of a batch at the lower of two fully connected layers.

    Args:
        batch: the update.
        consistency: of the pair.
        top: mixture of the head.
        watch: told of the progress.
    """
    began = time.perf_counter()
    lower = consistency.samples
    stage = lower.stage

    def naming(roots: Tensor, _: Consistency) -> list[Identity]:
        return identify_roots(batch, lower, top, roots)

    collected = collect(
        consistency,
        naming,
        partial(admissible, batch, lower.rank),
        Starts(
            batch.precision.seed,
            batch.starts(lower.rank, STARTS, GROWTH),
            deadline=batch.deadline,
        ),
        watch,
    )
    if not collected.complete:
        short = batch.short(_shortfall(consistency, collected))
        if batch.late:
            return short
        collected = all_weighed(batch, consistency, collected)
        near = near_copies(lower, [*collected.identities, *collected.refused])
        short = replace(short, reason=short.reason + near)
        return contradicted(batch, lower, collected) or short
    result = finish(
        batch,
        consistency,
        collected,
        naming,
        f"every sample of '{stage.name}' must map into the row space of "
        f"'{consistency.above.stage.name}' (for each {consistency.equations} equations, unknowns: "
        f"{lower.rank - 1})",
        began,
    )
    where = "" if isinstance(result, Separated) else lines(consistency, collected.roots)
    if isinstance(result, Unseparated) and where:
        return replace(result, reason=f"{result.reason}; {where}", consistent=True)
    return result


def identify_roots(batch: Batch, samples: Mixture, top: Mixture, roots: Tensor) -> list[Identity]:
    """The target of every root; one picture with several labels where no single class fits."""
    identities = identify(batch.chain, samples, top, roots, batch.loss)
    missing = [i for i, identity in enumerate(identities) if not identity.accepted]
    if single(batch, samples.rank):  # then no picture has two labels, each occurs once
        return identities
    if not missing or batch.classes > samples.gradient.shape[0] - samples.rank:
        return identities
    again = continuous(batch.chain, samples, roots[missing], batch.loss)
    for i, identity in zip(missing, again, strict=True):
        if identity.accepted:
            identities[i] = identity
    return identities


def _shortfall(consistency: Between, collected: Collected) -> str:
    lower = consistency.samples
    where = f"of '{lower.stage.name}'"
    said = (
        f"{collected.tally(where)} (σ_B/σ_1 {lower.ratio:.1e} there, "
        f"{consistency.above.ratio:.1e} at '{consistency.above.stage.name}')"
    )
    points = torch.cat([collected.roots, *(q[None] for q in collected.stray)])
    if on_lines := lines(consistency, points):
        return f"{said}; {on_lines}"
    if collected.rejected <= OUTSIDE:
        return (
            f"{said}; targets fit there (the nearest misses by {collected.rejected:.1e}), but not "
            "one alone whose weight is that of a sample"
        )
    if collected.rejected < 1.0:
        return (
            f"{said}; points that satisfy the equations were no samples: the nearest target misses "
            f"by {collected.rejected:.1e}"
        )
    return said


def between(consistency: Between, roots: Tensor) -> str:
    """Which two roots have a solution half way, so that both lie on a line of them; or "".

    A line ends where a unit changes its sign; a root just beyond its end looks isolated.

    Args:
        consistency: of the roots.
        roots: rows q, [F, R].
    """
    first, second = torch.triu_indices(len(roots), len(roots), 1, device=roots.device)
    if not len(first):
        return ""
    f = consistency.value((roots[first] + roots[second]) / 2.0)
    size = f.square().sum(1).clamp_min(1e-300)
    cost = consistency.project(f).square().sum(1) / size
    meets = cost <= FITS**2 * consistency.tolerance(f)
    if not bool(meets.any()):
        return ""
    pair = int(meets.nonzero()[0])
    return (
        f"points half way between samples {int(first[pair])} and {int(second[pair])} satisfy the "
        "equations too: they lie on a line of solutions, any point of which is as good"
    )


def lines(consistency: Between, roots: Tensor) -> str:
    """Which of the roots lie on lines of solutions, and why; "" if none does.

    Args:
        consistency: of the roots.
        roots: rows q, [F, R].
    """
    on = sum(on_line(consistency, q) for q in roots)
    if not on:
        return ""
    bent = [op for op in consistency.steps if isinstance(op, Activation)]
    if all(op.homogeneous for op in bent):  # piecewise linear
        between = ", ".join(f"'{op.name}' ({op.kind})" for op in bent)
        why = (
            f"samples that share a whole pattern of active units of {between}, which is linear "
            "between them"
        )
    else:
        why = "samples that are alike to this precision"
    return (
        f"{on} of {len(roots)} points that satisfy the equations lie on lines of such points: {why}"
    )
