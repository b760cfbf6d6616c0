"""Updates: what is accepted, and the words in which the rest is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases import normed
from torch import nn

from rgap.update.capture import capture
from rgap.update.losses import Loss
from rgap.update.update import Update


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return normed().eval()


INPUTS = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(7))
TARGETS = torch.tensor([1, 4])


@pytest.fixture
def update() -> Update:
    return capture(model(), INPUTS, TARGETS, share_labels=True)


# --- construction ---------------------------------------------------------------------------


def test_replace_works_and_validates(update: Update) -> None:
    changed = dataclasses.replace(update, batch_size=None, labels=None, loss="mse_loss")
    assert changed.batch_size is None and changed.loss == Loss("mse_loss")
    with pytest.raises(ValueError, match="batch_size"):
        dataclasses.replace(update, batch_size=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        update.batch_size = 3  # type: ignore[misc]


def test_tensors_are_copied_on_construction() -> None:
    gradient = torch.ones(3)
    update = Update({"w": gradient})
    gradient.zero_()
    assert update.gradients["w"].tolist() == [1, 1, 1]


def test_dtype_is_the_coarsest_of_the_gradients() -> None:
    mixed = {"a": torch.ones(1, dtype=torch.float64), "b": torch.ones(1, dtype=torch.bfloat16)}
    assert Update(mixed).dtype == torch.bfloat16
    assert Update(mixed, dtype=torch.float32).dtype == torch.float32


def test_sparse_gradients_become_dense() -> None:
    assert Update({"w": torch.eye(3).to_sparse()}).gradients["w"].layout == torch.strided


@pytest.mark.parametrize(
    ("gradients", "error", "match"),
    [
        ({"w": torch.tensor([1.0, float("nan")])}, ValueError, "'w' has NaN or infinity in 1 of 2"),
        ({"w": torch.tensor([float("inf")])}, ValueError, "'w' has NaN or infinity"),
        ({"w": torch.ones(2, dtype=torch.long)}, TypeError, "'w' has dtype torch.int64"),
        ({"w": torch.ones(2, dtype=torch.cfloat)}, TypeError, "'w' has dtype torch.complex64"),
        ({"w": None}, TypeError, "'w' is None"),
        ({"w": np.ones(2)}, TypeError, "'w' is a ndarray"),
        ({"w": torch.ones(2, device="meta")}, ValueError, "'w' is on the meta device"),
        ({}, ValueError, "at least one tensor"),
        ([torch.ones(2)], TypeError, "expected a dict"),
    ],
)
def test_bad_gradients_are_named(gradients: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Update(gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("batch_size", 0, ValueError),
        ("batch_size", -1, ValueError),
        ("batch_size", 1.5, TypeError),
        ("batch_size", True, TypeError),
        ("local_steps", 0, ValueError),
        ("input_shape", (3, 0), ValueError),
        ("value_range", (1.0, 0.0), ValueError),
        ("value_range", (0.0, float("inf")), ValueError),
        ("dtype", torch.int32, TypeError),
        ("dtype", "float32", TypeError),
        ("labels", [1], TypeError),
        ("labels", torch.tensor(1), ValueError),
        ("loss", "hinge", ValueError),
        ("buffers", {"v": torch.tensor([float("nan")])}, ValueError),
        ("buffers", {"v": 3}, TypeError),
    ],
)
def test_bad_fields_are_named(field: str, value: object, error: type[Exception]) -> None:
    name = {"labels": "labels", "buffers": "buffers: 'v'"}.get(field, field)
    with pytest.raises(error, match=name):
        Update({"w": torch.ones(1)}, **{field: value})  # type: ignore[arg-type]


def test_labels_must_fit_the_batch() -> None:
    with pytest.raises(ValueError, match="batch_size=3"):
        Update({"w": torch.ones(1)}, batch_size=3, labels=torch.tensor([1, 2]))


# --- check ----------------------------------------------------------------------------------


def test_check_accepts_its_own_model(update: Update) -> None:
    update.check(model())


def test_check_names_what_is_wrong(update: Update) -> None:
    g = update.gradients
    cases = [
        ({k: v for k, v in g.items() if k != "4.bias"}, "'4.bias' is missing"),
        ({**g, "extra": torch.ones(1)}, "'extra' is not a parameter"),
        (dict(reversed(g.items())), "place 0: expected '0.weight', got '4.bias'"),
        ({**g, "4.weight": g["4.weight"].T}, r"'4.weight' has shape \(16, 5\), expected \(5, 16\)"),
        ({k: torch.zeros_like(v) for k, v in g.items()}, "every tensor is zero, from '0.weight'"),
        (dict(zip("012345", g.values(), strict=True)), "from_breaching.*model=model"),
    ]
    for gradients, match in cases:
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(update, gradients=gradients).check(model())
    with pytest.raises(ValueError, match=r"'1\.other' is not a buffer"):
        dataclasses.replace(update, buffers={"1.other": torch.ones(1)}).check(model())
    with pytest.raises(ValueError, match=r"buffers: '1\.running_var' has shape"):
        dataclasses.replace(update, buffers={"1.running_var": torch.ones(9)}).check(model())


def test_one_zero_tensor_is_a_dead_layer_not_an_error(update: Update) -> None:
    zero = {**update.gradients, "0.bias": torch.zeros(4)}
    dataclasses.replace(update, gradients=zero).check(model())
