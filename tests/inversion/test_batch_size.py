"""Near copies: what ``EXACT`` says of a batch whose size is stated, and of one of unknown size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.recovery import Recovery, Status

DISTANCES = {torch.float32: (1e-6, 4e-4, 1e-1), torch.float64: (2e-13, 1e-9, 1e-4)}


class Skip(nn.Module):
    """x + f(x): no chain above the first layer."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), activation())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def network(kind: str, seed: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "conv":
        parts = [nn.Conv2d(1, 6, 3), nn.Softplus(), nn.Flatten(), nn.Linear(96, 12), nn.Softplus(),
                 nn.Linear(12, 5)]  # fmt: skip
    elif kind == "skip":
        parts = [nn.Flatten(), nn.Linear(36, 20), Skip(20, nn.Tanh), nn.Linear(20, 5)]
    elif kind == "logit":
        parts = [nn.Flatten(), nn.Linear(36, 20), nn.Sigmoid(), nn.Linear(20, 1)]
    else:
        parts = [nn.Flatten(), nn.Linear(36, 8)]
    return nn.Sequential(*parts).to(dtype).eval()


def near(seed: int, apart: float, count: int, dtype: torch.dtype) -> Tensor:
    """Copies of one picture, moved by up to ``apart``; of one direction or of one each."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.rand(1, 1, 6, 6, generator=draw, dtype=torch.float64)
    ways = torch.rand(count, 1, 6, 6, generator=draw, dtype=torch.float64)
    return (base + apart * (ways - (seed % 2) / 2)).to(dtype)


def holds(found: Recovery, x: Tensor) -> bool:
    """True if certified: every picture within the bound of one returned, and the reverse."""
    if "inputs" not in found.certified:
        return False
    assert found.inputs is not None and found.error_bound is not None
    gaps = (found.inputs.flatten(1)[:, None] - x.double().flatten(1)[None]).abs().amax(2)
    worst = max(float(gaps.amin(1).max()), float(gaps.amin(0).max()))
    assert worst <= found.error_bound + 1e-15, (worst, found.error_bound, found.reason)
    return True


# Of the calls of a kind, those that certify: in float32, in float64.
CERTIFIED = {"conv": (0, 2), "skip": (2, 2), "logit": (0, 2), "affine": (0, 3)}


@pytest.mark.cases(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["conv", "skip", "logit", "affine"])
def test_no_wrong_exact_of_near_copies(kind: str, dtype: torch.dtype) -> None:
    """Below a distance that grows with the rounding, r < B pictures come back for B."""
    count = 0
    for seed, apart in enumerate(DISTANCES[dtype]):
        model, x = network(kind, seed, dtype), near(seed, apart, 2 + seed % 2, dtype)
        y = torch.zeros(len(x), 1, dtype=dtype) if kind == "logit" else torch.full((len(x),), 3)
        loss = "binary_cross_entropy_with_logits" if kind == "logit" else "cross_entropy"
        update = rgap.capture(model, x, y, loss, value_range=None)
        count += holds(rgap.invert(model, replace(update, batch_size=None)), x)
        if seed == 1 and kind != "logit":
            stated = rgap.invert(model, update)
            count += holds(stated, x)
            assert not stated.exact or len(stated.inputs) == len(x)
    assert 2 * count >= CERTIFIED[kind][dtype == torch.float64]  # a machine's rounding


@pytest.mark.parametrize("kind", ["conv", "skip", "affine"])
def test_one_sample_of_an_unknown_batch_is_certified(kind: str) -> None:
    """In float64 pictures nearer than 1e-4 to each other could be shown as one, no others."""
    model, x = network(kind, 1, torch.float64), near(1, 0.0, 1, torch.float64)
    update = rgap.capture(model, x, torch.tensor([3]))
    found = rgap.invert(model, replace(update, batch_size=None))
    assert found.exact and found.error_bound is not None
    assert 1e-9 < found.error_bound < 1e-4
    assert "the batch size is not stated" in found.reason
    stated = rgap.invert(model, update)
    assert stated.exact and stated.error_bound < 1e-9


def test_what_no_layer_sees_is_no_certificate_of_an_unknown_batch() -> None:
    """One logit on an affine piece: k of every sample is parallel, all of them look like one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.LeakyReLU(), nn.Linear(7, 1)).double().eval()
    x = torch.rand(1, 9, dtype=torch.float64)
    y = torch.zeros(1, 1, dtype=torch.float64)
    update = rgap.capture(model, x, y, "binary_cross_entropy_with_logits")
    found = rgap.invert(model, replace(update, batch_size=None))
    assert found.status is Status.UNDERDETERMINED and not found.certified
    assert "state batch_size" in found.reason and found.inputs is None
    assert rgap.invert(model, update).exact


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_samples_that_send_nothing_are_not_taken_for_absent(reduction: str) -> None:
    """A sample of which the network is sure sends less than rounding; a sum does not miss it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[2].weight.mul_(60.0)
    x = torch.rand(40, 6)
    sure, labels = model(x).softmax(1).max(1)
    silent = int(sure.argmax())
    loss = rgap.Loss(reduction=reduction)
    wrong = (labels[:1] + 1) % 4
    batch = torch.stack([x[0], x[silent]])
    update = rgap.capture(model, batch, torch.cat([wrong, labels[silent : silent + 1]]), loss)
    unstated = replace(update, batch_size=None, labels=None)
    recovery = rgap.invert(model, unstated)
    alone = rgap.capture(model, x[:1], wrong, loss)
    found = rgap.invert(model, replace(alone, batch_size=None, labels=None))
    assert recovery.inputs is None and not recovery.certified, recovery.reason
    assert (found.inputs is not None) == (reduction == "mean"), found.reason


@pytest.mark.parametrize(
    ("unread", "dtype"), [(True, torch.float32), (True, torch.float64), (False, torch.float64)]
)
def test_dark_pictures_shown_as_copies_are_within_the_bound(unread, dtype):
    """Stated batch size, one label: shown in parts each is within the bound, whole their mean."""
    shown = 0
    for size, noise in ((2, 1e-3 if dtype is torch.float32 else 1e-7), (3, 1e-9)):
        torch.manual_seed(0)
        side = 4 if unread else 2
        net = nn.Sequential(
            nn.Conv2d(1, 4, 1, stride=2 if unread else 1), nn.Tanh(), nn.Flatten(),
            nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 6),
        ).to(dtype)  # fmt: skip
        x = noise * torch.rand(size, 1, side, side, dtype=dtype)
        found = rgap.invert(net, rgap.capture(net, x, torch.full((size,), 2)))
        assert found.status is not Status.INCONSISTENT, found.reason
        answer = found.partial if unread else found.inputs
        if answer is None:
            continue
        shown += found.multiplicities is not None
        x = x if unread or found.multiplicities is None else x.mean(0, keepdim=True)
        gaps = (answer[:, None] - x.double()[None]).nan_to_num(0.0).abs().flatten(2).amax(2)
        assert float(gaps.amin(0).max()) <= found.error_bound, (size, noise, found.reason)
    assert shown
