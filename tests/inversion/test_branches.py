"""What a network whose branches meet gives away below the place where its chain ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from branched import drawn
from residual import Block
from torch import Tensor, nn

import rgap
from rgap.recovery import Status

SHAPE = (3, 16, 16)


def network(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), Block(24, 24), Block(24, 48, 2), Block(48, 48),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    model.train()(rgap.photos.load(16, 16, dtype=torch.float32))
    return model.to(dtype).eval()


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
        recovery = rgap.invert(case.model, case.update, time_limit=1.0)
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
