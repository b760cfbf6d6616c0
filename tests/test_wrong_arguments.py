"""What a person writes by mistake is answered with what to write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rgap
from rgap.analysis import closed_form, layer_ranks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def sent(count: int = 1) -> rgap.Update:
    torch.manual_seed(1)
    return rgap.capture(network(), torch.rand(count, 6), torch.arange(count))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"input_shape": 6}, r"input_shape: .* got 6; write input_shape=\(3, 32, 32\)"),
        ({"value_range": 1}, r"value_range: .* got 1; write value_range=\(0.0, 1.0\)"),
        ({"noise": "a"}, r"noise: expected a number, got 'a'; write noise=0.01"),
        ({"noise": {"0.weight": 0.1}}, r"noise: .* write dataclasses.replace\(update, noise="),
        ({"batch_size": True}, "batch_size: expected whole numbers, got True; write batch_size=1"),
    ],
)
def test_arguments_of_invert(given: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        rgap.invert(network(), sent(), **given)
    if "value_range" not in given:
        with pytest.raises(TypeError, match=match):
            rgap.check(network(), sent(), **given)


CALLS = {
    "invert": lambda net, update: rgap.invert(net, update),
    "check": lambda net, update: rgap.check(net, update),
    "match": lambda net, update: rgap.match(net, update, iterations=1),
    "labels": lambda net, update: rgap.labels.estimate(net, update),
    "audit": lambda net, _: rgap.analysis.audit(net, (6,), (1,)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_weights_are_no_numbers(name: str, value: float) -> None:
    update, broken = sent(), network()
    with torch.no_grad():
        broken[2].weight[0, 0] = value
    match = r"model: '2.weight' has NaN or infinity in 1 of 24 entries; load the weights"
    with pytest.raises(ValueError, match=match):
        CALLS[name](broken, update)


@pytest.mark.parametrize("name", CALLS)
def test_a_model_whose_lazy_layers_have_no_shape(name: str) -> None:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)).eval()
    with pytest.raises(
        ValueError, match=r"'0.weight' of a lazy layer .* call model\(example\) once"
    ):
        CALLS[name](lazy, sent())


def test_a_progress_that_cannot_be_told() -> None:
    with pytest.raises(TypeError, match=r"progress: expected True, .* got 3; write progress=True"):
        rgap.invert(network(), sent(), progress=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "match"),
    [([0, 1], "write torch.tensor"), (torch.tensor([0]), "one target per sample")],
)
def test_labels_of_check_are_those_of_the_batch(labels: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        rgap.check(network(), sent(2), labels=labels)


def test_gradients_sample_by_sample_are_named() -> None:
    apart = {n: torch.stack([g, g]) for n, g in sent().gradients.items()}
    with pytest.raises(ValueError, match=r"grad_sample; write g\[0\] of each"):
        rgap.invert(network(), rgap.Update(apart, batch_size=2))


def test_copies_of_one_picture_are_not_called_different() -> None:
    reason = rgap.invert(network(), replace(sent(), batch_size=4)).reason
    assert "4 copies of one picture" in reason
    assert "1 different" not in reason


@pytest.mark.parametrize("count", [layer_ranks, closed_form])
def test_a_module_has_no_input_shape(count: Any) -> None:
    with pytest.raises(TypeError, match=r"got Conv2d; for a module write rgap.analysis"):
        count(nn.Conv2d(3, 4, 3), 2)


def test_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder, expected one safetensors file"):
        rgap.Update.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .* write os\.makedirs"):
        sent().save(tmp_path / "none" / "update.safetensors")
