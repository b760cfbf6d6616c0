"""A time limit is kept within 10 %, on a clock that counts the work instead of the machine's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.matching import match
from rgap.module_update import ModulePoint, ModuleUpdate
from rgap.solvers.gauss_newton import Schedule, gauss_newton
from rgap.solvers.priors import Squares

LIMIT, UNIT = 5.0, 0.1  # seconds; a pass through the network takes a fiftieth of the limit


class Clock:
    """Advances by one unit with every pass through the network, and otherwise not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        for owner, name in (
            (ModuleUpdate, "rows"), (ModuleUpdate, "direction"), (ModuleUpdate, "features"),
            (ModulePoint, "push"), (ModulePoint, "pull"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self._costly(getattr(owner, name)))
        # With the Jacobian formed a step is two passes; conjugate gradients are what takes long.
        monkeypatch.setattr(ModulePoint, "jacobian", lambda self: None)

    def _costly(self, function: Callable) -> Callable:
        def costly(*args: object) -> object:
            self.now += UNIT
            return function(*args)

        return costly


def network(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return nn.Sequential(*layers).double().eval()


NETWORKS = {
    "smooth": lambda: network(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 5)),
    "kinks": lambda: network(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)),
    "pool": lambda: network(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 5)
    ),
    "two pools": lambda: network(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    ),
}  # fmt: skip


def sent(model: nn.Module) -> rgap.Update:
    x = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    return rgap.capture(model, x, torch.tensor([1]), dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_completion_keeps_its_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NETWORKS[name]()
    update = sent(model)
    clock = Clock(monkeypatch)
    began = clock.now
    recovery = rgap.invert(model, update, complete=True, time_limit=LIMIT)
    assert clock.now - began <= 1.1 * LIMIT, recovery.reason
    assert recovery.seconds == pytest.approx(clock.now - began)
    assert clock.now - began > 0.3 * LIMIT or recovery.nearest is not None


@pytest.mark.parametrize("name", ["kinks", "pool"])
def test_a_search_keeps_its_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NETWORKS[name]()
    update = sent(model)
    clock = Clock(monkeypatch)
    began = clock.now
    found = match(model, update, labels=torch.tensor([1]), restarts=3, time_limit=LIMIT)
    assert 0.5 * LIMIT < clock.now - began <= 1.1 * LIMIT, found.reason
    assert found.ended is rgap.matching.Ended.TIME


def test_the_recursion_counts_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is that of the whole call: what the recursion took is gone."""
    model = NETWORKS["kinks"]()
    update = sent(model)
    clock = Clock(monkeypatch)
    module = sys.modules["rgap.invert"]
    descend = module.descend

    def slow(*args: object) -> object:
        clock.now += 0.9 * LIMIT
        return descend(*args)

    monkeypatch.setattr(module, "descend", slow)
    began = clock.now
    rgap.invert(model, update, complete=True, time_limit=LIMIT)
    assert clock.now - began <= 1.1 * LIMIT


class Stuck:
    """A residual that no step makes smaller, at a unit of time an evaluation."""

    now = 0.0

    def __init__(self, x: Tensor) -> None:
        Stuck.now += 1.0
        self.residual = 1.0 + x.norm()[None]

    def push(self, v: Tensor) -> Tensor:
        return v[:1]

    def pull(self, r: Tensor) -> Tensor:
        return r.expand(2)

    def jacobian(self) -> None:
        return None


def test_a_line_search_looks_at_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: Stuck.now)
    Stuck.now = 0.0
    found = gauss_newton(Stuck, torch.zeros(2).double(), Squares(1.0, 0.0), Schedule(seconds=1.5))
    assert found.ended == "the time is up" and Stuck.now <= 3.0
    assert torch.equal(found.value, torch.zeros(2).double())
