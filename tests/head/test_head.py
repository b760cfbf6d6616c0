"""Head equations of one sample: every root there is, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import picture, small_mlp
from scipy.optimize import brentq
from torch import Tensor, nn

from rgap import Loss, Status, capture, invert
from rgap.head.features import HeadCandidate, HeadFailure, features_from_bias, solve_head
from rgap.head.scale import _zeros
from rgap.network.chain import Stage, parse
from rgap.precision import Precision

BINARY = "binary_cross_entropy_with_logits"
LEAST = -0.2784645427610738  # minimum of z σ(z)


def stage_of(weight: Tensor, bias: Tensor | None = None) -> Stage:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return parse(layer, (weight.shape[1],)).stages[-1]


def sent(stage: Stage, x: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """∂L/∂W of one sample with features x [n], by the closed form."""
    k = loss.cotangent(stage.affine.forward(x[None]), target)
    return torch.outer(k[0], x)


def found_by(stage: Stage, gradient: Tensor, loss: Loss, **options: Any) -> list[HeadCandidate]:
    precision = Precision(options.get("dtype", torch.float64))
    found = solve_head(stage, gradient, None, loss, precision)
    assert not isinstance(found, HeadFailure), found.reason
    return found


def draw(seed: int, outputs: int, width: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
    x = torch.randn(width, generator=generator, dtype=torch.float64)
    return weight, x


# --- a single logit without a bias ----------------------------------------------------------


def scan(product: float) -> list[tuple[float, int]]:
    """All (z, y) with (σ(z) − y) z = ⟨W, G⟩, by sign changes on a dense grid of logits."""
    roots = []
    for label in (0, 1):

        def gap(z: float, y: int = label) -> float:
            return float((torch.sigmoid(torch.tensor(z).double()) - y) * z) - product

        grid = torch.cat([-torch.logspace(2.3, -9, 40_000), torch.logspace(-9, 2.3, 40_000)])
        grid = grid.double()
        values = (torch.sigmoid(grid) - label) * grid - product
        for i in torch.nonzero(values[:-1] * values[1:] < 0).flatten().tolist():
            roots.append((brentq(gap, float(grid[i]), float(grid[i + 1]), xtol=1e-14), label))
    return sorted(roots)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("logit", [-20.0, -4.0, -1.5, -1.2, -0.4, -0.01, 0.02, 0.7, 1.6, 5.0, 25.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_single_logit_has_the_roots_of_a_scan(label: float, logit: float, size: float) -> None:
    weight, x = draw(3, 1)
    x = x * logit / (weight @ x)  # the logit as wanted
    weight, x = weight / size, x * size
    stage, loss = stage_of(weight), Loss(BINARY)
    gradient = sent(stage, x, torch.tensor([label]), loss)
    product = float((weight * gradient).sum())
    found = found_by(stage, gradient, loss)
    logits = sorted((float((weight @ c.features.value[0])[0]), int(c.labels)) for c in found)
    wanted = scan(product)
    assert len(logits) == len(wanted), (logits, wanted)
    for (z, y), (root, expected) in zip(logits, wanted, strict=True):
        assert abs(z - root) < 1e-6 * max(1.0, abs(root))
        assert y == expected
    assert len(wanted) == (2 if product > 0 else 4)
    assert product > LEAST
    best = min(float((c.features.value[0] - x).abs().max()) for c in found)
    assert best < 1e-6 * float(x.abs().max()), "the truth is among them"
    for c in found:  # every candidate sends the same gradient
        again = sent(stage, c.features.value[0], c.labels.double().reshape(1), loss)
        assert torch.allclose(again, gradient, rtol=1e-6, atol=1e-12 * float(gradient.abs().max()))
        assert c.admissible


def test_at_the_minimum_two_roots_meet() -> None:
    """⟨W, G⟩ = min z σ(z): one double root for each label; just above it there are two."""
    weight, x = draw(3, 1)
    loss = Loss(BINARY)
    for offset, count in ((1e-3, 4), (1e-6, 4)):
        logit = brentq(
            lambda z, want=LEAST + offset: (
                float(torch.sigmoid(torch.tensor(z).double())) * z - want
            ),
            -1.2784645,
            -0.1,
        )
        stage = stage_of(weight)
        features = x * logit / (weight @ x)
        gradient = sent(stage, features, torch.tensor([0.0]), loss)
        assert len(found_by(stage, gradient, loss)) == count


def test_no_gradient_is_below_the_minimum() -> None:
    weight, _ = draw(3, 1)
    found = solve_head(
        stage_of(weight),
        weight * (LEAST - 0.01) / weight.square().sum(),
        None,
        Loss(BINARY),
        Precision(torch.float64),
    )
    assert isinstance(found, HeadFailure)
    assert not found.consistent
    assert BINARY in found.reason


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("angle", [0.0, 1e-13, 1e-10])
def test_weights_that_hardly_see_the_features(outputs: int, angle: float) -> None:
    """A head of zeros, or almost orthogonal to the features: logits far below the scale of x."""
    weight, x = draw(5, outputs)
    weight = angle * weight
    loss = Loss(BINARY) if outputs == 1 else Loss()
    target = torch.tensor([1.0]) if outputs == 1 else torch.tensor([2])
    stage = stage_of(weight)
    gradient = sent(stage, x, target, loss)
    found = found_by(stage, gradient, loss)
    assert min(float((c.features.value[0] - x).abs().max()) for c in found) < 1e-9
    if angle == 0.0:
        assert len(found) == (2 if outputs == 1 else 1)


# --- several classes without a bias ---------------------------------------------------------


@pytest.mark.cases(24)
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 1e2])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_without_a_bias_in_every_scale(
    classes: int, size: float, positive: bool, dtype: torch.dtype
) -> None:
    """The scale of the features, with the weights scaled against them and without."""
    for seed in range(4):
        weight, x = draw(seed, classes)
        x = size * (x.abs() if positive else x)
        for factor in (1.0, 1.0 / size):
            stage, label = stage_of(weight * factor * 0.3), seed % classes
            gradient = sent(stage, x, torch.tensor([label]), Loss())
            gradient = gradient.to(dtype).double()
            if float(gradient.norm()) < 1e-4 * float(x.norm()):
                continue  # the label's probability is nearly 1: see the saturated cases
            found = found_by(stage, gradient, Loss(), dtype=dtype)
            errors = [
                float((c.features.value[0] - x).norm() / x.norm())
                for c in found
                if int(c.labels) == label
            ]
            assert min(errors) < (1e-2 if dtype == torch.float32 else 1e-9)
            for c in found:
                again = sent(stage, c.features.value[0], c.labels, Loss())
                assert float((again - gradient).norm() / gradient.norm()) < 1e-3
                assert c.admissible


def test_the_sign_of_the_features_is_told_by_the_only_negative_row() -> None:
    weight, x = draw(1, 6)
    stage = stage_of(weight)
    for features in (x, -x, x.abs(), -x.abs()):
        for label in range(6):
            gradient = sent(stage, features, torch.tensor([label]), Loss())
            (candidate,) = found_by(stage, gradient, Loss())
            assert int(candidate.labels) == label
            assert torch.allclose(candidate.features.value[0], features, rtol=1e-9)
            assert torch.allclose(
                torch.outer(candidate.cotangent.value[0], features), gradient, rtol=1e-9
            )
            assert candidate.misfit < 1e-12
            assert candidate.uncertainty < 1e-9


def test_two_classes_without_a_bias_leave_both_signs() -> None:
    weight, x = draw(2, 2)
    weight[1] = -weight[0]
    stage = stage_of(weight)
    gradient = sent(stage, x, torch.tensor([0]), Loss())
    found = found_by(stage, gradient, Loss())
    ends = sorted(
        (float((c.features.value[0] - x).norm()), float((c.features.value[0] + x).norm()))
        for c in found
    )
    assert ends[0][0] < 1e-9, "the truth"
    assert any(other < 1e-9 for _, other in ends), "and its mirror image with the other label"


def test_label_smoothing_tries_every_class() -> None:
    loss = Loss(label_smoothing=0.2)
    weight, x = draw(4, 5)
    stage = stage_of(weight)
    for label in range(5):
        found = found_by(stage, sent(stage, x, torch.tensor([label]), loss), loss)
        right = [c for c in found if int(c.labels) == label]
        assert min(float((c.features.value[0] - x).abs().max()) for c in right) < 1e-9


def test_predicted_error_is_the_error_made() -> None:
    """The ensemble of α u against what rounding the gradient to float32 does."""
    ratios = []
    for seed in range(20):
        weight, x = draw(seed, 5)
        stage = stage_of(weight)
        gradient = sent(stage, x, torch.tensor([seed % 5]), Loss()).float().double()
        found = found_by(stage, gradient, Loss(), dtype=torch.float32)
        best = min(found, key=lambda c: float((c.features.value[0] - x).norm()))
        made = float((best.features.value[0] - x).norm())
        ratios.append(made / float(best.features.std.norm()))
    assert 0.05 < sorted(ratios)[10] < 5
    assert max(ratios) < 20


# --- with a bias ----------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["positive", "negative", "both"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_with_a_bias_features_and_label_are_read_off(sign: str, size: float) -> None:
    weight, x = draw(6, 5)
    x = size * {"positive": x.abs(), "negative": -x.abs(), "both": x}[sign]
    weight, bias = weight / size, torch.linspace(-1, 1, 5).double()
    stage = stage_of(weight, bias)
    for label in range(5):
        k = Loss().cotangent(stage.affine.forward(x[None]), torch.tensor([label]))[0]
        found = solve_head(stage, torch.outer(k, x), k, Loss(), Precision(torch.float64))
        assert not isinstance(found, HeadFailure)
        (candidate,) = found
        assert torch.allclose(candidate.features.value[0], x, rtol=1e-12)
        assert torch.equal(candidate.cotangent.value[0], k)
        assert int(candidate.labels) == label
        assert candidate.admissible
        assert candidate.scale == 0.0


def test_errors_of_the_bias_attack_carry_the_noise_of_both_gradients() -> None:
    _, x = draw(7, 5)
    k = torch.tensor([0.1, 0.2, -0.6, 0.2, 0.1]).double()
    layer = stage_of(torch.zeros(5, 7).double(), torch.zeros(5).double()).affine
    noise, made = 1e-4, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        weight = torch.outer(k, x) + noise * torch.randn(5, 7, generator=generator).double()
        bias = k + noise * torch.randn(5, generator=generator).double()
        value, _ = features_from_bias(layer, weight, bias, Precision(torch.float64, noise))
        made.append(value.value[0] - x)
    predicted, cotangent = features_from_bias(
        layer, torch.outer(k, x), k, Precision(torch.float64, noise, samples=400)
    )
    observed = torch.stack(made).square().mean(0).sqrt()
    ratio = predicted.std[0] / observed
    assert 0.75 < float(ratio.min()) <= float(ratio.max()) < 1.33
    assert abs(float(cotangent.std.mean()) / noise - 1) < 0.1


def test_zero_gradients_are_no_contradiction() -> None:
    weight, _ = draw(0, 3)
    for bias in (None, torch.zeros(3, dtype=torch.float64)):
        failure = solve_head(
            stage_of(weight, bias), torch.zeros(3, 7).double(), bias, Loss(), Precision()
        )
        assert isinstance(failure, HeadFailure)
        assert failure.consistent
        assert "zero" in failure.reason
    mixed = solve_head(
        stage_of(weight, torch.zeros(3).double()),
        torch.ones(3, 7).double(),
        torch.zeros(3).double(),
        Loss(),
        Precision(),
    )
    assert isinstance(mixed, HeadFailure)
    assert not mixed.consistent


# --- saturated ------------------------------------------------------------------------------


@pytest.mark.cases(28)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("factor", [3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 10000.0])
def test_a_saturated_softmax_is_right_or_flagged(
    bias: bool, dtype: torch.dtype, right: bool, factor: float
) -> None:
    model = small_mlp("leaky_relu", bias=bias, seed=1)
    x = picture((2, 4, 4), 2)
    with torch.no_grad():
        model[-1].weight.mul_(factor)
        winner = int(model(x).argmax())
    label = torch.tensor([winner if right else (winner + 1) % 5])
    update = capture(model, x, label, dtype=dtype)
    if not any(g.any() for g in update.gradients.values()):
        with pytest.raises(ValueError, match=r"every tensor is zero.*float64 if it underflowed"):
            invert(model, update)
        return
    recovery = invert(model, update)
    if factor == 1e4 and right and bias:  # what is left of the cotangent is below 1e-300
        assert recovery.status is Status.UNDERDETERMINED and recovery.inputs is None
    else:
        assert recovery.exact, recovery.reason
        assert recovery.inputs is not None and recovery.error_bound is not None
        assert float((recovery.inputs - x).abs().max()) <= recovery.error_bound
        assert recovery.labels is not None
        assert recovery.labels.tolist() == label.tolist()
    head = update.gradients["head.weight"].abs().amax(1)
    if float(head.min()) < torch.finfo(dtype).smallest_normal:
        assert any("'head.weight' underflowed" in warning for warning in recovery.warnings)
    else:
        assert not recovery.warnings


def test_a_root_at_a_grid_point_whose_sign_rounds_is_returned() -> None:
    """Of many scales at once a sign may be another than of one."""

    def function(alpha: Tensor) -> Tensor:
        many = len(alpha) > 1
        return (alpha - 1.0) * (alpha - 3.0) + (1e-12 if many else -1e-12)

    roots = _zeros(function, torch.tensor([0.5, 1.0, 2.0, 3.5], dtype=torch.float64))
    assert len(roots) == 2
    assert all(min(abs(root - 1.0), abs(root - 3.0)) < 1e-6 for root in roots)
