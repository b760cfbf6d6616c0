"""Targets of samples whose features at the last layer are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rgap
from rgap.inversion.problem import prepare
from rgap.inversion.weighed import weighed_at
from rgap.precision import Estimate
from rgap.update.preflight import ClientView

F64 = torch.float64


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6, 1e-7])
@pytest.mark.parametrize("seed", range(3))
def test_targets_of_features_that_are_nearly_alike(apart: float, seed: int) -> None:
    """The misfit is measured in roundings of the gradient, and holds none of an inverse."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(512, 10)).double()
    x = 0.02 + 0.02 * torch.rand(1, 512, dtype=F64) + 4e-3 * apart * torch.randn(2, 512, dtype=F64)
    labels = torch.tensor([4, 9])
    update = rgap.capture(model, x, labels, value_range=None)
    problem = prepare(ClientView.of(model, update))
    noise = 1e-18 * torch.randn(12, *x.shape, dtype=F64)
    read = weighed_at(problem, Estimate(x, noise))
    assert not isinstance(read, str), read
    assert read.labels.tolist() == labels.tolist()
    other = weighed_at(problem, Estimate(x + 1e-9 * torch.randn_like(x), noise))
    assert isinstance(other, str) and "not that of these samples" in other
