"""What a caller of ``invert`` may rely on: manners, every loss, every kind of refusal.

Whether ``EXACT`` is ever wrong over random networks is judged in ``test_certificate``.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from allocations import smallest_routes
from cases import picture, small_conv, small_mlp, state
from torch import Tensor, nn

from rgap import Head, Loss, Recovery, Status, Update, capture, invert
from rgap.precision import Precision

BINARY = "binary_cross_entropy_with_logits"
X = picture((2, 8, 8), 1)
LABEL = torch.tensor([3])


def error(recovery: Recovery, x: Tensor) -> float:
    """Largest error of an exact recovery, which must also keep its own bound."""
    assert recovery.status is Status.EXACT, recovery.explain()
    assert recovery.inputs is not None
    assert recovery.error_bound is not None
    assert recovery.inputs.shape == x.shape
    off = float((recovery.inputs - x).abs().max())
    assert off <= recovery.error_bound
    return off


def labels_of(recovery: Recovery) -> list[Any]:
    assert recovery.labels is not None
    found: list[Any] = recovery.labels.tolist()
    return found


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_conv("sigmoid", seed=0)


@pytest.fixture(scope="module")
def update(model: nn.Module) -> Update:
    return capture(model, X, LABEL, dtype=torch.float64)


# --- manners --------------------------------------------------------------------------------


def random_state() -> list[Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  (the state that users' own code has)
    return [torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest), random.getstate()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grads", [True, False])
def test_the_model_and_the_random_state_are_left_as_they_were(
    dtype: torch.dtype, grads: bool
) -> None:
    model = small_conv("leaky_relu", seed=2, norm=True).to(dtype)
    seen: list[torch.Size] = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    model.register_forward_pre_hook(lambda m, i: None)
    if grads:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    before, rng = state(model), random_state()
    recovery = invert(model, capture(model, X, LABEL))
    assert state(model) == before
    assert random_state() == rng
    assert seen, "the user's hook runs, as on the client"
    error(recovery, X)
    assert recovery.inputs is not None
    assert not recovery.inputs.requires_grad


@pytest.mark.parametrize("status", ["UNDERDETERMINED", "INCONSISTENT", "UNSUPPORTED", "error"])
def test_the_model_is_left_as_it_was_whatever_comes_out(status: str) -> None:
    model = small_conv("leaky_relu", seed=2, channels=2, stride=2)
    update = capture(model, X, LABEL)
    if status == "UNSUPPORTED":
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        update = capture(model, X, LABEL)
    if status == "INCONSISTENT":
        update = capture(small_conv("leaky_relu", seed=3, channels=2, stride=2), X, LABEL)
    before, rng = state(model), random_state()
    if status == "error":
        with pytest.raises(ValueError, match="batch_size"):
            invert(model, update, batch_size=0)
    else:
        assert invert(model, update).status.name == status
    assert state(model) == before
    assert random_state() == rng


def test_the_update_is_left_as_it_was(model: nn.Module, update: Update) -> None:
    before = {name: g.clone() for name, g in update.gradients.items()}
    invert(model, update)
    assert all(torch.equal(g, before[name]) for name, g in update.gradients.items())


def test_a_seed_fixes_every_number(model: nn.Module) -> None:
    update = capture(model, X, LABEL)
    first, again, other = (invert(model, update, seed=s) for s in (5, 5, 6))
    assert first.inputs is not None and again.inputs is not None and other.inputs is not None
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.predicted_error, again.predicted_error)
    assert first.error_bound == again.error_bound
    assert first.error_bound != other.error_bound, "the seed draws the sampled errors"
    for recovery in (first, other):
        error(recovery, X)


def test_draws_follow_from_the_seed_whatever_was_drawn_before() -> None:
    used, std = Precision(seed=3), torch.ones(4)
    first, second = used.normal(std), used.normal(std)
    assert not torch.equal(first, second), "errors of two numbers are independent"
    for fresh in (Precision(seed=3), replace(used)):
        assert torch.equal(fresh.normal(std), first)
    with pytest.raises(FrozenInstanceError):
        used.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize("frozen", ["all", "some"])
def test_a_server_that_froze_its_copy_can_invert(
    model: nn.Module, update: Update, frozen: str
) -> None:
    copy = small_conv("sigmoid", seed=0)
    for parameter in list(copy.parameters())[: None if frozen == "all" else 2]:
        parameter.requires_grad_(False)
    before = state(copy)
    assert error(invert(copy, update), X) < 1e-6
    assert state(copy) == before


def test_works_without_gradients_and_in_inference_mode(model: nn.Module, update: Update) -> None:
    with torch.no_grad():
        assert error(invert(model, update), X) < 1e-6
    with torch.inference_mode():
        assert error(invert(model, update), X) < 1e-6


def test_nothing_is_printed(
    model: nn.Module,
    update: Update,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger="rgap"):
        invert(model, update, progress=True)
        two = small_conv("sigmoid", seed=0, norm=True)
        invert(two, replace(capture(two, X, LABEL), buffers=moved(two)))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "", "progress is for terminals, not for pipes"
    messages = [record.getMessage() for record in caplog.records]
    assert any("conv0" in message for message in messages), "each stage is logged"
    assert any("norm0.running_mean" in message for message in messages)


# --- labels and batch size ------------------------------------------------------------------


def test_stated_labels_are_checked_not_believed(model: nn.Module, update: Update) -> None:
    right = invert(model, update, labels=LABEL)
    assert error(right, X) < 1e-6
    wrong = invert(model, update, labels=torch.tensor([1]))
    assert wrong.status is Status.INCONSISTENT
    assert wrong.inputs is None
    assert "[1]" in wrong.reason and "[3]" in wrong.reason, "names both"
    assert "labels=None" in wrong.reason
    shared = capture(model, X, LABEL, share_labels=True, dtype=torch.float64)
    assert error(invert(model, shared), X) < 1e-6
    assert invert(model, shared, labels=torch.tensor([0])).status is Status.INCONSISTENT


def test_stated_labels_without_a_bias() -> None:
    model = small_mlp("leaky_relu", classes=1, bias=False, seed=3)
    x = picture((2, 4, 4), 2)
    update = capture(model, x, torch.tensor([1.0]), BINARY, dtype=torch.float64)
    free = invert(model, update)
    told = invert(model, update, labels=torch.tensor([1]))
    lied = invert(model, update, labels=torch.tensor([0]))
    for recovery in (free, told):
        assert recovery.exact and float((recovery.inputs - x).abs().max()) < 1e-6
    assert lied.status is Status.INCONSISTENT and lied.inputs is None


def test_batch_size_override(model: nn.Module) -> None:
    silent = capture(model, X, LABEL, share_batch_size=False, dtype=torch.float64)
    assert error(invert(model, silent), X) < 1e-6  # the rank says that there is one
    assert error(invert(model, silent, batch_size=1), X) < 1e-6
    stated = capture(model, X, LABEL, dtype=torch.float64)
    recovery = invert(model, stated, batch_size=2)  # a mean: two copies send the same
    assert recovery.status is Status.AMBIGUOUS and recovery.multiplicities.tolist() == [2]
    [alone] = recovery.candidates
    assert alone.multiplicities.tolist() == [2] and len(alone.inputs) == 1


@pytest.mark.parametrize("labels", [[0, 1], [2, 2]])
def test_a_batch_is_answered_with_its_samples(labels: list[int]) -> None:
    model = small_mlp("sigmoid", seed=0)
    x = picture((2, 4, 4), 3, batch=2)
    update = capture(model, x, torch.tensor(labels), dtype=torch.float64)
    recovery = invert(model, update)
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.labels.tolist() == labels
    gaps = [float((recovery.inputs - x[order]).abs().max()) for order in ([0, 1], [1, 0])]
    assert min(gaps) <= recovery.error_bound


@pytest.mark.cases(10)
@pytest.mark.parametrize(
    "network",
    [
        small_mlp("sigmoid", seed=0),
        small_mlp("relu", seed=1),
        small_mlp("leaky_relu", bias=False, seed=2),
        nn.Sequential(small_conv("sigmoid", seed=0, size=4)),
        nn.Sequential(small_conv("tanh", seed=0, size=4, bias=False)),
    ],
    ids=["mlp", "relu", "bias-less mlp", "conv", "bias-less conv"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [[0, 1], [2, 2]])
def test_two_samples_declared_as_one_are_never_exact(
    network: nn.Module, dtype: torch.dtype, labels: list[int]
) -> None:
    x = picture((2, 4, 4), 3, batch=2)
    update = capture(network, x, torch.tensor(labels), dtype=dtype)
    recovery = invert(network, replace(update, batch_size=1))
    assert recovery.status is not Status.EXACT
    assert recovery.inputs is None
    assert invert(network, update, batch_size=1).inputs is None


def head_of(model: nn.Module, x: Tensor, targets: Tensor, loss: Loss | None = None) -> Head:
    """True features and cotangents at the last layer, in float64."""
    twin = model
    features: list[Tensor] = []
    last = [m for m in twin.modules() if isinstance(m, nn.Linear)][-1]
    handle = last.register_forward_hook(lambda m, i, o: features.append(i[0]))
    with torch.no_grad():
        outputs = twin(x.to(next(twin.parameters())))
    handle.remove()
    return Head(features[0].double(), (loss or Loss()).cotangent(outputs.double(), targets))


@pytest.mark.parametrize("labels", [[0, 1], [4, 4]])
def test_a_batch_below_a_known_head_is_recovered(labels: list[int]) -> None:
    model = small_conv("tanh", channels=12, seed=0, size=6, classes=10).double()
    x = picture((2, 6, 6), 5, batch=2).double()
    targets = torch.tensor(labels)
    update = capture(model, x, targets)
    recovery = invert(model, update, head=head_of(model, x, targets))
    assert error(recovery, x) < 1e-6
    assert labels_of(recovery) == labels
    assert recovery.layers[-1].route == "given"
    assert "fc (linear): 864 unknowns, given." in recovery.explain()
    wrong = head_of(model, picture((2, 6, 6), 6, batch=2).double(), targets)
    refuted = invert(model, update, head=wrong)
    assert refuted.status is Status.INCONSISTENT
    assert refuted.inputs is None


def test_a_deficient_batch_below_a_known_head_says_how_many_equations_are_missing() -> None:
    model = small_conv("tanh", channels=2, stride=2, seed=0).double()
    x = picture((2, 8, 8), 5, batch=2).double()
    targets = torch.tensor([0, 1])
    recovery = invert(model, capture(model, x, targets), head=head_of(model, x, targets))
    assert recovery.status is Status.UNDERDETERMINED
    assert recovery.inputs is None
    short = [layer for layer in recovery.layers if layer.nullity]
    assert short
    assert f"{short[0].nullity} equations are missing" in recovery.reason


# --- losses, biases, buffers ----------------------------------------------------------------

SOFT = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]])
MIXED = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])  # mixup: a convex combination of two labels


@pytest.mark.cases(12)
@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (Loss(), LABEL),
        (Loss(reduction="sum"), LABEL),
        (Loss(label_smoothing=0.1), LABEL),
        (Loss(targets="probability"), SOFT),
        (Loss(targets="probability"), MIXED),
        (Loss("mse_loss"), torch.tensor([[0.3, -1.0, 2.0, 0.0, 5.0]])),
        (Loss("mse_loss", reduction="sum"), torch.tensor([[0.3, -1.0, 2.0, 0.0, 5.0]])),
        (Loss(BINARY), torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0]])),
        (Loss(BINARY, targets="probability"), SOFT),
    ],
    ids=lambda value: f"{value.name}-{value.reduction}" if isinstance(value, Loss) else "",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_loss_and_its_targets_come_back(
    model: nn.Module, loss: Loss, targets: Tensor, dtype: torch.dtype
) -> None:
    recovery = invert(model, capture(model, X, targets, loss, dtype=dtype))
    assert error(recovery, X) < (1e-3 if dtype == torch.float32 else 1e-8)
    assert recovery.labels is not None
    close = 1e-4 if dtype == torch.float32 else 1e-8
    assert torch.allclose(
        recovery.labels.double().flatten(), targets.double().flatten(), atol=close
    )


def test_a_loss_that_was_declared_wrongly_is_inconsistent(model: nn.Module) -> None:
    update = capture(model, X, LABEL, dtype=torch.float64)
    for wrong in (Loss(BINARY), Loss(label_smoothing=0.1)):
        recovery = invert(model, replace(update, loss=wrong))
        assert recovery.status is Status.INCONSISTENT, recovery.reason
        # The bias attack reads nothing of the loss: the inputs hold whatever it was.
        assert recovery.certified == {"inputs"} and recovery.labels is None
        assert float((recovery.inputs - X).abs().max()) <= recovery.error_bound
        assert wrong.name in recovery.reason


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_one_logit_finds_both_labels_and_both_signs(label: int, seed: int) -> None:
    model = small_mlp("leaky_relu", classes=1, bias=False, seed=seed)
    x = picture((2, 4, 4), seed)
    update = capture(model, x, torch.tensor([float(label)]), BINARY, dtype=torch.float64)
    recovery = invert(model, update)
    assert recovery.status in (Status.EXACT, Status.AMBIGUOUS), recovery.explain()
    answers = [(c.inputs, c.labels) for c in recovery.candidates] or [
        (recovery.inputs, recovery.labels)
    ]
    off = [
        float((found - x).abs().max()) + abs(float(said) - label)
        for found, said in answers
        if found is not None and said is not None
    ]
    assert min(off) < 1e-6


def test_the_seeds_above_meet_logits_of_both_signs() -> None:
    with torch.no_grad():
        logits = [
            float(small_mlp("leaky_relu", classes=1, bias=False, seed=s)(picture((2, 4, 4), s)))
            for s in range(6)
        ]
    assert min(logits) < 0 < max(logits)


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("build", [small_mlp, small_conv])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chains_without_biases(build: Any, classes: int, dtype: torch.dtype) -> None:
    shape = (2, 4, 4) if build is small_mlp else (2, 8, 8)
    model = build("leaky_relu", classes=classes, bias=False, seed=classes)
    x = picture(shape, classes)
    update = capture(model, x, torch.tensor([1]), dtype=dtype)
    recovery = invert(model, update)
    assert error(recovery, x) < (1e-2 if dtype == torch.float32 else 1e-6)
    assert labels_of(recovery) == [1]


def test_mse_without_a_bias_leaves_a_scale_free() -> None:
    model = small_mlp("leaky_relu", bias=False, seed=0)
    update = capture(model, picture((2, 4, 4), 0), torch.rand(1, 5), "mse_loss")
    recovery = invert(model, update)
    assert recovery.status is Status.UNDERDETERMINED
    assert "free scale" in recovery.reason


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics that the client's data moved away from the server's."""
    return {
        name: buffer * 1.5 + 0.1 if buffer.is_floating_point() else buffer + 3
        for name, buffer in model.named_buffers()
    }


