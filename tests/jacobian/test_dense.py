"""Σ^{-1/2} J as a table: against autograd, and where the normal equations lose a direction."""

from __future__ import annotations

from math import inf

import pytest
import torch
from cases import mlp, pictures
from torch import Tensor, nn

from rgap.jacobian.dense import Dense
from rgap.jacobian.layer import ParameterRows
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.normal import Normal
from rgap.network.chain import parse
from rgap.separation.polish import normal_matrix
from rgap.solvers.positive import cholesky_in_place, resolved

F64 = torch.float64


def weighed(model: nn.Module, x: Tensor, kappa: Tensor) -> tuple[Linearisation, ParameterRows]:
    """A chain at x with a κ of any values, and weights of its rows."""
    draw = torch.Generator().manual_seed(3)
    point = Linearisation(parse(model, tuple(x.shape[1:])), x, kappa)
    return point, {
        n: (0.5 + torch.rand(len(g), generator=draw, dtype=F64)).reshape(-1, *([1] * (g.ndim - 1)))
        for n, g in point.gradients().items()
    }


def by_autograd(model: nn.Module, point: Linearisation, weights: ParameterRows) -> Tensor:
    """Σ^{-1/2} [∂g/∂κ, ∂g/∂x]."""
    names, parameters = zip(*model.named_parameters(), strict=True)

    def update(kappa: Tensor, x: Tensor) -> Tensor:
        grads = torch.autograd.grad((model(x) * kappa).sum(), parameters, create_graph=True)
        rows = {n: (g * weights[n]).flatten() for n, g in zip(names, grads, strict=True)}
        return torch.cat([rows[n] for n in sorted(rows)])

    parts = torch.autograd.functional.jacobian(update, (point.kappa, point.x))
    return torch.cat([part.flatten(1) for part in parts], 1)


def columns(point: Linearisation, weights: ParameterRows) -> Tensor:
    """The same from the products, which tests of their own hold against autograd."""
    on_kappa = point.jvp(None, torch.eye(point.kappa.numel(), dtype=F64).reshape(
        -1, *point.kappa.shape))  # fmt: skip
    on_x = point.jvp(torch.eye(point.x.numel(), dtype=F64).reshape(-1, *point.x.shape))
    parts = [
        torch.cat([(rows[n] * weights[n]).flatten(1) for n in sorted(rows)], 1)
        for rows in (on_kappa, on_x)
    ]
    return torch.cat(parts).T


def beside(apart: float) -> tuple[Linearisation, ParameterRows]:
    """Two samples at a distance, with one cotangent, of three fully connected layers."""
    x = pictures(2, 2).flatten(1)[:, :6]
    draw = torch.Generator().manual_seed(1)
    x[1] = x[0] + apart * torch.randn(6, generator=draw, dtype=F64)
    kappa = torch.randn(1, 5, generator=draw, dtype=F64).repeat(2, 1)
    torch.manual_seed(0)
    layers = (nn.Linear(6, 18), nn.Tanh(), nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 5))
    return weighed(nn.Sequential(*layers).double().eval(), x, kappa)


@pytest.mark.parametrize("free", [False, True])
def test_the_table_and_its_solutions_are_the_dense_ones(free: bool) -> None:
    model, draw = mlp("tanh", 2, widths=(6, 7)), torch.Generator().manual_seed(5)
    kappa = torch.randn(3, 5, generator=draw, dtype=F64)
    point, weights = weighed(model, pictures(3, 2).flatten(1), kappa)
    both, size = by_autograd(model, point, weights), kappa.numel()
    jacobian = both if free else both[:, size:]
    dense = Dense(point, weights, free)
    table = dense.basis @ dense.upper * dense.size
    assert float((table - jacobian).norm()) < 1e-12 * float(jacobian.norm())
    rows = {
        n: torch.randn(2, *g.shape, generator=draw, dtype=F64) for n, g in point.gradients().items()
    }
    flat = torch.cat([(rows[n] * weights[n]).flatten(1) for n in sorted(rows)], 1)
    wanted = torch.linalg.lstsq(jacobian, flat.T).solution.T
    dx, dkappa = dense.solve(rows)
    assert dx.shape == (2, *point.x.shape)
    parts = [dx.flatten(1)] if dkappa is None else [dkappa.flatten(1), dx.flatten(1)]
    assert (dkappa is not None) == free
    assert torch.allclose(torch.cat(parts, 1), wanted, rtol=1e-8, atol=1e-8 * float(wanted.norm()))


