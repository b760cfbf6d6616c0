"""Positions of a convolution, told apart by shifts alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from shifted import Convolution, random_convolution
from torch import Tensor, nn
from torch.nn import functional as F

from rgap.network.affine import convolution
from rgap.network.geometry import Geometry
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.arrangement import Arrangement, arrangements
from rgap.separation.shifts.positions import Positions, tell_positions_apart
from rgap.separation.shifts.relations import relation

F64 = torch.float64
EPS = torch.finfo(F64).eps
ALLOWED = 100.0  # times ε and the condition


def _case(
    filters: int, channels: int, side: int, batch: int, seed: int = 0, padding: int = 1
) -> Convolution:
    """A 3×3 convolution of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    geometry = Geometry.of((3, 3), padding=padding)
    w = torch.zeros(filters, channels, 3, 3, dtype=F64)
    affine = convolution("conv", w, None, ("w", None), (channels, side, side), geometry)
    x = torch.randn(batch, *affine.in_shape, generator=generator, dtype=F64)
    k = torch.randn(batch, *affine.out_shape, generator=generator, dtype=F64)
    return Convolution(affine, x, k)


def _told(case: Convolution) -> Positions | Unseparated:
    return tell_positions_apart(case.affine, case.gradient, case.noise)


def _factors(case: Convolution, one: Arrangement) -> tuple[Tensor, Tensor]:
    """L and Y by their definition, entry by entry."""
    geometry, x, k = case.affine.geometry, case.inputs, case.cotangents
    assert geometry is not None
    if one.exchanged:
        x, k = k, x
    grid, batch = list(product(*map(range, one.grid))), len(x)
    stack, span = (list(product(*map(range, sizes))) for sizes in (one.stack, one.span))
    left = k.new_zeros(len(stack), k.shape[1], len(grid), batch)
    right = x.new_zeros(len(grid), batch, len(span), x.shape[1])
    for i, q in enumerate(grid):
        for j, v in enumerate(stack):
            place = tuple(a - b for a, b in zip(q, v, strict=True))
            if all(0 <= p < n for p, n in zip(place, k.shape[2:], strict=True)):
                left[j, :, i] = k[(..., *place)].T
        for j, u in enumerate(span):
            place = tuple(
                s * a + d * b - low if not one.exchanged else a + b - (n - 1 - low)
                for a, b, s, d, n, (low, _) in zip(
                    q, u, geometry.stride, geometry.dilation, geometry.kernel, geometry.padding,
                    strict=True,
                )
            )  # fmt: skip
            if all(0 <= p < n for p, n in zip(place, x.shape[2:], strict=True)):
                right[i, :, j] = x[(..., *place)]
    return left.flatten(2).flatten(0, 1), right.flatten(2).flatten(0, 1)


