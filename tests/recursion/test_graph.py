"""Down residual and concatenating networks by gradient constraints alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from computed import computed
from torch import Tensor, nn

from rgap import photos
from rgap.network.flow import Flow
from rgap.precision import Estimate, Precision
from rgap.recursion.graph import GraphDescent, descend_graph

F64, F32 = torch.float64, torch.float32


class Block(nn.Module):
    """A residual block; a projection where the sizes change."""

    def __init__(self, into: int, out: int, stride: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.act1, self.act2 = act(), act()
        self.skip = nn.Conv2d(into, out, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(h)) + self.skip(x))


class Dense(nn.Module):
    """Layers that read all that was computed before them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(24, 24, 3, padding=1)
        self.second, self.last = nn.Conv2d(48, 24, 3, padding=1), nn.Conv2d(72, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.first(x).relu()], 1)
        x = torch.cat([x, self.second(x).relu()], 1)
        return self.last(x).relu()


def residual(act: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), act(), Block(24, 24, 1, act), Block(24, 48, 2, act),
        Block(48, 48, 1, act), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 5, 4, 2), nn.ReLU(), Dense(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """What a client sent, its own values, and the cotangent at its output."""

    flow: Flow
    gradients: dict[str, Tensor]
    values: list[Tensor]
    top: Tensor
    precision: Precision

    def descend(self) -> GraphDescent:
        error = self.precision.rounding(self.top)
        return descend_graph(self.flow, self.gradients, Estimate(self.top, error), self.precision)

    def checked(self, told: GraphDescent) -> list[str]:
        """Names of the values that were solved; fails where one is not the client's."""
        names = []
        for place, value in told.values.items():
            gap = (value.value - self.values[place]).abs().max()
            rounding = 50 * self.precision.unit * float(self.values[place].abs().max())
            assert float(gap) <= 10 * float(value.std.max()) + rounding
            names.append(self.flow.nodes[place].name)
        return names


def sent(
    build: Callable[[], nn.Module],
    labels: list[int],
    dtype: torch.dtype = F64,
    seed: int = 0,
    bend: Callable[[nn.Module, Tensor], None] = lambda model, x: None,
) -> Sent:
    torch.manual_seed(seed)
    model = build()
    x = photos.load(len(labels), 16, start=seed).to(dtype)
    model.to(dtype).train()(photos.load(16, 16).to(dtype))  # running statistics of pictures
    model.eval()
    bend(model, x)
    flow, gradients, top = computed(model, x, torch.tensor(labels))
    values = [x.double()]
    for node in flow.nodes[1:]:
        values.append(node.forward([values[source] for source in node.sources]).detach())
    return Sent(flow, gradients, values, top, Precision(dtype=dtype, samples=12))


@pytest.mark.parametrize(
    ("labels", "seed"), [([3], 0), ([3, 5], 0), ([3, 3], 1), ([1, 2, 3], 2), ([1, 1, 1], 2)]
)
def test_a_residual_network_gives_away_its_values(labels: list[int], seed: int) -> None:
    case = sent(residual, labels, seed=seed)
    told = case.descend()
    names = case.checked(told)
    assert len(told.shifts) == 1  # the last rectifier, before the pool
    assert {"6", "4.act1", "3.act2", "3.act1"} <= set(names), told.ends


@pytest.mark.parametrize("labels", [[3], [3, 5]])
def test_in_single_precision(labels: list[int]) -> None:
    case = sent(residual, labels, F32)
    case = Sent(case.flow, case.gradients, case.values, case.top, Precision(dtype=F32))
    told = case.descend()
    for place, value in told.values.items():  # the client's own values are rounded too
        size = float(case.values[place].abs().max())
        assert float((value.value - case.values[place]).abs().max()) < 1e-4 * size
    assert {"6", "4.act1", "3.act2"} <= {case.flow.nodes[place].name for place in told.values}


@pytest.mark.parametrize("labels", [[3], [2, 2]])
def test_a_network_that_concatenates(labels: list[int]) -> None:
    case = sent(dense, labels)
    told = case.descend()
    names = case.checked(told)
    assert names.count("4") == 1 and len(names) >= 3, (names, told.ends)


def test_an_activation_with_an_inverse_needs_no_mask() -> None:
    case = sent(lambda: residual(nn.LeakyReLU), [3])
    told = case.descend()
    case.checked(told)
    assert not told.masks and not told.ends
    assert [case.flow.nodes[place].name for place in told.shifts] == ["4.conv2"]  # below a pool


def test_slopes_of_two_samples_that_no_value_tells_are_open() -> None:
    case = sent(lambda: residual(nn.LeakyReLU), [3, 5])
    told = case.descend()
    case.checked(told)
    assert any("is not determined" in why for why in told.ends.values())


@pytest.mark.parametrize("name", ["4.conv2.weight", "4.conv1.weight", "3.conv2.weight"])
def test_a_gradient_of_another_batch_ends_the_way(name: str) -> None:
    case, other = sent(residual, [3]), sent(residual, [3], seed=1)
    gradients = {**case.gradients, name: other.gradients[name]}
    told = Sent(case.flow, gradients, case.values, case.top, case.precision).descend()
    solved = {case.flow.nodes[place].name for place in told.values}
    untouched = {"6"} | ({"4.act1"} if name != "4.conv2.weight" else set())
    assert solved <= untouched | {"3.act2"} and told.ends


def test_too_many_samples_say_which_layer_has_too_few_equations() -> None:
    case = sent(residual, [1, 2, 3, 4, 5, 6, 7])
    told = case.descend()
    case.checked(told)
    assert any("not told apart by shifts" in why for why in told.ends.values())


def test_frozen_layers_are_passed_where_others_read_the_value() -> None:
    case = sent(residual, [3])
    frozen = dict(case.gradients)
    absent = {"3.skip.weight": torch.full_like(frozen["3.skip.weight"], 1e150)}
    precision = Precision(dtype=F64, samples=12, entries=absent)
    frozen["3.skip.weight"] = torch.zeros_like(frozen["3.skip.weight"])
    case = Sent(case.flow, frozen, case.values, case.top, precision)
    assert "3.act1" in case.checked(case.descend())


def hardly_on(model: nn.Module, x: Tensor) -> None:
    """Two units of the last block but one give 1e-7 of what the others do."""
    z: list[Tensor] = []
    handle = model[3].act2.register_forward_pre_hook(lambda _, given: z.append(given[0].detach()))
    model(x)
    handle.remove()
    with torch.no_grad():
        on = (z[0] > 0).transpose(0, 1).flatten(1).any(1).nonzero().flatten()[[0, 3]]
        for c in on.tolist():
            least = z[0][:, c][z[0][:, c] > 0]
            model[3].bn2.bias[c] -= least.min() - 1e-7 * z[0].abs().max()


@pytest.mark.parametrize("labels", [[3], [3, 3]])
@pytest.mark.parametrize("seed", range(3))
def test_a_unit_that_is_hardly_on_is_settled_below(labels: list[int], seed: int) -> None:
    """Nothing above tells 1e-7 from 0 in float32; the gradient of the filter itself does."""
    case = sent(residual, labels, F32, seed, hardly_on)
    told = case.descend()
    names = case.checked(told)
    assert {"6", "4.act1", "3.act2", "3.act1"} <= set(names), told.ends
    place = next(p for p, node in enumerate(case.flow.nodes) if node.name == "3.act2")
    true = case.values[place] > 0
    assert int((told.masks[place].bool() != true).sum()) == 0
