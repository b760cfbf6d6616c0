"""Every mistake made on purpose is the best finding, with its number; clean updates have none."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import mistakes
import pytest
import torch
from mistakes import case, changed, clipped, moved, noisy, scaled
from mistakes_table import MISTAKES as TABLE
from mistakes_table import one_by_one, pruned, quantised, stepped
from torch import Tensor, nn
from typer.testing import CliRunner

import rgap
from rgap import Check, Finding, Loss, Status, capture, check
from rgap.cli.app import app
from rgap.diagnosis import Kind
from rgap.models.spec import resolve

CROSS, SQUARED, BINARY = "cross_entropy", "mse_loss", "binary_cross_entropy_with_logits"
DTYPES = (torch.float32, torch.float64)

# Where the head says something of λ: networks, batch sizes, losses, precision.
READABLE = [
    *itertools.product(("mlp", "lenet", "normed"), (1, 4), (CROSS,), DTYPES),
    *itertools.product(("mlp",), (1, 4), (SQUARED, BINARY), DTYPES),
    *itertools.product(("lenet", "normed"), (1,), (SQUARED,), DTYPES),
]
SPREAD = READABLE[::4]


def only(found: Check, kind: Kind) -> Finding:
    """The best finding, which is of this kind."""
    assert found.best is not None, f"nothing found; untested: {found.untested}"
    assert found.best.kind is kind, found.explain()
    assert kind in found.tested
    return found.best


# --- clean updates ---------------------------------------------------------------------------

CLEAN = [
    one
    for number, one in enumerate(
        itertools.product(
            ("mlp", "lenet", "normed"), (1, 2, 4), (CROSS, SQUARED, BINARY), DTYPES, (0, 30)
        )
    )
    if number % 5 > 1
]


@pytest.mark.cases(3)
@pytest.mark.parametrize("part", range(6))
def test_a_clean_update_has_no_finding(part: int) -> None:
    for number, (name, batch, loss, dtype, trained) in list(enumerate(CLEAN))[part::6]:
        given = case(name, batch, loss, dtype=dtype, trained=trained, seed=number)
        found = check(given.model, given.update)
        assert found.ok, (name, batch, loss, dtype, trained, found.explain())


@pytest.mark.parametrize("name", ["relu", "gelu", "bias-less", "soft", "regression", "dropout"])
def test_a_clean_update_of_another_network_has_no_finding(name: str) -> None:
    x = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(3))
    target, loss = torch.tensor([2]), Loss()
    if name in ("relu", "gelu"):
        model = mistakes.mlp(1, nn.ReLU if name == "relu" else nn.GELU)
    elif name == "bias-less":
        model = mistakes.seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 7, False)), 1)
    elif name == "dropout":
        model = dropped(nn.Sigmoid)
    else:
        model = mistakes.mlp(1)
    if name == "soft":
        target, loss = torch.tensor([[0.2, 0.3, 0.1, 0.4, 0.0]]), Loss(targets="probability")
    if name == "regression":
        target, loss = torch.tensor([[0.3, -1.0, 0.2, 2.0, 0.7]]), Loss(SQUARED)
    found = check(model, capture(model, x, target, loss))
    assert found.ok, found.explain()


# --- factors ---------------------------------------------------------------------------------


@pytest.mark.cases(12)
@pytest.mark.parametrize(("name", "batch", "loss", "dtype"), READABLE)
def test_a_reversed_sign(name: str, batch: int, loss: str, dtype: torch.dtype) -> None:
    given = case(name, batch, loss, dtype=dtype)
    found = only(check(given.model, scaled(given.update, -1.0)), Kind.SIGN)
    assert found.value == pytest.approx(-1.0, rel=2e-3)


@pytest.mark.parametrize(("name", "batch", "loss", "dtype"), SPREAD)
def test_a_rate_off_by_any_factor(name: str, batch: int, loss: str, dtype: torch.dtype) -> None:
    given = case(name, batch, loss, dtype=dtype, seed=1)
    factor = 10 ** random.Random(f"{name}{batch}{loss}").uniform(-2.0, 3.0)
    found = check(given.model, scaled(given.update, factor))
    assert only(found, Kind.SCALE).value == pytest.approx(factor, rel=2e-3)
    both = check(given.model, scaled(given.update, -factor))
    if loss != BINARY or batch > 1:  # one logit: a negative factor has a positive twin
        assert {f.kind for f in both.findings} == {Kind.SIGN, Kind.SCALE}


def test_the_line_that_mends_a_factor_mends_it() -> None:
    import dataclasses

    given = case("mlp", 4)
    update, model = scaled(given.update, -37.5), given.model
    names = {"dataclasses": dataclasses, "update": update, "rgap": rgap, "model": model}
    for _ in range(2):
        found = check(model, names["update"])  # type: ignore[arg-type]
        assert found.best is not None
        names["update"] = eval(found.best.remedy, names)
    for name, g in names["update"].gradients.items():  # type: ignore[attr-defined]
        assert torch.allclose(g, given.update.gradients[name], rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "batch", "loss"),
    [("mlp", 4, CROSS), ("lenet", 4, CROSS), ("normed", 4, CROSS), ("mlp", 4, BINARY),
     ("mlp", 4, SQUARED), ("mlp", 1, SQUARED)],
)  # fmt: skip
def test_a_sum_declared_as_a_mean_and_a_mean_as_a_sum(name: str, batch: int, loss: str) -> None:
    given = case(name, batch, loss)
    ratio = batch * (5 if loss == SQUARED else 1)
    summed = capture(given.model, given.inputs, given.targets, Loss(loss, "sum"))
    found = only(check(given.model, replace(summed, loss=given.loss)), Kind.REDUCTION)
    assert found.value == pytest.approx(ratio, rel=2e-3)
    assert 'reduction="sum"' in found.remedy
    found = only(check(given.model, replace(given.update, loss=summed.loss)), Kind.REDUCTION)
    assert found.value == pytest.approx(1 / ratio, rel=2e-3)


@pytest.mark.parametrize("name", ["mlp", "lenet", "normed"])
@pytest.mark.parametrize("sizes", [(3, 1), (2, 1, 1)])
def test_micro_batches_of_unequal_size(name: str, sizes: tuple[int, ...]) -> None:
    given = case(name, 4, dtype=torch.float64)
    found = only(check(given.model, mistakes.accumulated(given, sizes)), Kind.ACCUMULATION)
    assert found.value == len(sizes)
    assert str(list(sizes)) in found.evidence
    even = mistakes.accumulated(given, (2, 2))
    assert check(given.model, even).ok, "micro-batches of one size are a plain mean"


@pytest.mark.parametrize(("name", "batch", "loss", "dtype"), SPREAD)
@pytest.mark.parametrize("bound", [0.01, 0.05])
def test_a_clipped_norm(name: str, batch: int, loss: str, dtype: torch.dtype, bound: float) -> None:
    given = case(name, batch, loss, dtype=dtype)
    found = only(check(given.model, clipped(given.update, bound)), Kind.CLIPPING)
    assert found.value == bound


@pytest.mark.parametrize("name", ["mlp", "lenet", "normed"])
def test_another_loss(name: str) -> None:
    given = case(name, 1)
    found = only(check(given.model, replace(given.update, loss=Loss(SQUARED))), Kind.LOSS)
    assert 'rgap.Loss("cross_entropy"' in found.remedy


# --- the client's network ---------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("loss", [CROSS, SQUARED, BINARY])
def test_batch_norm_in_train_mode(batch: int, loss: str, bias: bool) -> None:
    given = case("normed", batch, loss, bias=bias)
    sent = mistakes.in_train_mode(given)
    assert only(check(given.model, sent), Kind.MODE).value < 1e-3
    assert Kind.MODE in {f.kind for f in check(given.model, scaled(sent, -3.0)).findings}


def dropped(activation: type[nn.Module], p: float = 0.4, classes: int = 5) -> nn.Module:
    return mistakes.seeded(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(72, 64), activation(), nn.Dropout(p), nn.Linear(64, 32),
            activation(), nn.Linear(32, classes),
        ),
        0,
    )  # fmt: skip


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.ReLU])
@pytest.mark.parametrize("batch", [1, 4])
def test_dropout_that_was_on(activation: type[nn.Module], batch: int) -> None:
    model = dropped(activation)
    given = replace(case("mlp", batch, classes=5), model=model)
    found = only(check(model, mistakes.in_train_mode(given)), Kind.DROPOUT)
    assert ("or rgap.invert(model.train(), update)" in found.remedy) == (batch == 1)
    if batch == 1:
        assert found.value == pytest.approx(0.4, abs=0.15 if activation is nn.Sigmoid else 1e-4)


@pytest.mark.parametrize(
    ("name", "batch", "loss"),
    [(n, b, CROSS) for n in ("mlp", "lenet", "normed") for b in (1, 4)]
    + [("mlp", 4, SQUARED), ("lenet", 1, SQUARED), ("normed", 1, SQUARED)],
)  # fmt: skip
def test_several_local_steps(name: str, batch: int, loss: str) -> None:
    given = case(name, batch, loss, dtype=torch.float64)
    found = only(check(given.model, mistakes.trained_locally(given, 2, 0.1)), Kind.STEPS)
    assert found.value == 2


def test_the_rate_of_local_steps_is_found() -> None:
    given = case("mlp", 1, dtype=torch.float64)
    sent = mistakes.trained_locally(given, 3, 0.07)
    found = only(check(given.model, sent), Kind.STEPS)
    assert found.value == 3
    assert "LocalTraining(0.07)" in found.remedy
    summed = only(check(given.model, scaled(sent, 3.0)), Kind.STEPS)
    assert summed.value == 3
    assert "g / 3" in summed.remedy


def test_a_batch_larger_than_declared() -> None:
    for name in ("mlp", "lenet"):
        given = case(name, 4, dtype=torch.float64)
        found = only(check(given.model, given.update, batch_size=2), Kind.BATCH_SIZE)
        assert found.value == 4


@pytest.mark.parametrize("level", [1e-2, 3e-5])
@pytest.mark.parametrize(("name", "batch"), [(n, b) for n in mistakes.NETS for b in (1, 4)])
def test_noise_that_is_not_stated(name: str, batch: int, level: float) -> None:
    given = case(name, batch)
    sent = noisy(given.update, level)
    found = only(check(given.model, sent), Kind.NOISE)
    assert found.value == pytest.approx(level, rel=0.2)
    assert Kind.NOISE not in {f.kind for f in check(given.model, sent, noise=level).findings}


# The misfit at that LeNet's head, 1e-4, is below what its float32 update shows.
SHOWN = [given for given in SPREAD if (given[0], given[1], given[3]) != ("lenet", 4, torch.float32)]


@pytest.mark.parametrize(("name", "batch", "loss", "dtype"), SHOWN)
def test_other_weights(name: str, batch: int, loss: str, dtype: torch.dtype) -> None:
    given = case(name, batch, loss, dtype=dtype)
    found = check(moved(given.model, 0.1), given.update).best
    assert found is not None
    # At a convolution network's head the target is all that is looked at: a loss gives it too, and
    # so may one changed entry.
    likely = (Kind.WEIGHTS, Kind.LOSS, Kind.ENTRY)
    assert found.kind is Kind.WEIGHTS or found.rivals == likely
    assert found.value < 1.0
    assert found.strength > 3.0


# --- values and names ------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.003])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_weight_difference_over_its_rate(dtype: torch.dtype, rate: float) -> None:
    """All 24 bits are used, and yet the values lie on a grid: times the rate they are halves."""
    for batch in (1, 4):
        given = case("mlp", batch)
        sent = changed(given.update, lambda g: (g * rate).to(dtype).float() / rate)
        best = only(check(given.model, sent), Kind.PRECISION)
        assert best.value == torch.finfo(dtype).eps and "divided by the rate" in best.evidence
        if batch == 1:
            mended = eval(best.remedy, {"dataclasses": dataclasses, "torch": torch, "update": sent})
            recovery = rgap.invert(given.model, mended)
            assert recovery.status is Status.EXACT and recovery.inputs is not None
            assert recovery.error_bound is not None
            assert float((recovery.inputs - given.inputs).abs().max()) < recovery.error_bound


def test_the_names_of_another_model_are_no_frozen_layers() -> None:
    given, other = case("lenet", 1), case("normed", 1)
    best = only(check(other.model, given.update), Kind.NAMES)
    assert "no parameters of the model" in best.evidence and "are missing" in best.evidence
    assert "with the model that the client trained" in best.remedy
    with pytest.raises(ValueError, match="instead") as refused:
        rgap.invert(other.model, given.update)
    assert "froze" not in str(refused.value)


def test_a_forgotten_loss_of_a_batch_is_the_first_suspect() -> None:
    """Two layers tell the samples apart without any loss, so that they are right whatever it is."""
    given = case("mlp", 2)

    def own(z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z, y) + 0.3 * z.square().mean()

    sent = capture(given.model, given.inputs, given.targets, Loss("own", function=own))
    recovery = rgap.invert(given.model, replace(sent, loss=Loss()))
    assert recovery.certified == {"inputs"} and recovery.status is Status.INCONSISTENT
    assert "explains it, and none could test: loss, " in recovery.reason


def test_a_missing_layer_is_not_said_to_be_zero() -> None:
    given = case("mlp", 1)
    last = list(given.update.gradients)[-1]
    sent = {n: g for n, g in given.update.gradients.items() if n != last}
    found = only(check(given.model, replace(given.update, gradients=sent)), Kind.NAMES)
    assert f"'{last}' first" in found.evidence


def test_what_a_model_in_train_mode_says_is_no_advice_to_leave_it() -> None:
    given = case("mlp", 1)
    model = nn.Sequential(*given.model[:3], nn.Dropout(0.4), *given.model[3:]).train()
    update = replace(given.update, gradients=dict(zip(
        dict(model.named_parameters()), mistakes.in_train_mode(given, model).gradients.values(),
        strict=True,
    )))  # fmt: skip
    recovery = rgap.invert(model, update)
    assert recovery.certified == {"inputs"} and "in train mode" in recovery.reason
    assert "write model.eval()" not in recovery.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    given = case("lenet", 1)
    sent = changed(given.update, lambda g: g.to(dtype).float())
    found = only(check(given.model, sent), Kind.PRECISION)
    assert found.value == torch.finfo(dtype).eps
    assert str(dtype) in found.remedy
    assert check(given.model, replace(sent, dtype=dtype)).ok, "declared, it is no mistake"


@pytest.mark.parametrize("how", [torch.sign, quantised, pruned])
@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_compression(name: str, how: object) -> None:
    given = case(name, 1)
    only(check(given.model, changed(given.update, how)), Kind.COMPRESSION)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [CROSS, SQUARED])
def test_labels_that_are_not_those_of_the_batch(loss: str) -> None:
    given = case("mlp", 1, loss)
    wrong = (given.targets + 1) % 10 if loss == CROSS else given.targets.roll(1, -1)
    found = check(given.model, given.update, labels=wrong)
    label = int(given.targets if loss == CROSS else given.targets.argmax())
    assert only(found, Kind.LABELS).value == label
    assert [f.kind for f in found.findings] == [Kind.LABELS]
    assert check(given.model, given.update, labels=given.targets).ok


def test_0_1_labels_of_several_outputs_are_written_out() -> None:
    given = case("mlp", 1, classes=3)
    right, wrong = torch.tensor([[0, 1, 1]]), torch.tensor([[1, 0, 0]])
    update = capture(given.model, given.inputs, right, BINARY)
    finding = only(check(given.model, update, labels=wrong), Kind.LABELS)
    assert finding.evidence.startswith("label 0,1,1 gives")
    assert finding.remedy.endswith("labels=torch.tensor([[0, 1, 1]]))")
    assert check(given.model, update, labels=right).ok


@pytest.mark.parametrize("loss", [Loss(targets="probability"), Loss(SQUARED)])
def test_stated_targets_of_any_numbers_may_be_wrong_where_none_fits(loss: Loss) -> None:
    given = case("mlp", 1)
    right = torch.linspace(0.01, 0.19, 10)[None]
    update = capture(given.model, torch.rand(1, *(given.update.input_shape or ())), right, loss)
    finding = only(check(given.model, update, labels=right.flip(1)), Kind.UNDECIDED)
    assert Kind.LABELS in finding.rivals and "labels=None" in finding.remedy
    assert check(given.model, update, labels=right).ok


def test_a_batch_size_that_is_not_that_of_the_mean() -> None:
    given = case("mlp", 4)
    found = only(check(given.model, replace(given.update, batch_size=8)), Kind.BATCH_SIZE)
    assert found.value == 4 and found.rivals == (Kind.SCALE,)
    assert "batch_size=4" in found.remedy and "g / 2" in found.evidence
    assert check(given.model, follow(given.model, replace(given.update, batch_size=8))).ok


def test_what_clipping_sample_by_sample_says_of_each() -> None:
    given = case("mlp", 4)
    found = only(check(given.model, one_by_one(given, 1.5)), Kind.CLIPPING)
    assert "by the factors " in found.evidence and f"{found.value:.4g} to " in found.evidence
    for label in given.targets.tolist():
        own = capture(
            given.model, *(t[given.targets == label] for t in (given.inputs, given.targets))
        )
        norm = sum(float(g.square().sum()) for g in own.gradients.values()) ** 0.5
        if norm > 1.5:
            assert f"(label {label}, norm {norm / 1.5:.3g} c)" in found.evidence


@pytest.mark.parametrize(("name", "batch"), [("mlp", 1), ("lenet", 4)])
def test_a_layer_whose_gradient_is_zero(name: str, batch: int) -> None:
    given = case(name, batch)
    stages = [n.removesuffix(".weight") for n in given.update.gradients if n.endswith("weight")]
    for frozen in stages[1:]:  # below the first nothing has a gradient that shows it
        sent = {
            n: torch.zeros_like(g) if n.startswith(frozen) else g
            for n, g in given.update.gradients.items()
        }
        update = replace(given.update, gradients=sent)
        found = only(check(given.model, update), Kind.ABSENT)
        assert f"'{frozen}'" in found.evidence
        model = copy.deepcopy(given.model)
        exec(found.remedy, {"model": model, "update": update})
        assert check(model, update).ok, "declared, it is no mistake"


def test_dead_units_are_no_missing_layer() -> None:
    """A dead layer leaves zeros in its own gradient, in those below and in what reads it."""
    model = mistakes.mlp(0, nn.ReLU, 10)
    with torch.no_grad():
        model[3].bias.fill_(-10.0)
    update = capture(model, torch.rand(2, 2, 6, 6), torch.tensor([1, 2]))
    assert not update.gradients["1.weight"].any()
    assert not update.gradients["3.weight"].any()
    assert check(model, update).ok


@pytest.mark.parametrize(("name", "batch"), [("mlp", 1), ("lenet", 4)])
def test_an_optimiser_that_divides_by_the_gradient(name: str, batch: int) -> None:
    given = case(name, batch)
    made = {n: m.make(given) for n, m in TABLE.items() if Kind.OPTIMISER in m.kinds}
    assert len(made) > 6
    made["5 of Adam"] = stepped(given, lambda p: torch.optim.Adam(p, 1e-3), 5)
    made["8 of Adagrad"] = stepped(given, lambda p: torch.optim.Adagrad(p, 1e-3), 8)
    made.pop("RMSprop, 2 steps")  # the second step is smaller, by what the gradient has changed
    for rule, sent in made.items():
        found = only(check(given.model, sent), Kind.OPTIMISER)
        assert "SGD" in found.remedy and "exp_avg" in found.remedy, rule


def test_names() -> None:
    given = case("mlp", 1)
    sent = given.update.gradients
    for prefix in ("module.", "_orig_mod.", "_module.", "module._orig_mod."):
        wrapped = replace(given.update, gradients={prefix + n: -g for n, g in sent.items()})
        found = check(given.model, wrapped)
        assert [f.kind for f in found.findings] == [Kind.NAMES, Kind.SIGN]
        assert prefix in found.findings[0].evidence
    turned = replace(given.update, gradients=dict(reversed(list(sent.items()))))
    assert "order" in only(check(given.model, turned), Kind.NAMES).evidence
    numbered = {str(i): g for i, g in enumerate(sent.values())}
    found = check(given.model, replace(given.update, gradients=numbered))
    assert "every shape fits" in only(found, Kind.NAMES).evidence
    frozen = dict(list(sent.items())[2:])
    found = check(given.model, replace(given.update, gradients=frozen))
    assert only(found, Kind.NAMES).value == 2
    ours = copy.deepcopy(given.model)
    partly = replace(given.update, gradients=frozen)
    exec(only(found, Kind.NAMES).remedy, {"model": ours, "update": partly})
    assert [p.requires_grad for p in ours.parameters()][:3] == [False, False, True]
    other = check(mistakes.lenet(0), given.update)
    assert other.best is not None
    assert other.best.kind is Kind.NAMES


def test_parameters_for_gradients() -> None:
    given = case("lenet", 1)
    for model in (given.model, moved(given.model, 0.05)):
        weights = {n: p.detach() for n, p in model.named_parameters()}
        found = check(given.model, replace(given.update, gradients=weights))
        assert only(found, Kind.PARAMETERS).value > 0.9


# --- what is said, and where -----------------------------------------------------------------


def test_an_inversion_that_fails_says_it_first() -> None:
    given = case("lenet", 1)
    recovery = rgap.invert(given.model, scaled(given.update, -1.0))
    assert recovery.status is not Status.EXACT
    if recovery.inputs is None:
        assert recovery.reason.startswith("the sign is reversed")
    given = case("mlp", 4)
    summed = capture(given.model, given.inputs, given.targets, Loss(reduction="sum"))
    recovery = rgap.invert(given.model, replace(summed, loss=given.loss))
    assert "smaller batch" not in recovery.reason
    if recovery.inputs is None:
        assert recovery.status is Status.INCONSISTENT
        assert recovery.reason.startswith("the loss was reduced in another way")
        assert 'reduction="sum"' in recovery.reason


def test_a_check_leaves_the_model_and_the_random_state_alone() -> None:
    given = case("normed", 1)
    given.model.train()
    state, before = (
        torch.get_rng_state(),
        {n: t.clone() for n, t in given.model.state_dict().items()},
    )
    assert only(check(given.model, given.update), Kind.MODE).strength > 100
    assert given.model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in given.model.state_dict().items())


def test_words_and_numbers() -> None:
    given = case("mlp", 1)
    found = check(given.model, scaled(given.update, -2.0))
    assert str(found) == found.explain()
    assert found.explain().startswith("1. sign: the sign is reversed")
    document = json.loads(json.dumps(found.summary()))
    assert [f["kind"] for f in document["findings"]] == ["sign", "scale"]
    assert "<table>" in found._repr_html_()
    clean = check(given.model, given.update)
    assert clean.best is None
    assert clean.explain().startswith("Nothing found")
    assert "mode" in document["untested"]


def test_bad_input_is_refused() -> None:
    given = case("mlp", 1)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        check(given.update, given.update)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rgap.Update\(gradients\)"):
        check(given.model, given.update.gradients)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise"):
        check(given.model, given.update, noise=-1.0)
    with pytest.raises(ValueError, match="batch_size"):
        check(given.model, given.update, batch_size=0)


WRONG = {
    "labels": (3, [1], torch.tensor([-1]), torch.tensor([10]), torch.tensor([1.5]),
               torch.tensor([1, 2]), torch.tensor(1), torch.zeros(1, 10), torch.tensor([True])),
    "seed": ("a", None, 2.5, True, 10**20, torch.tensor([1.0])),
    "time_limit": ("a", None, -1.0, float("nan"), torch.zeros(2)),
    "noise": ("a", None, float("inf"), {}, torch.zeros(2)),
    "batch_size": ("a", 2.5, -1, True, torch.tensor([True, True])),
    "input_shape": (3, "a", b"a", {}, torch.tensor(3), (0,), (2.5,)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_another_kind_is_named(name: str) -> None:
    given = case("mlp", 1)
    for value in WRONG[name]:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            check(given.model, given.update, **{name: value})  # type: ignore[arg-type]
    for value in () if name in ("noise", "batch_size", "input_shape") else WRONG[name]:
        if name == "time_limit" and value is None:  # no limit
            continue
        with pytest.raises((TypeError, ValueError), match=r"^(labels|targets|seed|time_limit): "):
            rgap.invert(given.model, given.update, **{name: value})  # type: ignore[arg-type]


def test_a_seed_is_a_whole_number_of_any_kind() -> None:
    given = case("mlp", 1)
    assert check(given.model, given.update, seed=torch.tensor([3]), batch_size=torch.tensor(1)).ok  # type: ignore[arg-type]


NET = "mlp:widths=16,classes=4,activation=tanh"


def test_the_command(tmp_path: Path) -> None:
    model = resolve(NET)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sent = capture(model, x, torch.tensor([3]))
    sent.save(tmp_path / "clean.safetensors")
    scaled(sent, -1.0).save(tmp_path / "flipped.safetensors")
    runner = CliRunner()
    clean = runner.invoke(app, ["check", NET, str(tmp_path / "clean.safetensors")])
    assert clean.exit_code == 0
    assert "Nothing found" in clean.output
    found = runner.invoke(app, ["check", NET, str(tmp_path / "flipped.safetensors")])
    assert found.exit_code == 1
    assert "the sign is reversed" in found.output
    as_json = runner.invoke(app, ["check", NET, str(tmp_path / "flipped.safetensors"), "--json"])
    assert json.loads(as_json.output)["findings"][0]["kind"] == "sign"
    assert runner.invoke(app, ["check", NET, "nowhere"]).exit_code == 2
    path = str(tmp_path / "clean.safetensors")
    assert runner.invoke(app, ["check", NET, path, "--device", "cpu"]).exit_code == 0
    lost = runner.invoke(app, ["check", NET, path, "--device", "cudda"])
    assert lost.exit_code == 2 and "--device: 'cudda'" in lost.output


def follow(model: nn.Module, update: rgap.Update) -> rgap.Update:
    """The update after the line that the best finding gives."""
    best = check(model, update).best
    assert best is not None
    names = {"dataclasses": dataclasses, "rgap": rgap, "update": update, "model": model}
    mended = eval(best.remedy, names)
    assert isinstance(mended, rgap.Update)
    return mended


def test_weights_of_zero_have_not_decayed() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 8))
    for p in model.parameters():
        nn.init.zeros_(p)
    sent = capture(model, torch.rand(3, 9), torch.tensor([0, 1, 2]), value_range=None)
    found = check(model, replace(sent, batch_size=1))
    assert Kind.DECAY not in [finding.kind for finding in found.findings]


@pytest.mark.parametrize(("batch", "rate"), [(1, 5e-4), (1, -1e-2), (4, 5e-4)])
def test_weight_decay_is_no_noise(batch: int, rate: float) -> None:
    given = case("mlp", batch)
    weights = {n: p.detach() for n, p in given.model.named_parameters()}
    sent = {n: g + rate * weights[n] for n, g in given.update.gradients.items()}
    decayed = replace(given.update, gradients=sent)
    found = only(check(given.model, decayed), Kind.DECAY)
    assert abs(found.value / rate - 1.0) < 1e-2
    assert check(given.model, follow(given.model, decayed)).ok


def test_a_wrong_rate_of_a_difference_scales_its_noise_too() -> None:
    given = case("mlp", 1)
    after = {
        n: p.detach() - 0.01 * given.update.gradients[n] for n, p in given.model.named_parameters()
    }
    fields = {"batch_size": 1, "input_shape": given.update.input_shape}
    sent = rgap.Update.from_delta(given.model, after, lr=0.1, **fields)
    assert only(check(given.model, sent), Kind.SCALE).value == pytest.approx(0.1, rel=1e-3)
    mended = follow(given.model, sent)
    assert check(given.model, mended).ok
    assert rgap.invert(given.model, mended).status is Status.EXACT


@pytest.mark.parametrize("rate", [0.1, 0.123])
def test_label_smoothing_is_another_loss_not_other_weights(rate: float) -> None:
    given = case("mlp", 1)
    torch.manual_seed(0)
    x, loss = torch.rand(1, *(given.update.input_shape or ())), Loss(label_smoothing=rate)
    update = replace(capture(given.model, x, torch.tensor([2]), loss), loss=Loss())
    assert f"label_smoothing={rate}" in only(check(given.model, update), Kind.LOSS).remedy
    recovery = rgap.invert(given.model, follow(given.model, update))
    assert recovery.status is Status.EXACT
    assert recovery.labels is not None
    assert recovery.labels.tolist() == [2]


def test_a_batch_told_apart_at_two_layers_comes_by_label() -> None:
    model = mistakes.mlp(0, classes=10)
    torch.manual_seed(0)
    x, y = torch.rand(4, 2, 6, 6), torch.tensor([9, 8, 8, 1])
    update = changed(capture(model, x, y), lambda g: g * 0.886)
    recovery = rgap.invert(model, update)
    assert recovery.labels is not None
    assert recovery.inputs is not None
    assert recovery.labels.tolist() == [1, 8, 8, 9]
    assert float((recovery.inputs[[0, 3]] - x[[3, 0]]).abs().max()) < 1e-3


class Tied(nn.Module):
    """Layers that share a weight, in the way of the name; then a head."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.lower, self.upper = way, nn.Linear(9, 9), nn.Linear(9, 9)
        self.head = nn.Linear(9, 6)
        if way == "parameter":
            self.upper.weight = self.lower.weight

    def forward(self, x: Tensor) -> Tensor:
        """One pass."""
        y = torch.sigmoid(self.lower(x))
        if self.way == "transpose":
            y = nn.functional.linear(y, self.lower.weight.T)
        elif self.way == "above":
            y = self.upper(nn.functional.linear(y, self.head.weight.T @ self.head.weight))
        else:
            y = self.upper(y)
        return self.head(torch.tanh(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", ["transpose", "parameter", "above"])
def test_a_weight_that_enters_twice_is_no_contradiction(way: str, batch: int) -> None:
    torch.manual_seed(3)
    model = Tied(way).eval()
    sent = capture(model, torch.rand(batch, 9), torch.arange(batch))
    assert check(model, sent).ok, check(model, sent).explain()
    due = Status.EXACT if (way, batch) == ("above", 1) else Status.UNSUPPORTED
    assert rgap.invert(model, sent).status is due


@pytest.mark.parametrize("classes", [1, 2])
def test_a_head_of_rank_one_is_no_batch_of_one(classes: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, classes)).eval()
    target = torch.tensor([0, 1, 1]) if classes > 1 else torch.tensor([[0.0], [1.0], [1.0]])
    sent = capture(model, torch.rand(3, 12), target, CROSS if classes > 1 else BINARY)
    assert check(model, replace(sent, batch_size=None)).ok


@pytest.mark.parametrize("factor", [2.0, 0.25, 3.0])
def test_a_simple_factor_on_a_batch_is_named_without_the_error_of_its_estimate(
    factor: float,
) -> None:
    torch.manual_seed(9)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(192, 40), nn.Tanh(),
        nn.Linear(40, 10),
    ).eval()  # fmt: skip
    update = rgap.capture(model, torch.rand(4, 3, 8, 8), torch.tensor([3, 1, 7, 5]))
    sent = replace(update, gradients={n: factor * g for n, g in update.gradients.items()})
    best = rgap.check(model, sent).best
    assert best is not None and f"g / {factor:g} for" in best.remedy, best