@pytest.mark.parametrize("number", range(12))
def test_a_stack_of_taps_is_the_product_of_what_stands_below_and_what_is_read(number: int) -> None:
    case = random_convolution(number, 24)
    geometry = case.affine.geometry
    assert geometry is not None
    for one in arrangements(geometry, case.affine.in_shape[1:]):
        left, right = _factors(case, one)
        exact = case.affine.weight_gradient(case.inputs, case.cotangents)
        made = torch.cat(list(one.blocks(exact).values()), 1)
        torch.testing.assert_close(made, left @ right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_pairs_of_a_step_are_those_of_neighbours(axis: int) -> None:
    case = _case(40, 9, 4, 2)
    one = arrangements(Geometry.of((3, 3), padding=1), (4, 4))[0]
    blocks = one.blocks(case.gradient)
    left, _ = _factors(case, one)
    basis = torch.linalg.qr(left).Q
    found = relation({u: basis.T @ b for u, b in blocks.items()}, one, axis, 1e-15)
    rows = torch.linalg.inv(basis.T @ left).reshape(4, 4, 2, 32)  # v of every position
    before, after = (rows.narrow(axis, first, 3).flatten(0, 2).T for first in (0, 1))
    assert found.before.shape == before.shape
    true = torch.cat([before, after])
    told = torch.cat([found.before, found.after])
    assert float((true - told @ (told.T @ true)).norm()) < 1e-10 * float(true.norm())


@pytest.mark.parametrize("number", range(200, 240))
def test_random_convolutions_within_the_condition_are_told_apart_and_no_other(number: int) -> None:
    case = random_convolution(number, 96)
    told = _told(case)
    if not case.within:
        assert isinstance(told, Unseparated)
        assert "not told apart by shifts" in told.reason
        return
    assert isinstance(told, Positions), told.reason
    assert told.batch == len(case.inputs)
    unit = torch.finfo(case.dtype).eps
    assert case.error(told.cotangents, told.inputs) < ALLOWED * unit * told.condition


def test_more_samples_than_the_published_pencil_bears() -> None:
    """One pair of offsets a shift bears r ≤ 3 C; all that a step relates, r (1 + 1/H) < 6 C."""
    case = _case(64, 14, 8, 1)
    told = _told(case)
    assert 64 > 3 * 14 and isinstance(told, Positions)
    assert case.error(told.cotangents, told.inputs) < 1e-9
    assert isinstance(_told(_case(64, 12, 8, 1)), Unseparated)


def test_a_gradient_truly_computed_in_float32() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(48, 96, 3, padding=1, bias=False)
    x, k = torch.randn(4, 48, 4, 4).relu(), torch.randn(4, 96, 4, 4)
    (sent,) = torch.autograd.grad(conv(x), conv.weight, k)
    case = replace(_case(96, 48, 4, 4), inputs=x.double(), cotangents=k.double())
    noise = float((sent.double() - case.gradient).square().mean().sqrt())
    told = tell_positions_apart(case.affine, sent.double(), noise)
    assert isinstance(told, Positions)
    assert case.error(told.cotangents, told.inputs) < 1e-5


def test_the_same_picture_twice_is_one_sample() -> None:
    case = _case(96, 48, 4, 3)
    case.inputs[1] = case.inputs[0]
    told = _told(case)
    assert isinstance(told, Positions)
    assert told.batch == 2  # its cotangents add up: nothing tells the copies apart
    merged = torch.stack([case.cotangents[:2].sum(0), case.cotangents[2]])
    alone = replace(case, inputs=case.inputs[1:], cotangents=merged)
    assert alone.error(told.cotangents, told.inputs) < 1e-11


def _random(gradient: Tensor) -> Tensor:
    return torch.randn(gradient.shape, generator=torch.Generator().manual_seed(5), dtype=F64)


def _of_one_rank(gradient: Tensor) -> Tensor:
    """Of the right rank, but no shifts."""
    left = _random(gradient[:, :16, 0, 0])
    return (left @ _random(gradient.flatten(1)[:16])).reshape(gradient.shape)


@pytest.mark.parametrize(
    "spoil",
    [
        _random,
        _of_one_rank,
        torch.zeros_like,
        lambda g: g.roll(
            1, 2
        ),  # another order of the taps; backwards would be a picture upside down
        lambda g: g.transpose(2, 3) + g,  # a weight that two layers share
        lambda g: F.threshold(g.abs(), float(g.abs().median()), 0.0) * g.sign(),  # pruned
        lambda g: g + 1e-6 * float(g.std()) * _random(g),  # noise that was not stated
        lambda g: torch.cat([g[:, :, :1] * 1.001, g[:, :, 1:]], 2),
    ],
)
def test_what_is_no_gradient_of_the_convolution_is_no_answer(spoil) -> None:
    case = _case(40, 20, 4, 1)
    told = tell_positions_apart(case.affine, spoil(case.gradient), EPS)
    assert isinstance(told, Unseparated)


@pytest.mark.parametrize(
    ("degenerate", "told_apart"),
    [
        ("constant", False),  # every inner position reads the same
        ("silent", True),  # a position that no filter sends anything for: k and x change places
        ("dead", True),  # channels of zeros
        ("row", False),  # a picture that is zero in its last row: nothing to read there
    ],
)
def test_maps_that_are_no_random_ones(degenerate: str, told_apart: bool) -> None:
    case = _case(40, 20, 4, 1)
    if degenerate == "constant":
        case.inputs[:] = case.inputs[:, :, :1, :1]
    if degenerate == "silent":
        case.cotangents[:, :, 1, 2] = 0
    if degenerate == "dead":
        case.inputs[:, 7:] = 0
    if degenerate == "row":
        case.inputs[:, :, 2:] = 0
    told = _told(case)
    assert isinstance(told, Positions) is told_apart
    if isinstance(told, Positions):
        assert case.error(told.cotangents, told.inputs) < ALLOWED * EPS * told.condition


def test_a_layer_that_is_none_is_refused_by_name() -> None:
    w = torch.zeros(4, 2, 3, 3, dtype=F64)
    grouped = convolution("here", w, None, ("w", None), (4, 5, 5), Geometry.of((3, 3), groups=2))
    with pytest.raises(ValueError, match=r"'here': expected a convolution with groups=1"):
        tell_positions_apart(grouped, w)


@pytest.mark.parametrize("size", [1e-120, 1e-200, 1e-290])
def test_gradients_whose_squares_are_below_all_numbers(size: float) -> None:
    """A saturated softmax sends such: the same positions, cotangents so much smaller."""
    w = torch.ones(9, 8, 3, dtype=torch.float64)
    conv = convolution("conv", w, None, ("w", None), (8, 4), Geometry.of((3,), padding=1))
    generator = torch.Generator().manual_seed(0)
    x, k = torch.randn(2, 2, 9, 4, generator=generator, dtype=torch.float64)
    gradient = conv.weight_gradient(x[:, :8], k)
    told = tell_positions_apart(conv, size * gradient)
    assert isinstance(told, Positions) and told.batch == 2
    made = conv.weight_gradient(told.inputs, told.cotangents / size)
    assert torch.allclose(made, gradient, atol=1e-9)
