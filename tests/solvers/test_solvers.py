"""Solvers against dense references, adjoint tests, and matrices made singular on purpose."""

from __future__ import annotations

import pytest
import torch
from operators import Coupling
from torch import Tensor

from rgap.solvers.joint_rank import JointRows
from rgap.solvers.kronecker import Kronecker, factor
from rgap.solvers.linear import Stacked, null_projection, solve_lsmr
from rgap.solvers.rank import numerical_rank, resolve_rcond
from rgap.solvers.subspace import SMALL, row_space, top_eigenpairs
from rgap.solvers.svd import right_singular_vectors, singular_values
from rgap.testing import dense_test, dot_test


def system(
    groups: int, rows: int, channels: int, size: int, extra: int, seed: int
) -> tuple[Kronecker, Coupling, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    k = Kronecker(draw(groups, rows, size), channels)
    w = Coupling(draw(extra, channels * size), channels)
    blocks = [
        torch.block_diag(*[k.matrix[c // (channels // groups)] for c in range(channels)]),
        w.matrix,
    ]
    return k, w, torch.cat(blocks)


@pytest.mark.parametrize("groups", [1, 2])
def test_kronecker_is_the_block_diagonal_matrix(groups: int) -> None:
    k, _, dense = system(groups, 5, 4, 7, 3, 0)
    dense_test(k.apply, dense[:20], (1, 4, 7), adjoint=k.adjoint)
    dot_test(k.apply, k.adjoint, (2, 4, 7))
    assert k.rank().rank == 4 * 5


@pytest.mark.parametrize(("spread", "accuracy"), [(1.0, 1e-12), (1e3, 1e-11), (1e6, 1e-8)])
def test_weighted_solve_is_as_accurate_as_dense_least_squares(
    spread: float, accuracy: float
) -> None:
    k, w, dense = system(2, 4, 4, 6, 20, 1)
    generator = torch.Generator().manual_seed(2)
    wg = spread ** torch.rand(2, 4, generator=generator, dtype=torch.float64)
    ww = spread ** torch.rand(20, generator=generator, dtype=torch.float64)
    truth = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    made = factor(k, wg, w, ww)
    assert made is not None
    rhs = made.apply(truth)
    x, _ = made.solve(rhs)
    assert (x - truth).abs().max() < accuracy
    noise = torch.randn(rhs[0].shape, generator=generator, dtype=torch.float64)
    weights = torch.cat([wg.repeat_interleave(2, 0).flatten(), ww])
    target = torch.cat([(rhs[0] + noise).flatten(1), rhs[1]], 1)
    dense_x = torch.linalg.lstsq(weights[:, None] * dense, target.T).solution.T
    x, _ = made.solve((rhs[0] + noise, rhs[1]))
    assert torch.allclose(x.flatten(1), dense_x, rtol=1e-6, atol=1e-8 * dense_x.abs().max())
    singular = torch.linalg.svdvals(weights[:, None] * dense)
    assert 0.5 < made.largest / singular[0] < 1.01
    assert 0.99 < made.smallest / singular[-1] < 3


def test_singular_system_is_not_factored_as_if_it_were_regular() -> None:
    k, w, _ = system(1, 2, 3, 6, 4, 3)
    made = factor(k, torch.ones(1, 2).double(), w, torch.ones(4).double())
    assert made is None or made.smallest < 1e-6 * made.largest


def test_joint_rank_counts_a_planted_intersection() -> None:
    k, w, _ = system(1, 4, 3, 6, 5, 4)
    planted = torch.zeros(3, 6, dtype=torch.float64)
    planted[1] = k.matrix[0].T @ torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    rows = torch.cat([w.matrix, planted.flatten()[None]])
    basis = row_space(rows).basis.reshape(-1, 3, 6)
    found = JointRows(k, [basis]).rank
    assert found.rank == 12 + 6 - 1
    assert found.clear
    assert JointRows(k, [row_space(w.matrix).basis.reshape(-1, 3, 6)]).rank.rank == 17


def test_row_space_by_cholesky_agrees_with_svd() -> None:
    matrix = torch.randn(80, 120, dtype=torch.float64)
    fast = row_space(matrix)
    assert fast.rank.rank == 80
    assert torch.allclose(fast.basis @ fast.basis.T, torch.eye(80).double(), atol=1e-12)
    projected = matrix - matrix @ fast.basis.T @ fast.basis
    assert projected.abs().max() < 1e-10
    matrix[-1] = matrix[:-1].sum(0)
    assert row_space(matrix).rank.rank == 79


def test_lsmr_keeps_the_null_component_of_its_start() -> None:
    k, w, dense = system(1, 2, 3, 6, 4, 5)
    stacked = Stacked(k, w, torch.ones(4).double())
    x = torch.randn(18, dtype=torch.float64)
    dense_test(stacked.apply, dense, (18,), adjoint=stacked.adjoint)
    null = null_projection(stacked, torch.randn(3, 18, dtype=torch.float64))
    assert null.shape == (3, 18)
    assert (dense @ null.T).abs().max() < 1e-9
    assert torch.allclose(null @ null.T, torch.eye(3).double(), atol=1e-10)
    run = solve_lsmr(stacked, dense @ x, start=null[0])
    difference = run.x - x
    assert (dense @ difference).abs().max() < 1e-8
    assert abs(float(run.x @ null[0]) - 1) < 1e-8


def test_rank_reports_both_sides_of_a_small_gap() -> None:
    values = torch.tensor([1.0, 1e-3, 2e-13, 1e-13, 1e-14])
    rank = numerical_rank(values, 5, 1.5e-13)
    assert rank.rank == 3
    assert not rank.clear
    assert rank.alternative == 4
    assert numerical_rank(values, 5, 1e-6).clear


def test_rcond_follows_the_noise_and_refuses_nonsense() -> None:
    assert resolve_rcond(None, (10, 10), noise=1e-5) == 1e-5
    assert resolve_rcond(None, (10, 10), torch.float32) == pytest.approx(1.19e-6, rel=1e-2)
    with pytest.raises(ValueError, match="expected rcond >= 0"):
        resolve_rcond(-1.0, (2, 2))
    with pytest.raises(ValueError, match="expected noise >= 0"):
        resolve_rcond(None, (2, 2), noise=-1.0)


def test_top_eigenpairs_finds_everything_above_the_threshold() -> None:
    size = SMALL + 50
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    values = torch.linspace(0.0, 0.99, size, dtype=torch.float64)
    values[-300:] = 1.0 - 1e-9 * torch.arange(300)  # more than one block holds
    matrix = (q * values) @ q.T
    found, vectors = top_eigenpairs(matrix, 1 - 1e-6)
    assert int((found > 1 - 1e-6).sum()) == 300
    kept = vectors[:, found > 1 - 1e-6]
    assert (q[:, -300:] @ (q[:, -300:].T @ kept) - kept).abs().max() < 1e-6


def test_long_matrices_have_lapacks_singular_values() -> None:
    for shape in ((3, 40), (40, 3), (2, 5, 30), (6, 6)):
        matrix = torch.randn(*shape, dtype=torch.float64)
        expected = torch.linalg.svdvals(matrix)
        assert torch.allclose(singular_values(matrix), expected)
        values, vh = right_singular_vectors(matrix)
        assert torch.allclose(values, expected)
        projected = matrix @ vh.transpose(-1, -2) @ vh
        assert torch.allclose(projected, matrix)
