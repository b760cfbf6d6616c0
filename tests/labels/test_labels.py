"""iDLG on real networks: features of one sign and of both, with and without a bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.labels import idlg
from rgap.update.capture import capture
from rgap.update.losses import Loss


def network(activation: type[nn.Module], classes: int, bias: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 9), activation(), nn.Linear(9, classes, bias=bias)
    ).eval()


def head_gradient(
    activation: type[nn.Module],
    label: int,
    *,
    classes: int,
    bias: bool,
    seed: int,
    dtype: torch.dtype | None = None,
    batch: int = 1,
    **loss: object,
) -> tuple[Tensor, Tensor | None]:
    model = network(activation, classes, bias, seed)
    inputs = torch.rand(batch, 3, 2, 2, generator=torch.Generator().manual_seed(seed + 100))
    name = "cross_entropy" if classes > 1 else "binary_cross_entropy_with_logits"
    targets = torch.full((batch,), label)
    update = capture(model, inputs, targets, Loss(name, **loss), dtype=dtype)  # type: ignore[arg-type]
    return update.gradients["3.weight"], update.gradients.get("3.bias")


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_label_is_found(activation: type[nn.Module], bias: bool, dtype: torch.dtype) -> None:
    for seed in range(5):
        for label in range(4):
            weight, b = head_gradient(
                activation, label, classes=4, bias=bias, seed=seed, dtype=dtype
            )
            found = idlg(weight, b)
            assert found.labels is not None and found.labels.tolist() == [label]
            assert found.counts is not None and found.counts.tolist() == [
                int(c == label) for c in range(4)
            ]
            assert found.least > 0.999 and found.reason == ""


def test_features_of_both_signs_defeat_row_signs_but_not_this_rule() -> None:
    weight, _ = head_gradient(nn.Tanh, 2, classes=5, bias=False, seed=3)
    assert bool(((weight > 0).any(1) & (weight < 0).any(1)).all())  # no row has one sign
    found = idlg(weight).labels
    assert found is not None and found.tolist() == [2]


def test_two_classes_need_a_bias() -> None:
    for label in (0, 1):
        weight, bias = head_gradient(nn.Tanh, label, classes=2, bias=True, seed=1)
        with_bias, without = idlg(weight, bias), idlg(weight)
        assert with_bias.labels is not None and with_bias.labels.tolist() == [label]
        assert without.labels is None and without.least == 0.0
        assert "sign of the features" in without.reason


def test_single_logit() -> None:
    for label in (0, 1):
        weight, bias = head_gradient(nn.Tanh, label, classes=1, bias=True, seed=1)
        found = idlg(weight, bias)
        assert found.labels is not None and found.labels.tolist() == [label]
        assert idlg(weight).labels is None and "single logit" in idlg(weight).reason


def test_more_than_one_sample_is_refused_not_answered() -> None:
    for bias in (True, False):
        weight, b = head_gradient(nn.Tanh, 1, classes=4, bias=bias, seed=2, batch=2)
        found = idlg(weight, b)
        assert found.labels is None and "rank above one" in found.reason


def test_label_smoothing_does_not_turn_the_label() -> None:
    for seed in range(10):
        weight, b = head_gradient(nn.ReLU, 1, classes=4, bias=True, seed=seed, label_smoothing=0.3)
        assert idlg(weight, b).labels.tolist() == [1]


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_underflowed_label_entry_is_flagged(scale: float) -> None:
    features = scale * torch.tensor([1.0, -2.0, 0.5])
    cotangent = torch.tensor([1e-9, 0.0, 3e-9])  # p_1 - 1 rounded to zero in float32
    for bias in (cotangent, None):
        found = idlg(torch.outer(cotangent, features), bias)
        assert found.labels is not None and found.labels.tolist() == [1]
        assert "underflowed" in found.reason and found.least < 1e-12


@pytest.mark.parametrize(
    ("cotangent", "with_bias", "label"),
    [
        ([0.0, 0.0, 0.0], True, None),
        ([0.0, 1e-9, 0.0], True, None),  # either zero may be the label's
        ([-1e-9, 0.0, 0.0], True, 0),
        ([-1e-9, 0.0, 0.0], False, None),  # the label's, or the only other one left
        ([-1.0, 1.0, 0.0], False, None),
        ([-1.0, 1.0, 0.0], True, 0),
        ([-1.0, 0.4, 0.6, 0.0], False, 0),
        ([-1.0, -0.5, 1.0, 0.5], True, None),
    ],
)
def test_underflow_table(cotangent: list[float], with_bias: bool, label: int | None) -> None:
    k = torch.tensor(cotangent)
    found = idlg(torch.outer(k, torch.tensor([0.3, -0.8])), k if with_bias else None)
    assert (found.labels is None) == (label is None)
    if found.labels is not None:
        assert found.labels.tolist() == [label]
    assert found.labels is not None or found.reason


def test_subnormal_rows_keep_their_sign() -> None:
    k = torch.tensor([-1.0, 1.0, 1e-44, 3e-45])
    found = idlg(torch.outer(k, torch.tensor([0.9, -0.7])))
    assert found.labels is not None and found.labels.tolist() == [0]


def test_bad_shapes_and_values() -> None:
    with pytest.raises(ValueError, match="weight_gradient: expected the head's"):
        idlg(torch.ones(3))
    with pytest.raises(ValueError, match=r"bias_gradient: expected \[3\]"):
        idlg(torch.ones(3, 2), torch.ones(2))
    with pytest.raises(ValueError, match="NaN"):
        idlg(torch.full((3, 2), float("nan")))
    with pytest.raises(ValueError, match="floating"):
        idlg(torch.ones(3, 2, dtype=torch.long))


def test_a_model_in_the_place_of_its_gradient_is_refused() -> None:
    model = nn.Linear(3, 4)
    with pytest.raises(TypeError, match=r"got Linear; write update\.gradients"):
        idlg(model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bias_gradient: expected a tensor, got str"):
        idlg(torch.ones(4, 3), "bias")  # type: ignore[arg-type]


def test_outputs_over_one_place_are_refused_in_words():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 20, 4), nn.ReLU(), nn.Conv2d(20, 3, 1)).double().eval()
    x, y = torch.rand(2, 1, 4, 4).double(), torch.zeros(2, 1, 1, dtype=torch.long)
    update = rgap.capture(network, x, y)
    assert rgap.check(network, update).findings == ()
    with pytest.raises(ValueError, match=r"expected logits \[B, C\], got outputs \[B, 3, 1, 1\]"):
        rgap.labels.estimate(network, update)
    flat = nn.Sequential(*network, nn.Flatten()).eval()
    update = rgap.capture(flat, x, torch.tensor([2, 0]))
    assert rgap.labels.estimate(flat, update).labels.tolist() == [0, 2]
