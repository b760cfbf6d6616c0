"""A whole batch at a head near B = C − 1: equations, turns, starts, agreement."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batched import batch_of
from cases import mlp, pictures
from torch import Tensor

from rgap.jacobian.batch_loss import loss_scale
from rgap.separation.batch import Batch, Separated, Unseparated
from rgap.separation.peeling import Collected
from rgap.separation.route import separate
from rgap.separation.softmax import separate as softmax
from rgap.separation.softmax.coupled import Coupled, agreement
from rgap.separation.softmax.equations import AtHead
from rgap.separation.softmax.separate import opening, separate_head, unfit

F64 = torch.float64
LABELS = {
    "equal": [2, 2, 2, 2, 2],
    "mixed": [0, 2, 2, 4, 4],
    "distinct": [0, 1, 3, 4, 5],
}


def posed(labels: list[int], seed: int = 0) -> tuple[Coupled, Batch, Tensor]:
    """A head with seven classes, its batch, and the true rows t [1, R(R − 1)]."""
    x, y = pictures(len(labels), seed), torch.tensor(labels)
    model = mlp("tanh", seed, widths=(24,), classes=7)
    batch = batch_of(model, x, y)
    top = batch.mixture(1)
    problem = Coupled(top, y, loss_scale(batch.loss, len(labels), 7), 0.0, batch.precision)
    features = batch.chain.stages[0].forward(x)[1].flatten(1)
    q = features @ top.right
    return problem, batch, ((q - problem.origin) @ problem.directions).flatten()[None]


@pytest.mark.parametrize("kind", LABELS)
def test_the_true_batch_satisfies_the_equations(kind: str) -> None:
    problem, _, truth = posed(LABELS[kind])
    assert float(problem.cost(truth)) < problem.floor()
    assert float(problem.cost(truth + 1e-6)) > 1e4 * problem.floor()


@pytest.mark.parametrize("kind", LABELS)
def test_derivative_and_normal_matrix_against_autograd(kind: str) -> None:
    problem, _, truth = posed(LABELS[kind])
    t = truth + 0.1 * torch.randn(
        2, truth.shape[1], generator=torch.Generator().manual_seed(1), dtype=F64
    )
    residual, jacobian = problem.linear(t)
    reference = torch.func.jacrev(lambda s: problem.linear(s[None])[0][0])
    for row, own in zip(t, jacobian, strict=True):
        assert torch.allclose(own, reference(row), rtol=1e-9, atol=1e-9 * float(own.abs().max()))
    cost, gradient, matrix = problem.normal(t)
    assert torch.allclose(cost, residual.square().sum(1), rtol=1e-12)
    assert torch.allclose(gradient, (residual[:, None] @ jacobian)[:, 0], rtol=1e-9)
    assert torch.allclose(matrix, jacobian.mT @ jacobian, rtol=1e-8, atol=1e-12 * matrix.max())


@pytest.mark.parametrize("kind", LABELS)
def test_following_a_step_is_that_step_to_first_order(kind: str) -> None:
    problem, _, truth = posed(LABELS[kind])
    step = torch.randn(1, truth.shape[1], generator=torch.Generator().manual_seed(2), dtype=F64)
    errors = [
        float((problem.follow(truth, h * step) - truth - h * step).norm()) for h in (1e-3, 1e-4)
    ]
    assert errors[1] < 0.02 * errors[0] + 1e-14
    still = problem.follow(truth, torch.zeros_like(truth))
    assert torch.allclose(still, truth, atol=1e-13)


def test_a_turn_of_equal_labels_keeps_mean_and_scatter() -> None:
    """What a straight step would stretch: Σ q and Σ q qᵀ stay however far it goes."""
    problem, _, truth = posed(LABELS["equal"])
    rows = truth.reshape(5, 4)
    away = rows - rows.mean(0)
    # The derivative of a turn of the five differences among themselves.
    basis = torch.linalg.svd(torch.eye(5, dtype=F64) - 0.2).U[:, :4]
    omega = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=F64)
    step = basis @ (omega - omega.T) @ (basis.T @ away)
    moved = problem.follow(truth, step.flatten()[None]).reshape(5, 4)
    apart = moved - moved.mean(0)
    assert torch.allclose(moved.mean(0), rows.mean(0), atol=1e-12)
    assert torch.allclose(apart.T @ apart, away.T @ away, atol=1e-11)
    assert float((moved - rows).norm()) > 0.1 * float(away.norm())


def test_no_batch_and_one_end_alone_are_refused() -> None:
    problem, _, truth = posed(LABELS["mixed"])
    wrong = truth + 0.05
    assert "the nearest batch misses by" in str(agreement(problem, wrong, problem.floor()))
    alone = agreement(problem, truth, problem.floor())
    assert isinstance(alone, str) and "only one of 1 ends fits" in alone
    both = agreement(problem, torch.cat([truth, truth]), problem.floor())
    assert isinstance(both, Tensor) and torch.allclose(both, problem.rows(truth)[0])


@pytest.mark.parametrize("kind", LABELS)
def test_solved_up_to_the_last_sample(kind: str) -> None:
    """B = 5 of at most 6 at seven classes: no sample is determined by its own equations."""
    problem, batch, truth = posed(LABELS[kind], seed=1)
    assert unfit(batch, problem.head) is None
    found = separate_head(batch, problem.head)
    assert isinstance(found, Separated)
    own = found.features.value.flatten(1) @ problem.head.right
    expected = problem.rows(truth)[0]
    assert float(torch.cdist(expected, own).amin(1).max()) < 1e-7 * float(
        expected.norm(dim=1).max()
    )
    assert found.head.targets.argmax(1).sort().values.tolist() == sorted(LABELS[kind])


def test_the_opening_ends_at_samples_of_its_classes() -> None:
    """Distinct labels: Newton steps with one shared slope solve each class from the mean."""
    x, y = pictures(4, 3), torch.tensor([1, 4, 7, 11])
    batch = batch_of(mlp("gelu", 3, widths=(24,), classes=16), x, y)
    head = batch.mixture(1)
    consistency = AtHead.of(head, 0.0, y, 4, batch.precision)
    begun, rows = opening(consistency)
    assert begun.labels.tolist() == y.tolist()
    truth = batch.chain.stages[0].forward(x)[1].flatten(1) @ head.right
    assert float((rows - truth).norm(dim=1).max()) < 1e-3 * float(truth.norm(dim=1).max())
    assert isinstance(separate(batch), Separated)


def test_a_batch_whose_samples_do_not_come_one_by_one_is_solved_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounding may move a sample's own root further than the samples are apart."""
    x, y = pictures(4, 3), torch.tensor([1, 4, 4, 11])
    batch = batch_of(mlp("gelu", 3, widths=(24,), classes=16), x, y)
    head = batch.mixture(1)
    none = head.weights.new_zeros(0, head.rank)
    monkeypatch.setattr(softmax, "collect", lambda *_, **__: Collected(none, [], 7, 1.0, 0))
    found = separate_head(batch, head)
    assert isinstance(found, Separated) and "together" in found.route
    truth = batch.chain.stages[0].forward(x)[1].flatten(1)
    gaps = torch.cdist(found.features.value, truth)
    assert sorted(gaps.argmin(1).tolist()) == [0, 1, 2, 3]
    assert float(gaps.amin(1).max()) < 1e-7 * float(truth.norm(dim=1).max())
    doubled = separate_head(replace(batch, size=8), head)  # then each would occur twice
    assert isinstance(doubled, Unseparated) and "found in 7 starts" in doubled.reason
