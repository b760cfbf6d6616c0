"""How often each picture occurs: whole numbers from the weights of cotangents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rgap.separation.counts import MOST, multiplicity, smallest_batch, split_counts, whole
from rgap.update.losses import Loss

F64 = torch.float64
BCE, MSE = "binary_cross_entropy_with_logits", "mse_loss"


def proportions(copies: list[int], reduction: bool) -> None:
    """The smallest batch that fits holds every picture as often as the true one, or a part."""
    loss = Loss(reduction="sum" if reduction else "mean")
    total = sum(copies)
    shares = [1.0 / m if reduction else total / m for m in copies]
    found = smallest_batch(shares, loss, 10)
    assert found is not None
    counts = [multiplicity(s, loss, found, 10) for s in shares]
    assert all(whole(m) and abs(m - round(m)) < 1e-6 for m in counts)
    if reduction:
        assert found == total
    else:
        assert total % found == 0  # a batch repeated as a whole has the same mean
        assert sum(round(m) for m in counts) == found


@given(copies=st.lists(st.integers(1, 3), min_size=1, max_size=12), reduction=st.booleans())
def test_the_smallest_batch_has_the_true_proportions(copies: list[int], reduction: bool) -> None:
    proportions(copies, reduction)


@pytest.mark.parametrize("copies", [[2, 9], [9, 2]])
def test_uneven_copies_have_the_true_proportions(copies: list[int]) -> None:
    """The weights are exact here: a tenth of a copy is no rounding."""
    proportions(copies, False)


@given(
    copies=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    scale=st.integers(1, 6),
    name=st.sampled_from(["cross_entropy", BCE, MSE]),
)
def test_the_smallest_batch_is_that_of_every_repeat(
    copies: list[int], scale: int, name: str
) -> None:
    loss, classes = Loss(name), 3
    entries = 1 if name == "cross_entropy" else classes

    def found(counts: list[int]) -> int | None:
        return smallest_batch([sum(counts) * entries / m for m in counts], loss, classes)

    assert found(copies) == found([scale * m for m in copies])


@given(
    copies=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    error=st.floats(-0.004, 0.004),
)
def test_rounded_weights_count_the_same(copies: list[int], error: float) -> None:
    shares = [sum(copies) / m for m in copies]
    moved = [s * (1 + error * (-1) ** i) for i, s in enumerate(shares)]
    assert smallest_batch(moved, Loss(), 10) == smallest_batch(shares, Loss(), 10)


@pytest.mark.parametrize("shares", [[-4.0, 4.0], [0.0, 3.0], [2.0, 3.0], [5.3], [2.0, 2.0, 2.0]])
def test_weights_of_no_batch(shares: list[float]) -> None:
    """Negative, nothing, or more or fewer samples than they themselves say."""
    assert smallest_batch(shares, Loss(), 10) is None


def test_weights_of_no_sum() -> None:
    assert smallest_batch([1.0, 0.7], Loss(reduction="sum"), 10) is None
    assert smallest_batch([1.0, -1.0], Loss(reduction="sum"), 10) is None


def test_whole() -> None:
    assert whole(1.0) and whole(2.2) and whole(MOST)
    assert not whole(1.4) and not whole(0.0) and not whole(-1.0) and not whole(0.3)
    assert whole(3.0, 3) and not whole(4.0, 3)
    assert not whole(MOST + 1.0)
    assert not whole(float("nan")) and not whole(float("inf"))


@given(
    counts=st.lists(st.integers(0, 4), min_size=2, max_size=6).filter(lambda c: sum(c) > 0),
    seed=st.integers(0, 1000),
    error=st.floats(-1e-4, 1e-4),
)
def test_counts_of_one_picture_with_several_labels(
    counts: list[int], seed: int, error: float
) -> None:
    """From m p − n the smallest m that gives whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(len(counts), generator=generator, dtype=F64).softmax(0)
    n = torch.tensor(counts, dtype=F64)
    found = split_counts(p, sum(counts) * p - n + error)
    assert found is not None
    m, split = found
    assert m <= sum(counts)
    assert float((m * p - split - (sum(counts) * p - n)).abs().max()) < 0.051
    assert int(split.sum()) == m and float(split.min()) >= 0


def test_no_counts_fit() -> None:
    p = torch.tensor([0.25, 0.25, 0.5], dtype=F64)
    assert split_counts(p, torch.tensor([0.5, 0.3, -0.1], dtype=F64)) is None
