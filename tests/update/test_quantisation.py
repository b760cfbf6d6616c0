"""Updates that went through a coarse format: recognised by their values, and never by chance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from allocations import Allocations
from torch import Tensor, nn

from rgap.arithmetic.rounding import UNIFORM, spacing
from rgap.inversion.invert import invert
from rgap.update.capture import capture
from rgap.update.quantisation import recognise
from rgap.update.update import Update

SHAPE = (1, 6, 6)


SCALED = "float16 over a loss scale"  # as mixed precision leaves a gradient


def network(kind: str = "mlp", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    steps = {
        "mlp": (nn.Flatten(), nn.Linear(36, 32), nn.Tanh(), nn.Linear(32, 6)),
        "conv": (nn.Conv2d(1, 8, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(72, 6)),
        "zero": (nn.Flatten(), nn.Linear(36, 8)),
    }
    model = nn.Sequential(*steps[kind]).eval()
    if kind == "zero":
        for p in model.parameters():
            nn.init.zeros_(p)
    return model


def sample(seed: int = 3) -> Tensor:
    return torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed))


def integers(g: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Uniform quantisation, one scale a tensor, as torch.quantize_per_tensor does it."""
    if signed:
        step = g.abs().max() / (2 ** (bits - 1) - 1)
        return (g / step).round() * step
    step = (g.max() - g.min()) / (2**bits - 1)
    return (g / step).round() * step


def sent(kind: str, way: str, seed: int = 0) -> tuple[nn.Module, Update]:
    model = network(kind, seed)
    update = capture(model, sample(), torch.tensor([2]))
    ways = {
        "float16": lambda g: g.half().float(),
        SCALED: lambda g: (g * 1024).half().float() / 1024,
        "bfloat16": lambda g: g.bfloat16().float(),
        "float32": lambda g: g.double(),
        "8-bit integers": lambda g: integers(g, 8),
        "16-bit integers": lambda g: integers(g, 16),
        "unsigned": lambda g: integers(g, 8, signed=False),
    }
    gradients = {n: ways[way](g) for n, g in update.gradients.items()}
    return model, dataclasses.replace(update, gradients=gradients, dtype=None)


WAYS = ["float16", SCALED, "bfloat16", "float32", "8-bit integers", "16-bit integers", "unsigned"]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("way", WAYS)
def test_a_coarse_update_is_recognised_and_answered_within_its_bound(kind: str, way: str) -> None:
    model, update = sent(kind, way, seed=4)
    name = "8-bit integers" if way == "unsigned" else way
    found = recognise(update.gradients)
    assert found is not None and found.kind == name
    assert set(found.noise) == set(update.gradients)
    recovery = invert(model, update)
    assert recovery.exact, recovery.reason
    assert any(f"those of {name}" in said for said in recovery.warnings)
    assert float((recovery.inputs - sample()).abs().max()) <= recovery.error_bound
    assert recovery.labels.tolist() == [2]
    found_by = update.as_rounded()[0]
    format_ = way.split(maxsplit=1)[0]
    assert found_by.dtype == (
        getattr(torch, format_) if way.startswith(("f", "bf")) else torch.float32
    )


@pytest.mark.parametrize("way", ["float16", SCALED, "bfloat16", "8-bit integers"])
def test_its_noise_is_the_error_of_its_entries(way: str) -> None:
    model, update = sent("mlp", way)
    truth = capture(model, sample(), torch.tensor([2])).gradients
    found = recognise(update.gradients)
    assert found is not None
    for name, std in found.noise.items():
        ratio = (update.gradients[name] - truth[name]) / std
        assert float(ratio.abs().max()) < 1.8
        if ratio.numel() > 200:
            assert 0.6 < float(ratio.square().mean().sqrt()) < 1.1


def test_a_half_precision_client_gets_its_precision_too() -> None:
    """Computed in float16, not only sent in it: every step rounded, the bound still holds."""
    model = network("mlp", 1).half()
    update = capture(model, sample().half(), torch.tensor([2]))
    wide = {n: g.float() for n, g in update.gradients.items()}
    again = dataclasses.replace(update, gradients=wide, dtype=torch.float32)
    recovery = invert(model.float(), again)
    assert recovery.status.name == "EXACT", recovery.reason
    assert float((recovery.inputs - sample().half()).abs().max()) <= recovery.error_bound


