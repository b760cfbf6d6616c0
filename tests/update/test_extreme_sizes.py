"""Entries whose squares float64 does not hold: no traceback, and no certificate of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import rgap


def network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(1)
    if kind == "convolutional":
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.Tanh(),
            nn.Flatten(), nn.Linear(24, 10),
        ).double().eval(), (1, 6, 6)  # fmt: skip
    bias = kind == "biased"
    layers = nn.Linear(12, 8, bias), nn.Sigmoid(), nn.Linear(8, 10, bias)
    return nn.Sequential(*layers).double().eval(), (12,)


@pytest.mark.cases(3)
@pytest.mark.parametrize("kind", ["convolutional", "biased", "unbiased"])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_answer_whatever_the_sizes(kind: str, batch: int) -> None:
    model, shape = network(kind)
    x = torch.rand(batch, *shape, dtype=torch.float64)
    sent = rgap.capture(model, x, torch.arange(batch))
    names = list(sent.gradients)
    for power in (-318, -271, -155, -140, 25):
        factor = float(f"1e{power}")
        for chosen in (names, names[:1], names[: len(names) // 2]):
            g = {n: factor * g if n in chosen else g for n, g in sent.gradients.items()}
            if not any(bool(t.any()) for t in g.values()):
                continue
            found = rgap.invert(model, replace(sent, gradients=g), batch_size=batch)
            if "inputs" in found.certified:
                assert found.inputs is not None and found.error_bound is not None
                apart = torch.cdist(found.inputs.flatten(1), x.flatten(1)).amin(1).max()
                assert float(apart) <= found.error_bound * x[0].numel() ** 0.5


def test_what_no_square_holds_is_refused_by_name() -> None:
    model, shape = network("biased")
    sent = rgap.capture(model, torch.rand(1, *shape, dtype=torch.float64), torch.tensor([0]))
    g = {n: 1e150 * g for n, g in sent.gradients.items()}
    with pytest.raises(ValueError, match=r"gradients: '0\.weight' has entries of .*at most 1e\+30"):
        rgap.invert(model, replace(sent, gradients=g))
