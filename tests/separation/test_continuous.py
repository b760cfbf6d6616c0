"""Batches with real-valued targets: the cotangents at the head are unknowns beside the samples."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cases import mlp, pictures
from steps_table import LOSSES, Case, drawn, fault, network
from torch import Tensor, nn

from rgap import Status, capture, invert
from rgap.inversion.polish import Equations, polish
from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.eliminated import Eliminated
from rgap.jacobian.layer import ParameterRows
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.normal import Normal
from rgap.limits import FITS
from rgap.network.chain import parse
from rgap.precision import Estimate, Precision
from rgap.separation.polish import normal_matrix

F64 = torch.float64


def held(activation: str = "tanh") -> tuple[Linearisation, ParameterRows]:
    """Three samples of a network of three layers with a κ of any values, and weights of rows."""
    model = mlp(activation, 2, widths=(6, 7))
    draw = torch.Generator().manual_seed(0)
    kappa = torch.randn(3, 5, generator=draw, dtype=F64)
    point = Linearisation(parse(model, (48,)), pictures(3, 2).flatten(1), kappa)
    weights = {
        n: (0.1 + torch.rand(len(g), generator=draw, dtype=F64)).reshape(-1, *([1] * (g.ndim - 1)))
        for n, g in point.gradients().items()
    }
    return point, weights


def columns(point: Linearisation, weights: ParameterRows) -> Tensor:
    """Σ^{-1/2} [∂g/∂κ, ∂g/∂x], one column at a time."""
    found = []
    for which, like in enumerate((point.kappa, point.x)):
        for entry in torch.eye(like.numel(), dtype=F64):
            direction = entry.reshape(1, *like.shape)
            rows = point.jvp(None, direction) if which == 0 else point.jvp(direction)
            found.append(torch.cat([(rows[n] * weights[n]).flatten() for n in weights]))
    return torch.stack(found, 1)


def test_the_normal_matrix_with_free_cotangents_is_dense_jtwj() -> None:
    point, weights = held()
    jacobian = columns(point, weights)
    found, expected = normal_matrix(point, weights, free=True), jacobian.T @ jacobian
    assert torch.equal(found, found.T)
    assert float((found - expected).norm()) < 1e-13 * float(expected.norm())


@pytest.mark.parametrize("activation", ["tanh", "leaky_relu"])
def test_pulls_are_the_transpose_in_both_arguments(activation: str) -> None:
    point, weights = held(activation)
    jacobian = columns(point, weights)
    draw = torch.Generator().manual_seed(3)
    rows = {n: torch.randn(2, *g.shape, generator=draw, dtype=F64)
            for n, g in point.gradients().items()}  # fmt: skip
    on_x, on_kappa = point.pulls({n: rows[n] * weights[n] for n in rows})
    flat = torch.cat([rows[n].flatten(1) for n in weights], 1)
    found = torch.cat([on_kappa.flatten(1), on_x.flatten(1)], 1)
    assert torch.allclose(found, flat @ jacobian, rtol=1e-12, atol=1e-12)


def test_elimination_leaves_the_schur_complement() -> None:
    """JᵀΣ⁻¹PJ, what P leaves, and the κ that explains most, against a dense least squares."""
    point, weights = held()
    jacobian, size = columns(point, weights), point.kappa.numel()
    on_kappa, on_x = jacobian[:, :size], jacobian[:, size:]
    free = Eliminated.of(point, weights)
    assert free is not None
    draw = torch.Generator().manual_seed(4)
    rows = {n: torch.randn(2, *g.shape, generator=draw, dtype=F64)
            for n, g in point.gradients().items()}  # fmt: skip
    flat = torch.cat([(rows[n] * weights[n]).flatten(1) for n in weights], 1).T
    wanted = torch.linalg.lstsq(on_kappa, flat).solution
    kappa, left = free.explained(rows)
    found = torch.cat([(left[n] * weights[n]).flatten(1) for n in weights], 1).T
    assert torch.allclose(kappa.flatten(1).T, wanted, rtol=1e-9, atol=1e-10)
    assert torch.allclose(found, flat - on_kappa @ wanted, rtol=1e-9, atol=1e-10)
    basis = torch.linalg.qr(on_kappa).Q
    apart = on_x - basis @ (basis.T @ on_x)
    images = Normal(point, weights, free).apply(torch.eye(point.x.numel(), dtype=F64).reshape(
        -1, *point.x.shape))  # fmt: skip
    expected = apart.T @ apart
    assert float((images.flatten(1) - expected).norm()) < 1e-11 * float(expected.norm())


def test_features_that_tell_nothing_apart_cannot_be_eliminated() -> None:
    point, weights = held()
    twice = point.moved(point.x[[0, 0, 1]])
    assert Eliminated.of(twice, weights) is None


def test_the_polish_on_the_whole_update_moves_targets_along() -> None:
    """A start that is off, with the targets that were read at it, ends at the truth."""
    model = mlp("tanh", 5)
    x, draw = pictures(3, 6), torch.Generator().manual_seed(7)
    y = torch.randn(3, 5, generator=draw, dtype=F64)
    update = capture(model, x, y, LOSSES["squared"])
    chain = parse(model, (3, 4, 4))
    off = torch.randn(x.shape, generator=draw, dtype=F64)
    wrong = y + 1e-4 * torch.randn(y.shape, generator=draw, dtype=F64)
    done = polish(
        Equations(chain, {n: g.double() for n, g in update.gradients.items()}, Precision(F64)),
        Estimate(x + 1e-5 * off, 1e-5 * off[None].expand(8, *off.shape)),
        BatchLoss(LOSSES["squared"], wrong, torch.ones(3, dtype=F64)),
        lambda v: v,
    )  # fmt: skip
    assert done.eliminated and done.head is not None
    assert done.full and done.misfit < FITS
    assert float((done.data.value - x).abs().max()) < 1e-9
    assert float((done.head.targets - y).abs().max()) < 1e-9


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("loss", ["binary", "squared", "soft"])
@pytest.mark.parametrize("seed", [1, 6])
def test_a_batch_of_samples_that_are_alike_is_certified(seed: int, loss: str, batch: int) -> None:
    """Inputs in (0.5, 0.73): a κ read off the features once is off by their condition."""
    case = Case("none", "input", batch, loss, seed)
    model = network(case)
    x, y = drawn(case, model)
    x = torch.sigmoid(x)
    found = invert(model, capture(model, x, y, LOSSES[loss]))
    assert found.status is Status.EXACT, found.reason
    assert fault(found, x, y) == ""


@pytest.mark.cases(1)
@pytest.mark.parametrize("seed", [5, 37])
def test_ends_of_a_line_of_solutions_are_no_samples(seed: int) -> None:
    """Two samples with one pattern of a LeakyReLU: every point between solves their equations.

    The line ends at kinks, where the equations are open from one side only: the points there, with
    cotangents of their own, would send both gradients.
    """
    torch.manual_seed(99)
    widths = (20, 24, 22, 20, 8)
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.LeakyReLU(0.2)]
    model = nn.Sequential(*layers[:-1]).eval()
    x, y = alike_in_pattern(model, seed)
    found = invert(model, capture(model, x, y, LOSSES["soft"]))
    assert found.status is Status.UNDERDETERMINED
    assert found.inputs is None and not found.certified


def alike_in_pattern(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """Six samples of which two share every sign of the first layer, and soft targets."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 20, generator=draw)
    y = torch.rand(6, 8, generator=draw).softmax(1)
    signs = model[0](x) > 0
    same = (signs[:, None] == signs[None]).all(2).triu(1)
    assert int(same.sum()) == 1
    return x, y