@pytest.mark.parametrize("relative", [0.5, 1e-7])
def test_the_clients_buffers_are_used_where_they_differ(relative: float) -> None:
    server = small_conv("sigmoid", seed=0, norm=True).double()
    client = small_conv("sigmoid", seed=0, norm=True).double()
    with torch.no_grad():
        for buffer in client.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1 + relative).add_(0.1 * relative)
    sent = capture(client, X, LABEL)
    before = state(server)
    recovery = invert(server, sent)
    assert error(recovery, X) < 1e-8
    assert state(server) == before
    if relative == 0.5:
        silent = invert(server, replace(sent, buffers={}))
        assert silent.status is Status.INCONSISTENT


# --- networks that are no chain -------------------------------------------------------------


def chain(step: nn.Module, width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), step, nn.Flatten(), nn.Linear(width, 5)
    ).eval()


@pytest.mark.parametrize(
    ("network", "node"),
    [
        (chain(nn.MaxPool2d(2), 64), "'1'"),
        (chain(nn.GELU(), 256), "'1'"),
        (chain(nn.SiLU(), 256), "'1'"),
        (chain(nn.LayerNorm(8), 256), "'1'"),
        (nn.Sequential(nn.Conv2d(2, 5, 7), nn.Flatten()).eval(), "'0'"),
    ],
    ids=["max-pool", "gelu", "silu", "layer norm", "convolutional head"],
)
def test_what_has_no_inverse_is_unsupported_and_named(network: nn.Module, node: str) -> None:
    recovery = invert(network, capture(network, X, LABEL))
    assert recovery.status is Status.UNSUPPORTED
    assert recovery.inputs is None
    assert recovery.reason.count(node) == 1, recovery.reason
    assert "audit still measures every layer" in recovery.reason
    assert recovery.explain()


