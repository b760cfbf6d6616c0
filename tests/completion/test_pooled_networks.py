"""Networks with max-pools: winners from gradients, data from what lies below them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.recovery import Recovery, Status

SIZES = 16, 16, "pool", 32, 32, "pool", 64, 64, "pool"


def vgg(dtype: torch.dtype, normed: bool, width: int = 3) -> nn.Module:
    """For 16×16 pictures, running statistics of photographs."""
    torch.manual_seed(0)
    layers, into = list[nn.Module](), 3
    for size in SIZES:
        if isinstance(size, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(into, width * size, 3, 1, 1))
        layers += [nn.BatchNorm2d(width * size), nn.ReLU()] if normed else [nn.ReLU()]
        into = width * size
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(into * 4, 10))
    model.train()(rgap.photos.load(16, 16, dtype=torch.float32))
    return model.to(dtype).eval()


def assert_certified(recovery: Recovery, x: Tensor) -> None:
    assert recovery.inputs is not None and recovery.error_bound is not None
    apart = (recovery.inputs[:, None] - x.double()).abs().flatten(2).amax(2)
    assert float(apart.amin(1).max()) <= recovery.error_bound
    assert len(set(apart.argmin(1).tolist())) == len(x)


@pytest.mark.parametrize(
    ("dtype", "labels", "normed"),
    [
        pytest.param(torch.float64, [3], False, id="double", marks=pytest.mark.long),
        pytest.param(torch.float32, [3], True, id="single", marks=pytest.mark.long),
        pytest.param(torch.float64, [5, 5], True, id="equal"),
    ],
)
def test_a_pooled_network_gives_its_batch_away(
    dtype: torch.dtype, labels: list[int], normed: bool
) -> None:
    model, x = vgg(dtype, normed), rgap.photos.load(len(labels), 16, start=4, dtype=dtype)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor(labels)))
    assert recovery.status is Status.EXACT, (recovery.reason, recovery.warnings)
    assert recovery.labels is not None and recovery.labels.tolist() == labels
    assert_certified(recovery, x)


@pytest.mark.cases(2)
@pytest.mark.parametrize("wrong", ["weights", "statistics", "another batch"])
def test_other_networks_certify_nothing(wrong: str) -> None:
    model, x = vgg(torch.float64, True), rgap.photos.load(1, 16, start=4, dtype=torch.float64)
    update = replace(rgap.capture(model, x, torch.tensor([3])), buffers={})
    with torch.no_grad():
        if wrong == "weights":
            model[3].weight.mul_(1.001)  # type: ignore[union-attr, operator]
        elif wrong == "statistics":
            model[4].running_var.mul_(1.001)  # type: ignore[union-attr, operator]
        else:
            model[-1].weight.mul_(1.001)  # type: ignore[union-attr, operator]
    recovery = rgap.invert(model, update, time_limit=5.0)
    assert recovery.inputs is None and not recovery.certified


@pytest.mark.cases(1)
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_equal_entries_of_a_window_certify_nothing_wrong(level: float) -> None:
    """A picture of one grey: inside the border all entries of a window are equal."""
    model = vgg(torch.float64, True, width=2)
    x = torch.full((1, 3, 16, 16), level, dtype=torch.float64)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor([3])))
    if recovery.inputs is not None:
        assert_certified(recovery, x)
    hooks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: hooks.__setitem__(name, inputs[0].detach())
        )
    model(x)
    for name, value in recovery.features.items():
        gap = float((value - hooks[name]).abs().max())
        assert gap <= 20.0 * recovery.features_error[name] + 1e-9
