"""What three ways of counting a layer's rank say, and the cause of every disagreement in words."""

from __future__ import annotations

from dataclasses import dataclass

from rgap.analysis.generic_rank.modular import BlockRanks, ModularRanks
from rgap.solvers.rank import SMALL_GAP


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

    def explain(self) -> str:
        """The generic ranks, and the cause of every disagreement, in plain words."""
        exact = self.modular
        lines = [
            f"{self.layer} ({self.kind}, B = {self.batch}): gradient {exact.gradient} + weight "
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
