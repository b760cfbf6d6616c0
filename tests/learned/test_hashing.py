"""Signed feature hashing beside the matrix that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.learned.hashing import FeatureHash


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def matrix(few: FeatureHash, entries: int) -> Tensor:
    """``[m, n]`` with one sign in every column."""
    buckets, signs = few.places(0, entries)
    whole = torch.zeros(few.size or entries, entries, dtype=torch.float64)
    whole[buckets, torch.arange(entries)] = signs.double()
    return whole


def test_it_is_the_product_with_the_signed_matrix() -> None:
    tensors, few = drawn((5, 3), (7,), (2, 2, 2)), FeatureHash(6, seed=3)
    flat = torch.cat([t.flatten() for t in tensors])
    torch.testing.assert_close(few.of(tensors), matrix(few, 30) @ flat)


def test_rows_are_hashed_one_by_one() -> None:
    rows, few = drawn((4, 5, 3), (4, 7)), FeatureHash(6)
    for number, row in enumerate(few.rows(rows)):
        torch.testing.assert_close(row, few.of([part[number] for part in rows]))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_do_not_change_it(chunk: int) -> None:
    rows, few = drawn((2, 100), (2, 33)), FeatureHash(16, seed=5)
    torch.testing.assert_close(few.rows(rows, chunk), few.rows(rows))


def test_it_is_linear() -> None:
    (a, b), few = drawn((50,), (50,)), FeatureHash(9)
    torch.testing.assert_close(few.of([2 * a - b]), 2 * few.of([a]) - few.of([b]))


def test_a_seed_decides_it_and_the_random_state_is_left() -> None:
    (a,), before = drawn((200,)), torch.get_rng_state()
    assert torch.equal(FeatureHash(8, 1).of([a]), FeatureHash(8, 1).of([a]))
    assert not torch.equal(FeatureHash(8, 1).of([a]), FeatureHash(8, 2).of([a]))
    assert torch.equal(before, torch.get_rng_state())


def test_products_are_kept_in_the_mean() -> None:
    a, b = drawn((400,), (400,))
    products = torch.stack(
        [FeatureHash(64, seed).of([a]) @ FeatureHash(64, seed).of([a + b]) for seed in range(400)]
    )
    wanted = float(a @ (a + b))
    error = float(products.std()) / len(products) ** 0.5
    assert abs(float(products.mean()) - wanted) < 4 * error


def test_buckets_and_signs_are_spread_evenly() -> None:
    buckets, signs = FeatureHash(16, seed=7).places(0, 16_000)
    counts = torch.bincount(buckets, minlength=16)
    assert int((counts - 1000).abs().max()) < 150  # five standard deviations
    assert abs(float(signs.double().mean())) < 0.04


def test_without_a_size_it_is_the_gradient_itself() -> None:
    tensors = drawn((3, 2), (4,))
    assert torch.equal(FeatureHash(None).of(tensors), torch.cat([t.flatten() for t in tensors]))


def test_of_a_jacobian_it_has_no_more_rank_than_numbers() -> None:
    """With fewer numbers than unknowns, pictures that differ along the rest look alike."""
    (jacobian,) = drawn((100, 20))  # equations, unknowns
    for size in (5, 15, 40):
        hashed = FeatureHash(size).rows([jacobian.T]).T
        assert int(torch.linalg.matrix_rank(hashed)) == min(size, 20)
