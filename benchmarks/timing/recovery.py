"""Times of the steps of a recovery, one photograph at B = 1 from a float32 gradient.

    python -m pytest benchmarks/timing/recovery.py --benchmark-enable \
        --benchmark-columns=min,median,rounds -q

``make bench`` runs it; ``make test`` does not collect it.  What each step returns is checked, its
time is only shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.head.features import HeadCandidate, HeadFailure, solve_head
from rgap.inversion.answer import head_gradients, read_answer
from rgap.inversion.problem import Problem, prepare
from rgap.network.chain import parse
from rgap.precision import Known
from rgap.recursion.descend import Descent, descend
from rgap.recursion.stage import BUDGET, solve_stage

ROUNDS = 3
STAGES = [("cnn6", i) for i in range(6)] + [("lenet", i) for i in range(3)]


@dataclass(frozen=True)
class Case:
    """What a client has and sends, and what every step of the recovery starts from."""

    model: nn.Module
    picture: Tensor
    target: Tensor
    loss: str
    update: rgap.Update

    def problem(self) -> Problem:
        """Checked and in float64, with a fresh random generator."""
        return prepare(self.model, self.update, None, None, 0.0, None, None, 0, BUDGET)

    def heads(self, problem: Problem) -> list[HeadCandidate]:
        """Candidates of the head equations, nearest to the true features first."""
        stage = problem.chain.stages[-1]
        found = solve_head(
            stage,
            *head_gradients(stage, problem.gradients),
            self.update.loss,
            problem.precision,
        )
        assert not isinstance(found, HeadFailure)
        features = problem.chain.trace(self.picture.double())[-1][0]
        for op in stage.lead:
            features = op.forward(features)
        return sorted(found, key=lambda c: float((c.features.value - features).norm()))

    @cached_property
    def head(self) -> HeadCandidate:
        """The candidate of the head nearest to the true features."""
        return self.heads(self.problem())[0]

    @cached_property
    def descent(self) -> Descent:
        """What the recursion recovers from it."""
        return self.descend(self.problem())

    def descend(self, problem: Problem) -> Descent:
        """From the head to the data."""
        last = len(problem.chain.stages) - 1
        return descend(
            problem.chain,
            problem.gradients,
            last,
            self.head.features,
            self.head.cotangent,
            problem.precision,
        )

    def error(self, inputs: Tensor) -> float:
        """Rms error of a recovered picture."""
        return float((inputs.double() - self.picture.double()).square().mean().sqrt())


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """CNN6 and LeNet with the gradient of the same photograph."""
    return {name: _case(name) for name in ("cnn6", "lenet")}


def _case(name: str) -> Case:
    model, loss = rgap.models.BUILTIN[name](seed=0), rgap.models.LOSSES[name]
    picture = rgap.photos.load(1, dtype=torch.float32)
    target = torch.tensor([3]) if loss == "cross_entropy" else torch.tensor([[1.0]])
    return Case(model, picture, target, loss, rgap.capture(model, picture, target, loss))


def timed(benchmark: Any, function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, after one run to warm up and ``ROUNDS`` timed ones."""
    return benchmark.pedantic(function, args=args, rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("name", ["cnn6", "lenet"])
@pytest.mark.benchmark(group="capture")
def test_capture(benchmark: Any, cases: dict[str, Case], name: str) -> None:
    """The client: forward and backward pass."""
    case = cases[name]
    update = timed(benchmark, rgap.capture, case.model, case.picture, case.target, case.loss)
    assert all(torch.equal(g, case.update.gradients[n]) for n, g in update.gradients.items())


@pytest.mark.parametrize("name", ["cnn6", "lenet"])
@pytest.mark.benchmark(group="parse")
def test_parse(benchmark: Any, cases: dict[str, Case], name: str) -> None:
    """The model as a chain of stages."""
    chain = timed(benchmark, parse, cases[name].model, (3, 32, 32))
    assert chain.complete


@pytest.mark.parametrize("name", ["cnn6", "lenet"])
@pytest.mark.benchmark(group="head equations")
def test_head(benchmark: Any, cases: dict[str, Case], name: str) -> None:
    """Features, cotangent and label from the last layer."""
    case = cases[name]
    best = timed(benchmark, case.heads, case.problem())[0]
    assert best.labels.flatten().tolist() == case.target.flatten().tolist()


@pytest.mark.parametrize(("name", "index"), STAGES)
@pytest.mark.benchmark(group="one stage of the recursion")
def test_stage(benchmark: Any, cases: dict[str, Case], name: str, index: int) -> None:
    """The equations of one layer, from true z and recovered k."""
    case = cases[name]
    problem = case.problem()
    stage = problem.chain.stages[index]
    z = problem.chain.trace(case.picture.double())[index][1]
    known = Known(z, problem.precision.rounding(z))
    step = timed(
        benchmark,
        solve_stage,
        stage.affine,
        problem.gradients[stage.affine.weight_name],
        known,
        case.descent.cotangents[index],
        problem.precision,
    )
    assert step.solution.value is not None


@pytest.mark.parametrize("name", ["cnn6", "lenet"])
@pytest.mark.benchmark(group="recursion")
def test_recursion(benchmark: Any, cases: dict[str, Case], name: str) -> None:
    """From the head to the picture."""
    case = cases[name]
    assert case.head.admissible  # found before the clock starts
    descent = timed(benchmark, case.descend, case.problem())
    assert case.error(descent.require_data().value) < 1e-4


@pytest.mark.parametrize("name", ["cnn6", "lenet"])
@pytest.mark.benchmark(group="polish and label")
def test_polish(benchmark: Any, cases: dict[str, Case], name: str) -> None:
    """Gauss–Newton on the whole update, and the label."""
    case = cases[name]
    cotangent = case.head.cotangent
    answer = timed(benchmark, read_answer, case.problem(), case.descent, cotangent)
    before = case.error(case.descent.require_data().value)
    assert case.error(answer.polished.data.value) < 1.1 * before


@pytest.mark.parametrize("name", ["cnn6", "lenet"])
@pytest.mark.benchmark(group="invert, end to end")
def test_invert(benchmark: Any, cases: dict[str, Case], name: str) -> None:
    """All of it, with the certificate."""
    case = cases[name]
    recovery = timed(benchmark, rgap.invert, case.model, case.update)
    assert recovery.status is rgap.Status.EXACT
    assert case.error(recovery.inputs) < recovery.error_bound
