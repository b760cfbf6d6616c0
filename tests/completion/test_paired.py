"""Sums that weigh two functions of one entry alike: both of its values send the same update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.completion.value_uniqueness import paired
from rgap.network.chain import parse
from rgap.recovery import Status

F64 = torch.float64
ENTRY, MIDDLE = 17, 0.45


class Residual(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm, self.other = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(width, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm(self.one(x)))
        return torch.relu(self.other(self.two(inner)) + self.short(x))


def even_in_one_entry(seed: int, exactly: bool) -> nn.Sequential:
    """``tanh(c(u − m + d)) + tanh(−c(u − m − d))`` of one entry u, below a wide network."""
    torch.manual_seed(seed)
    n, pairs = 108, 4
    wide = 2 * n + 2 * pairs
    first, second = nn.Linear(n, wide, dtype=F64), nn.Linear(wide, 288, dtype=F64)
    with torch.no_grad():
        first.weight.zero_()
        first.bias.zero_()
        second.weight.mul_(2)
        for i in range(n):
            if i != ENTRY:
                first.weight[i, i], first.weight[n + i, i] = 0.6, -0.4
        for k in range(pairs):
            c, d = 1.0 + k, 0.1 + 0.1 * k
            at = 2 * n + 2 * k
            first.weight[at, ENTRY], first.bias[at] = c, c * (d - MIDDLE)
            first.weight[at + 1, ENTRY], first.bias[at + 1] = -c, c * (d + MIDDLE)
            if exactly:
                second.weight[:, at + 1] = second.weight[:, at]
    for layer in (first, second):
        layer.requires_grad_(False)
    body = nn.Sequential(
        nn.Conv2d(8, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), Residual(64, 1),
        Residual(64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    unflat = nn.Unflatten(1, (8, 6, 6))
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, unflat, body).double().eval()


@pytest.mark.parametrize("exactly", [True, False])
def test_an_entry_that_enters_by_even_functions_alone(exactly: bool) -> None:
    model = even_in_one_entry(0, exactly)
    x = torch.rand(1, 3, 6, 6, dtype=F64)
    sent = rgap.capture(model, x, torch.tensor([3]))
    found = rgap.invert(model, sent)
    if exactly:
        other = x.clone()
        other.view(-1)[ENTRY] = 2 * MIDDLE - x.view(-1)[ENTRY]
        same = rgap.capture(model, other, torch.tensor([3]), value_range=None)
        gaps = [float((same.gradients[n] - g).norm() / g.norm()) for n, g in sent.gradients.items()]
        assert max(gaps) < 1e-13
        assert found.status is not Status.EXACT and "alike" in found.reason
    elif found.status is Status.EXACT:
        assert found.inputs is not None and found.error_bound is not None
        assert float((found.inputs - x).abs().max()) <= found.error_bound


def test_parallel_columns_of_every_kind() -> None:
    torch.manual_seed(0)
    for layer, shape in (
        (nn.Linear(1500, 64), (1500,)),
        (nn.Conv2d(8, 16, 3), (8, 6, 6)),
        (nn.Conv1d(8, 16, 2, groups=2), (8, 6)),
        (nn.Conv2d(8, 16, 3, groups=8), (8, 6, 6)),
    ):
        [stage] = parse(layer.double(), shape).stages
        assert not paired([stage.affine]), stage.affine.kind
        weight = layer.weight.data
        if weight.shape[1] == 1:
            continue
        last = weight.shape[1] - 1
        weight[:, last] = -3.0 * weight[:, 1]
        [stage] = parse(layer, shape).stages
        assert f"its inputs 1 and {last} alike" in paired([stage.affine])
