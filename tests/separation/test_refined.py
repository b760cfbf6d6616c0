"""K and X of a convolution by least squares, and what the errors of its gradient do to them."""

from __future__ import annotations

import pytest
import torch
from shifted import random_convolution
from torch.func import jvp

from rgap.network.affine import convolution
from rgap.network.geometry import Geometry
from rgap.separation.shifts.positions import Positions, tell_positions_apart
from rgap.separation.shifts.refined import Linearised, refined

F64 = torch.float64


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*like.shape, generator=generator, dtype=F64)


@pytest.mark.parametrize("seed", range(4))
def test_the_linear_system_is_that_of_the_gradient(seed: int) -> None:
    case, generator = random_convolution(seed), torch.Generator().manual_seed(seed)
    affine, at = case.affine, (case.cotangents, case.inputs)
    made = Linearised(affine, *at)

    def pushed(v: torch.Tensor) -> torch.Tensor:
        dk, dx = made.moved(v[None])
        return jvp(lambda k, x: affine.weight_gradient(x, k), at, (dk[0], dx[0]))[1]

    v, w = torch.randn(2, made.size, generator=generator, dtype=F64)
    rows = _normal(case.gradient, generator)
    torch.testing.assert_close((pushed(v) * rows).sum(), v @ made.adjoint(rows))
    torch.testing.assert_close((pushed(v) * pushed(w)).sum(), v @ made.normal(w[None])[0])
    wanted = pushed(v)
    again = pushed(made.solve(made.adjoint(wanted)[None])[0])
    assert float((again - wanted).norm()) <= 1e-5 * float(wanted.norm())


def _off(k: torch.Tensor, true: torch.Tensor) -> float:
    """Distance after the best factor, relative: of one sample Γ is a number."""
    alpha = (k * true).sum() / k.square().sum()
    return float((alpha * k - true).norm() / true.norm())


def test_errors_of_the_gradient_are_what_is_missed_and_what_they_make() -> None:
    shares, gained = list[float](), list[float]()
    for seed in range(20):
        case = random_convolution(seed)
        generator, true = torch.Generator().manual_seed(seed), case.cotangents
        noise = 1e-6 * float(case.gradient.square().mean().sqrt())
        sent = case.gradient + noise * _normal(case.gradient, generator)
        told = tell_positions_apart(case.affine, sent, noise)
        if not isinstance(told, Positions) or told.batch != 1:
            continue
        made, misfit = refined(case.affine, sent, told.cotangents, told.inputs, noise)
        assert misfit <= 1.5
        changes = [noise * made.adjoint(_normal(sent, generator)) for _ in range(12)]
        members, _ = made.moved(made.solve(torch.stack(changes)))
        predicted = sum(_off(made.k + one, made.k) ** 2 for one in members) ** 0.5 / 12**0.5
        shares.append(_off(made.k, true) / predicted)
        gained.append(_off(told.cotangents, true) / _off(made.k, true))
    assert len(shares) >= 4 and max(shares) <= 4.0 and min(gained) >= 0.9


def test_what_a_long_walk_adds_is_gone() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.zeros(24, 24, 3, 3, dtype=F64)
    affine = convolution("conv", w, None, ("w", None), (24, 4, 4), Geometry.of((3, 3), padding=1))
    x, k = torch.rand(2, 1, 24, 4, 4, generator=generator, dtype=F64)
    x, k = 0.01 * x + 1.0, (k - 0.5).abs()  # positions that are nearly the same
    sent = affine.weight_gradient(x, k)
    noise = 1e-9 * float(sent.square().mean().sqrt())
    sent = sent + noise * _normal(sent, generator)
    told = tell_positions_apart(affine, sent, noise)
    assert isinstance(told, Positions)
    made, misfit = refined(affine, sent, told.cotangents, told.inputs, noise)
    assert misfit <= 1.5
    assert _off(made.k, k) <= 0.2 * _off(told.cotangents, k)
