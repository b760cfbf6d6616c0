"""Losses against autograd, and the targets read back from the cotangent."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rgap.update.losses import Loss

CROSS = "cross_entropy"
BINARY = "binary_cross_entropy_with_logits"

CASES = [
    *(
        Loss(CROSS, reduction, smoothing, kind)
        for reduction in ("mean", "sum")
        for smoothing in (0.0, 0.1)
        for kind in ("index", "probability")
    ),
    *(Loss(BINARY, r, targets=kind) for r in ("mean", "sum") for kind in ("index", "probability")),
    Loss("mse_loss", "mean"),
    Loss("mse_loss", "sum"),
]


def sample(
    loss: Loss, batch: int, classes: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random outputs [B, C] and admissible targets."""
    rng = torch.Generator().manual_seed(seed)
    outputs = 3.0 * torch.randn(batch, classes, generator=rng, dtype=dtype)
    if loss.name == CROSS and loss.targets == "index":
        return outputs, torch.randint(classes, (batch,), generator=rng)
    values = torch.rand(batch, classes, generator=rng, dtype=dtype)
    if loss.name == CROSS:
        return outputs, values / values.sum(dim=1, keepdim=True)
    return outputs, (values > 0.5).long() if loss.targets == "index" else values


@pytest.mark.parametrize("loss", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 5), classes=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_cotangent_and_its_derivative_are_autograds(
    loss: Loss, dtype: torch.dtype, batch: int, classes: int, seed: int
) -> None:
    outputs, targets = sample(loss, batch, classes, seed, dtype)
    loss.check_targets(outputs, targets)
    leaf = outputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, targets), leaf)
    # A few roundings of numbers of size up to |outputs| ~ 10 for the squared error.
    tolerance = 50 * torch.finfo(dtype).eps
    assert torch.allclose(loss.cotangent(outputs, targets), expected, rtol=0, atol=tolerance)

    direction = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    product = torch.func.jvp(lambda z: loss.cotangent(z, targets), (outputs,), (direction,))[1]
    assert torch.allclose(loss.cotangent_jvp(outputs, direction), product, rtol=0, atol=tolerance)


@pytest.mark.parametrize("loss", CASES, ids=str)
@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 5), classes=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_targets_come_back(loss: Loss, batch: int, classes: int, seed: int) -> None:
    outputs, targets = sample(loss, batch, classes, seed)
    dense = loss.targets_from(outputs, loss.cotangent(outputs, targets))
    assert torch.allclose(dense, loss.dense(targets, outputs), rtol=0, atol=1e-13)
    found, distance = loss.read(dense)
    assert distance < 1e-13
    assert torch.allclose(found.double(), targets.double(), rtol=0, atol=1e-13)
    # What was read can be put in again.
    assert torch.allclose(loss(outputs, found), loss(outputs, targets), rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_value_is_torchs_in_the_outputs_dtype(reduction: str) -> None:
    outputs, targets = sample(Loss(), 3, 4, 0, torch.float32)
    ours = Loss(CROSS, reduction, 0.2)(outputs, targets)
    assert ours.dtype == torch.float32
    assert torch.equal(
        ours, F.cross_entropy(outputs, targets, reduction=reduction, label_smoothing=0.2)
    )


def test_dense_targets_replay_an_index_loss() -> None:
    loss = Loss(CROSS, label_smoothing=0.1)
    outputs, targets = sample(loss, 3, 4, 1)
    dense = loss.dense(targets, outputs)
    assert torch.allclose(loss(outputs, dense), loss(outputs, targets), rtol=1e-14)
    assert torch.equal(loss.cotangent(outputs, dense), loss.cotangent(outputs, targets))


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_a_single_logit_takes_labels_per_sample(shape: tuple[int, ...]) -> None:
    loss = Loss(BINARY)
    outputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0])
    loss.check_targets(outputs, labels)
    (expected,) = torch.autograd.grad(loss(outputs, labels), outputs)
    k = loss.cotangent(outputs.detach(), labels)
    assert k.shape == outputs.shape and torch.allclose(k, expected)
    found, distance = loss.read(loss.targets_from(outputs.detach(), k))
    assert found.shape == (4,) and torch.equal(found, labels) and distance < 1e-14


