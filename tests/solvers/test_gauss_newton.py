"""Gauss–Newton with a prior, and the priors against autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rgap.solvers.gauss_newton import Schedule, _images, conjugate_gradients, gauss_newton
from rgap.solvers.priors import Prior, Squares, Sum, TotalVariation, natural

F64 = torch.float64
PRIORS: dict[str, Prior] = {
    "isotropic": TotalVariation(smoothing=0.05),
    "anisotropic": TotalVariation(weight=2.0, smoothing=0.05, isotropic=False),
    "powers": TotalVariation(smoothing=0.05, power=0.7, chroma=3.0),
    "second": TotalVariation(smoothing=0.05, order=2, chroma=0.5, isotropic=False),
    "natural": natural(3, 2.0),
    "squares": Squares(weight=0.3, centre=0.4),
    "sum": Sum([TotalVariation(smoothing=0.1), Squares()]),
}


def pictures(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("name", PRIORS)
def test_gradient_against_autograd(name: str) -> None:
    prior, x = PRIORS[name], pictures().requires_grad_()
    (expected,) = torch.autograd.grad(prior.value(x), x)
    assert torch.allclose(prior.gradient(x.detach()), expected, atol=1e-14)


@pytest.mark.parametrize("name", PRIORS)
def test_the_curvature_touches_the_value_from_above(name: str) -> None:
    """value(x + v) ≤ value(x) + ⟨gradient, v⟩ + ½⟨v, curvature v⟩ for every v."""
    prior, x = PRIORS[name], pictures()
    bend, slope = prior.curvature(x), prior.gradient(x)
    for seed in range(1, 20):
        v = (pictures(seed) - 0.5) * 3.0 ** (seed % 5 - 2)
        above = prior.value(x) + (slope * v).sum() + 0.5 * (v * bend(v)).sum()
        assert float(prior.value(x + v)) <= float(above) + 1e-12
    v, w = pictures(1), pictures(2)
    assert torch.allclose((bend(v) * w).sum(), (v * bend(w)).sum())


def test_a_weight_means_the_same_for_every_size_and_batch() -> None:
    x = pictures()
    for prior in PRIORS.values():
        double = torch.cat([x, x])
        assert torch.allclose(prior.value(double), prior.value(x))


def test_total_variation_needs_neighbours_along_space_alone() -> None:
    x = pictures()
    rows = x.reshape(2, 3, 30)
    prior = TotalVariation(smoothing=1e-9, isotropic=False)
    assert torch.allclose(prior.value(rows), rows.diff(dim=2).abs().sum() / rows.numel())
    assert torch.allclose(prior.value(rows.flip(1)), prior.value(rows)), "channels do not mix"
    with pytest.raises(ValueError, match=r"write prior=Squares\(\)"):
        prior.value(x.reshape(2, 90))


def test_second_differences_do_not_see_slopes() -> None:
    slope = torch.linspace(0, 1, 8, dtype=F64).expand(1, 1, 8, 8)
    first, second = (TotalVariation(smoothing=1e-9, order=order) for order in (1, 2))
    assert float(first.value(slope)) > 0.1
    assert float(second.value(slope)) < 1e-8
    narrow = slope[..., :2]  # no entry has two neighbours along the last axis
    assert torch.allclose(second.gradient(narrow), torch.zeros_like(narrow), atol=1e-7)


def test_chroma_weighs_what_channels_do_not_share() -> None:
    grey = pictures()[:, :1].expand(-1, 3, -1, -1)
    plain, coloured = TotalVariation(), TotalVariation(chroma=3.0)
    assert torch.allclose(plain.value(grey), coloured.value(grey))
    opposed = pictures()[:, :1] * torch.tensor([1.0, -1.0, 0.0], dtype=F64).reshape(1, 3, 1, 1)
    assert torch.allclose(
        TotalVariation(smoothing=0.03).value(3 * opposed),
        TotalVariation(smoothing=0.03, chroma=3.0).value(opposed),
    )


@pytest.mark.parametrize("wrong", [{"power": 0.0}, {"power": 3.0}, {"order": 3}])
def test_a_prior_says_what_it_takes(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected .* write "):
        TotalVariation(**wrong)


@dataclass
class Rational:
    """r(x) = A x/(1 + |x|²/10) − r₀, two equations fewer than unknowns."""

    x: Tensor
    matrix: Tensor
    sent: Tensor

    @property
    def residual(self) -> Tensor:
        return self.matrix @ self.x / (1 + self.x.square().sum() / 10) - self.sent

    def push(self, v: Tensor) -> Tensor:
        return torch.func.jvp(
            lambda x: Rational(x, self.matrix, self.sent).residual, (self.x,), (v,)
        )[1]

    def pull(self, r: Tensor) -> Tensor:
        return torch.func.vjp(lambda x: Rational(x, self.matrix, self.sent).residual, self.x)[1](r)[
            0
        ]

    def jacobian(self) -> Tensor | None:
        return None


def test_equations_hold_and_the_prior_chooses_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 6, generator=generator, dtype=F64)
    truth = 0.5 * torch.randn(6, generator=generator, dtype=F64)
    sent = matrix @ truth / (1 + truth.square().sum() / 10)
    seen = []
    found = gauss_newton(
        lambda x: Rational(x, matrix, sent),
        torch.zeros(6, dtype=F64),
        Squares(centre=0.0),
        Schedule(accuracy=1e-10, lowest=1e-12, steps=60),
        watch=lambda step, x: seen.append((step.misfit, x)),
    )
    assert found.misfit < 1e-20 and len(seen) == len(found.steps)
    # Of all solutions the one nearest to the centre: the gradient of the prior has no part along
    # directions that the equations leave open.
    slope = torch.autograd.functional.jacobian(
        lambda x: Rational(x, matrix, sent).residual, found.value
    )
    null = torch.linalg.svd(slope).Vh[4:]
    assert float((null @ found.value).norm()) < 1e-5 * float(found.value.norm())


def test_it_stops_where_it_is_told_to() -> None:
    matrix, sent = torch.eye(4, 6, dtype=F64), torch.full((4,), 0.1, dtype=F64)

    def run(schedule: Schedule) -> str:
        start = torch.zeros(6, dtype=F64)
        return gauss_newton(
            lambda x: Rational(x, matrix, sent), start, Squares(centre=0.0), schedule
        ).ended

    assert "noise explains" in run(Schedule(target=1e-3))
    assert "time is up" in run(Schedule(seconds=0.0))
    assert "2 steps are done" in run(Schedule(steps=2))
    assert "nothing any more" in run(Schedule(steps=100))


def test_a_start_that_is_no_number_ends_at_once() -> None:
    found = gauss_newton(
        lambda x: Rational(x, torch.eye(4, 6, dtype=F64), torch.zeros(4, dtype=F64)),
        torch.full((6,), torch.nan, dtype=F64),
        Squares(),
        Schedule(),
    )
    assert found.ended == "the residual is not finite at the start"
    assert found.steps == () and found.misfit == float("inf")


def test_a_box_is_kept() -> None:
    matrix, sent = torch.eye(4, 6, dtype=F64), torch.full((4,), 5.0, dtype=F64)
    found = gauss_newton(
        lambda x: Rational(x, matrix, sent),
        torch.full((6,), 0.5, dtype=F64),
        Squares(),
        Schedule(steps=15),
        project=lambda x: x.clamp(0, 1),
    )
    assert float(found.value.min()) >= 0 and float(found.value.max()) <= 1
    assert found.value[:4].allclose(torch.ones(4, dtype=F64), atol=1e-3)


def test_conjugate_gradients_solve_and_survive_a_singular_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 5, generator=generator, dtype=F64)
    matrix, rhs = a.T @ a, torch.randn(5, generator=generator, dtype=F64)
    x, count = conjugate_gradients(lambda v: matrix @ v, rhs, 50, 1e-12)
    assert torch.allclose(matrix @ x, rhs, atol=1e-9) and count <= 8
    x, _ = conjugate_gradients(lambda v: torch.zeros_like(v), rhs, 50, 1e-12)
    assert torch.equal(x, torch.zeros(5, dtype=F64))


def test_a_curvature_is_taken_of_many_vectors_at_once() -> None:
    calls = []

    def counted(v: Tensor) -> Tensor:
        calls.append(1)
        return bend(v)

    def branching(v: Tensor) -> Tensor:
        return bend(v) if float(v.sum()) > 0.5 else 0.0 * v

    bend = natural(3).curvature(torch.rand(1, 3, 8, 8, dtype=torch.float64))
    eye = torch.eye(192, dtype=torch.float64).reshape(192, 1, 3, 8, 8)
    expected = torch.stack([bend(e) for e in eye])
    torch.testing.assert_close(_images(counted, eye), expected, rtol=0, atol=0)
    assert len(calls) == 3
    torch.testing.assert_close(_images(branching, eye), expected, rtol=0, atol=0)
