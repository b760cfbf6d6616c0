"""The routes of the audit: sketches of large layers, counts without data, weights drawn anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import picture, small_conv, small_mlp
from torch import nn

import rgap
from rgap.analysis import audit
from rgap.analysis.discard.layer_ranks import sketched_rank
from rgap.solvers.kronecker import Kronecker


def low_rank(rows: int, columns: int, rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(2, rows, rank, generator=generator).double()
    return left @ torch.randn(2, rank, columns, generator=generator).double()


@pytest.mark.parametrize(("rows", "columns"), [(20, 900), (900, 20), (30, 40)])
@pytest.mark.parametrize("rank", [0, 1, 13, 20])
def test_a_sketch_keeps_the_rank(rows: int, columns: int, rank: int) -> None:
    kronecker = Kronecker(low_rank(rows, columns, rank, rank), 6)
    assert sketched_rank(kronecker).rank == kronecker.rank().rank == 6 * rank


def test_the_condition_of_a_sketch_is_that_of_the_matrix_within_a_small_factor() -> None:
    kronecker = Kronecker(low_rank(20, 900, 20, 5), 2)
    ratio = sketched_rank(kronecker).condition / kronecker.rank().condition
    assert 0.2 < ratio < 5


def test_lenets_table_by_counting_alone() -> None:
    table = audit(rgap.models.lenet(seed=0), (3, 32, 32), (1, 2, 4, 10), method="formula")
    row = table.row("conv2", 2)
    assert (row.gradient_rank, row.weight_rank, row.joint_rank) == (3600, 1536, 4992)
    assert (row.nullity, row.route, row.exact, row.condition) == (1152, "counted", True, None)
    assert [table.row("head", b).nullity for b in (1, 2, 4, 10)] == [0, 0, 0, 768]
    assert table.summary()["rows"][0]["condition"] is None


@pytest.mark.parametrize("method", ["sketch", "formula"])
def test_a_layer_too_large_to_measure_is_counted_and_says_so(method: str) -> None:
    """[1, 144, 144]: 20,736 inputs, whose weight constraints would be a matrix of 2.6 GB."""
    first = nn.Conv2d(1, 3, 11, 2, 5)
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(15_552, 3)).eval()
    with pytest.raises(ValueError, match=r"at most 20000 inputs.*write method='sketch'"):
        audit(model, (1, 144, 144), (1,))
    row = audit(model, (1, 144, 144), (1,), method=method).row("0", 1)
    assert row.route == ("counted" if method == "formula" else "gradient sketched, weights counted")
    # 363 rows of K, 15,552 of W, and 3² that both have: nothing else is known of 20,736 inputs
    assert (row.gradient_rank, row.weight_rank, row.joint_rank) == (363, 15_552, 15_906)
    assert (row.nullity, row.exact) == (20_736 - 15_906, False)


def test_bounds_are_called_bounds() -> None:
    model = small_conv("relu", channels=3, size=5, seed=2)
    table = audit(model, (2, 5, 5), (2,), method="sketch")
    bound = next(row for row in table.rows if not row.exact)
    assert f"<td>≤ {bound.joint_rank}</td><td>≥ {bound.nullity}</td>" in table._repr_html_()
    words = table.explain()
    assert f"'{bound.layer}'" in words and "upper bound" in words
    assert table.largest_exact_batch == 0
    assert {"route", "exact"} <= set(table.to_frame().columns)


def half_gone() -> nn.Module:
    model = small_mlp("tanh", widths=(24, 16))
    with torch.no_grad():
        model.fc1.weight[8:] = 0
    return model


def odd_parameter() -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(32) * 3)
            self.fc = nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flatten(1) * self.scale)

    return Scaled().eval()


def test_random_weights_audit_the_architecture_and_leave_the_model_alone() -> None:
    """Trained to death: half of the units of fc1 say nothing; drawn anew, all of them do."""
    model = half_gone()
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    own = audit(model, (2, 4, 4), (2,)).row("fc1", 2)
    fresh = audit(model, (2, 4, 4), (2,), weights="random").row("fc1", 2)
    assert (own.weight_rank, fresh.weight_rank) == (16, 32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    again = audit(model, (2, 4, 4), (2,), weights="random", seed=1).row("fc1", 2)
    assert again.condition != fresh.condition and again.joint_rank == fresh.joint_rank


@pytest.mark.parametrize("build", [half_gone, odd_parameter])
def test_redrawn_weights_are_all_new(build: Callable[[], nn.Module]) -> None:
    from rgap.analysis.discard.audit import redrawn

    model = build()
    for old, new in zip(model.parameters(), redrawn(model, 7).parameters(), strict=True):
        assert not torch.equal(old, new) and bool(new.isfinite().all())


def test_a_sketch_measures_the_same_probe() -> None:
    model, x = small_conv("softplus", channels=2, size=5), picture((2, 5, 5), 4, 2).double()
    measured = audit(model, (2, 5, 5), (1, 2), inputs=x)
    sketched = audit(model, (2, 5, 5), (1, 2), inputs=x, method="sketch")
    for a, b in zip(measured.rows, sketched.rows, strict=True):
        assert (a.layer, a.gradient_rank, a.weight_rank) == (
            b.layer,
            b.gradient_rank,
            b.weight_rank,
        )


def test_the_measured_table_counts_what_max_pools_take_away() -> None:
    """Four entries go in for one that comes out; the layer behind the pool answers for them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16, 5),
        ).double()  # fmt: skip
    counted = {row.layer: row for row in audit(model, (2, 8, 8), (1, 2), method="formula").rows}
    for method in ("exact", "sketch"):
        found = {row.layer: row for row in audit(model, (2, 8, 8), (1, 2), method=method).rows}
        assert {name: row.unknowns for name, row in found.items()} == {
            name: row.unknowns for name, row in counted.items()
        }
        assert (found["3"].unknowns, found["7"].unknowns) == (2 * 4 * 64, 2 * 4 * 16)
        assert found["3"].nullity >= 2 * 4 * (64 - 16)
        assert found["7"].nullity >= 2 * 4 * (16 - 4)
