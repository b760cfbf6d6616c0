"""No step at any place of a network makes a certificate wrong."""

from __future__ import annotations

import random

import pytest
import torch
from steps_table import STEPS, Case, cases, fault, wrong
from torch import nn

import rgap

SOME = random.Random(3).sample(list(cases()), 40)


SATURATED = [Case("mask of one entry", "input", 1, loss) for loss in ("index", "soft")]
OPEN = [Case(step, "head", 1, "soft") for step in ("pad", "clamp", "relu", "buffer with zero")]


def test_nothing_wrong_is_certified_and_most_are() -> None:
    judged = {str(case): wrong(case) for case in [*SOME, *SATURATED, *OPEN]}
    assert not {case: said for case, said in judged.items() if said[1]}
    assert sum(status == "EXACT" for status, _ in judged.values()) >= 24


KEPT = ["temperature", "half", "batch norm", "negation", "shift", "buffer", "flip", "roll",
        "twice sigmoid", "tanh", "squeeze", "clone"]  # fmt: skip
READ = ["pad", "cumulative sum", "doubled", "reshape"]  # a batch of one is read from the data up


@pytest.mark.cases(14)
@pytest.mark.parametrize(
    ("step", "batch"), [*((s, b) for s in KEPT for b in (1, 2)), *((s, 1) for s in READ)]
)
def test_labels_behind_a_step_that_keeps_them_are_certified(step: str, batch: int) -> None:
    status, why = wrong(Case(step, "head", batch, "index"))
    assert (status, why) == ("EXACT", "")


def test_a_softmax_leaves_one_direction_of_a_target_open() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Softmax(1)).double()
    x = torch.rand(1, 6, dtype=torch.float64)
    y = torch.eye(5, dtype=torch.float64)[2:3]
    found = rgap.invert(model, rgap.capture(model, x, y, "mse_loss"))
    assert found.certified == {"inputs"} and found.labels is None
    assert float((found.inputs - x).abs().max()) <= found.error_bound
    assert "softmax" in found.reason and "1 of the 5 directions" in found.reason


def test_a_constant_mask_leaves_its_target_open() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), STEPS["buffer with zero"](5))
    model = model.double()
    x = torch.rand(1, 6, dtype=torch.float64)
    found = rgap.invert(model, rgap.capture(model, x, torch.rand(1, 5).double(), "mse_loss"))
    assert found.certified == {"inputs"} and not fault(found, x, torch.zeros(1, 5))
