"""No certificate at a precision that nothing in the update tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap import Loss, Status, Update
from rgap.inversion.backing import widening


def integers(g: Tensor, bits: int) -> Tensor:
    step = float(g.abs().max()) / (2 ** (bits - 1) - 1)
    return (g / step).round() * step


def decimals(g: Tensor, digits: int) -> Tensor:
    scale = 10.0 ** (digits - 1 - g.abs().clamp_min(1e-30).log10().floor())
    return (g * scale).round() / scale


def largest(g: Tensor, share: float) -> Tensor:
    return g * (g.abs() >= g.abs().flatten().quantile(1.0 - share))


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda g: integers(g, 8),
    "int4": lambda g: integers(g, 4),
    "int16": lambda g: integers(g, 16),
    "float16": lambda g: g.half().to(g),
    "bfloat16": lambda g: g.bfloat16().to(g),
    "sign": torch.sign,
    "mean sign": lambda g: g.sign() * g.abs().mean(),
    "decimals": lambda g: (g * 1000).round() / 1000,
    "digits": lambda g: decimals(g, 4),
    "largest": lambda g: largest(g, 0.5),
    "noise": lambda g: g * (1 + 1e-5 * torch.randn_like(g)),
    "logarithm": lambda g: g.sign() * torch.exp((g.abs().log() * 64).round() / 64),
}
TARGETS: dict[str, tuple[Loss, Callable[[int], Tensor]]] = {
    "mse": (Loss("mse_loss"), lambda m: torch.rand(1, m)),
    "equal": (Loss("mse_loss", "sum"), lambda m: torch.full((1, m), 0.3)),
    "soft": (Loss("cross_entropy", targets="probability"), lambda m: torch.rand(1, m).softmax(1)),
    "binary": (
        Loss("binary_cross_entropy_with_logits", targets="probability"),
        lambda m: torch.rand(1, m),
    ),
    "index": (Loss("binary_cross_entropy_with_logits"), lambda m: torch.ones(1, m)),
}

# Of the heads of a kind of targets, in their order above, those that are certified: roundings that
# are recognised, and never the head of one free row.
EXACT = {
    "int8": (2, 1, 1, 2, 1),
    "int16": (2, 1, 1, 2, 1),
    "float16": (2, 1, 1, 2, 1),
    "bfloat16": (0, 0, 1, 2, 1),
}


def head(rows: int, seed: int, equal: bool) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(12, rows)
    if equal:
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(p[:1].expand_as(p))
    return layer


def judge(model: nn.Module, update: Update, x: Tensor, target: Tensor) -> rgap.Recovery:
    """What comes back, held to the bounds that it states."""
    found = rgap.invert(model, update)
    if "inputs" in found.certified:
        gap = float((found.inputs - x).abs().max())
        assert gap <= found.error_bound, (gap, found.error_bound)
    if "targets" in found.certified and update.loss.targets != "index":
        off, bound = float((found.labels - target).abs().max()), found.targets_error_bound
        assert off <= bound, (off, bound)
    return found


@pytest.mark.cases(30)
@pytest.mark.parametrize("way", SPOILED)
@pytest.mark.parametrize("targets", TARGETS)
def test_a_head_that_nothing_tests_certifies_no_precision(way: str, targets: str) -> None:
    exact = 0
    for seed, (rows, equal) in enumerate([(1, False), (2, True), (3, False)]):
        if targets == "soft" and rows == 1:
            continue
        model = head(rows, seed, equal)
        loss, draw = TARGETS[targets]
        x, target = torch.rand(1, 12), draw(rows)
        update = rgap.capture(model, x, target, loss)
        sent = {n: SPOILED[way](g) for n, g in update.gradients.items()}
        exact += judge(model, dataclasses.replace(update, gradients=sent), x, target).exact
    assert exact == dict(zip(TARGETS, EXACT.get(way, (0,) * 5), strict=True))[targets]


@pytest.mark.parametrize("way", ["int8", "float16", "plain"])
@pytest.mark.parametrize("targets", ["mse", "soft", "binary"])
def test_targets_of_any_numbers_lie_within_their_own_bound(way: str, targets: str) -> None:
    """Recognised rounding of the head's gradient moves its targets, whatever it does to inputs."""
    exact = 0
    for seed, batch in enumerate((1, 1, 2)):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
        loss, draw = TARGETS[targets]
        x, target = torch.rand(batch, 12), torch.cat([draw(3) for _ in range(batch)])
        update = rgap.capture(model, x, target, loss)
        spoiled = SPOILED.get(way, lambda g: g)
        sent = {n: spoiled(g) for n, g in update.gradients.items()}
        found = rgap.invert(model, dataclasses.replace(update, gradients=sent))
        if not found.exact:
            assert found.status is Status.UNDERDETERMINED, found.reason
            continue
        exact += 1
        order = torch.cdist(x.double(), found.inputs).argmin(1)
        off, bound = float((found.labels[order] - target).abs().max()), found.targets_error_bound
        assert off <= bound <= 0.1 * (1 + float(target.abs().max())), (off, bound)
        assert found.summary()["targets_error_bound"] == bound
        assert f"targets_error_bound={bound}" in repr(found)
    assert exact == (2 if (way, targets) == ("int8", "binary") else 3)


class Normed(nn.Module):
    """A network that no chain of layers covers."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.below(x))
        return self.above(h / (1 + h.norm()))


def test_targets_above_a_barrier_have_a_bound_too() -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        model, x, target = Normed(), torch.rand(1, 10), torch.randn(1, 3)
        found = rgap.invert(model, rgap.capture(model, x, target, Loss("mse_loss")))
        assert found.exact, found.reason
        assert float((found.labels - target).abs().max()) <= found.targets_error_bound < 1e-3


def test_rows_of_other_sizes_and_logits_still_certify() -> None:
    """What has a test of its precision keeps its certificate."""
    x = torch.rand(1, 12, generator=torch.Generator().manual_seed(1))
    for rows, name in [(3, "mse"), (2, "binary"), (3, "soft"), (1, "index"), (3, "index")]:
        model = head(rows, 7, False)
        loss, draw = TARGETS[name]
        target = draw(rows)
        found = judge(model, rgap.capture(model, x, target, loss), x, target)
        assert found.exact, (rows, name, found.reason)


def test_one_row_of_a_free_target_says_what_is_missing() -> None:
    model, x = head(1, 3, False), torch.rand(1, 12)
    found = rgap.invert(model, rgap.capture(model, x, torch.rand(1, 1), Loss("mse_loss")))
    assert found.status.name == "UNDERDETERMINED" and not found.certified
    assert "none is left to test it" in found.reason


def test_fewer_tests_ask_for_a_wider_bound() -> None:
    """The bound of d tests covers the error but for the stated chance, by drawing them."""
    assert widening(0) == float("inf") and widening(1000) == 1.0
    generator = torch.Generator().manual_seed(0)
    for tests in (1, 2, 4):
        honest = torch.randn(200_000, tests, generator=generator).square().mean(1).sqrt()
        assert float((honest < 1.0 / (2.0 * widening(tests))).double().mean()) < 3e-4
