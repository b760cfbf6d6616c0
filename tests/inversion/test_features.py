"""Inputs of layers that are handed out where the recursion ends before the data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.recovery import Recovery, Status


def lenet() -> nn.Module:
    return rgap.models.lenet(channels=4, input_shape=(3, 16, 16), seed=0)


def pooled() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
            nn.Linear(128, 48), nn.ReLU(), nn.Linear(48, 10),
        ).eval()  # fmt: skip


def true_inputs(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What enters each layer, float64."""
    taken = {}
    for name, module in model.double().named_modules():
        if name in names:
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: taken.__setitem__(name, inputs[0].detach())
            )
    model(x.double())
    return taken


def assert_true(model: nn.Module, x: Tensor, recovery: Recovery) -> None:
    true = true_inputs(model, x, list(recovery.features))
    for name, value in recovery.features.items():
        assert value.shape == true[name].shape
        gaps = torch.cdist(true[name].flatten(1), value.flatten(1)) / value[0].numel() ** 0.5
        assert sorted(gaps.argmin(1).tolist()) == list(range(len(x)))  # each sample once
        assert float(gaps.amin(1).max()) < 20 * recovery.features_error[name] + 1e-7


@pytest.mark.parametrize(
    ("make", "labels", "status"),
    [
        (lenet, [3, 5], Status.UNDERDETERMINED),
        (pooled, [3], Status.UNSUPPORTED),
        (pooled, [3, 3], Status.UNSUPPORTED),
    ],
)
def test_the_last_layers_input_is_handed_out_and_gives_the_labels(
    make, labels: list[int], status: Status
) -> None:
    model = make()
    x = rgap.photos.load(len(labels), 16).float()
    update = rgap.capture(model, x, torch.tensor(labels))
    recovery = rgap.invert(model, update)
    assert recovery.status is status and recovery.inputs is None
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    assert head in recovery.features
    estimate = rgap.labels.estimate(model, update, method="exact", features=recovery.features[head])
    assert estimate.labels is not None and estimate.labels.tolist() == labels
    assert "invert(model, update)" in rgap.labels.estimate(model, update, method="exact").reason
    assert_true(model, x, recovery)


def test_mixtures_and_copies_are_not_handed_out() -> None:
    model = lenet()
    x = rgap.photos.load(2, 16).float()
    update = rgap.capture(model, x, torch.tensor([3, 5]))
    assert not rgap.invert(model, replace(update, batch_size=1)).features
    assert not rgap.invert(model, replace(update, batch_size=3)).features
    assert not rgap.invert(model, replace(update, batch_size=None)).features
    copies = rgap.capture(model, x[[0, 0]], torch.tensor([3, 3]))
    assert not rgap.invert(model, copies).features
    others = rgap.models.lenet(channels=4, input_shape=(3, 16, 16), seed=1)
    assert not rgap.invert(others, update).features


@pytest.mark.cases(1)
@pytest.mark.parametrize("seed", [1, 5, 9])
def test_no_mixture_is_a_feature_where_the_layers_between_are_linear_on_the_batch(
    seed: int,
) -> None:
    """Hardtanh that no unit of the batch leaves: points on the line between samples are as good."""
    for number in range(seed, seed + 4):
        torch.manual_seed(number)
        model = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1), nn.SiLU(), nn.Flatten(), nn.Linear(512, 32), nn.Hardtanh(),
            nn.Linear(32, 10),
        ).eval()  # fmt: skip
        x, y = torch.rand(2, 1, 4, 4), torch.rand(2, 10).softmax(1)
        sent = rgap.capture(model, x, y, rgap.Loss(targets="probability"))
        for name, value in rgap.invert(model, sent).features.items():
            true = model[: int(name)](x).double().detach()
            off = min(float((value.double() - t).abs().max()) for t in (true, true.flip(0)))
            assert off < 1e-3
