"""Ranks of a layer's equations counted in three ways, side by side, and why they differ.

* *numerical*: at the given weights and cotangents in float64, by singular values and a cutoff;
* *modular*: for generic weights and cotangents, exactly, with a stated probability of being too
  low (:mod:`rgap.analysis.generic_rank.modular`);
* *structural*: of the pattern alone, an upper bound (:mod:`rgap.analysis.generic_rank.structural`).

In exact arithmetic numerical ≤ modular ≤ structural.  The first falls short where weights or
cotangents are special, the second because equal entries stand in several places: the two blocks
share the equations Σ_u w_f(u) (K_f' x)_u = ⟨k_f', W_f x⟩, up to F² per group, which cancel by
value and not by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rgap.analysis.generic_rank.layout import active_units, require_affine
from rgap.analysis.generic_rank.modular import BlockRanks, ModularRanks, modular_ranks
from rgap.analysis.generic_rank.structural import structural_ranks
from rgap.analysis.generic_rank.together import as_samples, together
from rgap.analysis.probe import Probe, probe_layers, probe_pictures, probe_targets
from rgap.constraints import gradient_constraint
from rgap.constraints.ranks import stage_joint_rank, weight_row_spaces
from rgap.network.affine import Affine
from rgap.network.chain import parse
from rgap.network.running import refuse_meta
from rgap.solvers.limits import SMALL_GAP
from rgap.update.losses import Loss

LARGEST = 8192  # inputs of a layer: its weight block then takes half a gigabyte and a minute


@dataclass(frozen=True)
class LayerRanks:
    """What three ways of counting say about one layer.

    Attributes:
        layer: name of the layer.
        kind: such as "conv2d".
        batch: B.
        unknowns: B·n, entries of the layer's own input (behind a pool, if there is one).
        numerical: ranks in float64 at the given weights and cotangents.
        modular: generic ranks; ``modular.failure`` bounds the probability that they are too low.
        structural: maximum matchings.
        gap: smallest ratio of singular values (for the joint rank: of sines) across a cutoff.
        alternative: numerical joint rank on the other side of the cutoff, where the gap is small.
        seed: of the primes and points, and of the cotangents where none were given.
        beside: layers that read the same input, whose equations are not in this count; or the
            layer itself, where several calls are.
    """

    layer: str
    kind: str
    batch: int
    unknowns: int
    numerical: BlockRanks
    modular: ModularRanks
    structural: BlockRanks
    gap: float
    alternative: int
    seed: int
    beside: str = ""

    @property
    def nullity(self) -> int:
        """Unknowns that this layer's equations leave open, generically."""
        return self.unknowns - self.modular.joint

    @property
    def agree(self) -> bool:
        """True when numerical and modular ranks are the same."""
        return _plain(self.numerical) == _plain(self.modular)

    @property
    def _where(self) -> str:
        return f"{self.layer or 'the model itself'} ({self.kind}, B = {self.batch})"

    def __repr__(self) -> str:
        ranks = [f"{k} {_plain(getattr(self, k))}" for k in ("numerical", "modular", "structural")]
        return (
            f"LayerRanks({self._where}: gradient, weight and joint rank {', '.join(ranks)} of "
            f"{self.unknowns} unknowns)"
        )

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """The generic ranks, and the cause of every disagreement, in plain words."""
        exact = self.modular
        lines = [
            f"{self._where}: gradient {exact.gradient} + weight "
            f"{exact.weight} − shared {exact.shared} = {exact.joint} of {self.unknowns} unknowns "
            f"for generic weights, nullity {self.nullity} (too low a rank with probability below "
            f"{exact.failure:.0e})."
        ]
        lines += self._numerical_words() + self._structural_words()
        if self.beside == self.layer:
            lines.append("It is called more than once; its calls are counted like samples.")
        elif self.beside:
            lines.append(
                f"'{self.beside}' reads the same input: rgap.analysis.audit counts them together."
            )
        return "\n".join(lines)

    def _numerical_words(self) -> list[str]:
        low, exact = self.numerical, self.modular
        if self.agree:
            return []
        if self.gap < SMALL_GAP:
            return [
                f"Numerical joint rank {low.joint}: the values on both sides of the cutoff are "
                f"only a factor {self.gap:.1f} apart (the other side says {self.alternative}), so "
                "rounding decides it; trust the modular rank for generic weights, and count on "
                "an error of 1/σ in the directions between."
            ]
        if any(a > b for a, b in zip(_plain(low), _plain(exact), strict=True)):
            return [
                f"Numerical ranks {_plain(low)} above the generic {_plain(exact)}: exact "
                "arithmetic forbids that, so a cutoff counted rounding errors; weights or "
                "cotangents of very different sizes do this, scale them alike."
            ]
        words = []
        if low.gradient < exact.gradient:
            words.append(
                f"Gradient block: rank {low.gradient} with a clear gap, generic cotangents have "
                f"{exact.gradient}. These cotangents are special: under a softmax they sum to 0 "
                "over the classes, behind an average pool they repeat, and they cannot have more "
                "independent rows than the layer above has outputs."
            )
        if low.weight < exact.weight:
            words.append(
                f"Weight block: rank {low.weight} with a clear gap, generic weights have "
                f"{exact.weight}. Some filters of this layer depend on each other or are 0."
            )
        if not words:
            words.append(
                f"Joint rank {low.joint} with a clear gap, {exact.joint} for generic weights and "
                "cotangents: each block is as good as generic, but these weights and cotangents "
                "share more equations than they have to."
            )
        return words

    def _structural_words(self) -> list[str]:
        exact, pattern = self.modular, self.structural
        words = []
        for name, a, b in (
            ("Gradient", exact.gradient, pattern.gradient),
            ("Weight", exact.weight, pattern.weight),
        ):
            if b > a:
                words.append(
                    f"{name} block: the pattern admits {b}, {b - a} more. The same entries stand "
                    "in several rows, and minors cancel that a matching counts."
                )
        if pattern.joint > exact.joint:
            words.append(
                f"The pattern admits {pattern.joint} together, {pattern.joint - exact.joint} more "
                f"than there are: {exact.shared} equations follow from either block, Σ_u w_f(u) "
                "(K_f' x)_u = ⟨k_f', W_f x⟩, which cancel by value and not by position. A "
                "matching cannot see them."
            )
        return words


