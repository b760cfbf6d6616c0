"""Truncated singular values and the rank decision, against the whole decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgap.solvers.lowrank import ABOVE, SMALL, low_rank


def matrix(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """[m, n] with the given singular values."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int) -> Tensor:
        draw = torch.randn(rows, len(values), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(draw).Q

    return orthonormal(m) * values @ orthonormal(n).T


def geometric(rank: int, least: float) -> Tensor:
    top = torch.tensor(least, dtype=torch.float64).log10()
    return (
        torch.logspace(0, float(top), rank, dtype=torch.float64)
        if rank > 1
        else torch.ones(1, dtype=torch.float64)
    )


@settings(max_examples=30)
@given(
    m=st.integers(1, 260),
    n=st.integers(1, 260),
    part=st.floats(0.0, 1.0),
    decades=st.floats(0.0, 9.0),
    size=st.sampled_from([1.0, 1e-12, 1e9]),
    seed=st.integers(0, 100),
)
def test_as_the_whole_decomposition(
    m: int, n: int, part: float, decades: float, size: float, seed: int
) -> None:
    rank = 1 + int(part * (min(m, n) - 1))
    a = size * matrix(m, n, geometric(rank, 10**-decades), seed)
    found = low_rank(a, 1e-15)
    assert found.rank.rank == rank
    assert found.left.shape == (m, rank) and found.right.shape == (n, rank)
    eye = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(found.left.T @ found.left, eye, atol=1e-11)
    assert torch.allclose(found.right.T @ found.right, eye, atol=1e-11)
    expected = torch.linalg.svdvals(a)[:rank]
    assert float((found.values - expected).abs().max()) < 1e-13 * float(expected[0])
    back = found.left * found.values @ found.right.T
    assert float((back - a).norm()) < 1e-12 * float(a.norm())


@pytest.mark.parametrize("shape", [(400, 700), (700, 400), (60, 900), (900, 60), (300, 300)])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_plateau_of_float32(shape: tuple[int, int], rank: int) -> None:
    """Rounded entry by entry to float32, the signal stays and the plateau beneath is measured."""
    m, n = shape
    a = matrix(m, n, geometric(rank, 1e-3), rank)
    rounded = a.float().double()
    unit = torch.finfo(torch.float32).eps / 2
    found = low_rank(rounded, 2 * unit * (m**-0.5 + n**-0.5))
    assert found.rank.rank == rank
    beneath = torch.linalg.svdvals(rounded)[rank:]
    assert abs(float(found.beneath[0]) / float(beneath[0]) - 1.0) < 0.3
    assert found.rank.gap > 1e2


def test_noise_above_the_expectation_is_still_noise() -> None:
    """The cutoff moves up with the plateau that is met, not with what was promised."""
    a = matrix(200, 300, geometric(4, 1e-2))
    noise = torch.randn(200, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    level = 1e-6
    noisy = a + level * noise / torch.linalg.matrix_norm(noise, 2)
    for promise in (level, level / 2):
        found = low_rank(noisy, promise)
        assert found.rank.rank == 4, promise
        assert found.rank.cutoff > level


def test_a_signal_within_the_noise_is_cut() -> None:
    values = torch.tensor([1.0, 1e-2, 1e-8], dtype=torch.float64)
    a = matrix(150, 120, values)
    assert low_rank(a, 1e-12).rank.rank == 3
    assert low_rank(a, 1e-7).rank.rank == 2
    assert low_rank(a, 1e-2).rank.rank == 1
    cut = low_rank(a, 1e-7)
    assert abs(float(cut.beneath[0]) - 1e-8) < 1e-12
    assert cut.rank.cutoff == pytest.approx(ABOVE * 1e-7)


def test_the_gap_is_over_the_largest_value_that_was_cut() -> None:
    a = matrix(50, 40, torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64))
    found = low_rank(a, 1e-8)
    assert found.rank.rank == 2
    assert found.rank.gap == pytest.approx(1e6, rel=1e-4)


def test_more_samples_than_a_block() -> None:
    """A rank above the first block of the subspace iteration."""
    rank = 90
    a = matrix(420, 380, geometric(rank, 1e-4))
    found = low_rank(a, 1e-15)
    assert found.rank.rank == rank
    assert torch.allclose(found.values, torch.linalg.svdvals(a)[:rank], atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (SMALL + 40, 600), (1, 1)])
def test_a_zero_matrix(shape: tuple[int, int]) -> None:
    found = low_rank(torch.zeros(*shape, dtype=torch.float64), 1e-15)
    assert found.rank.rank == 0
    assert found.left.shape == (shape[0], 0) and found.right.shape == (shape[1], 0)
    assert len(found.values) == 0


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_full_rank(shape: tuple[int, int]) -> None:
    a = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = low_rank(a, 1e-15)
    assert found.rank.rank == min(shape)
    assert len(found.beneath) == 0
    assert found.rank.gap == float("inf")


def test_exact_deficiency() -> None:
    """Rows repeated bit by bit: what is beneath is rounding of the decomposition alone."""
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert low_rank(rows[torch.arange(30) % 3], 1e-15).rank.rank == 3


def test_a_stated_rank_keeps_the_decision() -> None:
    a = matrix(80, 60, geometric(6, 1e-2))
    found = low_rank(a, 1e-15, most=4)
    assert found.rank.rank == 6
    assert found.left.shape == (80, 4) and len(found.values) == 4
    assert low_rank(a, 1e-15, most=9).left.shape == (80, 6)


def test_the_same_matrix_gives_the_same_triplets() -> None:
    """The random block is the function's own: the global state is neither read nor moved."""
    a = matrix(500, 400, geometric(5, 1e-2))
    state = torch.random.get_rng_state()
    first = low_rank(a, 1e-15)
    torch.manual_seed(99)
    second = low_rank(a, 1e-15)
    torch.random.set_rng_state(state)
    assert torch.equal(first.left, second.left) and torch.equal(first.right, second.right)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_empty_matrix_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="matrix: expected entries, got shape"):
        low_rank(torch.zeros(*shape, dtype=torch.float64), 1e-15)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(64, 3072), (3072, 64)])
def test_rounding_is_spread_evenly(shape: tuple[int, int], seed: int) -> None:
    """Householder reflections leave thirty times the median in the first row of V."""
    a = matrix(*shape, geometric(24, 1e-2), seed)
    found = low_rank(a, 1e-16)
    for whole, space in ((a, found.right), (a.T, found.left)):
        rounding = (whole - (whole @ space) @ space.T).norm(dim=0)
        assert float(rounding.max()) < 4.0 * float(rounding.median())
