"""What `explain` advises follows what all equations determine together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import rgap
from rgap.analysis.causes.explain import Explanation, explain

SHAPE = (1, 8, 8)


def network(last: int = 6) -> nn.Module:
    """Two convolutions: the second lacks equations of its own, and the first has plenty."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1),
        nn.Tanh(),
        nn.Conv2d(8, last, 3, 2, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * last, 5),
    )


def update_of(model: nn.Module, size: int = 1) -> rgap.Update:
    x = torch.rand(size, *SHAPE, generator=torch.Generator().manual_seed(1))
    return rgap.capture(model, x, torch.arange(size), dtype=torch.float64)


def why(model: nn.Module, update: rgap.Update, **options: object) -> Explanation:
    return explain(rgap.invert(model, update, complete=False), model, update, **options)


def test_a_batch_that_all_equations_determine_is_one_for_completion() -> None:
    model = network()
    update = update_of(model)
    found = why(model, update)
    assert found.causes[0].kind == "missing equations"
    assert found.joint is not None
    assert (found.joint.joint_rank, found.joint.unknowns) == (64, 64)
    first = found.causes[0].changes[0]
    assert first.startswith("complete=True, which needs no prior: all equations together")
    assert "64 of 64 directions" in first
    assert "layers below" not in found.text
    assert found.numbers()["joint"] == {"rank": 64, "unknowns": 64, "identifiable": True}
    assert rgap.invert(model, update, complete=True).exact  # the advice holds


def test_directions_that_all_equations_leave_open_need_a_prior() -> None:
    model = rgap.models.lenet(channels=4, input_shape=(3, 16, 16), seed=0)
    update = rgap.capture(model, rgap.photos.load(1, 16), torch.tensor([3]), dtype=torch.float64)
    found = why(model, update)
    assert found.joint is not None and found.joint.joint_nullity == 228
    assert found.causes[0].changes[0] == (
        "a prior for what no method finds without one: all equations together determine 540 of "
        "768 directions and leave 228 open"
    )


def test_no_count_where_it_is_too_large_or_not_asked_for() -> None:
    model = network()
    update = update_of(model)
    short = why(model, update, memory_budget=1e3)
    assert short.joint is None
    assert "not counted here" in short.causes[0].changes[0]
    left = why(model, update, time_limit=0)
    assert left.joint is None and "layers below" in left.text
    steps = explain(
        rgap.invert(model, update, complete=False), model, replace(update, local_steps=2)
    )
    assert "several local steps" in steps.causes[0].changes[0]


def test_an_exact_recovery_asks_for_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rgap.models.mlp((8,), 3, input_shape=SHAPE, seed=0)
    monkeypatch.setattr(
        "rgap.analysis.causes.explain.joint_count", lambda *a, **k: pytest.fail("counted")
    )
    assert why(model, update_of(model)).causes == ()
