"""Where and why an inversion ended: a kind, a place and numbers, from which the words are made."""

from __future__ import annotations

from dataclasses import dataclass

from rgap.solvers.solution import Explained

__all__ = ["Halt", "HaltKind"]


class HaltKind(Explained):
    """What ended an inversion; the value says it in words."""

    POOL = "a pool that keeps less than its windows: a winner without its place, a norm"
    AVERAGE = "an average whose inputs do not follow from its outputs"
    ACTIVATION = "an activation without an element-wise inverse"
    STEP = "another step without an inverse"
    BARRIER = "a node at which the network is no chain of steps"
    HEAD = "a last layer that the head equations cannot read, or that leaves its input open"
    UNSEPARATED = "the samples of the batch were not told apart"
    DEFICIENT = "fewer independent equations than unknowns"
    ILL_CONDITIONED = "full rank, but directions stay open at the precision of the update"
    UNSOLVED = "solves from different starts end at different answers, and nobody counted the rank"
    LATE = "the time limit came before the equations of a layer were solved or counted"
    CONTRADICTION = "equations that contradict each other"

    @property
    def supported(self) -> bool:
        """False for what no closed form passes, whatever the update."""
        return self not in _UNSUPPORTED


_UNSUPPORTED = frozenset(
    {HaltKind.POOL, HaltKind.AVERAGE, HaltKind.ACTIVATION, HaltKind.STEP, HaltKind.BARRIER}
)


@dataclass(frozen=True)
class Halt:
    """Where and why the recursion ended before the data.

    Attributes:
        kind: what ended it.
        stage: name of the layer whose equations fall short, or of the step that has no inverse;
            "" where it is no one place.
        reason: the same in words, with the numbers.
        unknowns: entries that the equations are for, where they were counted.
        rank: how many of the equations are independent, where they were counted.

    >>> halt = Halt.deficient("conv1", rank=540, unknowns=768)
    >>> halt.kind.name, halt.missing
    ('DEFICIENT', 228)
    >>> halt.reason
    "the equations of 'conv1' have rank 540 for 768 unknowns: 228 equations are missing"
    """

    kind: HaltKind
    stage: str
    reason: str
    unknowns: int | None = None
    rank: int | None = None

    @property
    def supported(self) -> bool:
        """False when the step cannot be inverted at all (max-pool, GELU)."""
        return self.kind.supported

    @property
    def missing(self) -> int | None:
        """Equations that are missing, or None where they were not counted."""
        return None if self.unknowns is None or self.rank is None else self.unknowns - self.rank

    @classmethod
    def short(cls, stage: str, what: str, unknowns: int, missing: int) -> Halt:
        """Fewer equations than unknowns; the reason is ``what`` with their number behind it."""
        reason = f"{what}: {missing} equations are missing"
        return cls(HaltKind.DEFICIENT, stage, reason, unknowns, unknowns - missing)

    @classmethod
    def deficient(cls, stage: str, rank: int, unknowns: int) -> Halt:
        """The equations of a layer have too low a rank."""
        what = f"the equations of '{stage}' have rank {rank} for {unknowns} unknowns"
        return cls.short(stage, what, unknowns, unknowns - rank)

    @classmethod
    def unsent(cls, stage: str, rank: int, unknowns: int) -> Halt:
        """The gradient of a layer was not sent, and its weights alone do not fix its input."""
        what = (
            f"the gradient of '{stage}' was not sent (frozen on the client), and its weight "
            f"constraints alone have rank {rank} for {unknowns} unknowns"
        )
        return cls.short(stage, what, unknowns, unknowns - rank)

    @classmethod
    def ill_conditioned(cls, stage: str, unknowns: int) -> Halt:
        """They have full rank, but not at this precision."""
        reason = (
            f"the equations of '{stage}' have full rank {unknowns}, but at the precision of what "
            "is known above them some directions stay open"
        )
        return cls(HaltKind.ILL_CONDITIONED, stage, reason, unknowns, unknowns)

    @classmethod
    def drowned(cls, stage: str, unknowns: int, drowned: int) -> Halt:
        """The gradient that some of them are read off is no larger than its noise."""
        reason = (
            f"{drowned} of the {unknowns} values that '{stage}' takes in are drowned in the stated "
            "noise: its gradient is no larger"
        )
        return cls(HaltKind.ILL_CONDITIONED, stage, reason, unknowns, unknowns)

    @classmethod
    def unsolved(cls, stage: str, unknowns: int) -> Halt:
        """Nobody counted the rank, and two iterative solves disagree."""
        reason = (
            f"two solves of the {unknowns} unknowns of '{stage}' from different starts end at "
            "different answers: directions are open, or too badly conditioned for LSMR; a larger "
            "memory_budget counts them"
        )
        return cls(HaltKind.UNSOLVED, stage, reason, unknowns)

    @classmethod
    def late(cls, stage: str, unknowns: int, why: str) -> Halt:
        """There was no time to solve its equations or to count their rank."""
        reason = f"the rank of the equations of '{stage}' was not counted in the time: {why}"
        return cls(HaltKind.LATE, stage, reason, unknowns)

    @classmethod
    def contradiction(cls, stage: str) -> Halt:
        """The equations of a layer do not fit what is known above it."""
        return cls(HaltKind.CONTRADICTION, stage, "the equations contradict each other")

    @classmethod
    def narrowing(cls, step: str, kind: str, batch: int, taken: int, given: int) -> Halt:
        """A linear step that gives fewer values than it takes, for every sample of a batch."""
        what = f"'{step}' ({kind}) maps {taken} values to {given}"
        return cls.short(step, what, batch * taken, batch * (taken - given))

    @classmethod
    def cut(cls, step: str, kind: str, unknowns: int, missing: int) -> Halt:
        """A ReLU of the data themselves sets some of them to 0."""
        what = f"'{step}' ({kind}) sets {missing} values of the data to 0"
        return cls.short(step, what, unknowns, missing)

    @classmethod
    def unread(cls, stage: str, unknowns: int, missing: int) -> Halt:
        """No kernel of the first layer reads some of the data."""
        reason = f"no kernel of '{stage}' reads {missing} values of the data"
        return cls(HaltKind.DEFICIENT, stage, reason, unknowns, unknowns - missing)

    @property
    def numbers(self) -> dict[str, object]:
        """Plain values, for JSON; ``reason`` is left out, as the recovery states its own."""
        return {
            "kind": self.kind.name,
            "stage": self.stage,
            "unknowns": self.unknowns,
            "rank": self.rank,
            "missing": self.missing,
        }
