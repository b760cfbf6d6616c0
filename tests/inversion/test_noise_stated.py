"""Stated noise: kept entry by entry, read by the name of the gradient, met by every test."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from cases import dense
from torch import nn

import rgap
from rgap.inversion.invert import invert
from rgap.precision import Precision
from rgap.update.capture import capture
from rgap.update.update import Update

F64 = torch.float64


def mlp(*widths: int) -> nn.Sequential:
    return dense(*widths).double()


def sample(count: int = 1, seed: int = 7) -> torch.Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)


def noisy(update: Update, sigma: float, stated: float | None = None, seed: int = 1) -> Update:
    """The update with normal noise of ``sigma`` times each tensor's rms, stated as such."""
    rng = torch.Generator().manual_seed(seed)
    rms = {n: float(g.square().mean().sqrt()) for n, g in update.gradients.items()}
    sent = {
        n: g + sigma * rms[n] * torch.randn(g.shape, generator=rng, dtype=g.dtype)
        for n, g in update.gradients.items()
    }
    told = sigma if stated is None else stated
    std = {n: torch.full_like(g, told * rms[n]) for n, g in update.gradients.items()}
    return dataclasses.replace(update, gradients=sent, noise=std)


# --- the field ------------------------------------------------------------------------------


def test_noise_is_kept_entry_by_entry_in_the_order_of_the_gradients(tmp_path: Path) -> None:
    gradients = {"a": torch.ones(2, 3), "b": torch.ones(3)}
    std = torch.tensor([0.0, 0.5, 2.0])
    update = Update(gradients, noise={"b": std, "a": torch.full((2, 3), 0.1)})
    std.zero_()
    assert update.noise is not None
    assert list(update.noise) == ["a", "b"]
    assert update.noise["b"].tolist() == [0.0, 0.5, 2.0]  # a copy
    assert "noise 6.9e-01 rms" in repr(update)
    update.save(tmp_path / "update.safetensors")
    back = Update.load(tmp_path / "update.safetensors").noise
    assert back is not None and list(back) == ["a", "b"]
    assert all(torch.equal(back[n], update.noise[n]) for n in back)


def test_a_file_without_noise_has_none(tmp_path: Path) -> None:
    """Files from before there was noise carry no word of it."""
    Update({"a": torch.ones(2)}).save(tmp_path / "update.safetensors")
    assert b"noise" not in (tmp_path / "update.safetensors").read_bytes()
    assert Update.load(tmp_path / "update.safetensors").noise is None


