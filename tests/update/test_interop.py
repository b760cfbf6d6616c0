"""Updates from parameter differences, breaching and Flower."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import normed
from torch import nn

from rgap.update.capture import capture
from rgap.update.update import Update


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return normed().eval()


INPUTS = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(7))
TARGETS = torch.tensor([1, 4])


def trained(steps: int, lr: float) -> tuple[nn.Module, nn.Module]:
    before, after = model().double(), model().double()
    optimiser = torch.optim.SGD(after.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(after(INPUTS.double()), TARGETS).backward()
        optimiser.step()
    return before, after


@pytest.mark.parametrize("kinds", ["mm", "ds", "md", "dm"])
def test_delta_of_one_step_is_the_gradient(kinds: str) -> None:
    before, after = trained(1, 0.5)
    first = before if kinds[0] == "m" else before.state_dict()
    last = after if kinds[1] == "m" else after.state_dict()
    found = Update.from_delta(first, last, lr=0.5, batch_size=2)
    truth = capture(before, INPUTS, TARGETS)
    found.check(before)
    assert found.batch_size == 2 and found.local_steps == 1
    assert list(found.buffers) == list(truth.buffers)
    for name, gradient in truth.gradients.items():
        assert torch.allclose(found.gradients[name], gradient, rtol=0, atol=1e-14)


def test_delta_records_several_steps() -> None:
    before, after = trained(3, 0.1)
    found = Update.from_delta(before, after, lr=0.1, steps=3)
    assert found.local_steps == 3 and "3 local steps" in repr(found)


def test_delta_of_half_precision_does_not_round_again() -> None:
    found = Update.from_delta(
        {"w": torch.tensor([1.0], dtype=torch.bfloat16)},
        {"w": torch.tensor([0.5], dtype=torch.bfloat16)},
        lr=0.3,
    )
    assert found.gradients["w"].item() == pytest.approx(0.5 / 0.3, rel=1e-6)
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("after", "lr", "steps", "match"),
    [
        ({}, 0.1, 1, "after: 'w' is missing"),
        ({"w": torch.ones(1), "v": torch.ones(1)}, 0.1, 1, "before: 'v' is missing"),
        ({"w": torch.ones(2)}, 0.1, 1, "shape"),
        ({"w": torch.ones(1)}, 0.0, 1, "lr"),
        ({"w": torch.ones(1)}, float("nan"), 1, "lr"),
        ({"w": torch.ones(1)}, 0.1, 0, "steps"),
    ],
)
def test_bad_deltas(after: dict[str, torch.Tensor], lr: float, steps: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Update.from_delta({"w": torch.ones(1)}, after, lr, steps)
    with pytest.raises(TypeError, match="state_dict"):
        Update.from_delta([1], after, 0.1)  # type: ignore[arg-type]


def payloads(network: nn.Module, **about: object) -> tuple[dict[str, object], dict[str, object]]:
    truth = capture(network, INPUTS, TARGETS)
    server = {
        "parameters": list(network.parameters()),
        "buffers": list(network.buffers()),
        "metadata": SimpleNamespace(
            shape=(3, 4, 4), classes=5, mean=[0.5, 0.4, 0.5], std=[0.25, 0.2, 0.2], normalize=True
        ),
    }
    metadata = {"num_data_points": 2, "labels": None, "local_hyperparams": None, **about}
    shared = {"gradients": list(truth.gradients.values()), "buffers": None, "metadata": metadata}
    return server, shared


@pytest.mark.parametrize("listed", [True, False])
def test_breaching(listed: bool) -> None:
    network = model()
    server, shared = payloads(network, labels=TARGETS)
    found = (
        Update.from_breaching([server], [shared], model=network)
        if listed
        else Update.from_breaching(server, shared, model=network)
    )
    found.check(network)
    assert found.batch_size == 2 and found.input_shape == (3, 4, 4)
    assert found.labels is not None and found.labels.tolist() == [1, 4]
    assert found.value_range == pytest.approx((-2.5, 3.0))
    assert list(found.buffers) == [n for n, _ in network.named_buffers()]


def test_breaching_without_names_says_what_to_write() -> None:
    network = model()
    found = Update.from_breaching(*payloads(network))
    assert list(found.gradients) == list("012345")
    with pytest.raises(ValueError, match="model=model"):
        found.check(network)


def test_breaching_local_updates_have_the_opposite_sign() -> None:
    before, after = trained(2, 0.5)
    server, shared = payloads(before, local_hyperparams={"lr": 0.5, "steps": 2})
    pairs = zip(after.parameters(), before.parameters(), strict=True)
    shared["gradients"] = [(a - b).detach() for a, b in pairs]
    found = Update.from_breaching(server, shared, model=before)
    expected = Update.from_delta(before, after, lr=0.5, steps=2)
    assert found.local_steps == 2
    for name, gradient in expected.gradients.items():
        assert torch.allclose(found.gradients[name], gradient, rtol=1e-12)


def test_breaching_takes_the_labels_of_every_local_step_in_their_order() -> None:
    """The labels beside the number of points are sorted, which is the order of no batch."""
    before, after = trained(2, 0.5)
    hyper = {"lr": 0.5, "steps": 4, "data_per_step": 1}
    hyper["labels"] = [torch.tensor([4]), torch.tensor([1]), torch.tensor([4]), torch.tensor([1])]
    server, shared = payloads(before, labels=torch.tensor([1, 4]), local_hyperparams=hyper)
    shared["gradients"] = [
        (a - b).detach() for a, b in zip(after.parameters(), before.parameters(), strict=True)
    ]
    found = Update.from_breaching(server, shared, model=before)
    assert found.labels is not None and found.labels.tolist() == [4, 1]
    assert found.batch_size == 2 and found.local_steps == 4
    hyper["labels"] = None
    assert Update.from_breaching(server, shared, model=before).labels.tolist() == [1, 4]


def test_breaching_differences_know_their_rounding() -> None:
    """The server's weights are in its payload: the same noise as from both sets of weights."""
    before, after = (m.float() for m in trained(1, 0.5))
    server, shared = payloads(before, local_hyperparams={"lr": 0.5, "steps": 1})
    pairs = zip(after.parameters(), before.parameters(), strict=True)
    shared["gradients"] = [(a - b).detach() for a, b in pairs]
    found = Update.from_breaching(server, shared, model=before)
    expected = Update.from_delta(before, after, lr=0.5)
    assert found.noise is not None and expected.noise is not None
    for name, std in expected.noise.items():
        assert torch.allclose(found.noise[name], std, rtol=0.01, atol=1e-12)
        assert torch.allclose(found.gradients[name], expected.gradients[name], rtol=1e-5)
    del server["parameters"]
    again = Update.from_breaching(server, shared, model=before)  # the model's own weights do too
    assert again.noise is not None and list(again.noise) == list(found.noise)
    with pytest.raises(ValueError, match="expected the 6 parameters that the server sent out"):
        Update.from_breaching(server, shared)


