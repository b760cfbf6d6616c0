"""Batch sizes up to which a layer's own gradient says its input, counted and measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rgap
from rgap.analysis import audit, symbolic
from rgap.analysis.closed_forms.own_gradient import by_gradient, by_shifts
from rgap.constraints import gradient_constraint
from rgap.network.affine import convolution
from rgap.network.geometry import Geometry
from rgap.separation.shifts.positions import Positions, tell_positions_apart

CASES = {
    "padded": (Geometry.of((3, 3), padding=1), 12, 10, (3, 3)),
    "valid": (Geometry.of((2, 2)), 9, 8, (4, 3)),
    "strided": (Geometry.of((3, 3), stride=2, padding=1), 14, 9, (5, 5)),
    "wide": (Geometry.of((5,), padding=2), 6, 12, (8,)),
    "narrow": (Geometry.of((3, 3), padding=1), 40, 6, (4, 4)),
    "unread": (Geometry.of((2,), stride=3), 8, 6, (7,)),
}


def sent(name: str, batch: int) -> tuple[object, torch.Tensor, torch.Tensor]:
    geometry, filters, channels, space = CASES[name]
    generator = torch.Generator().manual_seed(batch)
    weight = torch.randn(filters, channels, *geometry.kernel, generator=generator).double()
    layer = convolution("conv", weight, None, ("w", None), (channels, *space), geometry)
    x = torch.randn(batch, *layer.in_shape, generator=generator).double()
    k = torch.randn(batch, *layer.out_shape, generator=generator).double()
    return layer, layer.weight_gradient(x, k), k


@pytest.mark.parametrize("name", CASES)
def test_up_to_there_gradient_constraints_alone_have_full_rank(name: str) -> None:
    geometry, filters, _, space = CASES[name]
    most = by_gradient(geometry, filters, space)
    for batch in {1, max(1, most), most + 1}:
        layer, _, k = sent(name, batch)
        rank = gradient_constraint(layer, k).rank().rank
        assert (rank == batch * torch.Size(layer.in_shape).numel()) == (batch <= most), batch


@pytest.mark.parametrize("name", CASES)
def test_up_to_there_shifts_tell_positions_apart(name: str) -> None:
    geometry, filters, channels, space = CASES[name]
    most = by_shifts(geometry, filters, channels, space)
    for batch in {1, max(1, most or 0), (most or 0) + 1}:
        layer, gradient, _ = sent(name, batch)
        told = tell_positions_apart(layer, gradient)
        right = isinstance(told, Positions) and told.batch == batch
        assert right == (most is not None and batch <= most), batch


def test_every_table_says_so() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 7),
    ).double()  # fmt: skip
    counted = audit(model, (3, 8, 8), (2, 20), method="formula")
    measured = audit(model, (3, 8, 8), (2, 20))
    for table in (counted, measured):
        told = [(row.by_gradient, row.by_shifts) for row in table.rows if row.batch_size == 2]
        assert told == [(0, None), (16, None), (144, 16), (6, None)], told
        assert "B = 2: shifts of their kernels tell all positions of 1" in table.explain()
        assert "B = 20: shifts" not in table.explain()
    text = symbolic(model, (3, 8, 8)).layers[2].text()
    assert "shifts, to B   = 16" in text and "k known, to B  ≤ 144" in text


def test_what_is_counted_is_what_a_recovery_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1024, 7),
    ).double()  # fmt: skip
    rows = {row.layer: row for row in audit(model, (3, 8, 8), (1,), method="formula").rows}
    assert rows["2"].by_shifts == 4 and rows["0"].by_gradient == 4
    x = rgap.photos.load(1, 8, dtype=torch.float64)
    assert rgap.invert(model, rgap.capture(model, x, torch.tensor([2]))).status.name == "EXACT"


def test_a_pool_that_widens_its_input_is_counted() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten(),
        nn.Linear(196, 5),
    )  # fmt: skip
    rows = {row.layer: row for row in audit(model, (3, 8, 8), (1,), method="formula").rows}
    assert rows["4"].unknowns == 196 and rows["0"].unknowns == 192