class _Past(nn.Module):
    """A convolution whose output also goes past the batch norm, as in DenseNet."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.head = nn.Linear(32 if joined else 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.inner(torch.relu(self.norm(x)))
        h = torch.cat([x, h], 1) if self.joined else x + h
        return self.head(torch.relu(h).mean((2, 3)))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_branch_past_a_batch_norm_is_no_contradiction(joined: bool, dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = _Past(joined).to(dtype).eval()
        model.norm.running_mean.normal_(0, 0.3)
        model.norm.running_var.uniform_(0.5, 2)
        x = torch.rand(1 + seed, 3, 8, 8, dtype=dtype)
        assert rgap.check(model, rgap.capture(model, x, torch.arange(1 + seed))).ok


def _fully(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(96, 30),
        nn.LeakyReLU(), nn.Linear(30, 8),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("sent_as", [torch.bfloat16, torch.float16])
def test_a_coarse_format_adds_no_rank(sent_as: torch.dtype) -> None:
    """What rounding leaves of rows that cancel is uneven, and longer than its mean says."""
    for seed in range(12):
        model = _fully(seed)
        update = rgap.capture(model, torch.rand(1, 3, 4, 4), torch.tensor([seed % 8]))
        coarse = {n: g.to(sent_as) for n, g in update.gradients.items()}
        assert rgap.check(model, dataclasses.replace(update, gradients=coarse)).ok, seed


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_pruning_that_is_declared_is_no_mistake(share: float) -> None:
    for seed in range(6):
        model = _fully(seed).to(torch.float64 if seed % 2 else torch.float32)
        x = torch.rand(1, 3, 4, 4, dtype=next(model.parameters()).dtype)
        update = rgap.capture(model, x, torch.tensor([seed]))
        kept, noise = {}, {}
        for name, g in update.gradients.items():
            least = g.abs().flatten().quantile(share)
            small = g.abs() < least
            kept[name] = torch.where(small, 0.0, g)
            noise[name] = torch.where(small, least / 3**0.5, torch.zeros_like(g))
        pruned = dataclasses.replace(update, gradients=kept, noise=noise)
        assert rgap.check(model, pruned).ok, seed


@pytest.mark.cases(2)
@pytest.mark.parametrize("level", [1e-6, 1e-3, 0.1])
def test_noise_that_is_stated_of_one_tensor_is_no_finding(level: float) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(30, 24), nn.Tanh(), nn.Linear(24, 5)).double().eval()
        x = torch.rand(1, 30, dtype=torch.float64)
        sent = rgap.capture(model, x, torch.tensor([1]))
        g = sent.gradients["2.weight"]
        sigma = level * float(g.abs().mean())
        gradients = {**sent.gradients, "2.weight": g + sigma * torch.randn_like(g)}
        noise = {"2.weight": torch.full_like(g, sigma)}
        found = rgap.check(model, replace(sent, gradients=gradients, noise=noise))
        assert found.ok, (seed, found.findings[0].evidence)


@pytest.mark.parametrize("noisy", ["0.bias", "2.bias", "4.bias", "2.weight"])
def test_noise_of_one_tensor_of_a_batch_is_no_finding(noisy: str) -> None:
    """Samples are told apart by other tensors, exactly; their equations hold to that noise."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(14, 12), nn.SiLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 6)
        ).double().eval()  # fmt: skip
        x = torch.rand(3, 14, dtype=torch.float64)
        sent = rgap.capture(model, x, torch.tensor([1, 4, 2]))
        g = sent.gradients[noisy]
        sigma = 1e-3 * float(g.abs().mean())
        gradients = {**sent.gradients, noisy: g + sigma * torch.randn_like(g)}
        update = replace(sent, gradients=gradients, noise={noisy: torch.full_like(g, sigma)})
        found = rgap.check(model, update)
        assert found.ok, (seed, found.findings[0].evidence)
