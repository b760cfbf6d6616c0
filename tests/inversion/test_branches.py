"""What a network whose branches meet gives away below the place where its chain ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from branched import drawn
from residual import pictured
from torch import Tensor, nn

import rgap
from rgap.recovery import Status

SHAPE = (3, 16, 16)


def network(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    return pictured(dtype, 16, (24, 48), seed, stride=2)


def seen(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    taken: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(lambda m, a, n=name: taken.update({n: a[0].detach()}))
    model(x)
    return taken


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_inputs_of_wide_layers_come_back_from_one_sample(
    dtype: torch.dtype, allowed: float
) -> None:
    model, x = network(dtype), rgap.photos.load(1, 16, start=3).to(dtype)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor([7])), time_limit=0.5)
    assert recovery.status is Status.UNDERDETERMINED and recovery.inputs is None
    true = seen(model, x)
    assert {"7", "4.conv2", "4.conv1", "3.conv2", "3.conv1"} <= set(recovery.features)
    told, said = recovery.summary(), recovery.explain()
    for name, value in recovery.features.items():
        size, gap = float(true[name].abs().max()), value - true[name]
        assert float(gap.abs().max()) <= allowed * size, name
        own = max(recovery.features_error[name], 1e-15 * size)
        assert float(gap.square().mean().sqrt()) <= 4.0 * own, name
        assert f"the input of '{name}'" in said and told["features_error"][name] >= 0


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
def test_a_layer_beside_another_is_explained_too(activation: type[nn.Module]) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.c1, self.c2 = (
                nn.Conv2d(2, 4, 1),
                nn.Conv2d(2, 8, 3, 1, 1),
                nn.Conv2d(8, 4, 3, 1, 1),
            )
            self.pool, self.a, self.h = nn.AvgPool2d(2), activation(), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(x)  # no data follow from its output
            return self.h((self.k(x) + self.c2(self.a(self.c1(x)))).flatten(1))

    torch.manual_seed(0)
    model = Beside().eval()
    recovery = rgap.invert(model, rgap.capture(model, torch.rand(1, 2, 8, 8), torch.tensor([1])))
    assert recovery.features and set(recovery.features) == set(recovery.features_error)
    assert all(f"'{name}'" in recovery.explain() for name in recovery.features)


def test_two_samples_have_no_features_of_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 5)
    )
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    two = rgap.capture(model.double(), x.expand(2, -1, -1, -1), torch.tensor([1, 1]))
    assert not rgap.invert(model, two).features
    assert rgap.invert(model, rgap.capture(model, x, torch.tensor([1]))).features


def test_a_gradient_of_another_sample_ends_them() -> None:
    model = network(torch.float64)
    x = rgap.photos.load(2, 16, start=3)
    own, other = (rgap.capture(model, x[i : i + 1], torch.tensor([7])) for i in (0, 1))
    mixed = {**own.gradients, "4.conv1.weight": other.gradients["4.conv1.weight"]}
    recovery = rgap.invert(model, replace(own, gradients=mixed), time_limit=0.5)
    assert not {"3.conv1", "3.conv2", "3.skip"} & set(recovery.features)


def test_a_budget_without_room_for_the_equations_leaves_them_out() -> None:
    model = network(torch.float32)
    x = rgap.photos.load(1, 16, dtype=torch.float32)
    update = rgap.capture(model, x, torch.tensor([7]))
    assert "3.conv1" in rgap.invert(model, update, time_limit=0.5).features
    assert "7" in rgap.invert(model, update, memory_budget=64e6, time_limit=0.5).features


def test_random_networks_with_branches_certify_nothing_wrong() -> None:
    """The whole sweep is benchmarks.sweeps.graphs."""
    exact = 0
    for number in range(1001, 1012):
        case = drawn(number)
        recovery = rgap.invert(case.model, case.update, time_limit=5.0)
        assert not (case.genuine and recovery.status is Status.INCONSISTENT), (number, case.words)
        if recovery.inputs is None or not recovery.certified:
            continue
        assert recovery.error_bound is not None
        apart = (recovery.inputs[:, None] - case.inputs.double()).abs().flatten(2).amax(2)
        near, mate = apart.min(1)
        assert float(near.max()) <= recovery.error_bound, (number, case.words)
        assert sorted(mate.tolist()) == list(range(len(mate))), (number, case.words)
        if recovery.labels is not None:
            assert torch.equal(recovery.labels, case.labels[mate]), (number, case.words)
        exact += recovery.exact
    assert exact >= 1


class Folded(nn.Module):
    """A step on the data below two wide branches that meet."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step
        self.c1, self.c2 = nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.p, self.h, self.a = nn.Conv2d(1, 16, 1), nn.Linear(400, 4), nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.step(x)
        return self.h((self.a(self.c2(self.a(self.c1(x)))) + self.p(x)).flatten(1))


