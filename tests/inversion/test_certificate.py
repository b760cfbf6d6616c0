"""EXACT is a certificate: judged on the true inputs, over random networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

import pytest
import torch
from cases import picture, small_conv, small_mlp
from torch import Tensor, nn

import rgap
from rgap import Status, capture, invert

BINARY = "binary_cross_entropy_with_logits"


@dataclass(frozen=True)
class Case:
    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: str
    dtype: torch.dtype
    determined: bool  # well-conditioned and determined by construction


def draw_case(seed: int) -> Case:
    """Networks × activations × weights × precision, one by one from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: list[object]) -> object:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    activation = str(
        pick(
            [
                "sigmoid",
                "tanh",
                "leaky_relu",
                "elu",
                "softplus",
                "selu",
                "softsign",
                "prelu",
                "relu",
            ]
        )
    )
    dtype = pick([torch.float32, torch.float64])
    kind = pick(["conv", "conv", "conv", "deficient", "mlp", "binary"])
    classes = int(pick([3, 5, 10]))
    label = torch.tensor([int(torch.randint(classes, (1,), generator=generator))])
    if kind == "mlp":
        bias = bool(pick([True, False]))
        model = small_mlp(activation, classes=classes, seed=seed, bias=bias)
        x, loss, target = picture((32,), seed).reshape(1, 2, 4, 4), "cross_entropy", label
        determined = bias
    elif kind == "binary":
        model = small_mlp(activation, classes=1, seed=seed, bias=False)
        x, loss = picture((32,), seed).reshape(1, 2, 4, 4), BINARY
        target, determined = torch.tensor([float(label % 2)]), False
    else:
        channels = 2 if kind == "deficient" else int(pick([6, 8]))
        stride = 2 if kind == "deficient" else 1
        scale = float(pick([0.0, 0.3]))
        norm = bool(pick([False, False, True]))
        model = small_conv(
            activation,
            channels=channels,
            classes=classes,
            stride=stride,
            seed=seed,
            scale=scale,
            norm=norm and not scale,
        )
        x, loss, target = picture((2, 8, 8), seed), "cross_entropy", label
        determined = kind == "conv" and activation != "relu" and scale == 0.0
    return Case(f"{kind}-{activation}-{dtype}-{seed}", model, x, target, loss, dtype, determined)


def test_exact_is_never_wrong_and_not_withheld() -> None:
    outcomes: dict[str, int] = {}
    determined = certified = 0
    ratios = []
    for seed in range(48):
        case = draw_case(seed)
        update = capture(case.model, case.inputs, case.targets, case.loss, dtype=case.dtype)
        recovery = invert(case.model, update, seed=seed)
        outcomes[recovery.status.name] = outcomes.get(recovery.status.name, 0) + 1
        assert recovery.status is not Status.INCONSISTENT, (case.name, recovery.reason)
        determined += case.determined
        if recovery.status is Status.EXACT:
            assert recovery.inputs is not None
            assert recovery.error_bound is not None
            error = float((recovery.inputs - case.inputs).abs().max())
            assert error <= recovery.error_bound, (case.name, error, recovery.error_bound)
            assert recovery.labels.flatten().tolist() == case.targets.tolist(), case.name
            certified += case.determined
            ratios.append(recovery.error_bound / max(error, 1e-300))
        elif recovery.status is Status.AMBIGUOUS:
            errors = [float((c.inputs - case.inputs).abs().max()) for c in recovery.candidates]
            assert min(errors) < 1e-2, (case.name, errors)
        else:
            assert recovery.inputs is None, case.name
    assert outcomes["EXACT"] > 14, outcomes
    assert outcomes["UNDERDETERMINED"] > 4, outcomes
    assert certified >= 0.9 * determined, (certified, determined, outcomes)
    assert median(ratios) < 100


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_odd_network_with_one_logit_is_ambiguous(label: float) -> None:
    model = small_mlp("tanh", classes=1, bias=False, seed=3)
    x = picture((32,), 4).reshape(1, 2, 4, 4)
    update = capture(model, x, torch.tensor([label]), BINARY, dtype=torch.float64)
    recovery = invert(model, update)
    assert recovery.status is Status.AMBIGUOUS
    assert recovery.inputs is not None
    found = sorted(
        (float((c.inputs - x).abs().max()), float((c.inputs + x).abs().max()), float(c.labels))
        for c in recovery.candidates
    )
    assert len(found) == 2
    assert found[0][0] < 1e-6
    assert found[0][2] == label
    assert found[1][1] < 1e-6
    assert found[1][2] == 1 - label
    assert "Candidate 1" in recovery.explain()


def test_another_models_update_is_inconsistent_and_names_the_layer() -> None:
    model, other = (small_conv("sigmoid", seed=s) for s in (0, 1))
    update = capture(other, picture((2, 8, 8), 0), torch.tensor([2]))
    recovery = invert(model, update)
    assert recovery.status is Status.INCONSISTENT
    assert recovery.inputs is None
    assert any(name in recovery.reason for name in ("'fc'", "conv0", "conv1"))


def test_stated_noise_widens_the_bound_instead_of_refusing() -> None:
    model = small_conv("sigmoid", channels=8, seed=0)
    x = picture((2, 8, 8), 1)
    update = capture(model, x, torch.tensor([1]), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = 1e-9
    noisy = {
        n: g + noise * torch.randn(g.shape, generator=generator, dtype=g.dtype)
        for n, g in update.gradients.items()
    }
    from dataclasses import replace

    recovery = invert(model, replace(update, gradients=noisy), noise=noise)
    assert recovery.status is Status.EXACT, recovery.reason
    error = float((recovery.inputs - x).abs().max())
    assert 1e-9 < error < recovery.error_bound


@pytest.mark.cases(20)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1e3, 1e4, 1e12, 1e25])
@pytest.mark.parametrize("classes", [2, 6, 20])
def test_batches_that_are_listed_send_the_update(
    classes: int, factor: float, dtype: torch.dtype, smoothing: float
) -> None:
    """Saturated logits round to any size of the features: their errors are as large as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, classes, bias=False)).to(dtype)
    loss, x = rgap.Loss(label_smoothing=smoothing), torch.rand(1, 12, dtype=dtype)
    update = rgap.capture(model, x, torch.tensor([1]), loss, value_range=None)
    gradients = {name: factor * g for name, g in update.gradients.items()}
    recovery = rgap.invert(model, replace(update, gradients=gradients))
    assert factor == 1.0 or not recovery.certified
    assert (recovery.status is Status.AMBIGUOUS) == bool(recovery.candidates)
    for one in recovery.candidates:
        assert one.inputs is not None
        sent = rgap.capture(model, one.inputs.to(dtype), one.labels, loss, value_range=None)
        for name, wanted in gradients.items():
            gap = float((sent.gradients[name] - wanted).norm() / wanted.norm())
            assert gap <= 1e3 * torch.finfo(dtype).eps, (gap, recovery.reason)


def test_a_large_multiple_of_a_smoothed_update_has_no_batches_to_list() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False)).double()
    loss, x = rgap.Loss(label_smoothing=0.1), torch.rand(1, 12, dtype=torch.float64)
    update = rgap.capture(model, x, torch.tensor([2]), loss, value_range=None)
    gradients = {name: 1e12 * g for name, g in update.gradients.items()}
    recovery = rgap.invert(model, replace(update, gradients=gradients))
    assert recovery.status is Status.UNDERDETERMINED, recovery.reason
    assert recovery.inputs is None and not recovery.candidates
