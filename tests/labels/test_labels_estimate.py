"""Labels from a model and an update: finding the head, local steps, refusals, the command."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import rgap
from rgap.cli.app import app
from rgap.cli.options import LabelMethod
from rgap.labels import METHODS, estimate, head_features
from rgap.models.spec import resolve

TARGETS = torch.tensor([3, 1, 3, 7, 7, 7, 0])
FOUND = sorted(TARGETS.tolist())


def lenet(activation: str = "relu", **options: object) -> nn.Module:
    return rgap.models.lenet(activation=activation, seed=1, **options)  # type: ignore[arg-type]


def photographs(count: int = len(TARGETS), **options: object) -> Tensor:
    return rgap.photos.load(count, dtype=torch.float32, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_labels_of_photographs(activation: str, reduction: str) -> None:
    model = lenet(activation)
    loss = rgap.Loss(reduction=reduction)
    update = rgap.capture(model, photographs(), TARGETS, loss)
    found = estimate(model, update)
    assert found.labels is not None and found.labels.tolist() == FOUND
    assert found.method == "best" and found.least > 0.99
    for method in ("gradinversion", "llg", "llg_star"):  # tanh has features of both signs
        decided = estimate(model, update, method=method).decided
        assert decided == (activation != "tanh"), method


def test_exact_counts_at_the_true_features_in_float64() -> None:
    model = lenet("tanh")
    update = rgap.capture(model, photographs(), TARGETS, dtype=torch.float64)
    features = head_features(model, update, photographs())
    assert features is not None
    found = estimate(model, update, method="exact", features=features)
    assert found.labels is not None and found.labels.tolist() == FOUND
    assert found.estimates is not None and found.counts is not None
    assert float((found.estimates - found.counts).abs().max()) < 1e-6


class Residual(nn.Module):
    """No chain below the head; the head is fed a pooled sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, 2, 1)
        self.two = nn.Conv2d(8, 8, 3, 1, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        x = F.relu(x + self.norm(self.two(x)))
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: Residual().eval(), id="residual"),
        pytest.param(lambda: rgap.models.lenet5(seed=0), id="max-pool"),
        pytest.param(lambda: rgap.models.vgg(seed=0), id="vgg"),
        pytest.param(lambda: rgap.models.resnet(seed=0), id="resnet"),
        pytest.param(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), id="linear"),
    ],
)
def test_what_lies_below_the_head_does_not_matter(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = model()
    inputs = photographs(size=rgap.models.INPUT_SHAPES["lenet"][-1])
    update = rgap.capture(network, inputs, TARGETS)
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    found = estimate(network, update)
    assert found.labels is not None and found.labels.tolist() == FOUND
    assert estimate(network, update, method="llg_star").decided
    assert torch.equal(state, torch.get_rng_state())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module._forward_pre_hooks for module in network.modules())