@pytest.mark.cases(5)
@pytest.mark.parametrize(
    "step",
    [
        lambda x: (x - 0.5).abs(),
        lambda x: (x - 0.5).square(),
        lambda x: torch.nn.functional.silu(8.0 * (x - 0.5)),
        lambda x: 2.0 * (x - 0.5).relu() - (x - 0.5),
        lambda x: x - 2.0 * torch.tanh(3.0 * (x - 0.5)),
    ],
    ids=["abs", "square", "silu", "relu made abs", "bent"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_data_with_mirror_images_are_not_certified(
    step: Callable[[Tensor], Tensor], seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = Folded(step).double().eval(), torch.rand(1, 1, 5, 5, dtype=torch.float64)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor([1])))
    if recovery.inputs is not None:
        assert float((recovery.inputs - x).abs().max()) <= recovery.error_bound
    assert recovery.status is not Status.INCONSISTENT


@pytest.mark.parametrize("step", [lambda x: x.flip(-1), lambda x: x.roll(1, -1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_data_come_back_through_a_step_that_only_moves_them(
    step: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    model, x = Folded(step).to(dtype).eval(), torch.rand(1, 1, 5, 5, dtype=dtype)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor([1])))
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.inputs is not None and recovery.error_bound is not None
    assert float((recovery.inputs - x).abs().max()) <= recovery.error_bound < 1e-4


class Grouped(nn.Module):
    """Layers with other groups that read one value."""

    def __init__(self, groups: tuple[int, int]) -> None:
        super().__init__()
        self.s, self.a = nn.Conv2d(1, 12, 3, 1, 1), nn.ELU()
        self.c, self.p = (nn.Conv2d(12, 12, 3, 1, 1, groups=g) for g in groups)
        self.h = nn.Linear(12 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.s(x))
        return self.h(self.a((self.c(x) + self.p(x)).flatten(1)))


@pytest.mark.parametrize("groups", [(2, 1), (1, 4), (2, 3)])
def test_layers_of_other_groups_read_one_value(groups: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, x = Grouped(groups).double().eval(), torch.rand(1, 1, 4, 4, dtype=torch.float64)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor([1])))
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.inputs is not None and recovery.error_bound is not None
    assert float((recovery.inputs - x).abs().max()) <= recovery.error_bound < 1e-9


class Flat(nn.Module):
    """Fully connected branches, a number that scales one of them, few outputs."""

    def __init__(self, outputs: int, activation: nn.Module) -> None:
        super().__init__()
        self.f, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.h, self.act = nn.Linear(8, outputs), activation
        self.alpha = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return self.h(self.alpha * h + self.b(self.act(self.a(h))))


@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_no_mixture_is_a_sample_of_a_batch_of_unknown_size(
    outputs: int, batch: int, shared: bool
) -> None:
    for seed, act in enumerate((nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.2))):
        torch.manual_seed(seed)
        model = Flat(outputs, act).double().eval()
        x = torch.rand(batch, 4, dtype=torch.float64)
        y, loss = torch.arange(batch) % max(outputs, 2), "cross_entropy"
        if outputs == 1:
            y, loss = y[:, None].double(), "binary_cross_entropy_with_logits"
        update = rgap.capture(model, x, y, loss=loss, share_batch_size=shared)
        recovery, true = rgap.invert(model, update, time_limit=2.0), seen(model, x)
        assert recovery.status is not Status.INCONSISTENT, recovery.reason
        for name, value in recovery.features.items():
            apart = (value[:, None] - true[name]).square().mean(2).sqrt().amin(1)
            assert float(apart.max()) <= 10.0 * recovery.features_error[name] + 1e-14, name


@pytest.mark.parametrize("seed", [0, 1])
def test_samples_with_factors_of_their_own_hand_out_no_scaled_features(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Flat(10, nn.Tanh()).double().eval(), torch.rand(2, 4, dtype=torch.float64)
    each = nn.functional.cross_entropy(model(x), torch.tensor([5, 7]), reduction="none")
    focal = ((1.0 - torch.exp(-each)).square() * each).mean()
    sent = torch.autograd.grad(focal, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    update = rgap.Update(
        dict(zip(names, sent, strict=True)), loss="cross_entropy", batch_size=2, input_shape=(4,)
    )
    recovery, true = rgap.invert(model, update, time_limit=2.0), seen(model, x)
    for name, value in recovery.features.items():
        apart = (value[:, None] - true[name]).square().mean(2).sqrt().amin(1)
        assert float(apart.max()) <= 10.0 * recovery.features_error[name] + 1e-14, name


def one_place(head: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 64, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(64, 64, 3)]
    last = [nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)]
    if head:
        layers[-1], last = nn.Conv2d(64, 10, 3), [nn.Flatten()]
    return nn.Sequential(*layers, *last)


@pytest.mark.cases(4)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_convolution_with_one_place_is_walked_from(
    head: bool, batch: int, dtype: torch.dtype
) -> None:
    """The chain reads it as a matrix, the graph as a convolution: their shapes differ."""
    model, x = one_place(head).to(dtype).eval(), torch.rand(batch, 1, 8, 8, dtype=dtype)
    y = torch.tensor([3, 5])[:batch]
    recovery = rgap.invert(model, rgap.capture(model, x, y))
    if batch == 2:
        assert recovery.status is not Status.INCONSISTENT
        return
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.inputs is not None and recovery.error_bound is not None
    assert float((recovery.inputs - x).abs().max()) <= recovery.error_bound < 1e-3
