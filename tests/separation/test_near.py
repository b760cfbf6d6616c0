"""Samples that nearly coincide: what is certified is right, however little tells them apart.

The direction that exchanges two samples at a distance d is fixed by terms of order d² of the
update, and is the first that rounding empties.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from rgap import Loss, Recovery, Status, Update, capture, invert

F32, F64 = torch.float32, torch.float64
LOSSES = {
    "classes": Loss(),
    "squared": Loss("mse_loss"),
    "binary": Loss("binary_cross_entropy_with_logits"),
}
ACTS = (nn.Tanh, nn.Sigmoid, lambda: nn.LeakyReLU(0.2))


def network(kind: str, seed: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Fully connected, or convolutions below, with activations and weights of a seed."""
    draw = random.Random(seed)
    a, b, c = (draw.choice(ACTS)() for _ in range(3))
    torch.manual_seed(seed)
    if kind == "dense":
        return nn.Sequential(
            nn.Linear(6, 18), a, nn.Linear(18, 18), b, nn.Linear(18, 4)
        ), (6,)  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), a, nn.Conv2d(6, 8, 3, padding=1), b, nn.Flatten(),
        nn.Linear(128, 24), c, nn.Linear(24, 4),
    ), (1, 4, 4)  # fmt: skip


def near(
    shape: tuple[int, ...], count: int, apart: float, same: bool, loss: str
) -> tuple[Tensor, Tensor]:
    """Samples at a distance from the first one; with its targets, or with others."""
    x = torch.rand(count, *shape, dtype=F64)
    for i in range(1, count):
        x[i] = x[0] + apart * torch.randn(shape, dtype=F64) * (1.0 if i == 1 else -0.6)
    if loss == "classes":
        return x, torch.arange(count) * (not same)
    y = torch.rand(count, 4, dtype=F64) if loss == "squared" else torch.eye(4, dtype=F64)[:count]
    return x, y[:1].repeat(count, 1) if same else y


def fault(recovery: Recovery, x: Tensor, y: Tensor) -> str:
    """What a certificate says that is not so; empty where it is right, or there is none."""
    if "inputs" not in recovery.certified:
        return ""
    assert recovery.inputs is not None and recovery.error_bound is not None
    if recovery.inputs.shape != x.shape:
        return f"{len(recovery.inputs)} samples of {len(x)}"
    orders = [list(order) for order in permutations(range(len(x)))]
    errors = [float((recovery.inputs.double() - x[order]).abs().max()) for order in orders]
    error, order = min(zip(errors, orders, strict=True))
    if error > recovery.error_bound:
        return f"inputs: {error:.1e} > {recovery.error_bound:.1e}"
    if "targets" not in recovery.certified:
        return ""
    assert recovery.labels is not None
    off = float((recovery.labels.double() - y[order].double()).abs().max())
    bound = recovery.targets_error_bound or 0.0
    return "" if off <= bound else f"targets: {off:.1e} > {bound:.1e}"


def recovered(
    kind: str, seed: int, count: int, digits: int, same: bool, loss: str, dtype: torch.dtype
) -> tuple[Recovery, Tensor, Tensor]:
    model, shape = network(kind, seed)
    x, y = near(shape, count, 10.0**-digits, same, loss)
    x, y = x.to(dtype), y.to(dtype) if y.is_floating_point() else y
    update = capture(
        model.eval().to(dtype), x, y, LOSSES[loss], dtype=dtype, value_range=None
    )  # fmt: skip
    return invert(model, update), x.double(), y


DUE = [  # (layers, seed of weights and activations, samples, -log10 of d, same targets, ...)
    ("dense", 1, 2, 1, False, "classes", F64),
    ("dense", 2, 2, 1, False, "classes", F32),
    ("dense", 2, 2, 2, False, "binary", F32),
    ("dense", 1, 2, 3, True, "binary", F64),
    ("dense", 2, 2, 3, True, "classes", F64),
    ("dense", 2, 2, 3, True, "squared", F64),
    ("dense", 1, 3, 2, True, "binary", F64),
    ("dense", 1, 3, 4, False, "squared", F64),
    ("dense", 2, 2, 4, False, "classes", F64),
    ("dense", 2, 2, 4, True, "squared", F64),
    ("conv", 2, 2, 1, True, "classes", F64),
    ("conv", 2, 2, 3, True, "binary", F64),
    ("conv", 20, 2, 2, False, "squared", F64),  # errors of free cotangents go down with the samples
]
OPEN = [
    ("dense", 5, 2, 4, False, "binary", F64),
    ("dense", 3, 2, 6, False, "squared", F64),
    ("dense", 3, 2, 7, False, "squared", F64),
    ("dense", 2, 2, 7, True, "binary", F64),
]


@pytest.mark.parametrize("case", DUE, ids=str)
def test_near_samples_that_are_determined_are_certified(case: tuple) -> None:
    recovery, x, y = recovered(*case)
    assert recovery.status is Status.EXACT, recovery.reason
    assert fault(recovery, x, y) == ""


@pytest.mark.parametrize("case", OPEN, ids=str)
def test_samples_that_are_too_near_are_not_certified_wrongly(case: tuple) -> None:
    assert fault(*recovered(*case)) == ""


