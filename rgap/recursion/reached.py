"""What the recursion reached: the data, or the lowest stage of which something is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from rgap.constraints import weight_constraint
from rgap.halt import Halt
from rgap.jacobian.layer import each
from rgap.limits import MISTAKEN, REFUTED
from rgap.network.chain import Chain
from rgap.network.reshape import Reshape
from rgap.precision import Estimate
from rgap.recursion.stage import StageSolution

__all__ = ["Descent", "Reached"]


@dataclass(frozen=True)
class Reached:
    """The lowest stage of which something is known.

    Attributes:
        index: of the stage.
        k: cotangent at its output.
        u: its input; None where its equations leave some of it open.
        z: its pre-activation where they do.
    """

    index: int
    k: Estimate
    u: Estimate | None
    z: Estimate | None


@dataclass(frozen=True)
class Descent:
    """What the recursion recovered, from the top down, and the data if it got there.

    Attributes:
        reached: the lowest stage of which something is known.
        solutions: by stage index.
        data: the input of stage 0 with its ensemble, or None.
        halt: why it ended early, or None.
        inputs: recovered inputs x_i by stage index.
        features: recovered inputs u_i of the affine maps by stage index.
        cotangents: k_i at the outputs of the affine maps by stage index.
        completed: the data come from a completion, not from the equations of every stage.
        mistaken: units of a ReLU, on average, that are on but within their error of off.
        partial: the data where only some of their entries are determined; the others are marked
            as unknown (see :class:`Estimate`).
    """

    reached: Reached
    solutions: Mapping[int, StageSolution] = field(default_factory=dict)
    inputs: Mapping[int, Estimate] = field(default_factory=dict)
    features: Mapping[int, Estimate] = field(default_factory=dict)
    cotangents: Mapping[int, Estimate] = field(default_factory=dict)
    data: Estimate | None = None
    halt: Halt | None = None
    completed: bool = False
    mistaken: float = 0.0
    partial: Estimate | None = None

    def require_data(self) -> Estimate:
        """The recovered data.

        Raises:
            ValueError: the recursion ended before it.
        """
        if self.data is None:
            raise ValueError(f"the recursion ended at '{self.require_halt().stage}'")
        return self.data

    def require_halt(self) -> Halt:
        """Why the recursion ended early.

        Raises:
            ValueError: it did not.
        """
        if self.halt is None:
            raise ValueError("the recursion reached the data")
        return self.halt

    def preconditioner(self, chain: Chain) -> Callable[[Tensor], Tensor] | None:
        """The data stage's factored equations as an approximate inverse of the whole update's.

        ``(Kᵀ Σ⁻¹ K + Wᵀ Ω⁻¹ W)⁻¹`` of stage 0, pulled through its lead.

        Args:
            chain: the network.

        Returns:
            A map of directions [S, B, *input_shape]; None if the data came straight from a bias.
        """
        if self.completed:
            return lambda v: v
        step, stage = self.solutions.get(0), chain.stages[0]
        simple = all(op.elementwise or isinstance(op, Reshape) for op in stage.lead)
        if step is None or step.factor is None or not simple:
            return None
        made = step.factor

        def inverse(v: Tensor) -> Tensor:
            coupling = weight_constraint(stage.affine, v.shape[1], read_only=True)
            u = v
            for op in stage.lead:  # (L⁻¹)ᵀ: a reshape is orthogonal, a scaling its own transpose
                u = each(op.forward if isinstance(op, Reshape) else op.inverse_linear, u)
            table = coupling.unfold(u.flatten(0, 1), u.shape[0])
            solved = coupling.fold(made.precondition(table)).reshape(u.shape)
            for op in reversed(stage.lead):
                solved = each(op.inverse_linear, solved)
            return solved

        return inverse

    @property
    def worst(self) -> tuple[int, float]:
        """Stage whose equations contradict each other most, with its weighted rms residual."""
        misfits = [(step.misfit, index) for index, step in self.solutions.items()]
        misfit, index = max(misfits, default=(0.0, -1))
        return index, misfit

    @property
    def doubt(self) -> str:
        """Why equations that contradict each other refute nothing, or "".

        What is above a ReLU tells a small value from none only up to its error, and a cotangent
        that was taken for 0 contradicts the layers below as another model would.
        """
        if self.mistaken < MISTAKEN:
            return ""
        return (
            f"about {self.mistaken:.1g} units of a ReLU are on by less than the error of this "
            "update and were taken for off, which contradicts like another model does"
        )

    @property
    def refuted(self) -> bool:
        """True if the equations of some stage contradict the features it started from."""
        return self.worst[1] > REFUTED