class Functional(nn.Module):
    """A head that is a parameter, not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3072, 40)
        self.w = nn.Parameter(torch.randn(10, 40) / 7)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.fc(x.flatten(1))).square(), self.w)


def test_a_head_that_is_no_module() -> None:
    torch.manual_seed(0)
    model = Functional().eval()
    update = rgap.capture(model, photographs(), TARGETS, dtype=torch.float64)
    features = head_features(model, update, photographs())
    assert features is not None and bool((features >= 0).all())
    found = estimate(model, update, method="exact", features=features)
    assert found.labels is not None and found.labels.tolist() == FOUND


def test_one_logit() -> None:
    model = rgap.models.mlp((64,), classes=1, activation="sigmoid", seed=0)
    targets = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    update = rgap.capture(model, photographs(5), targets, "binary_cross_entropy_with_logits")
    found = estimate(model, update)
    assert found.counts is not None and found.counts.tolist() == [2, 3]


# --- local steps ----------------------------------------------------------------------------


def trained(model: nn.Module, batches: list[tuple[Tensor, Tensor]], lr: float) -> nn.Module:
    client = copy.deepcopy(model)
    optimiser = torch.optim.SGD(client.parameters(), lr)
    for inputs, targets in batches:
        optimiser.zero_grad()
        F.cross_entropy(client(inputs), targets).backward()
        optimiser.step()
    return client


def delta(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], lr: float = 0.01, **fields: object
) -> rgap.Update:
    after = trained(model, batches, lr)
    return rgap.Update.from_delta(model, after, lr, len(batches), input_shape=(3, 32, 32), **fields)


@pytest.mark.parametrize("method", ["best", "ilrg", "llg", "llg_star", "gradinversion"])
def test_a_difference_of_parameters_gives_the_labels_of_the_gradient(method: str) -> None:
    model = lenet()
    distinct = torch.tensor([4, 9, 0, 2, 6])
    sent = delta(model, [(photographs(5), distinct)], batch_size=5)
    direct = rgap.capture(model, photographs(5), distinct)
    one, other = (estimate(model, update, method=method) for update in (sent, direct))
    assert one.labels is not None and other.labels is not None
    assert one.labels.tolist() == other.labels.tolist() == sorted(distinct.tolist())


def test_the_sign_of_a_difference_matters() -> None:
    """What ``after - before`` would give, read as a gradient, is wrong, and said to be unsure."""
    model = lenet()
    update = rgap.capture(model, photographs(), TARGETS)
    turned = replace(update, gradients={n: -g for n, g in update.gradients.items()})
    read = estimate(model, turned)
    assert read.labels.tolist() != FOUND and read.least < 0.9


def test_several_steps_on_one_batch() -> None:
    model = lenet()
    update = delta(model, [(photographs(), TARGETS)] * 4, batch_size=len(TARGETS))
    found = estimate(model, update)
    assert found.labels is not None and found.labels.tolist() == FOUND
    assert "average over 4 local steps" in found.reason
    features = head_features(model, update, photographs())
    exact = estimate(model, update, method="exact", features=features)
    assert exact.labels is None and "local steps" in exact.reason


def test_steps_on_different_batches_count_together() -> None:
    model = lenet("sigmoid")
    targets = torch.tensor([1, 1, 2, 5, 5, 5, 9, 0, 0])
    batches = [(photographs(3, start=3 * k), targets[3 * k : 3 * k + 3]) for k in range(3)]
    found = estimate(model, delta(model, batches, lr=3e-4), batch_size=9)
    assert found.labels is not None and found.labels.tolist() == sorted(targets.tolist())


# --- refusals -------------------------------------------------------------------------------


class Activated(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(12, 4), last

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.fc(x.flatten(1)))
        return out


def small(model: nn.Module, loss: object = "cross_entropy", targets: object = None) -> rgap.Update:
    inputs = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([0, 2]) if targets is None else targets
    return rgap.capture(model, inputs, wanted, loss)  # type: ignore[arg-type]


def test_refusals() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    update = small(model)
    with pytest.raises(ValueError, match=r"expected one of 'best'.*got 'ilgr'; write method="):
        estimate(model, update, method="ilgr")
    with pytest.raises(ValueError, match="does not state one; write batch_size=8"):
        estimate(model, replace(update, batch_size=None))
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        estimate(model, update, batch_size=0)
    # One size fits the fully connected layer; two do where a convolution comes first.
    assert torch.equal(
        estimate(model, replace(update, input_shape=None)).labels, estimate(model, update).labels
    )
    with pytest.raises(TypeError, match=r"update: expected an rgap\.Update, got dict"):
        estimate(model, update.gradients)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        estimate(update.gradients, update)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'1\.bias' is missing|not a parameter|has shape"):
        estimate(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval(), update)
    with pytest.raises(ValueError, match=r"features: expected \[2, 12\], got \[3, 12\]"):
        estimate(model, update, method="exact", features=torch.ones(3, 12))


def test_targets_without_counts_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    soft = small(model, rgap.Loss(targets="probability"), torch.full((2, 4), 0.25))
    real = small(model, "mse_loss", torch.zeros(2, 4))
    several = small(model, "binary_cross_entropy_with_logits", torch.ones(2, 4))
    for update, words in (
        (soft, "continuous targets have no counts"),
        (real, "continuous targets have no counts"),
        (several, "expected one logit"),
    ):
        with pytest.raises(ValueError, match=words):
            estimate(model, update)
    with pytest.raises(ValueError, match=r"loss: expected one of .*'cross_entropy'"):
        replace(soft, loss="focal")


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (nn.Sigmoid(), "expected logits, got 'sigmoid' after the last layer 'fc'"),
        (nn.LogSoftmax(1), "expected a fully connected last layer|expected logits"),
    ],
)
def test_a_model_that_does_not_end_in_its_head_is_refused(last: nn.Module, words: str) -> None:
    model = Activated(last).eval()
    with pytest.raises(ValueError, match=words):
        estimate(model, small(model))


def test_a_convolution_as_the_last_layer_is_refused_unless_it_has_one_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten()).eval()
    assert estimate(model, small(model)).labels.tolist() == [0, 2]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match=r"expected a fully connected last layer|logits"):
        estimate(model, small(model))


# --- command --------------------------------------------------------------------------------


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output if code == 2 else result.stdout


@pytest.fixture
def sent(tmp_path: Path) -> Callable[[int], str]:
    def write(count: int) -> str:
        path = tmp_path / f"{count}.safetensors"
        update = rgap.capture(
            rgap.models.lenet(seed=0), photographs(count), torch.tensor([3, 1, 3, 7])[:count]
        )
        update.save(path)
        return str(path)

    return write


def test_the_command_has_every_method() -> None:
    assert {m.value for m in LabelMethod} == {*METHODS, "all"}


def test_the_command_prints_counts(sent: Callable[[int], str]) -> None:
    shown = call("labels", "lenet", sent(4))
    assert "best: labels 1, 3, 3, 7" in shown and "7 others" in shown
    document = json.loads(call("labels", "lenet", sent(4), "--json", "--batch-size", "4"))
    assert document["batch_size"] == 4 and document["classes"] == 10
    assert document["methods"]["best"]["labels"] == [1, 3, 3, 7]


def test_the_command_compares_all_methods(sent: Callable[[int], str]) -> None:
    document = json.loads(call("labels", "lenet", sent(4), "--method", "all", "--json"))
    methods = document["methods"]
    assert set(methods) == set(METHODS)
    assert methods["ilrg"]["labels"] == [1, 3, 3, 7]
    assert methods["idlg"]["labels"] is None and "one sample" in methods["idlg"]["reason"]
    assert methods["rlg"]["present"][3] is True
    shown = call("labels", "lenet", sent(4), "--method", "idlg", code=1)
    assert "idlg: undecided: expected one sample, got a batch of 4" in shown


def test_the_command_takes_options_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "mlp"
    model = resolve("mlp:widths=16,classes=4,activation=gelu")
    rgap.capture(model, photographs(3), torch.tensor([1, 1, 2])).save(path)
    shown = call("labels", "mlp:widths=16,classes=4,activation=gelu", str(path))
    assert "best: labels 1, 1, 2" in shown
    assert [m.out_features for m in resolve("mlp:widths=16x8,classes=4")[1::2]] == [16, 8, 4]


def test_exact_inverts_first(sent: Callable[[int], str]) -> None:
    document = json.loads(call("labels", "lenet", sent(1), "--method", "exact", "--json"))
    found = document["methods"]["exact"]
    assert found["labels"] == [3] and min(found["confidence"]) > 0.99
    shown = call("labels", "lenet", sent(4), "--method", "exact", code=1)
    assert "exact: undecided: UNDERDETERMINED: " in shown


def test_the_command_refuses(tmp_path: Path) -> None:
    assert "write one with rgap capture" in call("labels", "lenet", "none", code=2)
    model = rgap.models.lenet(seed=0)
    targets = torch.tensor([3, 1])
    rgap.capture(model, photographs(2), targets, share_batch_size=False).save(tmp_path / "one")
    assert "does not state one" in call("labels", "lenet", str(tmp_path / "one"), code=2)
    rgap.capture(model, photographs(2), torch.zeros(2, 10), "mse_loss").save(tmp_path / "two")
    assert "have no counts" in call("labels", "lenet", str(tmp_path / "two"), code=2)
