"""Joint ranks of large layers, by the equations they share and by a part of the batch."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import Geometry, dense_blocks, dense_rank, layers
from torch import Tensor, nn

from rgap.constraints import gradient_constraint
from rgap.constraints.ranks import joint_rows, shared_products, weight_row_spaces
from rgap.network.affine import Affine
from rgap.network.modules import build
from rgap.solvers.joint_rank import JointRows
from rgap.solvers.spaces import RowSpaces, group_bases
from rgap.solvers.square import factored

MASKS = st.sampled_from([0.0, 0.0, 0.3, 0.7])


def affine_of(module: nn.Module, shape: tuple[int, ...]) -> Affine:
    names = {id(p): n for n, p in module.named_parameters()}
    made = build(module, "layer", shape, names)
    assert isinstance(made, Affine)
    return made


def rows_of(affine: Affine, k: Tensor, active: Tensor) -> JointRows:
    """As if every layer were a large one."""
    with patch("rgap.solvers.joint_rank.SMALL", 0):
        return joint_rows(
            affine, gradient_constraint(affine, k), weight_row_spaces(affine, active), cotangent=k
        )


def balanced(rows_k: Tensor, rows_w: Tensor) -> Tensor:
    return torch.cat([rows / rows.norm().clamp_min(1e-300) for rows in (rows_k, rows_w)])


@settings(max_examples=60, deadline=None)
@given(case=layers(), masked=MASKS, batch=st.integers(1, 8))
def test_the_fast_rank_is_that_of_the_dense_system(
    case: Geometry, masked: float, batch: int
) -> None:
    affine = affine_of(case.module, case.shape)
    generator = torch.Generator().manual_seed(case.seed)
    k = torch.randn(batch, *affine.out_shape, generator=generator, dtype=torch.float64)
    alive = torch.rand(k.shape, generator=generator) >= masked
    assume(bool(alive.any()))
    k = k * alive
    rows_k, rows_w = dense_blocks(case.module, k, case.shape)
    stacked = balanced(rows_k, rows_w[alive.flatten()])
    found = rows_of(affine, k, alive)
    assert found.rank.rank == dense_rank(stacked)
    open_ = found.open_directions(3, generator)
    if open_ is not None and found.rank.nullity:
        folded = open_.reshape(3, affine.in_shape[0], batch, -1).transpose(1, 2).flatten(1)
        assert float((stacked @ folded.T).norm()) < 1e-9 * float(stacked.norm())
        rank = int(torch.linalg.matrix_rank(folded, rtol=1e-9))  # each is good to 1e-11
        assert rank == min(3, found.rank.nullity)


@pytest.fixture(scope="module")
def wide() -> tuple[Affine, Tensor]:
    """Nine samples of a layer whose gradient is complete after two."""
    torch.manual_seed(0)
    module = nn.Conv2d(3, 3, 3, 2, 1).double()
    affine = affine_of(module, (3, 6, 6))
    return affine, torch.randn(9, *affine.out_shape).double()


def test_two_samples_of_nine_decide(wide: tuple[Affine, Tensor]) -> None:
    affine, k = wide
    active = torch.ones(k.shape, dtype=torch.bool)
    taken: list[int] = []
    whole = JointRows._part

    def noted(self: JointRows, shared: Tensor) -> JointRows | None:
        part = whole(self, shared)
        taken.append(0 if part is None else len(part.spaces.weight))
        return part

    with patch.object(JointRows, "_part", noted):
        found = rows_of(affine, k, active)
    assert taken[-1] in (2, 3)
    slow = joint_rows(affine, gradient_constraint(affine, k), weight_row_spaces(affine, active))
    assert found.rank.rank == slow.rank.rank == 9 * 27 + 81 - 9


def test_a_part_that_shares_more_does_not_decide(wide: tuple[Affine, Tensor]) -> None:
    """Its first samples are copies of one: they reach neither the rank of K nor what is shared."""
    affine, k = wide
    k = torch.cat([k[:1], k[:1], k[:1], k[:1], k[4:]])
    active = torch.ones(k.shape, dtype=torch.bool)
    found = rows_of(affine, k, active)
    slow = joint_rows(affine, gradient_constraint(affine, k), weight_row_spaces(affine, active))
    assert found.rank.rank == slow.rank.rank


def test_an_angle_that_is_nearly_zero_is_not_taken_for_zero() -> None:
    """Two filters that differ by 1e-6: their rows are shared to 1e-6, not to rounding."""
    torch.manual_seed(0)
    module = nn.Conv2d(2, 2, 3, 2, 1).double()
    with torch.no_grad():
        module.weight[1] = module.weight[0] + 1e-6 * torch.randn(2, 3, 3)
    affine = affine_of(module, (2, 6, 6))
    k = torch.randn(2, *affine.out_shape).double()
    active = torch.ones(k.shape, dtype=torch.bool)
    stacked = balanced(*dense_blocks(module, k, (2, 6, 6)))
    assert rows_of(affine, k, active).rank.rank == dense_rank(stacked)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (4, 2), (4, 4)])
def test_one_projector_gives_the_squares_of_the_cosines(channels: int, groups: int) -> None:
    torch.manual_seed(channels + groups)
    affine = affine_of(
        nn.Conv2d(channels, channels, 3, 2, groups=groups).double(), (channels, 7, 7)
    )
    k = torch.randn(3, *affine.out_shape).double()
    weight = weight_row_spaces(affine, torch.ones(k.shape, dtype=torch.bool))
    bases = group_bases(gradient_constraint(affine, k), None, 0.0)
    q = weight[0].basis.reshape(-1, channels, 49)
    spaces = RowSpaces(bases, [q, q, q], channels)
    t = spaces.cosines()
    with patch("rgap.solvers.spaces.CHUNK", 1):  # channel by channel
        assert torch.allclose(spaces._squares_by_projector(), t @ t.T, atol=1e-13)
    assert torch.allclose(spaces._squares_by_projector(), t @ t.T, atol=1e-13)
    assert torch.allclose(spaces.squares(False), t @ t.T, atol=1e-13)
    assert torch.allclose(spaces.squares(True), t.T @ t, atol=1e-13)


def test_the_bound_on_the_distance_of_many_tables_holds_and_is_near(
    wide: tuple[Affine, Tensor],
) -> None:
    affine, k = wide
    rows = rows_of(affine, k, torch.ones(k.shape, dtype=torch.bool))
    inside = torch.cat(list(shared_products(affine, k))).movedim(1, 2).flatten(3).flatten(2)
    for off in (0.0, 1e-9, 1e-3):
        moved = inside + off * torch.randn(inside.shape, dtype=inside.dtype)
        scales = 1.0 / moved.flatten(1).norm(dim=1)
        unit = moved * scales[:, None, None]
        spaces = rows.spaces
        apart = unit - spaces.from_gradient(spaces.to_gradient(unit))
        other = unit - spaces.from_weight(spaces.to_weight(unit))
        true = max(float(torch.linalg.matrix_norm(x.flatten(1), 2)) for x in (apart, other))
        bound = rows._distance_of_sums(moved, scales)
        assert true <= bound <= 100 * true + 1e-13


def test_square_matrices_know_the_ends_of_their_spectrum() -> None:
    u, v = (torch.linalg.qr(torch.randn(90, 90).double()).Q for _ in range(2))
    values = torch.logspace(0, -9, 90, dtype=torch.float64)
    made = factored((u * values) @ v)
    assert made is not None
    largest, smallest = made.extremes
    assert 0.9 < largest <= 1.0 + 1e-12
    assert 1e-9 * (1 - 1e-6) < smallest < 2e-9
    x = torch.randn(90, 2).double()
    assert torch.allclose(made.matrix @ made.solve(x), x, atol=1e-5)
    assert torch.allclose(made.matrix.T @ made.solve_transposed(x), x, atol=1e-5)
