"""Batch norm in train mode: what stands above and below it comes back, nothing else is claimed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from train_mode import SHAPE, buffers, mixing_conv, mixing_mlp, untouched

import rgap
from rgap import Status


def entering(network: nn.Sequential, last: int, x: Tensor) -> Tensor:
    """The input of a layer, in float64, buffers left alone."""
    out: Tensor = copy.deepcopy(network).double()[:last](x.double())
    return out.detach()


def farthest(found: Tensor, true: Tensor) -> float:
    """Largest distance of a row from its nearest true one."""
    gaps = (found.double().flatten(1)[:, None] - true.double().flatten(1)[None]).abs().amax(2)
    return float(gaps.amin(1).max())


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("stated", [True, False])
def test_features_above_the_last_batch_norm_come_back(count: int, stated: bool) -> None:
    network = mixing_conv()
    x, y = torch.rand(count, *SHAPE), torch.tensor([4, 1, 7])[:count]
    before = buffers(network)
    update = rgap.capture(network, x, y, dtype=torch.float64, share_batch_size=stated)
    recovery = rgap.invert(network, update)
    assert recovery.status is Status.UNSUPPORTED and recovery.inputs is None
    assert "'4' (BatchNorm2d)" in recovery.reason and "mixes the samples" in recovery.reason
    assert "matching the whole update still works" in recovery.reason
    assert untouched(network, before)
    if stated:
        features = recovery.features["7"]
        assert len(features) == count
        assert farthest(features, entering(network, 7, x)) < 1e-9


def test_a_single_sample_gives_its_features() -> None:
    network = mixing_conv()
    x = torch.rand(1, *SHAPE)
    update = rgap.capture(network, x, torch.tensor([4]), dtype=torch.float64)
    recovery = rgap.invert(network, update)
    assert recovery.status is Status.UNSUPPORTED
    assert farthest(recovery.features["7"], entering(network, 7, x)) < 1e-9


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("stated", [True, False])
def test_a_layer_below_a_batch_norm_claims_nothing(count: int, stated: bool) -> None:
    """The gradient of its bias is what rounding leaves of 0: no equation may be read off it."""
    network = mixing_mlp()
    x = torch.rand(count, 12)
    update = rgap.capture(network, x, torch.arange(count), share_batch_size=stated)
    recovery = rgap.invert(network, update)
    assert recovery.status in (Status.UNSUPPORTED, Status.UNDERDETERMINED)
    assert not recovery.certified and recovery.inputs is None


def test_a_pair_below_every_batch_norm_gives_the_inputs() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Linear(12, 16), nn.Sigmoid(), nn.Linear(16, 14), nn.Sigmoid(),
            nn.Linear(14, 14), nn.BatchNorm1d(14), nn.ReLU(), nn.Linear(14, 5),
        ).train()  # fmt: skip
        x = torch.rand(3, 12)
    update = rgap.capture(network, x, torch.arange(3), dtype=torch.float64)
    recovery = rgap.invert(network, update)
    assert recovery.certified == {"inputs"} and recovery.status is Status.UNDERDETERMINED
    assert recovery.inputs is not None and recovery.error_bound is not None
    assert farthest(recovery.inputs, x) <= recovery.error_bound < 1e-9


def test_completion_matches_the_whole_update() -> None:
    network = mixing_mlp((4, 12, 10))
    x, y = torch.rand(3, 4), torch.arange(3)
    update = rgap.capture(network, x, y, dtype=torch.float64)
    recovery = rgap.invert(network, update, labels=y, complete=True, time_limit=5.0)
    assert recovery.status in (Status.COMPLETED, Status.UNSUPPORTED)
