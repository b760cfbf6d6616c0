"""The contract for bad input, one test an item, through the public front doors.

Every refusal names the tensor or layer, says what was expected and what came, and what to write
instead; none of it is a traceback from PyTorch.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import picture, small_conv
from torch import Tensor, nn
from typer.testing import CliRunner

import rgap
from rgap import Recovery, Status, Update, capture, invert
from rgap.cli.app import app

SHAPE = (2, 6, 6)
X = picture(SHAPE, 1)
LABEL = torch.tensor([3])


def network(**options: Any) -> nn.Module:
    return small_conv("sigmoid", **{"channels": 4, "size": 6, **options})


@pytest.fixture
def update() -> Update:
    return capture(network(), X, LABEL, dtype=torch.float64)


def changed(update: Update, name: str, change: Callable[[Tensor], object]) -> dict[str, Any]:
    return {**update.gradients, name: change(update.gradients[name])}


def refusal(call: Callable[[], object], *words: str, error: type[Exception] = ValueError) -> str:
    """The message of ``call``’s error, which has all ``words``."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, "no accident of a lower layer"
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


def refused(*arguments: object) -> str:
    """The one line of a command that ends with exit code 2."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("rgap: error: ")
    return str(line)


def test_the_untouched_update_is_recovered(update: Update) -> None:
    """Else every refusal below could have another cause."""
    recovery = invert(network(), update)
    assert recovery.status is Status.EXACT
    assert recovery.inputs is not None
    assert torch.allclose(recovery.inputs.double(), X.double(), atol=1e-8)


# --- the gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_with_nan_or_infinity(update: Update, value: float) -> None:
    def spoil(g: Tensor) -> Tensor:
        return g.clone().index_fill_(0, torch.tensor([1]), value)

    refusal(
        lambda: replace(update, gradients=changed(update, "conv1.bias", spoil)),
        *("'conv1.bias'", "NaN or infinity in 1 of 4", "capture again in float64"),
    )


def test_a_gradient_that_becomes_nan_after_construction_is_refused_too(update: Update) -> None:
    update.gradients["conv1.bias"][0] = float("nan")
    refusal(lambda: invert(network(), update), "'conv1.bias'", "NaN or infinity in 1 of 4")


def test_a_gradient_of_the_wrong_shape(update: Update) -> None:
    bad = replace(update, gradients=changed(update, "fc.weight", lambda g: g.T))
    refusal(
        lambda: invert(network(), bad),
        *("'fc.weight'", "has shape (144, 5)", "expected (5, 144)", "Build the model"),
    )


def test_a_missing_parameter(update: Update) -> None:
    rest = {n: g for n, g in update.gradients.items() if n != "conv1.weight"}
    refusal(
        lambda: invert(network(), replace(update, gradients=rest)),
        *("'conv1.weight' is missing", "expected the 6 parameters", "Write Update("),
    )


def test_an_extra_parameter(update: Update) -> None:
    more = replace(update, gradients={**update.gradients, "old.weight": torch.ones(3)})
    refusal(
        lambda: invert(network(), more),
        *("'old.weight' is not a parameter of the Sequential", "write dataclasses.replace("),
    )


def test_parameters_in_another_order(update: Update) -> None:
    turned = replace(update, gradients=dict(reversed(update.gradients.items())))
    message = refusal(
        lambda: invert(network(), turned),
        *(
            "order",
            "place 0",
            "expected 'conv0.weight', got 'fc.bias'",
            "write dataclasses.replace",
        ),
    )
    assert "model.named_parameters()" in message
    ordered = {n: turned.gradients[n] for n, _ in network().named_parameters()}
    assert invert(network(), replace(turned, gradients=ordered)).status is Status.EXACT


def test_a_gradient_from_another_model_is_inconsistent_and_names_the_layer(update: Update) -> None:
    recovery = invert(network(seed=9), update)
    assert recovery.status is Status.INCONSISTENT
    assert recovery.inputs is None
    assert any(f"'{layer}'" in recovery.reason for layer in ("fc", "conv1", "conv0"))


@pytest.mark.parametrize("layer", ["conv0", "conv1", "fc"])
def test_one_layer_of_another_client_is_inconsistent(update: Update, layer: str) -> None:
    other = capture(network(), picture(SHAPE, 8), LABEL, dtype=torch.float64)
    name = f"{layer}.weight"
    mixed = replace(update, gradients={**update.gradients, name: other.gradients[name]})
    recovery: Recovery = invert(network(), mixed)
    assert recovery.status is Status.INCONSISTENT, recovery.explain()
    assert recovery.inputs is None
    assert layer in recovery.explain()


def test_a_gradient_that_is_zero(update: Update) -> None:
    zero = {n: torch.zeros_like(g) for n, g in update.gradients.items()}
    refusal(
        lambda: invert(network(), replace(update, gradients=zero)),
        *(
            "every tensor is zero, from 'conv0.weight' on",
            "Expected a gradient, got zeros",
            "write p.grad.clone()",
            "zero_grad()",
        ),
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_a_gradient_of_no_floating_dtype(update: Update, dtype: torch.dtype) -> None:
    gradients = changed(update, "fc.bias", lambda g: g.to(dtype))
    refusal(
        lambda: replace(update, gradients=gradients),
        *("'fc.bias' has dtype", str(dtype), "expected a floating dtype", "write .float()"),
        error=TypeError,
    )


@pytest.mark.parametrize(("value", "words"), [(None, "is None"), ([0.0], "is a list")])
def test_a_gradient_that_is_no_tensor(update: Update, value: object, words: str) -> None:
    gradients = changed(update, "fc.bias", lambda g: value)
    refusal(
        lambda: replace(update, gradients=gradients), "'fc.bias'", words, "write torch.",
        error=TypeError,
    )  # fmt: skip


# --- batch size, mode, shape ----------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, -2])
def test_a_batch_size_below_one(update: Update, batch: int) -> None:
    for call in (
        lambda: replace(update, batch_size=batch),
        lambda: invert(network(), update, batch_size=batch),
    ):
        refusal(call, "batch_size: expected at least 1", f"got {batch}", "write batch_size=")


def test_an_unknown_batch_size(update: Update) -> None:
    silent = replace(update, batch_size=None)
    assert invert(network(), silent).status is Status.EXACT
    assert invert(network(), silent, batch_size=1).status is Status.EXACT


def test_batch_norm_of_one_value_a_channel_in_train_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    refusal(
        lambda: capture(model.train(), X, LABEL),
        *("failed in 2", "more than 1 value per channel", "[1, 4]", "write a batch of B >= 2"),
    )
    assert model.training, "left as it was"


def test_pictures_of_a_shape_that_does_not_fit(update: Update) -> None:
    refusal(
        lambda: capture(network(), picture((2, 9, 9), 1), LABEL),
        *("failed in fc", "in_features=144", "(1, 2, 9, 9)", "Write inputs of the shape"),
    )
    refusal(
        lambda: invert(network(), replace(update, input_shape=(2, 9, 9))),
        *("'fc'", "expects [B, 144], got [B, 324]", "write the input_shape"),
    )
    refusal(
        lambda: capture(network(), X[0, 0], LABEL),
        *("model", "(6, 6)", "Write inputs"),
    )


def test_an_unknown_input_shape() -> None:
    pooled = nn.Sequential(
        nn.Conv2d(X.shape[1], 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)
    ).eval().to(X.dtype)  # fmt: skip
    refusal(
        lambda: invert(pooled, replace(capture(pooled, X, LABEL), input_shape=None)),
        *("expected an input shape", "does not state one", "write input_shape=("),
    )


# --- files and the command line -------------------------------------------------------------


class Trap:
    """Unpickling this leaves a folder behind."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.mkdir, (Path("trap"),)  # type: ignore[return-value]