def _plain(ranks: BlockRanks) -> tuple[int, int, int]:
    return ranks.gradient, ranks.weight, ranks.joint


def layer_ranks(
    affine: Affine,
    batch: int,
    active: Tensor | None = None,
    *,
    cotangents: Tensor | None = None,
    points: int = 2,
    seed: int = 0,
) -> LayerRanks:
    """Numerical, modular and structural ranks of one layer.

    Args:
        affine: the layer; its weights are those of the numerical ranks.
        batch: B.
        active: True where a unit is on, ``[B, *out_shape]``; None: all.
        cotangents: k of the numerical ranks, ``[B, *out_shape]``, 0 where a unit is off; None:
            standard normal.
        points: random points and primes of the modular ranks.
        seed: of whatever is random.

    Raises:
        ValueError: a batch below 1, a layer too large for exact ranks, shapes that do not fit.
        TypeError: a mask that is not boolean.

    >>> import torch
    >>> from rgap.network.affine import Geometry, convolution
    >>> w = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    >>> around = Geometry.of((3, 3), padding=1)
    >>> conv = convolution("conv", w, None, ("conv.weight", None), (3, 6, 6), around)
    >>> found = layer_ranks(conv, 2)
    >>> found.numerical.joint, found.modular.joint, found.structural.joint, found.unknowns
    (194, 194, 198, 216)
    """
    _refuse_large(affine)
    active_units(affine, batch, active)
    shape = (batch, *affine.out_shape)
    place = affine.weight.device
    mask = torch.ones(shape, dtype=torch.bool, device=place) if active is None else active
    if cotangents is None:
        generator = torch.Generator().manual_seed(seed)
        cotangents = torch.randn(shape, generator=generator, dtype=torch.float64).to(place)
    elif tuple(cotangents.shape) != shape:
        raise ValueError(
            f"'{affine.name}' ({affine.kind}): expected cotangents of shape {list(shape)}, got "
            f"{list(cotangents.shape)}; write k = ∂L/∂z, one row per sample"
        )
    numerical, gap, alternative = _numerical(affine, cotangents.double() * mask, mask)
    return LayerRanks(
        affine.name,
        affine.kind,
        batch,
        batch * prod(affine.in_shape),
        numerical,
        modular_ranks(affine, batch, active, points=points, seed=seed),
        BlockRanks(*structural_ranks(affine, batch, active)),
        gap,
        alternative,
        seed,
    )