def test_bad_breaching_data() -> None:
    network = model()
    server, shared = payloads(network)
    with pytest.raises(ValueError, match="one query, got 2"):
        Update.from_breaching([server, server], shared)
    with pytest.raises(ValueError, match="'gradients' is missing"):
        Update.from_breaching(server, {})
    with pytest.raises(ValueError, match="expected the 2 parameters"):
        Update.from_breaching(server, shared, model=nn.Linear(2, 2))


def test_ndarrays_by_parameter_and_by_state_dict() -> None:
    network = model()
    truth = capture(network, INPUTS, TARGETS)
    arrays = [g.numpy() for g in truth.gradients.values()]
    found = Update.from_ndarrays(network, arrays, batch_size=2)
    found.check(network)
    assert all(torch.equal(found.gradients[k], v) for k, v in truth.gradients.items())
    with pytest.raises(ValueError, match=r"expected 6 .* or 9"):
        Update.from_ndarrays(network, arrays[:-1])
    with pytest.raises(TypeError, match="real numbers"):
        Update.from_ndarrays(network, [a.astype(object) for a in arrays])


def test_ndarrays_of_a_flower_client() -> None:
    before, after = trained(1, 0.5)
    arrays = [value.numpy() for value in after.state_dict().values()]
    found = Update.from_ndarrays(before, arrays, lr=0.5)
    found.check(before)
    truth = capture(before, INPUTS, TARGETS)
    for name, gradient in truth.gradients.items():
        assert torch.allclose(found.gradients[name], gradient, rtol=0, atol=1e-14)
    assert list(found.buffers) == list(truth.buffers)


@pytest.mark.parametrize("carried", [np.float64, np.dtype(">f4"), list, object])
def test_weights_round_as_the_client_kept_them_whatever_carried_them(carried: Any) -> None:
    before, after = (network.float() for network in trained(steps=1, lr=0.1))
    plain = [p.detach().numpy() for p in after.parameters()]
    sent = [p.tolist() if carried is list else p.astype(carried) for p in plain]
    if carried is object:
        sent = np.array([*plain, None], dtype=object)[:-1]
    expected = Update.from_ndarrays(before, plain, lr=0.1)
    update = Update.from_ndarrays(before, sent, lr=0.1)
    assert update.dtype == torch.float32
    assert update.noise is not None and expected.noise is not None
    for name, gradient in expected.gradients.items():
        assert torch.equal(update.gradients[name], gradient)
        assert torch.equal(update.noise[name], expected.noise[name])


def test_weights_of_half_precision_round_by_half_precision() -> None:
    before, after = (network.float() for network in trained(steps=1, lr=0.1))
    halved = {n: p.detach().half() for n, p in after.named_parameters()}
    expected = Update.from_delta(before, halved, lr=0.1)
    update = Update.from_delta(before, {n: p.float() for n, p in halved.items()}, lr=0.1)
    assert update.dtype == torch.float16
    assert update.noise is not None and expected.noise is not None
    assert all(torch.equal(update.noise[n], s) for n, s in expected.noise.items())


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ("weights.npz", r"got str; write list\(np\.load"),
        (Path("weights.npz"), r"PosixPath; write list\(np\.load"),
        ({"a": np.zeros(2)}, r"got dict; write Update\(gradients\)"),
        (SimpleNamespace(tensors=[b""]), r"write flwr\.common.parameters_to_ndarrays"),
        ([b"x"], r"got list; write \[np\.load"),
    ],
)
def test_what_is_no_list_of_arrays_is_named(arrays: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        Update.from_ndarrays(model(), arrays, lr=0.1)


def test_whole_numbers_are_no_weights() -> None:
    whole = [p.detach().numpy().astype("int64") for p in model().parameters()]
    with pytest.raises(TypeError, match=r"torch\.int64, expected weights"):
        Update.from_ndarrays(model(), whole, lr=0.1)
    with pytest.raises(TypeError, match=r"lr: expected a number, got '0\.1'; write lr=0\.01"):
        Update.from_ndarrays(model(), whole, lr="0.1")  # type: ignore[arg-type]
