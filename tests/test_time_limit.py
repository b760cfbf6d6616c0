"""A time limit is kept within 10 %, on a clock that counts the work instead of the machine's."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from math import inf

import pytest
import torch
from cases import redrawn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rgap
from rgap.analysis import audit, harden, identifiability, noise
from rgap.jacobian.module_update import ModuleUpdate
from rgap.jacobian.products import GraphProducts
from rgap.jacobian.update_map import UpdateMap
from rgap.machine import allowance
from rgap.machine.allowance import PLAIN, SYMMETRIC
from rgap.matching.search import match
from rgap.progress import Report
from rgap.recovery import Status
from rgap.recursion import stage
from rgap.solvers.gauss_newton import Schedule, gauss_newton
from rgap.solvers.priors import Squares

inversion = import_module("rgap.inversion.invert")  # the function has the module's name

LIMIT, UNIT = 5.0, 0.1  # seconds; a pass through the network takes a fiftieth of the limit


class Clock:
    """Advances by one unit with every pass through the network, and otherwise not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        for owner, name in (
            (ModuleUpdate, "rows"), (ModuleUpdate, "apart"), (GraphProducts, "push"),
            (GraphProducts, "pull"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self._costly(getattr(owner, name)))
        # With the Jacobian formed a step is two passes; conjugate gradients are what takes long.
        monkeypatch.setattr(GraphProducts, "jacobian", lambda self: None)

    def _costly(self, function: Callable) -> Callable:
        def costly(*args: object) -> object:
            self.now += UNIT
            return function(*args)

        return costly


def network(*layers: nn.Module) -> nn.Module:
    return redrawn(*layers).double()


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
    module = sys.modules["rgap.inversion.problem"]
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


# --- analyses: what a factorisation takes is told before it begins -------------------------------


class Factoring:
    """A clock that factorisations and passes through the network advance, by their size."""

    RATE = 2e-6  # seconds of a unit of work

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(allowance, "pace", lambda device: self.RATE)
        monkeypatch.setattr(allowance, "LEAST_ASKED", 1.0)  # no work is too little to be asked for
        for name, share in (("svd", 1.0), ("svdvals", 1.0), ("eigh", SYMMETRIC), ("qr", PLAIN)):
            self._costs(monkeypatch, torch.linalg, name, share)
        columns = UpdateMap.columns

        def costly(update: UpdateMap, directions: Tensor) -> Tensor:
            self.now += 0.02 * len(directions)
            return columns(update, directions)

        monkeypatch.setattr(UpdateMap, "columns", costly)
        monkeypatch.setattr(UpdateMap, "chunk", 4)

    def _costs(
        self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, share: float
    ) -> None:
        function = getattr(owner, name)

        def costly(matrix: Tensor, *args: object, **options: object) -> object:
            *outer, rows, columns = matrix.shape
            work = allowance.factorisation(rows, columns, share)
            self.now += self.RATE * work * max(1, torch.Size(outer).numel())
            return function(matrix, *args, **options)

        monkeypatch.setattr(owner, name, costly)


class Working(TorchDispatchMode):
    """A clock that every operation of torch advances, a long one by its work."""

    RATE, PASS = 1e-6, 2e-5  # seconds of a unit of work, and of an operation

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(allowance, "pace", lambda device: self.RATE)
        monkeypatch.setattr(allowance, "LEAST_ASKED", 1.0)  # no work is too little to be asked for

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, Tensor)]
        count = allowance.WORK.get(func.overloadpacket.__name__)
        self.now += self.PASS + (self.RATE * count(*tensors) if count is not None else 0.0)
        return func(*args, **(kwargs or {}))


WORKING: dict[str, Callable[..., object]] = {
    "dense": lambda **o: identifiability(_conv(), (2, 6, 6), 4, method="dense", **o),
    "sketch": lambda **o: identifiability(_conv(), (2, 6, 6), 4, method="sketch", **o),
    "structured": lambda **o: identifiability(_conv(), (2, 6, 6), 8, method="structured", **o),
    "ranks": lambda **o: identifiability(
        _conv(), (2, 6, 6), 8, method="structured", null_space=False, **o
    ),
    "noise": lambda **o: noise(_conv(), (2, 6, 6), 2, sigma=0.1, **o),
    "audit": lambda **o: audit(_conv(), (2, 6, 6), (1, 8, 16), **o),
    "harden": lambda **o: harden(_mlp(12, 16), (1, 4, 4), 0.5, largest_batch=4, **o),
}


