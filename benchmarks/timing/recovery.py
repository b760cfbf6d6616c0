"""Times of the steps of a recovery, one photograph at B = 1 from a float32 gradient.

    python -m benchmarks.timing.recovery                            every step of CNN6 and LeNet
    python -m benchmarks.timing.recovery --only "lenet and stage"   some of them

pytest-benchmark keeps the time; ``make test`` does not collect this file.  What each step returns
is checked, its time is only shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.one_photograph import OnePhotograph
from rgap.head.features import HeadCandidate
from rgap.inversion.answer import read_answer
from rgap.network.chain import parse
from rgap.precision import Estimate
from rgap.recursion.reached import Descent
from rgap.recursion.stage import solve_stage

ROUNDS = 3
STAGES = [("cnn6", i) for i in range(6)] + [("lenet", i) for i in range(3)]


@dataclass(frozen=True)
class Case(OnePhotograph):
    """The client, and what every step of the recovery starts from."""

    @cached_property
    def head(self) -> HeadCandidate:
        """The candidate of the head nearest to the true features."""
        return self.heads(self.problem())[0]

    @cached_property
    def descent(self) -> Descent:
        """What the recursion recovers from it."""
        return self.descend(self.problem(), self.head)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """CNN6 and LeNet with the gradient of the same photograph."""
    return {name: Case.of(name) for name in ("cnn6", "lenet")}


def timed(benchmark: Any, function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, after one run to warm up and ``ROUNDS`` timed ones."""
    return benchmark.pedantic(function, args=args, rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("name", ["cnn6", "lenet"])
@pytest.mark.benchmark(group="capture")
def test_capture(benchmark: Any, cases: dict[str, Case], name: str) -> None:
    """The client: forward and backward pass."""
    case = cases[name]
    update = timed(benchmark, rgap.capture, case.model, case.picture, case.target, case.loss)
    assert all(g.equal(case.update.gradients[n]) for n, g in update.gradients.items())


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
    known = Estimate(z, problem.precision.rounding(z))
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
    descent = timed(benchmark, case.descend, case.problem(), case.head)
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


def main() -> int:
    """Hand this file to pytest-benchmark."""
    parser = Arguments(__doc__, only="lenet and head")
    parser.add_argument("--only", default="", metavar="WORDS", help="as pytest -k takes them")
    words = ["--benchmark-enable", "--benchmark-columns=min,median,rounds", "-q", __file__]
    return int(pytest.main([*words, "-k", parser.parse_args().only]))


if __name__ == "__main__":
    sys.exit(main())
