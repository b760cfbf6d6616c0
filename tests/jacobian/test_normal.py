"""The normal equations of the whole update: formed, factored and solved, against autograd."""

from __future__ import annotations

import pytest
import torch
from cases import small_conv
from torch import Tensor

from rgap import Status, capture, invert
from rgap.jacobian import normal
from rgap.jacobian.layer import ParameterRows
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.normal import Normal
from rgap.models import published as models
from rgap.network.chain import parse
from rgap.photos import packaged as photos

X = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KAPPA = torch.tensor([[0.3, -0.5, 0.1, 0.2, -0.1]], dtype=torch.float64)


def made() -> tuple[Normal, Tensor]:
    """The normal equations of a small chain, and the weighted dense Jacobian from autograd."""
    model = small_conv("tanh", channels=4, seed=1).double()
    point = Linearisation(parse(model, (2, 8, 8)), X, KAPPA)
    generator = torch.Generator().manual_seed(1)
    weights: ParameterRows = {}
    for name, g in point.gradients().items():
        shape = (len(g), *([1] * (g.ndim - 1)))
        weights[name] = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    names, parameters = zip(*model.named_parameters(), strict=True)

    def update(x: Tensor) -> Tensor:
        value = (model(x) * KAPPA).sum()
        grads = torch.autograd.grad(value, parameters, create_graph=True)
        return torch.cat([(g * weights[n]).flatten() for n, g in zip(names, grads, strict=True)])

    jacobian = torch.autograd.functional.jacobian(update, X)
    return Normal(point, weights), jacobian.reshape(-1, X.numel())


def test_the_matrix_is_the_jacobians_gram_matrix() -> None:
    equations, jacobian = made()
    factored = equations.factored()
    assert factored is not None
    assert torch.allclose(factored.matrix, jacobian.T @ jacobian, rtol=1e-9, atol=1e-12)


def test_worst_direction_is_the_smallest_singular_value() -> None:
    equations, jacobian = made()
    factored = equations.factored()
    assert factored is not None
    smallest = float(torch.linalg.svdvals(jacobian)[-1])
    assert factored.worst() == pytest.approx(1 / smallest, rel=0.2)


def test_solutions_are_the_dense_least_squares_solutions() -> None:
    equations, jacobian = made()
    generator = torch.Generator().manual_seed(2)
    rows = {
        n: torch.randn(3, *g.shape, generator=generator, dtype=torch.float64)
        for n, g in equations.point.gradients().items()
    }
    flat = torch.cat([(rows[n] * equations.weights[n]).flatten(1) for n in rows], 1)
    wanted = torch.linalg.lstsq(jacobian, flat.T).solution.T
    factored = equations.factored()
    assert factored is not None
    found, used, done = equations.solve(rows, factored.inverse, 20, 1e-8)
    assert done
    assert used <= 6
    assert torch.allclose(found.flatten(1), wanted, rtol=1e-6, atol=1e-9)
    plain, _, done = equations.solve(rows, lambda v: v, 5000, 1e-9)
    assert done
    assert torch.allclose(plain.flatten(1), wanted, rtol=1e-4, atol=1e-6)


def test_too_many_unknowns_are_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    equations = made()[0]
    assert equations.small
    monkeypatch.setattr(normal, "LARGEST", X.numel() - 1)
    assert not equations.small


def test_saturated_tanh_is_certified_by_the_whole_update() -> None:
    """The recursion alone leaves five times the error, and one stage alone is no proof."""
    model = models.lenet(100, 12, "tanh", input_shape=(3, 20, 20), seed=7, weights="uniform")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    picture = photos.load(1, 20, start=7)
    update = capture(model, picture, torch.tensor([49]), dtype=torch.float32)
    recovery = invert(model, update)
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.inputs is not None
    assert recovery.error_bound is not None
    assert recovery.predicted_error is not None
    error = recovery.inputs - picture
    assert float(error.abs().max()) <= recovery.error_bound
    rms = float(error.square().mean().sqrt())
    assert rms < 1e-5
    assert 1 / 3 < float(recovery.predicted_error[0]) / rms < 3