@pytest.mark.cases(10)
@pytest.mark.parametrize("share", [0.07, 0.3, 0.62, 0.9])
@pytest.mark.parametrize("name", WORKING)
def test_every_operation_asks_for_its_time(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the limit falls, products and solves are counted like factorisations."""
    with Working(monkeypatch) as clock:
        began = clock.now
        WORKING[name]()
        whole = clock.now - began
        began = clock.now
        with suppress(allowance.OutOfTime):
            WORKING[name](time_limit=share * whole)
        assert clock.now - began <= (1 + allowance.OVER) * share * whole


@pytest.mark.parametrize("limit", [0.5, 2.0])
@pytest.mark.parametrize("call", ["dense", "sketch", "noise", "harden"])
def test_columns_that_would_all_go_through_at_once_keep_the_limit(
    call: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, model = Factoring(monkeypatch), _mlp()
    monkeypatch.setattr(UpdateMap, "chunk", 10_000)  # 0.02 s each, 64 a sample
    options = {"time_limit": limit}
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: identifiability(model, (1, 8, 8), 4, method="dense", **options),
        "sketch": lambda: identifiability(model, (1, 8, 8), 4, method="sketch", **options),
        "noise": lambda: noise(model, (1, 8, 8), 4, sigma=1e-3, **options),
        "harden": lambda: harden(model, (1, 8, 8), changes=("batch size",), **options),
    }
    began = clock.now
    with pytest.raises(allowance.OutOfTime):
        calls[call]()
    assert clock.now - began <= (1 + allowance.OVER) * limit


@pytest.mark.parametrize("seconds", [1e-9, 0.05, inf])
def test_pieces_cover_every_direction_once(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Factoring(monkeypatch)
    update = UpdateMap(_mlp(), torch.rand(1, 1, 8, 8), torch.tensor([1]), rgap.Loss())
    update.chunk_seconds = seconds
    eye = torch.eye(64).reshape(-1, 1, 1, 8, 8)
    made = list(update.chunks(eye))
    assert [at for piece, _ in made for at in range(piece.start, piece.stop)] == list(range(64))
    assert torch.allclose(torch.cat([products for _, products in made]), update.columns(eye))
    assert max(len(products) for _, products in made) == {1e-9: 1, 0.05: 2, inf: 4}[seconds]
    assert clock.now > 1000.0


def _mlp(units: int = 40, inputs: int = 64) -> nn.Sequential:
    return network(nn.Flatten(), nn.Linear(inputs, units), nn.Tanh(), nn.Linear(units, 10))


def _conv() -> nn.Sequential:
    return network(
        nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, 2, 1), nn.Tanh(), nn.Flatten(),
        nn.Linear(54, 10),
    )  # fmt: skip


ANALYSES: dict[str, Callable] = {
    "dense": lambda **o: identifiability(
        _mlp(), (1, 8, 8), 2, method="dense", sequential=False, **o
    ),
    "structured": lambda **o: identifiability(
        _conv(), (2, 6, 6), 4, method="structured", sequential=False, **o
    ),
    "noise": lambda **o: noise(_mlp(), (1, 8, 8), 2, sigma=0.1, **o),
    "sampled": lambda **o: noise(_mlp(), (1, 8, 8), 2, sigma=0.1, method="sampled", **o),
}


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_ends_at_its_limit(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Factoring(monkeypatch)
    began = clock.now
    ANALYSES[name]()
    limit = share * (clock.now - began)
    began = clock.now
    told: list[Report] = []
    with pytest.raises(allowance.OutOfTime, match="write time_limit="):
        ANALYSES[name](time_limit=limit, progress=told.append)
    assert clock.now - began <= 1.1 * limit
    assert told and all(report.left is None or report.left <= 1.001 * limit for report in told)


def test_an_audit_returns_what_it_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Factoring(monkeypatch)
    began = clock.now
    audit(_conv(), (2, 6, 6), (1,))
    limit = 4.0 * (clock.now - began)
    began = clock.now
    found = audit(_conv(), (2, 6, 6), (1, 8, 16), time_limit=limit)
    assert clock.now - began <= 1.1 * limit
    assert found.batch_sizes[:1] == (1,) and 16 not in found.batch_sizes
    assert "was not measured (time_limit:" in found.notes[-1]
    assert len({row.layer for row in found.rows}) == 3
    with pytest.raises(allowance.OutOfTime):
        audit(_conv(), (2, 6, 6), (8,), time_limit=limit / 1e3)


@pytest.mark.parametrize(("limit", "need"), [(5.0, 32.0), (60.0, 410.0), (20.0, 22.5)])
def test_the_advice_is_above_its_own_estimate(
    limit: float, need: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowance, "pace", lambda device: 1e-9)
    with pytest.raises(allowance.OutOfTime) as refused, allowance.Timed(False, limit) as show:
        show.ahead(need * 1e9)
    advised = float(re.search(r"write time_limit=(\S+),", str(refused.value)).group(1))
    assert 2.0 * need <= advised <= max(4.4 * limit, 2.3 * need)


def test_hardening_returns_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Factoring(monkeypatch)
    began = clock.now
    options = {"largest_batch": 4, "changes": ("batch size", "channels")}
    whole = harden(_mlp(12, 16), (1, 4, 4), 0.5, **options)
    limit = 0.9 * (clock.now - began)
    began = clock.now
    found = harden(_mlp(12, 16), (1, 4, 4), 0.5, time_limit=limit, **options)
    assert clock.now - began <= 1.1 * limit
    assert len(found.changes) + len(found.failed) == len(whole.changes) + len(whole.failed)
    assert any("not found out (time_limit:" in text for text in found.failed)


def test_a_limit_that_is_none_is_refused() -> None:
    for wrong in (0.0, -1.0, float("nan"), "60", True):
        with pytest.raises((TypeError, ValueError), match="time_limit: expected seconds"):
            audit(_mlp(), (1, 8, 8), (1,), time_limit=wrong)


class _Late:
    """Time for so many questions, and then for none."""

    def __init__(self, granted: int) -> None:
        self.granted = granted

    def __call__(self, work: float) -> None:
        self.granted -= 1
        if self.granted < 0:
            raise allowance.OutOfTime("it takes about 70 s, and 1 s of 2 s are left; write x")


@pytest.mark.parametrize("budget", [None, 1.0])  # with matrices, and by LSMR alone
def test_a_layer_without_time_is_not_determined(
    budget: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the time ends, the certificate is the whole one or none, and the layer is named."""
    model = network(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1), nn.Tanh(), nn.Flatten(),
        nn.Linear(2 * 16, 5),
    )  # fmt: skip
    x = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    update = rgap.capture(model, x, torch.tensor([2]), dtype=torch.float64)
    if budget is not None:
        monkeypatch.setattr(stage, "memory", lambda affine, batch: inf)
    ends, granted = set(), 0
    while (late := _run(model, update, granted, monkeypatch)).status.name != "EXACT":
        assert late.halt is not None and late.halt.kind.name == "LATE"
        assert late.inputs is None and not late.certified and late.halt.rank is None
        assert f"'{late.halt.stage}' was not counted in the time: it takes" in late.reason
        assert f"{late.halt.stage} (conv2d)" in late.explain() and "not counted" in late.explain()
        ends.add(late.halt.stage)
        granted = 2 * granted + 1 if budget else granted + 1
    assert ends == {"2", "0"} and (late.inputs - x).abs().max() < 1e-6
    whole = _run(model, update, 10**9, monkeypatch)
    assert torch.equal(whole.inputs, late.inputs)


