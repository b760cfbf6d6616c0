"""Rounding to counts: the nearest ones in Euclid's metric, the likeliest in a correlated one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rgap.labels.integers import nearest_counts, nearest_simplex
from rgap.labels.lattice import search

numbers = st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=1, max_size=12)


def compositions(total: int, parts: int) -> Tensor:
    """Every vector of counts, [N, parts]."""
    bars = itertools.combinations(range(total + parts - 1), parts - 1)
    ends = [(-1, *b, total + parts - 1) for b in bars]
    return torch.tensor([[y - x - 1 for x, y in itertools.pairwise(e)] for e in ends])


def one_by_one(values: Tensor, total: int) -> Tensor:
    """The definition: a one at a time, where it costs least."""
    counts = torch.zeros(len(values), dtype=torch.long)
    for _ in range(total):
        counts[(values - counts).argmax()] += 1
    return counts


def distance(values: Tensor, counts: Tensor) -> float:
    return float((values - counts).square().sum())


@given(numbers, st.integers(0, 40))
def test_counts_add_up_and_are_nearest(values: list[float], total: int) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    counts = nearest_counts(v, total)
    assert counts.dtype == torch.long
    assert int(counts.sum()) == total and int(counts.min()) >= 0
    assert distance(v, counts) == pytest.approx(distance(v, one_by_one(v, total)), rel=1e-9)


@given(st.lists(st.floats(-3, 6), min_size=3, max_size=3), st.integers(0, 7))
def test_no_other_counts_are_nearer(values: list[float], total: int) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    best = min(distance(v, n) for n in compositions(total, 3))
    assert distance(v, nearest_counts(v, total)) <= best + 1e-9


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.floats(-0.45, 0.45))
def test_counts_are_left_alone_and_a_common_shift_does_not_matter(
    counts: list[int], shift: float
) -> None:
    n = torch.tensor(counts)
    assert torch.equal(nearest_counts(n.double(), int(n.sum())), n)
    assert torch.equal(nearest_counts(n.double() + abs(shift), int(n.sum())), n)


@given(numbers, st.floats(0.1, 50))
def test_the_simplex_is_reached_at_its_nearest_point(values: list[float], total: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    x = nearest_simplex(v, total)
    assert float(x.min()) >= 0 and float(x.sum()) == pytest.approx(total, rel=1e-9, abs=1e-9)
    # The optimality condition: v - x is one number on the support and at most that elsewhere.
    slack = v - x
    assert float(slack[x > 0].max() - slack[x > 0].min()) < 1e-6
    assert float(slack.max()) <= float(slack[x > 0].max()) + 1e-6


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        nearest_counts(torch.tensor([1.0, float("nan")]), 2)
    with pytest.raises(ValueError, match=r"expected \[C\]"):
        nearest_counts(torch.ones(2, 2), 2)
    with pytest.raises(ValueError, match="total: expected at least 0"):
        nearest_counts(torch.ones(2), -1)


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_the_likeliest_of_all_counts(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(2, 4, generator=g, dtype=torch.float64)
    covariance = root.T @ root + 0.01 * torch.eye(4, dtype=torch.float64)
    truth = torch.randint(0, 4, (4,), generator=g)
    v = truth + torch.randn(2, generator=g, dtype=torch.float64) @ root / 2
    every = compositions(int(truth.sum()), 4)
    away = every.double() - v
    costs = torch.einsum("ni,ij,nj->n", away, torch.linalg.inv(covariance), away)
    found = search(v, covariance, int(truth.sum()))
    assert torch.equal(found, every[costs.argmin()])


def test_correlated_errors_are_undone_where_rounding_fails() -> None:
    truth = torch.tensor([4, 3, 0, 5])
    u = torch.tensor([0.9, -0.6, 0.4, -0.7], dtype=torch.float64)
    v = truth - 1.2 * u
    assert not torch.equal(nearest_counts(v, 12), truth)
    found = search(v, torch.outer(u, u) + 1e-3 * torch.eye(4, dtype=torch.float64), 12)
    assert torch.equal(found, truth)
