"""What every solver returns: the value, a result that explains itself, and its statistics."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from rgap.solvers.rank import Evidence, Rank

T = TypeVar("T")


class Explained(Enum):
    """Members whose value is a sentence."""

    @property
    def explanation(self) -> str:
        """The member in words a user can act on."""
        return str(self.value)


class Result(Explained):
    """How a solve ended; the text says what it means and what to do next."""

    SOLVED = "solved: the equations determine the unknowns"
    DEFICIENT = (
        "rank deficient: the equations leave directions open; the value is None or one of many "
        "solutions, add equations or a prior"
    )
    NOT_CONVERGED = (
        "not converged: the iteration limit came first; raise max_iterations or the memory budget"
    )


@dataclass(frozen=True)
class Stats:
    """Numbers of one solve.

    Attributes:
        route: how it was solved, for example "gradient", "cholesky", "lsmr".
        unknowns: number of unknowns.
        block_rank: rank of the first block of equations alone (None if it was not needed).
        joint: rank of all equations together, or what says that they leave nothing open where
            none was counted; None where a matrix-free solve found directions open.
        condition: condition number of the error-weighted system that was solved.
        residual: relative residual of the gradient block.
        iterations: refinement or LSMR iterations.
    """

    route: str
    unknowns: int
    block_rank: int | None
    joint: Rank | Evidence | None
    condition: float
    residual: float
    iterations: int = 0


@dataclass(frozen=True)
class Solution(Generic[T]):
    """Value, result and statistics of one solve.

    >>> from rgap.solvers.rank import Rank
    >>> rank = Rank.full(2)
    >>> Solution(1.5, Result.SOLVED, Stats("demo", 2, 2, rank, 1.0, 0.0)).solved
    True
    """

    value: T
    result: Result
    stats: Stats

    @property
    def solved(self) -> bool:
        """True if the equations determined every unknown."""
        return self.result is Result.SOLVED