def test_saturated_binary_curvature_keeps_its_digits() -> None:
    outputs = torch.tensor([[40.0]], dtype=torch.float64)
    curvature = Loss(BINARY).cotangent_jvp(outputs, torch.ones_like(outputs))
    assert curvature.item() == pytest.approx(math.exp(-40.0), rel=1e-12)  # 1 - sigmoid gives 0


def test_read_measures_the_distance() -> None:
    dense = torch.tensor([[0.9, 0.1, 0.0]])
    assert Loss().read(dense)[1] == pytest.approx(0.1)
    assert Loss().read(dense)[0].tolist() == [0]
    soft = Loss(CROSS, targets="probability")
    assert soft.read(torch.tensor([[1.25, -0.25]]))[1] == pytest.approx(0.25)
    assert Loss("mse_loss").read(torch.tensor([[5.0]]))[1] == 0.0
    for loss in (Loss(), soft, Loss("mse_loss"), Loss(BINARY)):
        assert loss.read(torch.tensor([[float("nan"), 1.0]]))[1] == math.inf


def test_admissible_targets() -> None:
    assert Loss().admissible(3) == [0, 1, 2]
    assert Loss(BINARY).admissible(1) == [0, 1]
    assert Loss(BINARY).admissible(2) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert Loss("mse_loss").admissible(3) is None
    assert Loss(CROSS, targets="probability").admissible(3) is None
    with pytest.raises(ValueError, match="too many to list"):
        Loss(BINARY).admissible(40)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        ("cross-entropy", "write loss='cross_entropy'"),
        ("BCE", "write loss='binary_cross_entropy_with_logits'"),
        ("triplet", "expected one of 'cross_entropy'"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0])), "positive numbers"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(3)), "weighs places"),
        (nn.BCELoss(weight=torch.ones(3)), "weighs places"),
        (nn.NLLLoss(ignore_index=2), "ignore_index"),
        (nn.CrossEntropyLoss(ignore_index=0), "ignore_index"),
        (nn.CrossEntropyLoss(reduction="none"), "expected 'mean' or 'sum'"),
    ],
)
def test_losses_that_are_refused(loss: str | nn.Module, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Loss.of(loss)


def test_losses_that_are_accepted() -> None:
    assert Loss.of(CROSS) == Loss()
    assert Loss.of(Loss(BINARY)) == Loss(BINARY)
    torchs = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")
    assert Loss.of(torchs) == Loss(CROSS, "sum", 0.1)
    assert Loss.of(nn.MSELoss()) == Loss("mse_loss", targets="value")
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]), label_smoothing=0.1)
    assert Loss.of(weighted) == Loss(CROSS, label_smoothing=0.1, weight=(1.0, 2.0))
    assert Loss.of(nn.NLLLoss(torch.tensor([1.0, 3.0]))).weight == (1.0, 3.0)
    assert Loss.of(nn.BCELoss(reduction="sum")) == Loss("binary_cross_entropy", "sum")
    assert Loss.of(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))).pos_weight == (3.0,)
    assert not Loss.of(None).known and not Loss.of("unknown").equations
    assert Loss.of(F.huber_loss).own and Loss.of(nn.HuberLoss()).name == "HuberLoss"
    with pytest.raises(TypeError, match="expected one of"):
        Loss.of(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"name": BINARY, "label_smoothing": 0.1}, "has none in PyTorch"),
        ({"targets": "value"}, "takes 'index' or 'probability'"),
        ({"name": "mse_loss", "targets": "probability"}, "takes 'value'"),
        ({"name": "mse_loss", "weight": [1.0]}, "has none"),
        ({"gamma": 2.0}, "option of focal_loss"),
        ({"name": "focal_loss", "gamma": -1.0}, "at least 0"),
        ({"name": "sigmoid_focal_loss", "alpha": 1.5}, r"in \(0, 1\)"),
        ({"name": "unknown", "weight": [1.0]}, "unknown loss has no options"),
        ({"name": "mine", "function": F.huber_loss, "label_smoothing": 0.1}, "into the function"),
        ({"weight": [1.0, -1.0]}, "positive numbers"),
    ],
)
def test_options_that_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Loss(**options)  # type: ignore[arg-type]


