"""Updates that are no plain gradient, or belong to another loss: what is said about them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import picture, small_conv, small_mlp
from torch import Tensor, nn

from rgap import Loss, Status, Update, capture, invert
from rgap.diagnosis.evidence import gather
from rgap.models import published as models
from rgap.precision import Precision
from rgap.update.compression import compression

X = picture((2, 8, 8), 1)
SIGNS = "as sign compression leaves them"
PRUNED = "as pruning to the largest entries leaves them"


def signs(g: Tensor) -> Tensor:
    return g.sign()


def scaled_signs(g: Tensor) -> Tensor:
    """One scale per tensor."""
    return g.sign() * g.abs().mean()


def ternary(g: Tensor) -> Tensor:
    return torch.where(g.abs() > g.abs().mean(), g.sign() * 0.01, torch.zeros_like(g))


def compressed_by(model: nn.Module, update: Update) -> bool:
    size = update.batch_size
    evidence = gather(model, update, size, None, None, Precision(update.dtype), math.inf)
    assert set(evidence.terms) <= set(update.gradients)
    return compression(update.gradients, evidence.terms) is not None


def largest(share: float) -> Callable[[Tensor], Tensor]:
    def keep(g: Tensor) -> Tensor:
        least = g.abs().flatten().topk(max(1, int(share * g.numel()))).values[-1]
        return torch.where(g.abs() >= least, g, torch.zeros_like(g))

    return keep


def compressed(update: Update, how: Callable[[Tensor], Tensor]) -> Update:
    return replace(update, gradients={name: how(g) for name, g in update.gradients.items()})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (signs, SIGNS),
        (scaled_signs, SIGNS),
        (ternary, SIGNS),
        (largest(0.1), PRUNED),
        (largest(0.2), PRUNED),
    ],
)
@pytest.mark.parametrize("build", [small_conv, small_mlp])
def test_a_compressed_update_is_called_one(
    build: Callable[..., nn.Module], how: Callable[[Tensor], Tensor], words: str
) -> None:
    model = build("sigmoid", seed=0)
    x = X if build is small_conv else picture((2, 4, 4), 1)
    update = capture(model, x, torch.tensor([3]))
    recovery = invert(model, compressed(update, how))
    assert recovery.status is not Status.EXACT
    assert recovery.inputs is None
    assert recovery.reason.count("the update itself looks compressed") == 1
    assert words in recovery.reason
    assert recovery.explain().count(words) == 1
    assert not any("underflow" in note for note in recovery.warnings), "zeros of a compression"
    assert not recovery.features


CASES = [
    (name, activation, batch)
    for name in ("lenet", "mlp", "lenet5", "vgg", "resnet")
    for activation in ("sigmoid", "relu")
    for batch in (1, 3)
]


@pytest.mark.parametrize(("name", "activation", "batch"), CASES)
def test_a_plain_gradient_is_not_taken_for_a_compressed_one(
    name: str, activation: str, batch: int
) -> None:
    """Dead units, max-pooling and padding leave zeros too; black pixels zero whole columns."""
    model = models.BUILTIN[name](activation=activation, seed=1)
    x = picture((3, 32, 32), 2, batch)
    x[:, :, :8] = 0
    update = capture(model, x, torch.arange(batch))
    assert not compressed_by(model, update)


def test_a_kernel_that_mostly_meets_padding_is_not_a_compression() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Flatten(), nn.Linear(8, 3))
    update = capture(model.eval(), picture((4, 1, 1), 0), torch.tensor([1]))
    assert float((update.gradients["0.weight"] == 0).double().mean()) > 0.8
    assert not compressed_by(model, update)


@pytest.mark.parametrize("batch", [1, 3])
def test_pruned_sums_are_told_by_their_biases(batch: int) -> None:
    """Windows of a convolution are too many outer products to count: a live row has ∂b."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, 1, 1), nn.Sigmoid(), nn.Conv2d(12, 6, 3), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(216, 2),
    ).eval()  # fmt: skip
    update = capture(model, picture((2, 8, 8), 0, batch), torch.arange(batch) % 2)
    assert not compressed_by(model, update)
    assert compressed_by(model, compressed(update, largest(0.1)))


def test_too_few_numbers_prove_nothing() -> None:
    assert compression({"w": torch.ones(2, 4), "b": torch.ones(2)}, {"w": 1}) is None
    assert compression({"w": torch.eye(4)}, {"w": 1}) is None
    eye = torch.diag(torch.linspace(0.5, 1.0, 16))
    assert compression({"w": eye}, {"w": 1}) is not None
    assert compression({"w": eye.pow(9)}, {"w": 16}) is None


# --- a loss that was declared wrongly ---------------------------------------------------------


@pytest.mark.cases(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label", range(5))
def test_cross_entropy_declared_as_squared_error_is_noticed(dtype: torch.dtype, label: int) -> None:
    model = small_conv("sigmoid", seed=0)
    sent = capture(model, X, torch.tensor([label]), dtype=dtype)
    recovery = invert(model, replace(sent, loss=Loss("mse_loss")))
    assert recovery.status is Status.EXACT, "every target is admissible, and the inputs are right"
    assert recovery.inputs is not None
    assert float((recovery.inputs - X).abs().max()) <= (recovery.error_bound or 0)
    (warning,) = recovery.warnings
    assert "the shape of cross_entropy, not of mse_loss" in warning
    assert f"Note: {warning}" in recovery.explain()
    assert not invert(model, sent).warnings


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 5])
def test_squared_error_is_not_taken_for_cross_entropy(seed: int, classes: int) -> None:
    """One-hot targets too, whose cotangents mostly have one negative entry."""
    model = small_mlp("sigmoid", classes=classes, seed=seed)
    target = nn.functional.one_hot(torch.tensor([seed % classes]), classes).float()
    update = capture(model, picture((2, 4, 4), seed), target, "mse_loss")
    assert not invert(model, update).warnings


def test_noise_and_coarse_precision_leave_the_shape_undecided() -> None:
    model = small_mlp("sigmoid", seed=0)
    update = capture(model, picture((2, 4, 4), 0), torch.tensor([1]))
    declared = replace(update, loss=Loss("mse_loss"))
    assert invert(model, declared).warnings
    assert not invert(model, declared, noise=1e-3).warnings
    assert not invert(model, replace(declared, dtype=torch.bfloat16)).warnings
