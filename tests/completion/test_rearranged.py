"""Pictures with entries in other places: which networks tell them apart, and what is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.completion.rearranged import rearrangements, steps_of, unmoved
from rgap.recovery import Status

F64 = torch.float64


class Skip(nn.Module):
    def __init__(self, width: int, kernel: int = 1, **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, 1, kernel // 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def framed(shape: tuple[int, ...]) -> Tensor:
    """One black column at the left, two at the right."""
    x = torch.rand(shape, dtype=F64)
    x[..., 0] = x[..., -2:] = 0
    return x


def inverted(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, dtype: torch.dtype, **options: object
) -> tuple[rgap.Recovery, float]:
    """The recovery, and how far its pictures are off."""
    model = make().to(dtype).eval()
    update = rgap.capture(model, x.to(dtype), y, dtype=dtype)
    recovery = rgap.invert(model, update, **options)
    off = float("nan")
    if recovery.inputs is not None and len(x) == 1:
        off = float((recovery.inputs - x.to(dtype).double()).abs().max())
    return recovery, off


def patches(pool: nn.Module) -> nn.Sequential:
    """Patches side by side, and a pool over four of them."""
    return nn.Sequential(nn.Conv2d(1, 96, 2, 2), nn.ReLU(), pool, nn.Flatten(), nn.Linear(96, 10))


@pytest.mark.cases(3)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("pool", "options"), [(nn.MaxPool2d(2), {}), (nn.AvgPool2d(2), {"complete": True})]
)
def test_patches_of_one_window_may_change_places(
    pool: nn.Module, options: dict[str, bool], seed: int
) -> None:
    torch.manual_seed(seed)
    x, y = torch.rand(1, 1, 4, 4, dtype=F64), torch.tensor([3])
    model = patches(pool).double()
    other = x.clone()
    other[..., :2, :2], other[..., :2, 2:] = x[..., :2, 2:], x[..., :2, :2]
    sent, same = rgap.capture(model, x, y), rgap.capture(model, other, y)
    assert all(torch.allclose(sent.gradients[n], g) for n, g in same.gradients.items())
    recovery = rgap.invert(model, sent, **options)
    assert recovery.status is not Status.EXACT and "inputs" not in recovery.certified
    if recovery.status is Status.AMBIGUOUS:
        one, two = recovery.candidates
        assert float((one.inputs - two.inputs).abs().max()) > 1e-3
        for candidate in recovery.candidates:
            again = rgap.capture(model, candidate.inputs, candidate.labels).gradients
            assert all(torch.allclose(again[n], g) for n, g in sent.gradients.items())


def circular(width: int) -> nn.Conv2d:
    return nn.Conv2d(1, width, 3, 1, 1, padding_mode="circular")


SYMMETRIC: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "frame": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 256, 3, 1, 1), nn.ReLU(), Skip(256), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(256, 10),
        ),
        (1, 1, 4, 6),
    ),
    "circle": (
        lambda: nn.Sequential(
            circular(200), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(200, 10)
        ),
        (1, 1, 4, 4),
    ),
    "patches": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 64, 2, 2), nn.ReLU(), Skip(64), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(256, 10),
        ),
        (1, 1, 8, 8),
    ),
    "rows": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 64, (1, 3), 1, (0, 1)), nn.ReLU(), nn.MaxPool2d((2, 1)), nn.Flatten(),
            nn.Linear(512, 10),
        ),
        (1, 1, 4, 4),
    ),
    "frames": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 128, (1, 3, 3), 1, (0, 1, 1)), nn.ReLU(), nn.MaxPool3d((2, 1, 1)),
            nn.Flatten(), nn.Linear(128 * 18, 10),
        ),
        (1, 1, 4, 3, 3),
    ),
    "phases": (
        lambda: nn.Sequential(
            nn.Conv1d(1, 96, 3, 1, 2, 2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(),
            nn.Linear(96 * 4, 10),
        ),
        (1, 1, 8),
    ),
    "skip": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 96, (1, 3), 1, (0, 1)), nn.ReLU(), Skip(96), nn.MaxPool2d((2, 1)),
            nn.Flatten(), nn.Linear(96 * 6, 10),
        ),
        (1, 1, 4, 3),
    ),
    "offset": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 192, 2, 2, 1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(192, 96, 1),
            nn.ReLU(), nn.MaxPool2d((1, 2)), nn.Flatten(), nn.Linear(288, 10),
        ),
        (1, 2, 4, 4),
    ),
}  # fmt: skip


@pytest.mark.cases(16)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SYMMETRIC)
def test_nothing_is_certified_where_another_picture_sends_the_same(
    name: str, seed: int, dtype: torch.dtype
) -> None:
    make, shape = SYMMETRIC[name]
    torch.manual_seed(seed)
    x = framed(shape) if name == "frame" else torch.rand(shape, dtype=F64)
    recovery, _ = inverted(make, x, torch.tensor([seed]), dtype)
    assert recovery.status is not Status.EXACT and "inputs" not in recovery.certified


@pytest.mark.parametrize("seed", range(2))
def test_windows_whose_places_overlap_tell_them_apart(seed: int) -> None:
    torch.manual_seed(seed)
    recovery, off = inverted(
        lambda: nn.Sequential(
            nn.Conv2d(1, 64, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
        ),
        torch.rand(1, 1, 4, 4, dtype=F64), torch.tensor([seed]), F64,
    )  # fmt: skip
    assert recovery.status is Status.EXACT and off <= recovery.error_bound


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_picture_is_not_left_at_the_kink_where_it_becomes_open(dtype: torch.dtype) -> None:
    """Pixels that only units read that are off, or lose their pool, are open in an interval."""
    exact = 0
    for seed in (0, 1, 3, 6):
        torch.manual_seed(seed)
        x = torch.rand(1, 2, 5, 5).double()
        recovery, off = inverted(
            lambda: nn.Sequential(
                nn.Conv2d(2, 48, 2, 1, 1), nn.ReLU(), nn.MaxPool2d(2, 3), nn.Flatten(),
                nn.Linear(192, 10),
            ),
            x, torch.randint(0, 10, (1,)), dtype,
        )  # fmt: skip
        if recovery.status is Status.EXACT:
            exact += 1
            assert off <= recovery.error_bound, seed
    assert exact > 0


@pytest.mark.parametrize("step", [1, 2])
def test_every_rearranged_picture_has_the_entries_of_the_first(step: int) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 7, 6)
    x[:, :2] = 0
    others = list(rearrangements(x, (step,), 0.0))
    assert {"moved", "patches", "part"} <= {word for one in others for word in one.words.split()}
    for one in others:
        assert torch.equal(one.value.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
        assert not torch.equal(one.value, x)


def test_a_mean_over_places_does_not_tell_them_apart() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 4, 4)
    others = list(rearrangements(x, steps_of((1, 4, 4), [(3, 2, 2)]), 0.0))
    assert not unmoved(_flat, x, others)
    assert len(unmoved(_mean, x, others)) == len(others)


def _flat(pictures: Tensor) -> Tensor:
    return pictures.flatten(1)


def _mean(pictures: Tensor) -> Tensor:
    return pictures.mean((2, 3))


@pytest.mark.parametrize("shape", [(5,), (2, 6), (1, 3, 4), (1, 2, 3, 2), (3, 1, 1)])
def test_any_shape_is_taken(shape: tuple[int, ...]) -> None:
    x = torch.linspace(0.0, 1.0, torch.Size(shape).numel()).reshape(shape)
    for one in rearrangements(x, steps_of(shape, [shape]), 0.0):
        assert one.value.shape == x.shape
