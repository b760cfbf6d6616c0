"""Ranks modulo a prime against elimination with Python's own integers."""

from __future__ import annotations

import random
from math import isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgap.solvers.modular import (
    Skeleton,
    failure_bound,
    is_prime,
    multiply,
    null_space,
    random_prime,
    rank,
    reduce,
    residues,
    skeleton,
)

P = 2**31 - 1


def plain_rank(matrix: np.ndarray, prime: int) -> int:
    """Row by row, in exact integers."""
    rows = [[int(v) % prime for v in row] for row in matrix]
    found = 0
    for column in range(matrix.shape[1]):
        pivot = next((i for i in range(found, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        inverse = pow(rows[found][column], -1, prime)
        for i in range(found + 1, len(rows)):
            factor = rows[i][column] * inverse % prime
            if factor:
                rows[i] = [
                    (a - factor * b) % prime for a, b in zip(rows[i], rows[found], strict=True)
                ]
        found += 1
    return found


def exact_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.int64).astype(object) @ b.astype(np.int64).astype(object)


@st.composite
def deficient(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """A sparse matrix of planted rank at most r, with a prime of any size."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    inner = draw(st.integers(0, 24))
    prime = draw(st.sampled_from((3, 7, 101, 65537, P)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from((0.1, 0.4, 1.0)))
    left = rng.integers(0, prime, (rows, inner)) * (rng.random((rows, inner)) < share)
    right = rng.integers(0, prime, (inner, columns)) * (rng.random((inner, columns)) < share)
    product = left.astype(object) @ right.astype(object) if inner else np.zeros((rows, columns))
    return (product % prime).astype(np.int64), prime


@settings(max_examples=150, deadline=None)
@given(deficient())
def test_rank_is_the_rank_of_plain_elimination(case: tuple[np.ndarray, int]) -> None:
    matrix, prime = case
    assert rank(matrix, prime) == plain_rank(matrix, prime)


@settings(max_examples=100, deadline=None)
@given(deficient())
def test_skeleton_reproduces_the_other_rows(case: tuple[np.ndarray, int]) -> None:
    matrix, prime = case
    found = skeleton(residues(matrix, prime), prime)
    assert found.rank == plain_rank(matrix, prime) == plain_rank(matrix[found.top], prime)
    assert sorted([*found.top, *found.bottom]) == list(range(len(matrix)))
    assert not np.any(
        (exact_product(found.factors, matrix[found.top]) - matrix[found.bottom]) % prime
    )


@settings(max_examples=100, deadline=None)
@given(deficient())
def test_null_space_is_all_of_it(case: tuple[np.ndarray, int]) -> None:
    matrix, prime = case
    basis = null_space(residues(matrix, prime), prime)
    assert basis.shape == (matrix.shape[1], matrix.shape[1] - plain_rank(matrix, prime))
    assert not np.any(exact_product(matrix, basis) % prime)
    assert plain_rank(basis, prime) == basis.shape[1]


def test_products_are_exact_where_the_sums_are_largest() -> None:
    """All entries at ±p/2 with one sign: every partial sum takes the largest value it can."""
    for prime in (P, 2**30 + 3):
        for length in (1, 127, 128, 129, 300):
            left = np.full((3, length), float(prime // 2))
            left[1] *= -1
            left[2, ::2] -= 1
            right = np.full((length, 2), float(prime // 2))
            right[:, 1] *= -1
            got = multiply(left, right, prime)
            assert np.abs(got).max() <= prime // 2 + 1
            assert not np.any((exact_product(left, right) - got.astype(np.int64)) % prime)


def test_reduce_keeps_the_residue_up_to_the_largest_sum() -> None:
    values = [2**52, -(2**52), 2**52 - 1, P, -P, P // 2, P // 2 + 1, 0, 1, 3 * P, (2**21) * P - 1]
    got = reduce(np.array(values, dtype=np.float64), P)
    assert [int(g) % P for g in got] == [v % P for v in values]
    assert np.abs(got).max() <= P // 2 + 1
    assert got[3] == got[4] == got[7] == got[9] == 0.0  # a multiple of p is exactly 0


def test_a_rank_drops_only_where_the_prime_divides() -> None:
    matrix = np.diag([1, 6, 35, 0])
    assert [rank(matrix, p) for p in (3, 5, 7, 11)] == [2, 2, 2, 3]


def test_negative_and_large_entries() -> None:
    big = np.array([[2**62, 1], [2**62 % 101, 1]], dtype=np.int64)
    assert rank(big, 101) == 1
    assert rank(np.array([[2**63 + 5, 1], [(2**63 + 5) % 101, 1]], dtype=np.uint64), 101) == 1
    assert rank(np.array([[-1, 1], [100, 1]]), 101) == 1


def test_banded_and_dense_of_the_size_of_a_layer() -> None:
    """A rank that was planted, in a matrix whose recursion is many levels deep."""
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, P, (400, 137)), rng.integers(0, P, (137, 300))
    product = multiply(residues(left, P), residues(right, P), P)
    assert rank(product.astype(np.int64), P) == 137
    band = np.zeros((300, 320), dtype=np.int64)
    for shift in range(20):
        band[np.arange(300), np.arange(300) + shift] = rng.integers(1, P, 300)
    band[50:60] = 0
    band[200] = band[199]
    assert rank(band, P) == 289 == rank(band.T, P)
    assert rank(band[rng.permutation(300)][:, rng.permutation(320)], P) == 289


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    assert rank(np.zeros(shape, dtype=np.int64), P) == 0
    found = skeleton(np.zeros(shape), P)
    assert isinstance(found, Skeleton)
    assert found.factors.shape == (shape[0], 0)
    assert null_space(np.zeros(shape), P).shape == (shape[1], shape[1])


def test_primes() -> None:
    slow = [n for n in range(2, 3000) if all(n % d for d in range(2, isqrt(n) + 1))]
    assert [n for n in range(3000) if is_prime(n)] == slow
    # strong pseudoprimes: to base 2; to 2 and 3; to 2, 3 and 5
    assert not any(is_prime(n) for n in (2047, 1373653, 25326001, 2**31 - 3))
    assert is_prime(2**31 - 1)
    drawn = {random_prime(random.Random(seed)) for seed in range(30)}
    assert len(drawn) == 30
    assert all(2**30 < p < 2**31 and is_prime(p) for p in drawn)


def test_the_failure_bound_is_met_by_a_small_prime() -> None:
    """det of a 3×3 matrix of unknowns modulo p: it vanishes in at most 3 of p random points."""
    prime, trials = 101, 4000
    rng = np.random.default_rng(1)
    short = sum(rank(rng.integers(0, prime, (3, 3)), prime) < 3 for _ in range(trials))
    bound = failure_bound(3, 3, 0.0, prime)
    assert bound == pytest.approx(3 / 101)
    exact = 1 - np.prod([1 - prime**-i for i in (1, 2, 3)])  # share of singular matrices
    assert exact < bound
    assert short / trials == pytest.approx(exact, abs=4 * (exact / trials) ** 0.5)
    assert failure_bound(0, 0, 0.0, prime) == 0.0
    assert failure_bound(200, 200, 0.0, prime) == 1.0


def test_what_is_no_integer_matrix_or_no_prime_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"expected a matrix of integers, got 2 dimensions of float"
    ):
        rank(np.eye(2), P)
    with pytest.raises(TypeError, match="got 1 dimensions"):
        rank(np.arange(3), P)
    for modulus in (1, 2, 9, 2**31 - 3, 2**31 + 11):
        with pytest.raises(ValueError, match="expected an odd prime below 2\\^31, got"):
            rank(np.eye(2, dtype=np.int64), modulus)
