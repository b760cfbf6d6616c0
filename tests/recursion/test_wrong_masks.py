"""A unit that is on by less than the error of its value: its filter's gradient says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgap.network.flow import Flow, flow_of
from rgap.precision import Estimate, Precision
from rgap.recursion.readers import Contradicted, Reader, from_gradients


@pytest.mark.parametrize("wrong", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_filters_with_a_wrong_cotangent_stand_apart(wrong: int, dtype: torch.dtype) -> None:
    """All others agree on the input, so that these are named, and only these."""
    torch.manual_seed(wrong)
    conv = nn.Conv2d(12, 40, 3, padding=1, bias=False).double()
    flow = flow_of(nn.Sequential(conv, nn.Flatten(), nn.Linear(40 * 36, 3)).double(), (12, 6, 6))
    assert isinstance(flow, Flow)
    x = torch.randn(2, 12, 6, 6, dtype=torch.float64).relu()
    k = torch.randn(2, 40, 6, 6, dtype=torch.float64) * (torch.rand(2, 40, 6, 6) < 0.5)
    sent = torch.nn.grad.conv2d_weight(x.to(dtype), (40, 12, 3, 3), k.to(dtype), padding=1)
    taken, filters = k.clone(), torch.randperm(40)[:wrong]
    for f in filters.tolist():
        place = k[:, f].nonzero()[0].tolist()
        taken[place[0], f, place[1], place[2]] = 0.0  # on, and taken for off
    precision = Precision(dtype=dtype, samples=8)
    known = Estimate(taken, precision.rounding(taken))
    affine = flow.nodes[1].link
    found = from_gradients([Reader(affine, known)], {"0.weight": sent.double()}, precision)
    if not wrong:
        assert isinstance(found, Estimate)
        assert float((found.value - x).abs().max()) <= 10.0 * float(found.std.max())
        return
    assert isinstance(found, Contradicted)
    assert found.filters[0].nonzero().flatten().tolist() == sorted(filters.tolist())