def test_entries_count_a_row_for_every_number() -> None:
    point, weights = beside(0.1)
    both = columns(point, weights)
    biases = sum(w.numel() for n, w in weights.items() if n.endswith("bias"))
    rows = both.shape[0] - biases
    assert Dense.entries(point) == rows * point.x.numel()
    assert Dense.entries(point, free=True) == rows * both.shape[1]


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
def test_worst_direction_is_what_is_left_once_cotangents_are_eliminated(
    apart: float, free: bool
) -> None:
    point, weights = beside(apart)
    both, size = columns(point, weights), point.kappa.numel()
    on_x = both[:, size:]
    if free:
        basis = torch.linalg.qr(both[:, :size]).Q
        on_x = on_x - basis @ (basis.T @ on_x)
        on_x = on_x - basis @ (basis.T @ on_x)
    smallest = float(torch.linalg.svdvals(on_x)[-1])
    assert Dense(point, weights, free).worst() == pytest.approx(1 / smallest, rel=0.1)


class Given:
    """A linearisation whose J is stated."""

    def __init__(self, jacobian: Tensor, first: int = 0) -> None:
        self.x = torch.zeros(1, jacobian.shape[1] - first, dtype=F64)
        self.kappa = torch.zeros(1, max(first, 1), dtype=F64)
        self.on_kappa, self.on_x = jacobian[:, :first], jacobian[:, first:]

    def jvp(self, dx: Tensor | None, dkappa: Tensor | None = None) -> ParameterRows:
        if dx is not None:
            return {"w": dx.flatten(1) @ self.on_x.T}
        assert dkappa is not None
        return {"w": dkappa.flatten(1) @ self.on_kappa.T}


@pytest.mark.parametrize("smallest", [1.0, 1e-6, 1e-10, 1e-12])
@pytest.mark.parametrize("units", [1e-8, 1.0, 1e8])
def test_worst_of_a_known_smallest_singular_value(smallest: float, units: float) -> None:
    """Also where the units of the unknowns differ: a scale of a column loses nothing."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 8, generator=draw, dtype=F64)).Q for n in (40, 8))
    values = torch.ones(8, dtype=F64)
    values[-1] = smallest
    matrix = units * (u * values) @ v.T
    found = Dense(Given(matrix), {"w": torch.ones((), dtype=F64)}).worst()
    assert found == pytest.approx(1 / (units * smallest), rel=0.1)


@pytest.mark.parametrize("free", [False, True])
def test_a_direction_that_rounding_has_emptied_is_open(free: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    matrix = torch.randn(40, 8, generator=draw, dtype=F64)
    matrix[:, 5] = matrix[:, 2] + 1e-15 * matrix[:, 3]
    weights = {"w": torch.ones((), dtype=F64)}
    assert Dense(Given(matrix, 4 if free else 0), weights, free).worst() == inf
    matrix[:, 5] = matrix[:, 2]
    assert Dense(Given(matrix, 4 if free else 0), weights, free).worst() == inf


@pytest.mark.parametrize("free", [False, True])
def test_normal_equations_say_when_they_have_lost_a_direction(free: bool) -> None:
    """Where they are resolved they say what the table says; near samples are not resolved."""
    seen = set()
    for digits in range(8):
        point, weights = beside(10.0**-digits)
        matrix = normal_matrix(point, weights, free)
        lower = cholesky_in_place(matrix.clone())
        seen.add(lower is not None and resolved(matrix, lower))
        if lower is not None and resolved(matrix, lower) and not free:
            factored = Normal(point, weights).factored()
            assert factored is not None
            worst = Dense(point, weights).worst()
            assert factored.worst() == pytest.approx(worst, rel=0.1)
    assert seen == {True, False}
