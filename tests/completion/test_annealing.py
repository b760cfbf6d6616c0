"""One loop anneals kinks: it goes on from where it stood, and leaves no kink rounded off."""

from __future__ import annotations

import ast
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import rgap
from rgap.completion.annealing import Plan, Position, anneal, stages
from rgap.constraints.known_input import Whole
from rgap.jacobian.module_update import ClientLoss, KnownFeatures, ModuleUpdate, watchable
from rgap.solvers.gauss_newton import STOPPED, Schedule
from rgap.solvers.priors import Squares


def equations(activation: nn.Module) -> ModuleUpdate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3)).double().eval()
    x = torch.rand(1, 4, generator=torch.Generator().manual_seed(1)).double()
    update = rgap.capture(model, x, torch.tensor([1]), dtype=torch.float64)
    source = ClientLoss(update.loss, torch.tensor([1]))
    return ModuleUpdate(model, update.gradients, source, (1, 4))


START = torch.full((1, 4), 0.5, dtype=torch.float64)
PRIOR = Squares(1.0, 0.5)
LATE = float("inf")


def test_a_pass_that_was_stopped_goes_on_as_it_would_have() -> None:
    """Stopped after any step, of any stage, and resumed: bit for bit the same."""
    update = equations(nn.ReLU())
    whole = anneal(update, Position(START), Plan(PRIOR, Schedule(steps=6), 4, LATE, 1.0))
    assert len(whole.steps) > 6
    for stop in range(1, len(whole.steps)):
        position, count = Position(START), 0

        def watch(step, x, stop=stop) -> bool:
            nonlocal count
            count += 1
            return count == stop

        first = anneal(update, position, Plan(PRIOR, Schedule(steps=6), 4, LATE, 1.0), watch)
        assert first.ended == STOPPED and len(first.steps) == stop
        assert torch.equal(position.x, first.value) and position.marks is not None
        rest = anneal(update, position, Plan(PRIOR, Schedule(steps=6), 4, LATE, 1.0))
        assert torch.equal(rest.value, whole.value), stop
        assert len(first.steps) + len(rest.steps) == len(whole.steps)


def test_out_of_time_the_kinks_are_the_networks_own() -> None:
    update = equations(nn.ReLU())
    sharp: list[float | None] = []

    def watch(step, x) -> None:
        sharp.append(update.sharpness.value)

    late = time.perf_counter() + 1e6
    anneal(update, Position(START), Plan(PRIOR, Schedule(steps=3), 4, late, 0.0), watch)
    assert sharp == [None] * 3
    over = anneal(update, Position(START), Plan(PRIOR, Schedule(steps=3), 4, 0.0, 1.0))
    assert over.steps == () and over.misfit == update.misfit(over.value)


def test_a_network_without_kinks_has_one_stage() -> None:
    update = equations(nn.Tanh())
    position = Position(START)
    found = anneal(update, position, Plan(PRIOR, Schedule(), 4, LATE, 1.0))
    assert position.stage == 0 and found.misfit < 1e-8
    assert len(stages(Schedule(), 4)) == 6


class PurposeError(Exception):
    """Raised on purpose."""


def test_an_exception_leaves_no_kink_rounded_off() -> None:
    update = equations(nn.ReLU())
    before = update.misfit(START)

    def watch(step, x) -> None:
        assert update.sharpness.value is not None
        raise PurposeError

    with pytest.raises(PurposeError):
        anneal(update, Position(START), Plan(PRIOR, Schedule(), 4, LATE, 1.0), watch)
    assert update.sharpness.value is None and update.misfit(START) == before
    with update.softened(3.0):
        with update.softened(None):
            assert update.misfit(START) == before
        assert update.sharpness.value == 3.0
    assert update.sharpness.value is None


def test_sharpness_is_set_in_one_place() -> None:
    root = Path(__file__).resolve().parents[2] / "rgap"
    found = {
        path.name
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Assign, ast.AugAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and target.attr == "value"
        and isinstance(target.value, ast.Attribute) and target.value.attr == "sharpness"
    }  # fmt: skip
    assert found == {"module_update.py"}


def test_a_stage_that_is_no_module_is_asked_for_and_not_tried() -> None:
    """An AttributeError of the model's own is no longer taken for a missing module."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    model = Functional().double().eval()
    assert watchable(model, "fc") and not watchable(model, "linear")
    u = torch.rand(1, 4).double()
    known = KnownFeatures("linear", (1, 4), Whole(u), u)
    sent = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="source: expected a module of the model"):
        ModuleUpdate(model, sent, known, (1, 4))
    model.forward = lambda x: x.no_such_thing  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no_such_thing"):
        ModuleUpdate(model, sent, replace(known, layer="fc"), (1, 4))
