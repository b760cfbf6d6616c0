"""The public tests of operators: what is right passes, every kind of mistake is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.testing import dense, dense_test, dot_test, tolerance

A = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def apply(x: Tensor) -> Tensor:
    return A.to(x) @ x


def adjoint(y: Tensor) -> Tensor:
    return A.T.to(y) @ y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_a_right_operator_passes_in_any_unit(dtype: torch.dtype, factor: float) -> None:
    def own(x: Tensor) -> Tensor:
        return factor * apply(x)

    def back(y: Tensor) -> Tensor:
        return factor * adjoint(y)

    dot_test(own, back, (6,), dtype=dtype)
    dense_test(own, factor * A, (6,), adjoint=back, dtype=dtype)


@pytest.mark.parametrize("place", [(0, 0), (3, 5), (1, 4)])
def test_one_wrong_entry_is_enough(place: tuple[int, int]) -> None:
    wrong = A.clone()
    wrong[place] *= 1 + 1e-9
    with pytest.raises(AssertionError, match=r"mine: the adjoint is not that of apply: <A x, y>"):
        dot_test(apply, lambda y: wrong.T @ y, (6,), name="mine")
    message = rf"mine: entry \[{place[0]}, {place[1]}\] of the matrix"
    with pytest.raises(AssertionError, match=message):
        dense_test(apply, wrong, (6,), name="mine")
    message = rf"mine: entry \[{place[1]}, {place[0]}\] of the adjoint"
    with pytest.raises(AssertionError, match=message):
        dense_test(apply, A, (6,), adjoint=lambda y: wrong.T @ y, name="mine")


@pytest.mark.parametrize(
    ("own", "back", "message"),
    [
        (apply, lambda y: torch.cat([adjoint(y), y[:1]]), r"gives \[\[7\]\], expected \[\[6\]\]"),
        (lambda x: apply(x) / 0, adjoint, "A x of finite numbers is not finite"),
        (apply, lambda y: adjoint(y) / 0, "A' y of finite numbers is not finite"),
    ],
)
def test_other_shapes_and_infinities_are_named(own, back, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        dot_test(own, back, (6,))


def test_what_is_not_linear_is_no_operator() -> None:
    with pytest.raises(AssertionError, match="of the image of a random x"):
        dense_test(lambda x: x.square(), torch.eye(3).double(), (3,))
    with pytest.raises(AssertionError, match=r"shape \[4, 6\], the reference \[4, 5\]"):
        dense_test(apply, A[:, :5], (6,))


def test_structures_are_spaces_too() -> None:
    def split(x: dict[str, Tensor]) -> tuple[Tensor, None, list[Tensor]]:
        return x["a"].sum(0), None, [2.0 * x["b"]]

    def joined(y: tuple[Tensor, None, list[Tensor]]) -> dict[str, Tensor]:
        return {"a": y[0].expand(2, 3), "b": 2.0 * y[2][0]}

    like = {"a": torch.zeros(2, 3).double(), "b": torch.zeros(1).double()}
    dot_test(split, joined, like)
    matrix = dense(split, like)
    assert matrix.shape == (4, 7)
    assert matrix[3, 6] == 2
    dense_test(split, lambda x: (x["a"].sum(0), None, [x["b"] + x["b"]]), like, adjoint=joined)


def test_the_derivative_is_taken_where_it_is_wanted() -> None:
    x = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    dense_test(lambda v: 3 * x.square() * v, lambda x: x**3, (5,), at=x)
    with pytest.raises(AssertionError, match="of the matrix"):
        dense_test(lambda v: 3 * x.square() * v, lambda x: x**3, (5,), at=x + 1e-6)


def test_the_tolerance_grows_as_a_random_walk() -> None:
    assert tolerance(torch.float32, 400) == 20 * 16 * 2.0**-23
    assert tolerance(torch.float64, 0) == tolerance(torch.float64, 1)


def test_global_randomness_is_left_alone() -> None:
    before = torch.get_rng_state()
    dot_test(apply, adjoint, (6,))
    dense_test(apply, A, (6,))
    assert torch.equal(before, torch.get_rng_state())


def test_numbers_whose_squares_overflow_hide_nothing() -> None:
    big = torch.tensor(1e30)
    with pytest.raises(AssertionError, match="the adjoint is not that of apply"):
        dot_test(lambda x: big * x, lambda y: 1.01 * big * y, (6,), dtype=torch.float32)
