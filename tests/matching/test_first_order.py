"""The loop of the published optimisers: what it judges, its kernels, and its routes for rows."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from cases import picture, small_conv
from torch import Tensor, nn

import rgap
from rgap.jacobian.module_update import ClientLoss
from rgap.matching.first_order import EXPLODED, RestartState, first
from rgap.matching.objective import TOGETHER, Objective
from rgap.matching.presets import PRESETS, Preset
from rgap.network.isolation import SMALL, convolution_work, small_kernels
from rgap.solvers.priors import Squares, Sum, TotalVariation, value_and_gradient

F64 = torch.float64
SHAPE = (1, 2, 4, 4)
LABEL = torch.tensor([3])


def objective(preset: Preset, dtype: torch.dtype = F64, labels: Tensor | None = LABEL) -> Objective:
    model = small_conv("sigmoid", size=4, channels=3, norm=True).double()
    update = rgap.capture(model, picture(SHAPE[1:], 1), LABEL, dtype=F64)
    where = preset.coordinates((0.0, 1.0))
    return Objective(
        model, update.gradients, ClientLoss(update.loss, labels), SHAPE, preset, where, dtype=dtype
    )


def standing(count: int) -> RestartState:
    rows = torch.arange(2.0 * count, dtype=F64).reshape(count, 2)
    state = first(objective(PRESETS["ig"]), rows)
    return RestartState.of(state)


@pytest.mark.parametrize("name", [n for n, preset in PRESETS.items() if not preset.domains])
def test_one_by_one_or_together_is_the_same(name: str) -> None:
    """Below TOGETHER rows PyTorch's graph, from there on function transforms."""
    preset = replace(PRESETS[name], group=0.0)
    one = objective(preset, labels=None if preset.joint else LABEL)
    rows = torch.randn(TOGETHER, one.unknowns, dtype=F64)
    values, slopes = one(rows)
    apart = [one(rows[:2]), one(rows[2:])]
    assert torch.allclose(values, torch.cat([v for v, _ in apart]), rtol=1e-12)
    assert torch.allclose(slopes, torch.cat([s for _, s in apart]), rtol=1e-9, atol=1e-14)
    assert not values.requires_grad and not slopes.requires_grad


def test_a_standing_is_its_state() -> None:
    at = standing(3)
    at.judge(torch.tensor([1.0, nan, 3.0], dtype=F64), torch.ones(3, 2, dtype=F64), 1.0)
    at.number = 7
    state = at.state()
    again = RestartState.of(state).state()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert all(tensor.dtype == again[name].dtype for name, tensor in state.items())
    assert state["iteration"].item() == 7 and state["best_at"].tolist() == [0, 0, 0]


def test_numbers_of_a_state_keep_their_precision() -> None:
    at = standing(1)
    at.judge(torch.tensor([1 / 3], dtype=F64), torch.ones(1, 2, dtype=F64), 1.0)
    assert at.state()["best_values"].item() == 1 / 3


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_slope_that_is_not_finite_gives_a_start_up(bad: float) -> None:
    at, ones = standing(2), torch.ones(2, 2, dtype=F64)
    at.judge(torch.tensor([2.0, 1.0], dtype=F64), ones, 1.0)
    at.number, at.rows = 1, at.rows + 1.0
    slopes = ones.clone()
    slopes[0, 1] = bad
    at.judge(torch.tensor([0.5, 0.5], dtype=F64), slopes, 1.0)
    assert at.alive == [False, True] and at.values.tolist() == [inf, 0.5]
    assert at.best_values == [2.0, 0.5] and at.best_at == [0, 1]
    assert at.best.tolist() == [[0.0, 1.0], [3.0, 4.0]], "the first keeps its best row"
    assert at.living(at.rows, at.best).tolist() == [[0.0, 1.0], [3.0, 4.0]]
    assert at.living(slopes, 0.0).tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_large_finite_slopes_are_finite() -> None:
    """Their sum would overflow."""
    at = standing(1)
    most = torch.finfo(F64).max
    at.judge(torch.tensor([1.0], dtype=F64), torch.full((1, 2), most, dtype=F64), 1.0)
    assert at.alive == [True] and at.best_values == [1.0]


def test_progress_and_explosion() -> None:
    at, slopes = standing(1), torch.ones(1, 2, dtype=F64)
    for number, value in enumerate((2.0, 1.99999, 1.0, EXPLODED * 1.9, EXPLODED * 2.1)):
        at.number = number
        at.judge(torch.tensor([value], dtype=F64), slopes, 1.0)
        assert at.progress == (0, 0, 2, 2, 2)[number]
        assert at.alive == [number < 4]
    assert at.best_values == [1.0] and at.best_at == [2]


def test_small_convolutions_run_without_onednn_and_the_setting_comes_back() -> None:
    usual = torch.backends.mkldnn.enabled
    assert usual, "PyTorch's default"
    with small_kernels(SMALL - 1):
        assert not torch.backends.mkldnn.enabled
    for work in (0.0, SMALL):
        with small_kernels(work):
            assert torch.backends.mkldnn.enabled
    with pytest.raises(KeyError), small_kernels(1.0):
        raise KeyError
    assert torch.backends.mkldnn.enabled
    seen: list[bool] = []
    model = small_conv("sigmoid", size=4, channels=3)
    update = rgap.capture(model, picture(SHAPE[1:], 1), LABEL)
    rgap.match(
        model, update, method="ig", iterations=1,
        callback=lambda _: seen.append(torch.backends.mkldnn.enabled),
    )  # fmt: skip
    assert seen == [False, False] and torch.backends.mkldnn.enabled


def test_kernels_agree() -> None:
    one = objective(PRESETS["ig"], torch.float32)
    rows = torch.randn(1, one.unknowns)
    assert 0 < one.work < SMALL
    usual = one(rows)
    with one.kernels():
        small = one(rows)
    for ours, theirs in zip(small, usual, strict=True):
        # Single precision, summed in another order.
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_work_is_counted_over_all_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2))
    x = torch.zeros(3, 2, 8, 8)
    by_hand = (3 * 16 * 4 * 18, 3 * 9 * 6 * 8)
    assert convolution_work(model, x) == sum(by_hand) / 2
    assert not any(m._forward_hooks for m in model.modules())
    assert convolution_work(nn.Linear(8, 2), x) == 0


@pytest.mark.parametrize(
    "prior",
    [
        TotalVariation(weight=0.7, smoothing=0.02),
        TotalVariation(smoothing=1e-3, isotropic=False),
        TotalVariation(power=0.5, order=2, chroma=3.0),
        Sum([TotalVariation(), Squares()]),
    ],
)
def test_value_and_gradient_together_are_those_apart(prior: TotalVariation | Sum) -> None:
    x = picture((3, 5, 6), 2, 2).double().requires_grad_()
    value, slope = value_and_gradient(prior, x.detach())
    assert torch.allclose(value, prior.value(x.detach()), rtol=1e-14)
    assert torch.allclose(slope, prior.gradient(x.detach()), rtol=1e-14)
    (expected,) = torch.autograd.grad(prior.value(x), x)
    assert torch.allclose(slope, expected, atol=1e-14)
