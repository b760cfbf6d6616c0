"""Levenberg–Marquardt from many starts, against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares
from torch import Tensor

from rgap.solvers.least_squares import levenberg_marquardt, refine, triangular_solve


class Sines:
    """r(t) = A sin(t) + C t² − d: dense, smooth, with many minima."""

    def __init__(self, rows: int, unknowns: int, seed: int, attainable: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.a, self.c = draw(rows, unknowns), 0.3 * draw(rows, unknowns)
        self.truth = draw(unknowns)
        self.d = self._terms(self.truth[None])[0] if attainable else draw(rows)

    def _terms(self, t: Tensor) -> Tensor:
        return t.sin() @ self.a.T + t.square() @ self.c.T

    def linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.a * t.cos()[:, None] + 2 * self.c * t[:, None]
        return self._terms(t) - self.d, slope

    def cost(self, t: Tensor) -> Tensor:
        return self.linear(t)[0].square().sum(1)

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, j = self.linear(t)
        return r.square().sum(1), (r[:, None] @ j)[:, 0], j.transpose(1, 2) @ j

    def some(self, index: Tensor) -> Sines:
        return self

    def scipy(self, start: Tensor) -> tuple[np.ndarray, float]:
        found = least_squares(
            lambda t: self.linear(torch.from_numpy(t)[None])[0][0].numpy(),
            start.numpy(),
            jac=lambda t: self.linear(torch.from_numpy(t)[None])[1][0].numpy(),
            method="lm",
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=2000,
        )
        return found.x, 2.0 * found.cost


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    unknowns=st.integers(1, 6),
    spare=st.integers(0, 9),
    attainable=st.booleans(),
)
def test_same_minimum_as_scipy(seed: int, unknowns: int, spare: int, attainable: bool) -> None:
    """Near a minimum both must end in it: started 1 percent from where SciPy ends."""
    problem = Sines(unknowns + spare, unknowns, seed, attainable)
    first, _ = problem.scipy(problem.truth)
    there = torch.from_numpy(first)
    slope = problem.linear(there[None])[1][0]
    values = torch.linalg.svdvals(slope)
    # Where a large residual bends a flat minimum, Gauss–Newton is linear at best (Dennis 1977).
    residual = float(problem.cost(there[None]).sqrt())
    curvature = float(problem.a.norm() + 2 * problem.c.norm())
    assume(float(values[-1]) ** 2 > 3 * residual * curvature + 1e-3)
    generator = torch.Generator().manual_seed(seed)
    starts = there + 1e-2 * torch.randn(5, unknowns, generator=generator, dtype=torch.float64)
    found = levenberg_marquardt(problem, starts, max_iterations=100)
    for t, cost, start in zip(found.value, found.cost, starts, strict=True):
        expected, least = problem.scipy(start)
        assert float(cost) <= least * (1 + 1e-9) + 1e-20
        assert torch.allclose(t, torch.from_numpy(expected), atol=1e-6)


def test_random_starts_end_at_minima_that_scipy_confirms() -> None:
    problem = Sines(9, 4, 5)
    starts = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = levenberg_marquardt(problem, starts, max_iterations=200)
    assert bool((found.cost <= problem.cost(starts)).all())
    assert torch.allclose(found.cost, problem.cost(found.value), rtol=1e-12, atol=1e-28)
    assert int(found.settled.sum()) >= 38
    assert bool((found.cost < 1e-20).any())  # one of forty meets the root
    for t, cost in zip(found.value[found.settled], found.cost[found.settled], strict=True):
        _, least = problem.scipy(t)
        assert float(cost) <= least * (1 + 1e-6) + 1e-18


class Logarithms:
    """log t = d: not a number left of 0."""

    def __init__(self, d: Tensor) -> None:
        self.d = d

    def linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t.log() - self.d, torch.diag_embed(1 / t)

    def cost(self, t: Tensor) -> Tensor:
        return (t.log() - self.d).square().sum(1)

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, j = self.linear(t)
        return r.square().sum(1), (r[:, None] @ j)[:, 0], j.transpose(1, 2) @ j

    def some(self, index: Tensor) -> Logarithms:
        return self


def test_starts_that_are_no_numbers_do_not_spoil_the_others() -> None:
    d = torch.tensor([0.3, -0.7], dtype=torch.float64)
    starts = torch.tensor(
        [[-1.0, 1.0], [1.0, 1.0], [torch.nan, 1.0], [torch.inf, 2.0], [2.0, 0.2]],
        dtype=torch.float64,
    )
    found = levenberg_marquardt(Logarithms(d), starts, tolerance=1e-26)
    assert found.cost.isinf().tolist() == [True, False, True, True, False]
    assert not bool(found.settled[[0, 2, 3]].any())
    assert torch.allclose(found.value[[1, 4]], d.exp().expand(2, 2), rtol=1e-10)


def test_a_step_out_of_the_domain_is_shortened() -> None:
    """The full step from t = 8 to the root of log t lands left of 0, where nothing is defined."""
    d = torch.zeros(1, dtype=torch.float64)
    found = levenberg_marquardt(Logarithms(d), torch.tensor([[8.0]], dtype=torch.float64))
    assert torch.allclose(found.value, torch.ones(1, 1, dtype=torch.float64), rtol=1e-10)


def test_nothing_unknown() -> None:
    problem = Sines(3, 1, 0)

    class Fixed:
        def cost(self, t: Tensor) -> Tensor:
            return problem.cost(problem.truth.expand(len(t), 1) + 1.0)

        def linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
            raise AssertionError("there is nothing to linearise in")

        normal = linear

    start = torch.zeros(4, 0, dtype=torch.float64)
    found = levenberg_marquardt(Fixed(), start)
    assert found.value.shape == (4, 0) and found.iterations == 0
    assert bool(found.settled.all()) and bool((found.cost > 0).all())
    assert refine(Fixed(), start).shape == (4, 0)


def test_enough_stops_before_the_last_start() -> None:
    problem = Sines(8, 3, 2)
    generator = torch.Generator().manual_seed(0)
    starts = torch.cat(
        [
            problem.truth.expand(6, 3),
            problem.truth + 3 * torch.randn(2, 3, generator=generator, dtype=torch.float64),
        ]
    )
    early = levenberg_marquardt(problem, starts, tolerance=1e-24, enough=0.7)
    late = levenberg_marquardt(problem, starts, tolerance=1e-24, enough=1.0)
    assert early.iterations < late.iterations
    assert bool(early.settled[:6].all())


class Counted(Sines):
    """Counts the points at which a Gauss–Newton matrix was asked for."""

    points = 0

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.points += len(t)
        return super().normal(t)


def test_settled_starts_cost_nothing() -> None:
    problem = Counted(8, 3, 2)
    there = problem.truth.expand(5, 3)
    found = levenberg_marquardt(problem, there, tolerance=1e-24)
    assert problem.points == 0 and found.iterations == 0 and bool(found.settled.all())
    away = torch.cat([there, problem.truth[None] + 0.3])
    found = levenberg_marquardt(problem, away, tolerance=1e-24)
    assert problem.points == found.iterations > 1
    assert torch.equal(found.value[:5], there) and bool(found.settled.all())


class Flat:
    """A linear problem with singular values from 1 to ``least``, whose solution is known."""

    def __init__(self, least: float, unknowns: int = 6, rows: int = 20) -> None:
        generator = torch.Generator().manual_seed(7)

        def orthonormal(m: int, n: int) -> Tensor:
            draw = torch.randn(m, n, generator=generator, dtype=torch.float64)
            return torch.linalg.qr(draw).Q

        values = torch.logspace(0, np.log10(least), unknowns, dtype=torch.float64)
        self.jacobian = orthonormal(rows, unknowns) * values @ orthonormal(unknowns, unknowns).T
        self.truth = torch.randn(unknowns, generator=generator, dtype=torch.float64)
        self.rhs = self.jacobian @ self.truth

    def linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t @ self.jacobian.T - self.rhs, self.jacobian.expand(len(t), -1, -1)

    def cost(self, t: Tensor) -> Tensor:
        return self.linear(t)[0].square().sum(1)

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, j = self.linear(t)
        return r.square().sum(1), (r[:, None] @ j)[:, 0], j.transpose(1, 2) @ j

    def some(self, index: Tensor) -> Flat:
        return self


def test_refine_reaches_what_the_normal_equations_cannot() -> None:
    """At a condition of 1e10 JᵀJ is singular to working precision; QR keeps six digits."""
    problem = Flat(1e-10)
    start = torch.zeros(2, 6, dtype=torch.float64)
    ends = levenberg_marquardt(problem, start, max_iterations=100)
    rough = (ends.value - problem.truth).norm(dim=1) / problem.truth.norm()
    fine = (refine(problem, ends.value) - problem.truth).norm(dim=1) / problem.truth.norm()
    assert bool((rough > 1e-3).all())
    assert bool((fine < 1e-5).all())


def test_refine_takes_no_step_that_raises_the_cost() -> None:
    problem = Sines(6, 3, 11)
    far = torch.full((3, 3), 40.0, dtype=torch.float64) * torch.tensor([[1.0], [-1.0], [0.5]])
    assert bool((problem.cost(refine(problem, far, steps=1)) <= problem.cost(far)).all())
    at = problem.truth[None]
    assert torch.equal(refine(problem, at), at)


def test_refine_squares_the_error_of_an_attainable_problem() -> None:
    problem = Sines(10, 4, 3)
    near = problem.truth + 1e-4
    once = (refine(problem, near[None], steps=1)[0] - problem.truth).norm()
    assert float(once) < 1e-6
    assert torch.allclose(refine(problem, near[None])[0], problem.truth, atol=1e-13)


@pytest.mark.parametrize(("rows", "unknowns"), [(5, 5), (9, 3), (40, 7)])
def test_triangular_solve_is_the_pseudo_inverse(rows: int, unknowns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    j = torch.randn(3, rows, unknowns, generator=generator, dtype=torch.float64)
    r = torch.randn(3, rows, generator=generator, dtype=torch.float64)
    expected = (torch.linalg.pinv(j) @ r[:, :, None])[:, :, 0]
    assert torch.allclose(triangular_solve(j, r), expected, rtol=1e-9, atol=1e-11)


def test_triangular_solve_without_full_rank_takes_no_step() -> None:
    j = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    j[1, :, 2] = 0.0
    r = torch.ones(2, 6, dtype=torch.float64)
    step = triangular_solve(j, r)
    assert bool((step[0] != 0).all())
    assert torch.equal(step[1], torch.zeros(3, dtype=torch.float64))
