"""The error of a batch in any order."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from rgap.learned.assignment import assigned_error


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_it_is_the_least_over_all_permutations(size: int) -> None:
    made, truth = drawn(5, size, 3, 2), drawn(5, size, 3, 2, seed=1)
    every = torch.stack(
        [
            (made[:, list(order)] - truth).square().mean((1, 2, 3))
            for order in permutations(range(size))
        ]
    )
    torch.testing.assert_close(assigned_error(made, truth), every.amin(0))


def test_the_order_does_not_matter() -> None:
    made, truth = drawn(3, 5, 4), drawn(3, 5, 4, seed=1)
    turned = [4, 0, 3, 1, 2]
    torch.testing.assert_close(assigned_error(made[:, turned], truth), assigned_error(made, truth))
    torch.testing.assert_close(assigned_error(made, truth[:, turned]), assigned_error(made, truth))


def test_its_slope_is_that_of_the_best_pairing() -> None:
    made, truth = drawn(2, 3, 4).requires_grad_(), drawn(2, 3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: assigned_error(x, truth), (made,))