def generic_ranks(
    model: nn.Module,
    input_shape: Sequence[int],
    batch_size: int = 1,
    *,
    loss: str | Loss = "cross_entropy",
    inputs: Tensor | None = None,
    points: int = 2,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> tuple[LayerRanks, ...]:
    """Ranks of every layer of a network, chain or not, at random integer points.

    A probe batch says which units are on (ReLU, max-pool) and gives the cotangents of the
    numerical ranks, beside the model's own weights.  The modular ranks see the masks alone.

    Args:
        model: in eval mode; left as it was.
        input_shape: of one sample, for example (3, 32, 32).
        batch_size: B.
        loss: of the client.
        inputs: probe pictures ``[B, *input_shape]``; uniform random ones if None.
        points: random points and primes per layer.
        seed: of whatever is random.
        device: where to compute; default the CPU.

    Returns:
        One :class:`LayerRanks` per use of a fully connected or convolutional layer, in forward
        order.  The calls of one weight are the samples of one batch; layers that read one input
        are counted one by one, and name each other in ``beside``.

    Raises:
        ValueError: as :func:`layer_ranks`, and for a model without such layers, in train mode, or
            probe pictures of another shape.

    >>> import rgap
    >>> found = generic_ranks(
    ...     rgap.models.fcn3(seed=0), (1, 28, 28), loss="binary_cross_entropy_with_logits"
    ... )
    >>> [ranks.modular.joint for ranks in found]
    [784, 1000, 100]
    """
    shape = tuple(int(n) for n in input_shape)
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}; write batch_size=1")
    parse(model, shape)
    refuse_meta(model)
    loss = Loss.of(loss)
    inputs = probe_pictures(inputs, shape, batch_size, seed, device)
    targets = probe_targets(model, inputs, loss, None, seed)
    probes = probe_layers(model, inputs, targets, loss)
    by_use: dict[int, LayerRanks] = {}
    for group in together(probes):
        own = [probes[i] for i in group.members]
        merged = [as_samples(own)] * len(own) if group.kind == "shared" else own
        for number, probe in zip(group.members, merged, strict=True):
            ranks = _of_probe(probe, points, seed)
            names = {p.affine.name: None for p in own if p is not own[group.members.index(number)]}
            by_use[number] = replace(ranks, beside=", ".join(names))
    return tuple(by_use[number] for number in sorted(by_use))


def _of_probe(probe: Probe, points: int, seed: int) -> LayerRanks:
    """Ranks of a layer as a probe batch met it; a frozen weight has no gradient block."""
    ranks = layer_ranks(
        probe.affine,
        len(probe.cotangents),
        probe.active,
        cotangents=probe.cotangents,
        points=points,
        seed=seed,
    )
    if probe.trained:
        return ranks

    def without(block: Any) -> Any:
        return replace(block, gradient=0, joint=block.weight)

    three = {what: without(getattr(ranks, what)) for what in ("numerical", "modular", "structural")}
    return replace(ranks, **three)


def _numerical(affine: Affine, cotangents: Tensor, active: Tensor) -> tuple[BlockRanks, float, int]:
    """Ranks in float64, the smallest gap, and the joint rank on the other side of it."""
    kronecker = gradient_constraint(affine, cotangents)
    gradient = kronecker.rank()
    spaces = weight_row_spaces(affine, active)
    joint = stage_joint_rank(affine, kronecker, spaces, cotangent=cotangents)
    weight = sum(space.rank.rank for space in spaces)
    gap = min([gradient.gap, joint.gap, *(space.rank.gap for space in spaces)])
    # An undecided block moves the joint rank with it, as far as there are unknowns.
    moved = gradient.alternative - gradient.rank
    moved += sum(space.rank.alternative - space.rank.rank for space in spaces)
    alternative = max(0, min(joint.size, joint.alternative + moved))
    return BlockRanks(gradient.rank, weight, joint.rank), gap, alternative


def _refuse_large(affine: Affine) -> None:
    require_affine(affine)
    size = prod(affine.in_shape)
    if size > LARGEST:
        raise ValueError(
            f"'{affine.name}' ({affine.kind}): expected at most {LARGEST} inputs per sample for "
            f"exact ranks, got {size}; count a smaller input_shape, whose layers have the same "
            "structure, or write structural_ranks for an upper bound"
        )