def test_average_pool_is_counted_not_refused() -> None:
    network = chain(nn.Sequential(nn.Sigmoid(), nn.AvgPool2d(2)), 64)
    recovery = invert(network, capture(network, X, LABEL))
    assert recovery.status is Status.UNDERDETERMINED
    assert recovery.inputs is None
    assert "192 equations are missing" in recovery.reason


# --- noise, memory --------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [1e-10, 1e-7, 1e-3])
def test_stated_noise_is_in_the_bound_or_the_answer_is_withheld(
    model: nn.Module, update: Update, noise: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    noisy = replace(
        update,
        gradients={
            name: g + noise * torch.randn(g.shape, generator=generator, dtype=g.dtype)
            for name, g in update.gradients.items()
        },
    )
    recovery = invert(model, noisy, noise=noise)
    if noise < 1e-3:
        assert recovery.exact, recovery.reason
        assert noise < error(recovery, X) <= recovery.error_bound
    else:
        assert recovery.status is Status.UNDERDETERMINED and recovery.inputs is None
    silent = invert(model, noisy)
    assert silent.status is Status.INCONSISTENT, "noise that is not stated refutes every answer"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_memory_budget_takes_the_route_without_matrices(
    model: nn.Module, dtype: torch.dtype
) -> None:
    with smallest_routes():
        recovery = invert(model, capture(model, X, LABEL, dtype=dtype))
    assert recovery.layer("conv0").route == "lsmr", recovery.reason
    assert error(recovery, X) < (1e-4 if dtype == torch.float32 else 1e-10)


def test_without_matrices_a_shortfall_is_seen_but_not_counted() -> None:
    deficient = small_conv("sigmoid", channels=2, stride=2, seed=0)
    with smallest_routes():
        recovery = invert(deficient, capture(deficient, X, LABEL))
    assert recovery.status is Status.UNDERDETERMINED
    assert recovery.inputs is None
    assert "memory_budget" in recovery.reason
    assert recovery.layer("conv0").nullity is None


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = logging.getLogger("rgap").level
    yield
    assert logging.getLogger("rgap").level == level, "logging is configured by the user alone"
