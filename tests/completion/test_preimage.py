"""Data from known values of a network, alone and as part of an inversion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from residual import Block, pictured
from torch import Tensor, nn

import rgap
from rgap.completion.preimage import Astray, preimage
from rgap.completion.value_settling import Settling
from rgap.completion.value_uniqueness import mirrored
from rgap.jacobian.frontier import Frontier, Tangent, frontier
from rgap.limits import SAFETY
from rgap.machine.clock import Clock
from rgap.network.flow import Flow, flow_of
from rgap.precision import Estimate
from rgap.recovery import Route, Status
from rgap.recursion.graph import GraphDescent

F64 = torch.float64


def network(dtype: torch.dtype, seed: int = 1, width: int = 32) -> nn.Module:
    return pictured(dtype, 8, (width, 64), seed)


def known(flow: Flow, x: Tensor, *names: str, off: float = 1e-14) -> GraphDescent:
    """True values with errors as stated."""
    values, told = [x], GraphDescent()
    generator = torch.Generator().manual_seed(0)
    for place, node in enumerate(flow.nodes[1:], 1):
        values.append(node.forward([values[source] for source in node.sources]))
        if node.name in names:
            v = values[-1]
            noise = off * torch.randn((9, *v.shape), generator=generator, dtype=F64)
            told.values[place] = Estimate(v + noise[0], noise[1:])
    return told


def grey(x: Tensor) -> Tensor:
    return torch.full_like(x, 0.5)


@pytest.mark.parametrize("off", [1e-14, 1e-6])
def test_data_come_back_within_the_errors_of_the_values(off: float) -> None:
    flow = flow_of(network(F64), (3, 8, 8))
    assert isinstance(flow, Flow)
    x = rgap.photos.load(2, 8, start=5, dtype=F64)
    told = known(flow, x, "relu_1", off=off)
    assert [flow.nodes[p].name for p in frontier(flow, told.values)] == ["relu_1"]
    found = preimage(flow, told, lambda number: grey(x))
    assert not isinstance(found, Astray), found
    assert found.equations > found.unknowns == 192
    error = found.data.value - x
    assert float(found.misfit.max()) < 2.0
    assert float(error.abs().max()) <= 10.0 * float(found.data.std.max()) + 1e-15
    assert float(found.data.std.max()) < 10.0 * off + 1e-14


def test_time_that_is_up_is_no_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rgap.completion.value_search.STEPS", 1)
    flow = flow_of(network(F64), (3, 8, 8))
    assert isinstance(flow, Flow)
    x = rgap.photos.load(1, 8, start=5, dtype=F64)
    found = preimage(flow, known(flow, x, "relu_1"), lambda number: grey(x), clock=Clock(0.0))
    assert isinstance(found, Astray)
    assert "the time was up" in found.reason and "time_limit" in found.reason
    limited = Clock(0.0, limited=True)
    begun: list[int] = []
    found = preimage(flow, known(flow, x, "relu_1"), begun.append, clock=limited)  # type: ignore[arg-type]
    assert isinstance(found, Astray) and not begun
    assert "the time was up before" in found.reason and "time_limit" in found.reason


def test_the_clients_own_rounding_of_its_values_is_part_of_their_errors() -> None:
    """Values of many float32 layers, known exactly: the float64 network has slightly others."""
    deep = nn.Sequential(*network(torch.float32)[:3], *(Block(32, 32) for _ in range(3)))
    deep.train()(rgap.photos.load(16, 8, dtype=torch.float32))
    deep.eval()
    x = rgap.photos.load(1, 8, start=5, dtype=torch.float32)
    with torch.no_grad():
        value = deep(x).double()
    flow = flow_of(deep.double(), (3, 8, 8))
    assert isinstance(flow, Flow)
    top = len(flow.nodes) - 1
    exact = Estimate(value, 1e-12 * torch.randn((8, *value.shape), dtype=F64))
    found = preimage(
        flow, GraphDescent({top: exact}, unit=2.0**-24), lambda number: grey(x).double()
    )
    assert not isinstance(found, Astray), found
    assert float(found.misfit.max()) < 1.5  # 1e5 without it
    error = found.data.value - x
    assert float(error.abs().max()) <= 10.0 * float(found.data.std.max()) < 1e-4


def test_values_that_leave_directions_open_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    flow = flow_of(model.double(), (3, 8, 8))
    assert isinstance(flow, Flow)
    x = rgap.photos.load(1, 8, dtype=F64)
    few = preimage(flow, known(flow, x, "1"), lambda number: grey(x))
    assert isinstance(few, Astray) and "for 192 unknowns" in few.reason
    torch.manual_seed(0)
    with torch.no_grad():  # many filters that never see one colour
        wide = nn.Sequential(nn.Conv2d(3, 12, 3, 1, 1), nn.Flatten(), nn.Linear(768, 3)).double()
        wide[0].weight[:, 2] = 0.0  # type: ignore[union-attr, operator, index]
    flow = flow_of(wide, (3, 8, 8))
    assert isinstance(flow, Flow)
    open_ = preimage(flow, known(flow, x, "0"), lambda number: grey(x))
    assert isinstance(open_, Astray) and "directions of the data open" in open_.reason


def test_values_of_another_network_are_refused() -> None:
    flow, other = (flow_of(network(F64, seed), (3, 8, 8)) for seed in (1, 2))
    assert isinstance(flow, Flow) and isinstance(other, Flow)
    x = rgap.photos.load(1, 8, dtype=F64)
    told = known(other, x, "1", "relu_1")
    assert isinstance(preimage(flow, told, lambda number: grey(x)), Astray)


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("batch", "labels"), [(1, [3]), (2, [5, 5]), (4, [3, 4, 5, 6])], ids=["one", "equal", "four"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_residual_network_gives_its_batch_away(
    batch: int, labels: list[int], dtype: torch.dtype
) -> None:
    model, x = network(dtype), rgap.photos.load(batch, 8, start=4, dtype=dtype)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor(labels)))
    assert recovery.status is Status.EXACT, (recovery.reason, recovery.warnings)
    assert recovery.inputs is not None and recovery.error_bound is not None
    assert recovery.labels is not None and recovery.labels.tolist() == labels
    apart = (recovery.inputs[:, None] - x.double()).abs().flatten(2).amax(2)
    assert float(apart.amin(1).max()) <= recovery.error_bound < 1e-4
    assert len(set(apart.argmin(1).tolist())) == batch
    routes = {report.layer: report.route for report in recovery.layers}
    assert routes["4.conv2"] is Route.GRADIENT and "EXACT" in recovery.explain()


def test_other_running_statistics_certify_nothing() -> None:
    model = network(torch.float64)
    x = rgap.photos.load(1, 8, start=4, dtype=F64)
    update = replace(rgap.capture(model, x, torch.tensor([3])), buffers={})
    with torch.no_grad():
        model[2].bn1.running_var.mul_(1.01)  # type: ignore[union-attr, operator]
    recovery = rgap.invert(model, update)
    assert recovery.inputs is None and not recovery.certified


@pytest.mark.cases(3)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("off", [1e-13, 1e-8, 1e-5])
def test_data_end_where_the_values_are_met_best(off: float, seed: int) -> None:
    """At the weighted least squares of the values: short of it the data are off by more than said.

    A misfit of one standard error an entry is no sign of it: the errors of many values hide those
    of few data.
    """
    flow = flow_of(network(F64, seed), (3, 8, 8))
    assert isinstance(flow, Flow)
    x = rgap.photos.load(1, 8, start=seed, dtype=F64)
    told = known(flow, x, "relu_1", off=off)
    found = preimage(flow, told, lambda number: grey(x))
    assert not isinstance(found, Astray), found
    [place] = told.values
    full = Frontier(flow, [place], told.values)
    data, [sigma] = found.data.value, full.sigma(0)
    tangent = Tangent(full, [sigma], data)
    gap = ((told.values[place].value - full(data)[0]) / sigma).flatten(1)
    rows = tangent.pull(torch.eye(gap.shape[1], dtype=F64)).flatten(1)
    step = torch.linalg.lstsq(rows / tangent.unit, gap.T).solution
    std = float(found.data.std.max())
    assert float(step.abs().max()) <= 0.1 * std
    assert float((data - x).abs().max()) <= 6.0 * std  # of 192 normal entries


class Even(nn.Module):
    """``relu(z) + relu(−z)``, which is |z|."""

    def forward(self, z: Tensor) -> Tensor:
        return z.relu() + (-z).relu()


class Square(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * z


class Residual(nn.Module):
    def __init__(self, width: int, even: nn.Module) -> None:
        super().__init__()
        self.first, self.even = nn.Linear(12, width, bias=False), even
        self.inner, self.head = nn.Linear(width, width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.even(self.first(x))
        return self.head(torch.relu(h + torch.relu(self.inner(h))))


@pytest.mark.cases(12)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("even", [torch.abs, torch.square, Even(), Square()])
@pytest.mark.parametrize("batch", [1, 2])
def test_data_whose_mirror_image_sends_the_same_update_are_not_certified(
    even: nn.Module, batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Residual(64, even).double()
    x = 2.0 * torch.rand(batch, 12, dtype=F64) - 1.0
    labels = torch.tensor([3, 1])[:batch]
    update, mirrored = (
        rgap.capture(model, data, labels, value_range=(-1.0, 1.0)) for data in (x, -x)
    )
    for name, sent in update.gradients.items():
        torch.testing.assert_close(sent, mirrored.gradients[name])
    recovery = rgap.invert(model, update)
    assert recovery.status is not Status.EXACT and recovery.inputs is None


def test_a_black_first_picture_does_not_hide_the_mirror_image_of_the_second() -> None:
    torch.manual_seed(0)
    model = Residual(64, Even()).double()
    flow = flow_of(model, (12,))
    assert isinstance(flow, Flow)
    x = torch.cat([torch.zeros(1, 12), 2.0 * torch.rand(1, 12) - 1.0]).double()
    [place] = [place for place, node in enumerate(flow.nodes) if node.name == "add"]
    values = [x]
    for node in flow.nodes[1:]:
        values.append(node.forward([values[source] for source in node.sources]))
    known = {place: Estimate(values[place], torch.zeros(2, *values[place].shape, dtype=F64))}
    function = Frontier(flow, [place], known).to(torch.float32)
    assert "mirror image" in mirrored(function, x)
    assert not mirrored(function, x[:1])


def test_settling_ends_with_the_time() -> None:
    flow = flow_of(network(F64), (3, 8, 8))
    assert isinstance(flow, Flow)
    x = rgap.photos.load(1, 8, start=5, dtype=F64)
    told = known(flow, x, "relu_1", off=1e-6)
    full = Frontier(flow, frontier(flow, told.values), told.values, told.unit)
    near = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    late = Settling(full, Clock(0.0, limited=True)).settled(0, near)
    assert isinstance(late, str) and "the time was up as the data were settled" in late
    made = Settling(full, Clock(0.0)).settled(0, near)
    assert not isinstance(made, str), made
    assert float((made[0].value - x).abs().max()) <= SAFETY * float(made[0].std.max())