@pytest.mark.parametrize("seed", [1, 3])
def test_a_direction_that_rounding_empties_accuses_nobody(seed: int) -> None:
    """The steps leave it out and go on: the update is reproduced, and the reason says why not."""
    recovery, x, y = recovered("dense", seed, 2, 4, True, "squared", F64)
    assert fault(recovery, x, y) == "" and not recovery.exact
    assert "nearly coincide" in recovery.reason and "another model" not in recovery.reason
    assert recovery.residual is None or recovery.residual < 1e-13


@pytest.mark.parametrize("condition", [1e6, 1e10])
def test_one_picture_behind_a_layer_of_poor_condition(condition: float) -> None:
    """Two channels carry three, and the second one next to nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(144, 24), nn.Tanh(), nn.Linear(24, 5),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for layer, dim in ((model[0], 0), (model[2], 1)):
            rows = layer.weight.movedim(dim, 0)
            u, s, v = torch.linalg.svd(rows.flatten(1), full_matrices=False)
            s[1] = s[0] / condition
            rows.copy_((u * s @ v).view_as(rows))
    x, y = torch.rand(1, 3, 6, 6, dtype=F64), torch.tensor([1])
    recovery = invert(model, capture(model, x, y, dtype=F64))
    assert recovery.exact or condition > 1e6
    assert fault(recovery, x, y) == ""


class Residual(nn.Module):
    """x + |…| above a layer without a bias: the head alone tells the samples apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.first(x).abs())).abs()


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


CHAINS = {
    "head alone": lambda: (nn.Linear(12, 64, bias=False), Absolute(), Residual()),
    "relu": lambda: (nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
    "tanh": lambda: (nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()),
}


def sent_near(kind: str, apart: float, seed: int) -> tuple[nn.Sequential, Update, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(*CHAINS[kind](), nn.Linear(64, 4)).eval()
    x, y = torch.rand(2, 12), torch.tensor([3, 1])
    x[1] = x[0] + apart * torch.randn(12)
    return model, capture(model, x, y, value_range=None), x, y


@pytest.mark.cases(3)
@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("apart", [1e-3, 2e-4, 1e-4, 3e-5])
def test_a_weight_that_its_error_explains_contradicts_no_batch_size(
    kind: str, apart: float
) -> None:
    for seed in (3, 9, 16):
        model, update, x, y = sent_near(kind, apart, seed)
        found = invert(model, update)
        assert found.status is not Status.INCONSISTENT, found.reason
        assert not (wrong := fault(found, x, y)), f"{seed}: {wrong}"


@pytest.mark.cases(2)
@pytest.mark.parametrize("factor", [3.0, 0.5])
@pytest.mark.parametrize("apart", [1e-2, 1e-4])
def test_a_factor_on_near_copies_is_found_or_left_open(factor: float, apart: float) -> None:
    for seed in (3, 14):
        model, update, x, y = sent_near("head alone", apart, seed)
        scaled = replace(update, gradients={n: factor * g for n, g in update.gradients.items()})
        found = invert(model, scaled)
        assert not (wrong := fault(found, x, y)), f"{seed}: {wrong}"
        if apart > 1e-3:
            told = re.search(r"the update is (\S+) times", found.reason)  # no data below |x|
            assert told and float(told[1]) == pytest.approx(factor, rel=1e-3), found.reason
        else:
            assert found.status is Status.UNDERDETERMINED and "near copies" in found.reason


@pytest.mark.cases(10)
@pytest.mark.parametrize("seed", range(24))
def test_no_genuine_near_copies_are_a_contradiction(seed: int) -> None:
    draw = random.Random(seed)
    kind, count = draw.choice(list(CHAINS)), draw.choice([2, 3])
    classes, apart = draw.choice([4, 5, 10]), 10.0 ** draw.uniform(-5, -2)
    torch.manual_seed(seed)
    model = nn.Sequential(*CHAINS[kind](), nn.Linear(64, classes)).eval()
    x, y = torch.rand(count, 12), torch.randint(classes, (count,))
    x[1] = x[0] + apart * torch.randn(12)
    found = invert(model, capture(model, x, y, value_range=None))
    assert found.status is not Status.INCONSISTENT, found.reason
    assert not (wrong := fault(found, x, y)), wrong


@pytest.mark.cases(6)
@pytest.mark.parametrize("apart", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_points_on_a_line_of_solutions_are_not_certified(apart: float, seed: int) -> None:
    """Samples that share every unit: the ends of the line between kinks look isolated."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    ).eval()
    x = torch.rand(2, 12)
    x[1] = x[0] + apart * torch.randn(12)
    update = capture(model, x, torch.tensor([3, 1]), value_range=None)
    recovery = invert(model, update)
    assert recovery.status is not Status.INCONSISTENT
    if "inputs" in recovery.certified:
        assert recovery.inputs is not None and recovery.error_bound is not None
        off = torch.cdist(recovery.inputs, x.double(), p=torch.inf).amin(1)
        assert float(off.max()) <= recovery.error_bound