@pytest.mark.parametrize(
    ("noise", "error", "match"),
    [
        ({"b": torch.ones(2)}, ValueError, "'b' is not among the gradients"),
        ({"a": torch.ones(3)}, ValueError, r"'a' has shape \(3,\), expected \(2,\)"),
        ({"a": torch.tensor([0.1, -1.0])}, ValueError, "negative entry -1"),
        ({"a": torch.tensor([0.1, float("nan")])}, ValueError, "NaN or infinity in 1 of 2"),
        ({"a": 0.1}, TypeError, "'a' is a float"),
        (0.1, TypeError, "noise: expected a dict"),
    ],
)
def test_bad_noise_is_named(noise: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Update({"a": torch.ones(2)}, noise=noise)  # type: ignore[arg-type]


# --- what reads it ----------------------------------------------------------------------------


def test_the_norm_of_noise_of_unequal_entries_is_near_that_of_a_draw() -> None:
    rng = torch.Generator().manual_seed(0)
    std = torch.rand(40, 1, generator=rng, dtype=F64) ** 4 * torch.rand(90, generator=rng).double()
    precision = Precision(F64, entries={"w": std})
    drawn = max(
        float(torch.linalg.matrix_norm(std * torch.randn(40, 90, generator=rng), 2))
        for _ in range(5)
    )
    assert 0.6 * precision.noise_norm("w", std) < drawn < 1.1 * precision.noise_norm("w", std)
    even = Precision(F64, 0.5)
    assert even.noise_norm("w", std) == pytest.approx(0.5 * (40**0.5 + 90**0.5))


def test_projected_noise_has_the_spread_of_projected_draws() -> None:
    rng = torch.Generator().manual_seed(0)
    std = torch.rand(4, 30, generator=rng, dtype=F64)
    basis = torch.linalg.qr(torch.randn(30, 3, generator=rng, dtype=F64)).Q
    precision = Precision(F64, 0.2, entries={"w": std}).projected("w", basis)
    draws = torch.hypot(std, torch.tensor(0.2).double()) * torch.randn(
        4000, 4, 30, generator=rng, dtype=F64
    )
    met = (draws @ basis).square().mean(0).sqrt()
    assert torch.allclose(met, precision.noise_std("w", met), rtol=0.05)


@pytest.mark.parametrize("kind", ["mlp", "batch", "conv", "no bias"])
def test_noise_of_one_size_says_the_same_entry_by_entry(kind: str) -> None:
    """`Update.noise` at one value everywhere and the float of `invert` are the same statement."""
    torch.manual_seed(0)
    conv = (nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(288, 5))
    models = {
        "mlp": mlp(36, 20, 10, 5),
        "batch": mlp(36, 40, 30, 5),
        "conv": nn.Sequential(*conv).double().eval(),
        "no bias": nn.Sequential(nn.Flatten(), nn.Linear(36, 5, bias=False)).double().eval(),
    }
    count = 2 if kind == "batch" else 1
    update = capture(models[kind], sample(count), torch.tensor([3, 1][:count]))
    sigma = 1e-7 * float(torch.cat([g.flatten() for g in update.gradients.values()]).std())
    rng = torch.Generator().manual_seed(3)
    sent = {
        n: g + sigma * torch.randn(g.shape, generator=rng, dtype=F64)
        for n, g in update.gradients.items()
    }
    update = dataclasses.replace(update, gradients=sent)
    by_float = invert(models[kind], update, noise=sigma)
    entries = {n: torch.full_like(g, sigma) for n, g in update.gradients.items()}
    by_entry = invert(models[kind], dataclasses.replace(update, noise=entries))
    assert by_entry.status is by_float.status and by_float.status.name == "EXACT"
    assert by_entry.inputs is not None and by_float.inputs is not None
    assert torch.allclose(by_entry.inputs, by_float.inputs, atol=1e-9)
    assert by_entry.error_bound == pytest.approx(by_float.error_bound, rel=1e-3)
    order = [1, 0] if count == 2 else [0]  # by label
    assert float((by_entry.inputs - sample(count)[order]).abs().max()) <= by_entry.error_bound
    silent = invert(models[kind], dataclasses.replace(update, noise=None))
    assert silent.status.name == "INCONSISTENT" and not silent.certified


# --- every test meets it ----------------------------------------------------------------------

SIGMAS = (1e-8, 1e-4, 1e-2, 0.1, 1.0)  # of the rms of a tensor's entries


def network(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    wide = nn.Linear(36, 300), nn.ReLU(), nn.Linear(300, 6)
    conv = nn.Conv2d(1, 6, 5, 2, 2), nn.Sigmoid(), nn.Conv2d(6, 12, 3, 2, 1), nn.Sigmoid()
    steps: dict[str, tuple[nn.Module, ...]] = {
        "one layer": (nn.Flatten(), nn.Linear(36, 6)),
        "mlp": (nn.Flatten(), *mlp(36, 24, 16, 6)[1:]),
        "wide": (nn.Flatten(), *wide),
        "no bias": (
            nn.Flatten(), nn.Linear(36, 24, bias=False), nn.LeakyReLU(0.2),
            nn.Linear(24, 6, bias=False),
        ),
        "conv": (*conv, nn.Flatten(), nn.Linear(48, 6)),
    }  # fmt: skip
    return nn.Sequential(*steps[kind]).double().eval()


def off(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error of any entry, each answer compared with the nearest sample."""
    nearest = torch.cdist(found.flatten(1), truth.flatten(1)).argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(truth)))
    return float((found - truth[nearest]).abs().max())


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("kind", "count"),
    [("one layer", 1), ("mlp", 1), ("wide", 1), ("no bias", 1), ("conv", 1), ("mlp", 2),
     ("wide", 2), ("one layer", 2)],
)  # fmt: skip
def test_noise_stated_as_it_is_never_contradicts(kind: str, count: int) -> None:
    """At any size: an answer within its bound, or the word that the noise is too large for one."""
    seed = 3 + count
    model, x = network(kind, seed), sample(count, seed)
    y = torch.tensor([4, 1][:count])
    update, exact = capture(model, x, y), 0
    for sigma in SIGMAS:
        found = invert(model, noisy(update, sigma, seed=seed))
        assert found.status.name in ("EXACT", "UNDERDETERMINED", "AMBIGUOUS"), found.reason
        if found.status.name == "EXACT":
            exact += 1
            assert found.inputs is not None and found.labels is not None
            assert found.error_bound is not None
            assert off(found.inputs, x) <= found.error_bound
            assert sorted(found.labels.tolist()) == sorted(y.tolist())
    assert exact >= 2


@pytest.mark.parametrize("kind", ["one layer", "mlp", "no bias", "conv"])
def test_noise_stated_a_hundred_times_too_small_is_never_certified(kind: str) -> None:
    model, x = network(kind, 11), sample(1, 11)
    update = capture(model, x, torch.tensor([2]))
    for sigma in (1e-6, 1e-3, 0.1):
        found = invert(model, noisy(update, sigma, stated=sigma / 100))
        assert found.status.name in ("INCONSISTENT", "UNDERDETERMINED"), found.status


def test_noise_that_was_not_stated_is_named_as_a_cause() -> None:
    model, x = network("mlp", 1), sample(1, 1)
    sent = noisy(capture(model, x, torch.tensor([2])), 0.01)
    found = invert(model, dataclasses.replace(sent, noise=None))
    assert found.status.name == "INCONSISTENT"
    assert "noise that was not stated" in found.reason
    assert "rounding and noise explain" in found.reason


@pytest.mark.parametrize("noise", [1.0, 40.0])
def test_values_that_drown_in_the_stated_noise_are_called_so(noise: float) -> None:
    model = rgap.models.mlp((40, 32), 10, "tanh", input_shape=(3, 8, 8), seed=0)
    update = capture(model, rgap.photos.load(1, 8).float(), torch.tensor([2]))
    recovery = invert(model, update, noise=noise)
    assert recovery.inputs is None
    assert "192 of the 192 values" in recovery.reason and "noise" in recovery.reason
    assert "no kernel" not in recovery.reason