def test_a_pickle_where_safetensors_is_expected(
    update: Update, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("update.safetensors").write_bytes(pickle.dumps({**update.gradients, "x": Trap()}))
    words = ("update.safetensors", "a pickle", "expected safetensors", "write Update(torch.load(")
    refusal(lambda: Update.load("update.safetensors"), *words)
    line = refused("invert", "lenet", "update.safetensors")
    assert all(word in line for word in words)
    line = refused("audit", "lenet", "--weights", "update.safetensors")
    assert "is a pickle that torch.save did not write" in line
    assert not Path("trap").exists(), "nothing in it was run"


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (
            "no_such_module_at_all:build",
            ("no module 'no_such_module_at_all'", "package.module:fac"),
        ),
        ("badnets:biuld", ("'badnets' has no 'biuld'", "did you mean 'build'?")),
        ("needy:build", ("importing 'needy' failed", "'absent_package', which is not installed")),
        ("broken:build", ("importing 'broken' failed: ZeroDivisionError",)),
        ("badnets:number", ("expected badnets:number() to return a torch.nn.Module", "got a int")),
    ],
)
def test_a_model_factory_that_cannot_be_imported(
    factory: str, words: tuple[str, ...], update: Update, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("badnets.py").write_text("def build(): pass\ndef number(): return 3\n")
    Path("needy.py").write_text("import absent_package\n")
    Path("broken.py").write_text("1 / 0\n")
    update.save("u.safetensors")
    for command in (("invert", factory, "u.safetensors"), ("audit", factory)):
        line = refused(*command)
        assert line.startswith("rgap: error: MODEL: ")
        assert all(word in line for word in words), line


def test_an_update_of_another_network_on_the_command_line(update: Update, tmp_path: Path) -> None:
    update.save(tmp_path / "u.safetensors")
    line = refused("invert", "lenet", tmp_path / "u.safetensors")
    assert "'conv1.bias' has shape" in line or "is missing" in line
    assert "expected" in line


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.head = nn.Embedding(9, 6), nn.Linear(30, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(self.e(x).flatten(1))))


ENTRIES: dict[str, Callable[[nn.Module, rgap.Update], object]] = {
    "invert": rgap.invert,
    "match": rgap.match,
    "audit": lambda m, u: rgap.analysis.audit(m, (5,), (1,)),
    "formula": lambda m, u: rgap.analysis.audit(m, (5,), (1,), method="formula"),
    "identifiability": lambda m, u: rgap.analysis.identifiability(m, (5,), 1),
    "noise": lambda m, u: rgap.analysis.noise(m, torch.rand(1, 5)),
    "harden": lambda m, u: rgap.analysis.harden(m, (5,)),
    "capture": lambda m, u: rgap.capture(
        m, torch.ones(1, 5, dtype=torch.long), torch.ones(1).long()
    ),
}


def test_models_of_tokens_are_refused_in_one_sentence_or_served() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    loss = nn.functional.cross_entropy(model(torch.tensor([[1, 2, 3, 4, 5]])), torch.tensor([2]))
    sent = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    update = rgap.Update(dict(zip(names, sent, strict=True)), batch_size=1, input_shape=(5,))
    for name, entry in ENTRIES.items():
        try:
            said = entry(model, update).reason  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            said = str(error)
        assert "write a module that starts behind the embedding" in said, (name, said)
        assert ("matching" not in said and "scalar types" not in said) or name == "formula", said
    assert rgap.labels.estimate(model, update).labels.tolist() == [2]
    assert rgap.check(model, update).findings == ()
