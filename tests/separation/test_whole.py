"""Samples and cotangents have to make the gradient: no mixture passes for a sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.precision import Estimate, Precision
from rgap.separation.batch import Separated
from rgap.separation.softmax import separate
from rgap.separation.whole import short_of

F64 = torch.float64


def flat_batch(seed: int, scale: float) -> tuple[nn.Module, Tensor, Tensor]:
    """Three samples at a head, one of which is right beyond doubt: its cotangent is tiny."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            size = 0.3 if p.ndim > 2 else 0.1
            p.copy_(size * torch.randn(p.shape, generator=draw, dtype=F64))
        model[4].weight.mul_(scale)
        x = torch.rand(3, 1, 12, 12, generator=draw, dtype=F64)
        y = torch.randint(10, (3,), generator=draw)
        y[0] = model(x)[0].argmax()
    return model.eval(), x, y


@pytest.mark.parametrize("scale", [20.0, 60.0, 120.0])
@pytest.mark.parametrize("seed", range(6))
def test_features_are_those_of_one_sample_each(seed: int, scale: float) -> None:
    model, x, y = flat_batch(seed, scale)
    recovery = rgap.invert(model, rgap.capture(model, x, y, dtype=F64))
    if "4" not in recovery.features:
        return
    truth = model[:4](x).detach()
    for row in recovery.features["4"]:
        off = min(float((row - sample).square().mean().sqrt()) for sample in truth)
        assert off < 10.0 * recovery.features_error["4"] + 1e-12


def test_a_mixture_misses_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right samples pass; with a share of another in one of them they do not."""
    seen = list[tuple[Separated, Precision]]()

    def noted(separated: Separated, precision: Precision) -> str:
        seen.append((separated, precision))
        return short_of(separated, precision)

    monkeypatch.setattr(separate, "short_of", noted)
    model, x, y = flat_batch(0, 1.0)
    recovery = rgap.invert(model, rgap.capture(model, x, y, dtype=F64))
    assert "4" in recovery.features and seen
    one, precision = seen[-1]
    assert short_of(one, precision) == ""
    value = one.features.value.clone()
    value[0] = 0.9 * value[0] + 0.1 * value[1]
    mixed = replace(one, features=Estimate(value, one.features.error))
    said = short_of(mixed, precision)
    assert "one is a mixture" in said and "3 samples at '4'" in said
    half = Estimate(0.5 * one.cotangents.value, one.cotangents.error)
    assert short_of(replace(one, cotangents=half), precision) == "", "a factor on the whole loss"
