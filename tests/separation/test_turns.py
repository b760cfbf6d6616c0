"""Batches of one label at a head by turns of their differences: slope, adjoint, solutions."""

from __future__ import annotations

import pytest
import torch
from batched import batch_of
from torch import Tensor, nn

from rgap.jacobian.batch_loss import loss_scale
from rgap.separation.batch import Batch, Separated
from rgap.separation.softmax.coupled import Coupled
from rgap.separation.softmax.separate import separate_head
from rgap.separation.softmax.turns import Parts, Turns, solve_turns

F64 = torch.float64


def posed(classes: int, size: int, width: int, seed: int = 0) -> tuple[Batch, Coupled, Tensor]:
    """A head with the features between 0 and 1, all of label 1, and the true rows t [R, R − 1]."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, classes)).double()
    x = torch.randn(size, width, generator=generator, dtype=F64).clamp(0.0, 1.0)
    y = torch.ones(size, dtype=torch.long)
    batch = batch_of(model, x, y)
    top = batch.mixture(0)
    problem = Coupled(top, y, loss_scale(batch.loss, size, classes), 0.0, batch.precision)
    return batch, problem, (x @ top.right - problem.origin) @ problem.directions


def test_the_true_batch_has_no_gap_and_its_slope_is_the_derivative() -> None:
    _, problem, truth = posed(12, 6, 20)
    equations = Turns.of(problem, truth)
    assert equations.cost(truth) < 1e-20
    generator = torch.Generator().manual_seed(1)
    t = truth + 0.3 * torch.randn(truth.shape, generator=generator, dtype=F64)
    step = torch.randn(6, 6, generator=generator, dtype=F64)
    step = step - step.mean(1, keepdim=True)
    state, h = equations.at(t), 1e-5
    ends = [equations.at(equations.moved(t, sign * h * step)).residual for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * h)
    assert torch.allclose(state.push(step), slope, rtol=1e-6, atol=1e-7 * float(slope.norm()))
    residual = torch.randn(state.residual.shape, generator=generator, dtype=F64)
    left, right = (state.push(step) * residual).sum(), (step * state.pull(residual)).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-10)


def test_the_preconditioner_inverts_the_damping_and_both_are_symmetric() -> None:
    _, problem, truth = posed(12, 6, 20)
    parts = Parts.of(Turns.of(problem, truth).at(truth + 0.1))
    a, b = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(2), dtype=F64)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    for function in (parts.times, parts.solve):
        assert float((function(a) * b).sum()) == pytest.approx(float((a * function(b)).sum()))
        assert float((function(a) * a).sum()) > 0


def test_random_turns_end_at_the_batch() -> None:
    _, problem, truth = posed(40, 20, 64)
    start = problem.starts(1, torch.Generator().manual_seed(0))[0]
    found = solve_turns(problem, start)
    assert found is not None
    duals = torch.linalg.pinv(problem.rows(truth.reshape(1, -1))[0])
    share = problem.rows(found[None])[0] @ duals
    assert torch.allclose(share.max(1).values, torch.ones(20, dtype=F64), atol=1e-6)
    assert sorted(share.argmax(1).tolist()) == list(range(20))


def test_a_batch_of_one_label_with_few_classes_to_spare_is_separated() -> None:
    batch, problem, truth = posed(46, 26, 64)
    answer = separate_head(batch, problem.head)
    assert isinstance(answer, Separated), answer
    own = answer.features.value.flatten(1)
    x = problem.rows(truth.reshape(1, -1))[0] @ problem.head.right.T
    gap = torch.cdist(own, x, compute_mode="donot_use_mm_for_euclid_dist").min(0).values
    assert float(gap.max() / x.norm(dim=1).max()) < 1e-9
