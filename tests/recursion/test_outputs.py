"""Batches that no head tells apart: cotangents at the output from the convolution below it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from computed import computed
from scipy.optimize import linear_sum_assignment
from torch import nn

import rgap
from rgap.precision import Estimate, Precision
from rgap.recovery import Status
from rgap.recursion.outputs import cotangents_at_output

F64 = torch.float64


def network(dtype: torch.dtype, normed: bool = True, bias: bool = True) -> nn.Module:
    """Three classes; the last convolution tells up to five samples apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)

        def layer(into: int, out: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(into, out, 3, stride, 1, bias=bias and not normed)
            return [conv, nn.BatchNorm2d(out, affine=bias)] if normed else [conv]

        model = nn.Sequential(
            *layer(3, 32, 2), nn.ReLU(), *layer(32, 48, 2), nn.ReLU(), *layer(48, 48, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 3, bias=bias),
        )  # fmt: skip
        model.train()(rgap.photos.load(16, 12, dtype=torch.float32))
    return model.to(dtype).eval()


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_more_samples_than_classes(labels: list[int], normed: bool, dtype: torch.dtype) -> None:
    model, x = network(dtype, normed), rgap.photos.load(5, 12, start=3).to(dtype)
    flow, gradients, top = computed(model, x, torch.tensor(labels))
    told = cotangents_at_output(flow, gradients, Precision(dtype=dtype))
    assert isinstance(told, Estimate), told
    _, mate = linear_sum_assignment(torch.cdist(told.value, top).numpy())
    off = (told.value - top[mate]).abs()
    assert float(off.max()) <= (1e-9 if dtype is F64 else 2e-3)
    rms = float(told.error.square().mean().sqrt())
    assert float(off.square().mean().sqrt()) <= 5.0 * rms


@pytest.mark.parametrize("why", ["no bias", "other bias", "no shifts", "too many"])
def test_what_does_not_follow_is_said(why: str) -> None:
    model = network(F64, bias=why != "no bias")
    count = 9 if why == "too many" else 3
    x = rgap.photos.load(count, 12, start=3).to(F64)
    flow, gradients, _ = computed(model, x, torch.arange(count) % 3)
    if why == "other bias":
        gradients["7.bias"] = 1.1 * gradients["7.bias"]
    if why == "no shifts":
        gradients["6.weight"] = torch.randn_like(gradients["6.weight"])
    told = cotangents_at_output(flow, gradients, Precision(dtype=F64))
    said = {
        "no bias": "no gradient of a bias above it says",
        "other bias": "miss the samples",
        "no shifts": "not told apart by shifts",
        "too many": "not told apart by shifts",
    }
    assert isinstance(told, str) and said[why] in told


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_batch_of_more_samples_than_classes_comes_back(dtype: torch.dtype) -> None:
    model, x = network(dtype), rgap.photos.load(4, 12, start=3).to(dtype)
    labels = torch.tensor([2, 0, 2, 1])
    found = rgap.invert(model, rgap.capture(model, x, labels), time_limit=3.0)
    assert {"3", "6"} <= set(found.features), found.reason
    seen = nn.Sequential(*model[:6])(x).detach().double()
    told = found.features["6"]
    apart = (told[:, None] - seen).abs().flatten(2).amax(2)
    near, mate = apart.min(1)
    assert sorted(mate.tolist()) == [0, 1, 2, 3]
    assert float(near.max()) <= (1e-9 if dtype is F64 else 1e-2)
    if found.inputs is not None:
        assert found.error_bound is not None
        apart = (found.inputs[:, None] - x.double()).abs().flatten(2).amax(2)
        assert float(apart.min(1).values.max()) <= found.error_bound
        assert found.labels is not None
        assert found.labels.tolist() == labels[apart.argmin(1)].tolist()


def test_it_is_the_stated_batch_or_none() -> None:
    model, x = network(F64), rgap.photos.load(4, 12, start=3).to(F64)
    update = rgap.capture(model, x, torch.tensor([2, 0, 2, 1]))
    wrong = rgap.invert(model, replace(update, batch_size=5))
    assert wrong.status is not Status.EXACT and not wrong.features
    twice = rgap.capture(model, x[[0, 0, 1, 2, 3]], torch.tensor([2, 2, 0, 2, 1]))
    copied = rgap.invert(model, twice)
    assert copied.status is not Status.INCONSISTENT and not copied.features