# --- what is none -----------------------------------------------------------------------------


def ordinary(seed: int) -> dict[str, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    model, zero = network("mlp", seed), network("zero")
    digits = torch.randint(0, 17, (1, *SHAPE), generator=rng) / 16  # levels of a 4-bit scanner
    binary = torch.randint(0, 2, (1, *SHAPE), generator=rng).float()
    dead = {
        n: g * (torch.arange(len(g)) < 2).reshape(-1, *[1] * (g.ndim - 1)).float()
        for n, g in capture(model, sample(seed), torch.tensor([1])).gradients.items()
    }
    return {
        "captured": capture(model, sample(seed), torch.tensor([1])).gradients,
        "double": capture(network("mlp", seed).double(), sample().double(),
                          torch.tensor([1])).gradients,
        "zero weights, digits": capture(zero, digits, torch.tensor([1])).gradients,
        "zero weights, binary": capture(zero, binary, torch.tensor([1])).gradients,
        "binary": capture(model, binary, torch.tensor([1])).gradients,
        "few": {"w": torch.randn(3, generator=rng), "b": torch.randn(1, generator=rng)},
        "one-hot": {"w": torch.eye(64)},
        "signs": {"w": 0.01 * torch.randn(50, 50, generator=rng).sign()},
        "mostly zero": dead,
        "zeros": {"w": torch.zeros(64, 64)},
        "underflowed": {
            n: torch.tensor([1.0, 1e-9, 3e-11, -4e-12, 1e-13, 0.0]) for n in "abcdef"
        },
        "counts": {"w": torch.randint(0, 100, (64, 64), generator=rng).float()},
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_gradients_are_left_alone(seed: int) -> None:
    for name, gradients in ordinary(seed).items():
        assert recognise(gradients) is None, name
        update = Update(gradients)
        assert update.as_rounded() == (update, None)


def test_tensors_that_were_not_rounded_keep_what_they_have() -> None:
    """A head in float32 above layers in float16: only the rounded tensors get its noise."""
    _, update = sent("mlp", "float16")
    mixed = {**update.gradients, "3.weight": torch.randn(6, 32), "3.bias": torch.randn(6)}
    found = recognise(mixed)
    assert found is not None and set(found.noise) == {"1.weight", "1.bias"}


def test_rounding_adds_to_noise_that_was_stated() -> None:
    _, update = sent("mlp", "float16")
    stated = {n: torch.full_like(g, 1e-3) for n, g in update.gradients.items()}
    both, said = dataclasses.replace(update, noise=stated).as_rounded()
    assert said is not None and both.noise is not None
    g = update.gradients["1.weight"]
    own = UNIFORM * spacing(g, torch.float16)
    assert torch.allclose(both.noise["1.weight"].double(), (own**2 + 1e-6).sqrt(), rtol=1e-5)


def test_a_few_values_refute_a_format_and_nothing_large_is_converted() -> None:
    """All 13 widths and 3 formats of an update together allocate less than it is itself."""
    rng = torch.Generator().manual_seed(0)
    # one input was off
    dead = torch.randn(6000, 1024, generator=rng) * (torch.arange(1024) > 0)
    update = {"w": dead, "b": torch.randn(3000, generator=rng)}
    with Allocations() as made:
        assert recognise(update) is None
    assert made.total < 4 * dead.numel(), f"{made.total / (4 * dead.numel()):.1f} times its size"


def test_what_rounding_leaves_of_zero_is_no_format() -> None:
    """∂b below a group norm is a sum that is zero: what is left of it ends in zeros."""
    for seed in range(24):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 24, 5, padding=2), nn.GroupNorm(24, 24), nn.Tanh(), nn.Flatten(),
            nn.Linear(24 * 72, 3), nn.Tanh(), nn.Linear(3, 1),
        ).eval()  # fmt: skip
        y = torch.zeros(1, 1)
        sent = capture(model, torch.rand(1, 2, 8, 9), y, "binary_cross_entropy_with_logits")
        assert recognise(sent.gradients) is None, seed
