"""A factor of any size on the update: the right data and the factor, or a reason that names it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

import rgap

F64 = torch.float64


def network(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    if kind == "pair":
        layers = [nn.Flatten(), nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 32), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(32, 10)).to(dtype).eval()
    convolution = nn.Conv2d(3, 16, 3, 1, 1)
    return (
        nn.Sequential(convolution, nn.LeakyReLU(0.3), nn.Flatten(), nn.Linear(256, 10))
        .to(dtype)
        .eval()
    )


FACTORS = (1e-30, 1e-10, 1e10, 1e20, 1e25, 1e29)


@pytest.mark.cases(16)
@pytest.mark.parametrize(
    ("dtype", "factor"), [(F64, 1e-100), *product((F64, torch.float32), FACTORS)]
)
@pytest.mark.parametrize("kind", ["pair", "head"])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_factor_is_found_or_named(
    batch: int, kind: str, dtype: torch.dtype, factor: float
) -> None:
    model = network(kind, dtype)
    x = torch.rand(batch, 3, 4, 4, dtype=dtype)
    update = rgap.capture(model, x, torch.arange(batch))
    sent = {name: factor * g for name, g in update.gradients.items()}
    found = rgap.invert(model, replace(update, gradients=sent))
    if found.status is not rgap.Status.EXACT:
        assert kind == "head" and batch > 1 and "factor" in found.reason, found.reason
        assert not found.certified
        return
    assert found.inputs is not None and found.error_bound is not None
    off = (found.inputs[:, None] - x.double()).abs().flatten(2).amax(2).amin(1)
    assert float(off.max()) <= found.error_bound < 1e-4
    assert found.scale == pytest.approx(factor, rel=1e-5)


def test_what_leaves_the_range_of_squares_is_refused() -> None:
    model = network("head", F64)
    update = rgap.capture(model, torch.rand(3, 3, 4, 4, dtype=F64), torch.arange(3))
    sent = {name: 1e40 * g for name, g in update.gradients.items()}
    with pytest.raises(ValueError, match="squares leave the range of float64; divide the update"):
        rgap.invert(model, replace(update, gradients=sent))


def test_labels_of_a_gradient_that_no_probabilities_send_are_not_decided() -> None:
    model = network("head", F64)
    update = rgap.capture(model, torch.rand(3, 3, 4, 4, dtype=F64), torch.arange(3))
    sent = {name: 1e20 * g for name, g in update.gradients.items()}
    told = rgap.labels.estimate(model, replace(update, gradients=sent))
    assert not told.decided and "of a size that no probabilities send" in told.reason