OUTPUTS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("loss", "targets", "error", "match"),
    [
        (Loss(), torch.tensor([0, 3]), ValueError, "class indices 0 to 2"),
        (Loss(), torch.tensor([0, -100]), ValueError, "ignore_index"),
        (Loss(), torch.tensor([0]), ValueError, r"expects shape \(2,\)"),
        (Loss(), torch.eye(3)[:2].long(), ValueError, r"argmax\(dim=1\)"),
        (Loss(), torch.eye(3)[:2], TypeError, "targets='probability'"),
        (Loss(CROSS, targets="probability"), torch.tensor([0, 1]), TypeError, "targets='index'"),
        (Loss(CROSS, targets="probability"), torch.ones(2, 3), ValueError, "sum to 1"),
        (Loss(BINARY), torch.full((2, 3), 0.5), ValueError, "labels 0 and 1"),
        (Loss(BINARY), torch.tensor([0, 1]), ValueError, "expects shape"),
        (Loss(BINARY, targets="probability"), 2 * torch.ones(2, 3), ValueError, r"in \[0, 1\]"),
        (Loss("mse_loss"), torch.zeros(2, 3, dtype=torch.long), TypeError, r"targets.float\(\)"),
        (Loss("mse_loss"), torch.full((2, 3), float("nan")), ValueError, "NaN"),
        (Loss("mse_loss"), torch.zeros(2, 3, dtype=torch.cfloat), TypeError, "real"),
    ],
)
def test_targets_that_are_refused(
    loss: Loss, targets: Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        loss.check_targets(OUTPUTS, targets)


def test_outputs_that_are_refused() -> None:
    with pytest.raises(ValueError, match="for a single logit"):
        Loss()(torch.zeros(2, 1), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="got a scalar"):
        Loss("mse_loss").dense(torch.tensor(0.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match="direction"):
        Loss().cotangent_jvp(OUTPUTS, torch.zeros(3))
    with pytest.raises(ValueError, match="cotangent"):
        Loss().targets_from(OUTPUTS, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_targets_in_half_precision_are_admissible(dtype: torch.dtype) -> None:
    soft = torch.softmax(torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), dim=1)
    Loss(CROSS, targets="probability").check_targets(torch.zeros(4, 10), soft.to(dtype))


W = (0.5, 1.0, 2.0, 4.0)
DECLARED = [
    *(
        Loss(CROSS, reduction, smoothing, kind, weight=W)
        for reduction in ("mean", "sum")
        for smoothing in (0.0, 0.1)
        for kind in ("index", "probability")
    ),
    *(Loss("nll_loss", reduction, weight=w) for reduction in ("mean", "sum") for w in (None, W)),
    *(
        Loss(BINARY, reduction, targets=kind, pos_weight=(3.0, 0.5, 1.0, 2.0))
        for reduction in ("mean", "sum")
        for kind in ("index", "probability")
    ),
    *(Loss("binary_cross_entropy", targets=kind) for kind in ("index", "probability")),
    *(Loss("focal_loss", r, gamma=g, weight=w) for r in ("mean", "sum")
      for g, w in ((None, None), (0.5, W), (1.0, W), (0.0, None), (3.0, W))),
    *(Loss("sigmoid_focal_loss", gamma=g, alpha=a) for g, a in ((2.0, 0.25), (0.5, None))),
]  # fmt: skip


def drawn(loss: Loss, batch: int, seed: int, space: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Outputs [B, 4, *space] that the loss takes, and admissible targets."""
    rng = torch.Generator().manual_seed(seed)
    z = 2.0 * torch.randn(batch, 4, *space, generator=rng, dtype=torch.float64)
    if loss.name == "nll_loss":
        z = torch.log_softmax(z, 1)
    if loss.name == "binary_cross_entropy":
        z = torch.sigmoid(z)
    values = torch.rand(batch, 4, *space, generator=rng, dtype=torch.float64)
    if loss.name in (CROSS, "nll_loss", "focal_loss"):
        if loss.targets == "index":
            return z, torch.randint(4, (batch, *space), generator=rng)
        return z, values / values.sum(1, keepdim=True)
    return z, (values > 0.5).double() if loss.targets == "index" else values


def torchs(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """The loss by PyTorch's own functions, or by its definition where it has none."""
    w = None if loss.weight is None else z.new_tensor(loss.weight)
    if loss.name == CROSS:
        return F.cross_entropy(
            z, y, w, reduction=loss.reduction, label_smoothing=loss.label_smoothing
        )
    if loss.name == "nll_loss":
        return F.nll_loss(z, y, w, reduction=loss.reduction)
    if loss.name == BINARY:
        positive = z.new_tensor(loss.pos_weight).reshape(-1, *[1] * (z.ndim - 2))
        return F.binary_cross_entropy_with_logits(
            z, y, pos_weight=positive, reduction=loss.reduction
        )
    if loss.name == "binary_cross_entropy":
        return F.binary_cross_entropy(z, y, reduction=loss.reduction)
    gamma = 2.0 if loss.gamma is None else loss.gamma
    if loss.name == "focal_loss":
        q = torch.softmax(z, 1).gather(1, y[:, None])[:, 0]
        a = 1.0 if w is None else w[y]
        each = -a * (1 - q) ** gamma * q.log()
    else:
        p = torch.sigmoid(z)
        r = p * y + (1 - p) * (1 - y)
        a = 1.0 if loss.alpha is None else loss.alpha * y + (1 - loss.alpha) * (1 - y)
        each = -a * (1 - r) ** gamma * r.log()
    return each.mean() if loss.reduction == "mean" else each.sum()


@pytest.mark.parametrize("loss", DECLARED, ids=str)
@pytest.mark.parametrize("space", [(), (2, 3)])
def test_declared_losses_are_torchs_and_their_derivatives_autograds(
    loss: Loss, space: tuple[int, ...]
) -> None:
    for seed, batch in ((0, 1), (1, 3)):
        z, y = drawn(loss, batch, seed, space)
        loss.check_targets(z, y)
        leaf = z.clone().requires_grad_()
        value = torchs(loss, leaf, y)
        assert torch.allclose(loss(z, y), value, rtol=1e-12)
        (expected,) = torch.autograd.grad(value, leaf)
        assert torch.allclose(loss.cotangent(z, y), expected, rtol=1e-10, atol=1e-13)
        v = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
        product = torch.func.jvp(lambda z, y=y: loss.cotangent(z, y), (z,), (v,))[1]
        assert torch.allclose(loss.cotangent_jvp(z, v, y), product, rtol=1e-9, atol=1e-12)
        with pytest.raises(ValueError, match="curvature"):
            loss.cotangent_jvp(z, v)


@pytest.mark.parametrize("loss", DECLARED, ids=str)
def test_declared_targets_come_back(loss: Loss) -> None:
    for seed, batch in ((0, 1), (1, 3), (2, 5)):
        z, y = drawn(loss, batch, seed)
        smooth = bool(loss.label_smoothing) and loss.weight is not None
        if smooth and batch > 1 and loss.reduction == "mean" and loss.targets == "index":
            continue  # the divisor mixes the samples: every class of one sample is tried instead
        dense = loss.targets_from(z, loss.cotangent(z, y))
        assert torch.allclose(dense, loss.dense(y, z), rtol=0, atol=1e-9)
        found, distance = loss.read(dense)
        assert distance < 1e-9
        assert torch.allclose(found.double(), y.double(), rtol=0, atol=1e-9)


def test_cross_entropy_over_pixels_has_one_target_a_pixel() -> None:
    loss = Loss()
    z, y = drawn(loss, 2, 0, (3, 5))
    loss.check_targets(z, y)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, y), leaf)
    k = loss.cotangent(z, y)
    assert torch.allclose(k, expected, rtol=0, atol=1e-15)
    found, distance = loss.read(loss.targets_from(z, k))
    assert torch.equal(found, y) and distance < 1e-12
    with pytest.raises(ValueError, match=r"expects shape \(2, 3, 5\)"):
        loss.check_targets(z, y[:, 0])


def test_a_loss_of_ones_own_is_differentiated_by_autograd() -> None:
    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().pow(1.5).mean()

    loss = Loss.of(own)
    z, y = torch.randn(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(own(leaf, y), leaf)
    assert loss.name == "own" and torch.equal(loss.cotangent(z, y), expected)
    v = torch.randn_like(z)
    product = torch.autograd.functional.vhp(lambda z: own(z, y), z, v)[1]
    assert torch.allclose(loss.cotangent_jvp(z, v, y), product)
    with pytest.raises(ValueError, match="gradient of a scalar"):
        Loss.of(lambda z, y: z)(z, y)
    with pytest.raises(ValueError, match="no formula"):
        loss.targets_from(z, z)


def test_weights_of_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 numbers"):
        Loss(weight=[1.0, 2.0]).check_targets(OUTPUTS, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="for logits write"):
        Loss("binary_cross_entropy").check_targets(2 + OUTPUTS, torch.zeros(2, 3))