def _run(
    model: nn.Module, update: rgap.Update, granted: int, monkeypatch: pytest.MonkeyPatch
) -> rgap.Recovery:
    monkeypatch.setattr(inversion, "Until", lambda *_: _Late(granted))
    return rgap.invert(model, update, time_limit=1e6)


def test_a_completion_has_its_share_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = list[float]()

    def until(began: float, limit: float, share: float, device: str) -> allowance.Ahead:
        shares.append(share)
        return _Late(0)

    monkeypatch.setattr(inversion, "Until", until)
    model = NETWORKS["smooth"]()
    x = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    update = rgap.capture(model, x, torch.tensor([2]), dtype=torch.float64)
    found = rgap.invert(model, update, complete=True, time_limit=2.0)
    assert shares == [inversion.COUNTING] and "was not counted in the time" in found.reason
    assert "0 steps" not in found.reason and found.nearest is not None


def test_samples_that_there_is_no_time_to_tell_apart_contradict_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 10)
    ).double()
    x, y = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 1, 2])
    smoothed = rgap.capture(model, x, y, loss=rgap.Loss("cross_entropy", label_smoothing=0.1))
    update = replace(smoothed, loss="cross_entropy")  # no root of its equations is a sample
    late, whole = (rgap.invert(model, update, time_limit=limit) for limit in (1e-3, None))
    assert late.status is not Status.INCONSISTENT and late.inputs is None
    assert "the time limit ended the search" in late.reason, late.reason
    assert "the time limit" not in whole.reason
    few, many = (int(re.findall(r"in (\d+) starts", r.reason)[0]) for r in (late, whole))
    assert few < many


def test_zeros_without_memory_in_forward_mode() -> None:
    """The slope of a squared error by its target is one: torch must not crash on it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 2, 2), nn.ConvTranspose2d(4, 2, 2, 2)).double().eval()
    told = rgap.analysis.identifiability(
        model, (2, 6, 6), 1, loss=rgap.Loss("mse_loss"), time_limit=60.0
    )
    assert told.unknowns == 72
