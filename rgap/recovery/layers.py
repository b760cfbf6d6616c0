"""What became of each layer: its equations in numbers, the way it was passed, and both in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from math import inf, isfinite

from torch import Tensor

from rgap.halt import Halt, HaltKind
from rgap.solvers.rank import Rank
from rgap.solvers.solution import Stats

__all__ = ["LayerReport", "Route", "sentence"]


class Route(StrEnum):
    """How the input of a layer was had; a member is equal to its text."""

    GIVEN = "given"
    SEPARATION = "separation"
    BIAS_ATTACK = "bias attack"
    HEAD_EQUATIONS = "head equations"
    GRADIENT = "gradient"
    CHOLESKY = "cholesky"
    LSMR = "lsmr"
    VALUES = "values above"
    RANK_ONLY = "rank only"
    NOT_REACHED = "not reached"

    def __repr__(self) -> str:
        return repr(self.value)

    @property
    def words(self) -> str:
        """What a reader learns of a layer that was passed this way."""
        if self is Route.GIVEN:
            return "given"
        return f"{_WORDS.get(self, 'all determined')} [{self}]"

    @property
    def solved(self) -> bool:
        """True where a linear system was solved; it has a condition and a residual."""
        return self in (Route.GRADIENT, Route.CHOLESKY, Route.LSMR)


_WORDS = {
    Route.SEPARATION: "separated sample by sample",
    Route.BIAS_ATTACK: "read off its own gradient",
    Route.HEAD_EQUATIONS: "read off its own gradient and the loss",
    Route.GRADIENT: "determined by its gradient alone",
    Route.CHOLESKY: "determined by its gradient and its weights",
    Route.LSMR: "determined by its gradient and its weights",
    Route.VALUES: "determined by known values above it",
}


@dataclass(frozen=True)
class LayerReport:
    """The equations of one stage, as ``invert`` met them; by default not at all.

    Attributes:
        layer: module path.
        kind: "linear", "conv2d", ...
        unknowns: entries of the stage's input, B·n less those that no kernel reads.
        gradient_rank: rank of the gradient constraints, or None if not reached.
        joint_rank: rank of gradient and weight constraints together.
        nullity: unknowns − joint_rank.
        gap: σ_r/σ_{r+1} where a rank was counted from singular values; infinite where nothing was
            cut, or where ``route`` determined the layer without counting one.
        condition: condition number of the error-weighted system.
        residual: relative residual of the gradient constraints at the answer.
        seconds: time spent.
        route: see :class:`Route`.
        note: what stopped the recursion here, or "".
        unread: entries of the input that no kernel reads (strides and dilations leave them out).
        predicted_error: rms error of the input as the recursion found it, or None if it did not.
    """

    layer: str
    kind: str
    unknowns: int
    gradient_rank: int | None = None
    joint_rank: int | None = None
    nullity: int | None = None
    gap: float = inf
    condition: float = inf
    residual: float = inf
    seconds: float = 0.0
    route: Route = Route.NOT_REACHED
    note: str = ""
    unread: int = 0
    _weight_rank: Callable[[], int] | None = field(default=None, repr=False, compare=False)
    _null_space: Callable[[int], Tensor] | None = field(default=None, repr=False, compare=False)
    predicted_error: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "route", Route(self.route))

    def read_off(
        self, route: Route, null_space: Callable[[int], Tensor], predicted_error: float | None
    ) -> LayerReport:
        """The same layer where its own gradient gave all of its input."""
        n = self.unknowns
        stats = Stats(route, n, n, Rank.full(n), 1.0, 0.0)
        return self.solved(stats, 0.0, null_space, predicted_error)

    def solved(
        self,
        stats: Stats,
        seconds: float,
        null_space: Callable[[int], Tensor],
        predicted_error: float | None,
    ) -> LayerReport:
        """The same layer where its equations were solved, or counted and found short."""
        rank = stats.joint
        return replace(
            self, gradient_rank=stats.block_rank, joint_rank=None if rank is None else rank.rank,
            nullity=None if rank is None else rank.nullity, condition=stats.condition,
            gap=rank.gap if isinstance(rank, Rank) else inf, residual=stats.residual,
            seconds=seconds, route=Route(stats.route), _null_space=null_space,
            predicted_error=predicted_error,
        )  # fmt: skip

    @cached_property
    def weight_rank(self) -> int | None:
        """Rank of the weight constraints of the batch (computed when first asked for)."""
        return None if self._weight_rank is None else self._weight_rank()

    @property
    def determined(self) -> bool:
        """True if the stage's equations fix its input."""
        return self.nullity == 0

    def __getstate__(self) -> dict[str, object]:
        """State without the callables, so that reports pickle and deep-copy."""
        state = dict(self.__dict__)
        state["_weight_rank"] = None
        state["_null_space"] = None
        return state


def sentence(report: LayerReport, halt: Halt | None, certified: bool = False) -> str:
    """One layer in words; its note unless it is the halt, which the reason above says already.

    Args:
        report: of the layer.
        halt: of the recursion.
        certified: True if the input of the layer is among the certified features all the same.
    """
    unread = f" ({report.unread} more values are read by no kernel)" if report.unread else ""
    text = f"{report.layer} ({report.kind}): {report.unknowns} unknowns{unread}, "
    here = halt is not None and halt.stage == report.layer
    if report.route is Route.NOT_REACHED:
        if certified:
            return text + "not reached from above, certified all the same."
        late = here and halt is not None and halt.kind is HaltKind.LATE
        return text + ("not counted; the recursion stops here." if late else "not reached.")
    said = here and halt is not None and halt.kind is not HaltKind.CONTRADICTION
    note = f": {report.note}." if report.note and not said else "."
    stop = f"the recursion stops here{note}"
    if report.nullity is None:
        return f"{text}some of them open [{report.route}]; {stop}"
    if report.nullity:
        return f"{text}{report.nullity} of them open; {stop}"
    if report.note:
        text += f"as many independent equations [{report.route}]"
    else:
        text += report.route.words
    # Only a system that was solved has these two; a layer that was read off has none.
    numbers = {"condition": report.condition, "residual": report.residual}
    if report.route.solved:
        shown = [f"{name} {value:.1e}" for name, value in numbers.items() if isfinite(value)]
        text += "".join(f", {part}" for part in shown)
    return f"{text}; {stop}" if report.note else f"{text}."
