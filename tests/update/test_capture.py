"""Capture: autograd's gradient, the client's precision, and a model left as it was."""

from __future__ import annotations

import copy
import gc
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import normed, state
from torch import Tensor, nn

from rgap.update.capture import capture
from rgap.update.losses import Loss

RNG = torch.Generator().manual_seed(11)
INPUTS = torch.rand(2, 3, 6, 6, generator=RNG)
TARGETS = torch.tensor([1, 4])


class Residual(nn.Module):
    """No chain: a skip connection, functional calls, a weight used twice, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.unused = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(108, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.conv(x))
        return self.head(F.gelu(self.conv(x)).flatten(1))


class Counter(nn.Module):
    """Writes to a buffer and an attribute in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(108, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(108), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.linear(x)


def convolutional() -> nn.Module:
    return normed(dropout=True)


MODELS: list[Callable[[], nn.Module]] = [convolutional, Residual, Counter]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = request.param().eval()
    return made


def reference(model: nn.Module, loss: Loss, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradient by a plain backward pass of a copy."""
    twin = copy.deepcopy(model).to(dtype)
    loss(twin(INPUTS.to(dtype)), TARGETS).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in twin.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [Loss(), Loss(reduction="sum", label_smoothing=0.1)], ids=str)
def test_the_gradient_is_autograds_in_the_models_order(
    model: nn.Module, loss: Loss, dtype: torch.dtype
) -> None:
    expected = reference(model, loss, dtype)
    update = capture(model, INPUTS, TARGETS, loss, dtype=dtype)
    assert list(update.gradients) == [n for n, _ in model.named_parameters()]
    assert update.dtype == dtype and update.loss == loss and update.batch_size == 2
    assert update.input_shape == (3, 6, 6)
    for name, gradient in update.gradients.items():
        assert gradient.dtype == dtype and not gradient.requires_grad
        assert torch.equal(gradient, expected[name]), name
    update.check(model)


def test_a_double_model_keeps_its_precision_and_bfloat16_too(model: nn.Module) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        update = capture(copy.deepcopy(model).to(dtype), INPUTS, TARGETS)
        assert update.dtype == dtype
        assert {g.dtype for g in update.gradients.values()} == {dtype}


def test_float32_is_truly_float32_even_under_autocast_and_no_grad(model: nn.Module) -> None:
    plain = capture(model, INPUTS, TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        wrapped = capture(model, INPUTS, TARGETS)
    with torch.inference_mode():
        inferred = capture(model, INPUTS.clone(), TARGETS)
    double = capture(model, INPUTS, TARGETS, dtype=torch.float64)
    for name, gradient in plain.gradients.items():
        assert torch.equal(wrapped.gradients[name], gradient)
        assert torch.equal(inferred.gradients[name], gradient)
    assert any(not torch.equal(double.gradients[n].float(), g) for n, g in plain.gradients.items())


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        ("binary_cross_entropy_with_logits", 1, torch.tensor([0, 1])),
        ("binary_cross_entropy_with_logits", 3, torch.tensor([[0, 1, 1], [1, 0, 1]])),
        ("mse_loss", 3, torch.rand(2, 3)),
        (nn.CrossEntropyLoss(label_smoothing=0.2), 3, torch.tensor([0, 2])),
        (Loss(targets="probability"), 2, torch.tensor([[0.25, 0.75], [1.0, 0.0]])),
    ],
)
def test_every_loss(loss: Any, outputs: int, targets: Tensor) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, outputs)).eval()
    update = capture(network, INPUTS, targets, loss)
    k = Loss.of(loss).cotangent(network(INPUTS).detach(), targets)
    assert torch.allclose(update.gradients["1.bias"], k.sum(0), atol=1e-6)


# --- manners --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("grads", [True, False])
def test_the_model_is_left_as_it_was(
    model: nn.Module, dtype: torch.dtype | None, grads: bool
) -> None:
    handle = model.register_forward_hook(lambda *_: None)
    if grads:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    before = state(model)
    capture(model, INPUTS, TARGETS, dtype=dtype)
    assert state(model) == before
    handle.remove()


def test_the_model_is_left_as_it_was_after_an_error(model: nn.Module) -> None:
    before = state(model)
    with pytest.raises(ValueError, match="forward pass failed"):
        capture(model, torch.rand(2, 3, 5, 9), TARGETS)
    with pytest.raises(ValueError, match="class indices"):
        capture(model, INPUTS, torch.tensor([0, 99]))
    assert state(model) == before


def test_random_state_is_left_as_it_was(model: nn.Module) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    python_state = random.getstate()
    capture(model, INPUTS, TARGETS)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert random.getstate() == python_state


def test_inputs_and_targets_are_left_as_they_were() -> None:
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 5)).eval()
    inputs, targets = (INPUTS - 0.5).requires_grad_(), TARGETS.clone()
    kept = inputs.detach().clone()
    capture(network, inputs, targets, value_range=None)
    assert torch.equal(inputs, kept) and inputs.grad is None and torch.equal(targets, TARGETS)


def test_user_hooks_run_as_on_the_client(model: nn.Module) -> None:
    seen: list[torch.Size] = []
    handle = model.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    capture(model, INPUTS, TARGETS)
    handle.remove()
    assert seen == [torch.Size([2, 5])]


def reachable(root: object) -> Iterator[Tensor]:
    """Every tensor that can be reached from ``root``, gradients' graphs included."""
    seen: set[int] = set()
    todo: list[object] = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            assert item.grad_fn is None
            yield item
        todo.extend(gc.get_referents(item))


class PassThrough(nn.Module):
    """dL/d(shift) is a multiple of x - y itself."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize("share", [True, False])
def test_inputs_and_targets_are_never_stored(model: nn.Module, share: bool) -> None:
    update = capture(model, INPUTS, TARGETS, share_labels=share)
    found = list(reachable(update))
    assert len(found) == len(update.gradients) + len(update.buffers) + share
    private = {INPUTS.untyped_storage().data_ptr(), TARGETS.untyped_storage().data_ptr()}
    for tensor in found:
        assert tensor.untyped_storage().data_ptr() not in private
        assert tensor.shape != INPUTS.shape or not torch.equal(tensor, INPUTS)
        if not share:
            assert tensor.shape != TARGETS.shape or not torch.equal(tensor, TARGETS)
    assert (update.labels is not None) == share
    assert share or repr(update).endswith("labels unknown)")


def test_no_gradient_shares_memory_with_the_batch() -> None:
    inputs, targets = torch.rand(2, 3), torch.rand(2, 3)
    update = capture(PassThrough(), inputs, targets, "mse_loss")
    pointer = update.gradients["shift"].untyped_storage().data_ptr()
    assert pointer not in (
        inputs.untyped_storage().data_ptr(),
        targets.untyped_storage().data_ptr(),
    )


def test_what_is_shared(model: nn.Module) -> None:
    hidden = capture(model, INPUTS, TARGETS, share_batch_size=False)
    assert hidden.batch_size is None and hidden.labels is None
    shared = capture(model, INPUTS, TARGETS, share_labels=True)
    assert shared.labels is not None and torch.equal(shared.labels, TARGETS)
    with pytest.raises(ValueError, match="gives the batch size away"):
        capture(model, INPUTS, TARGETS, share_labels=True, share_batch_size=False)


def test_buffers_are_those_before_the_forward_pass() -> None:
    counter = Counter().eval()
    update = capture(counter, INPUTS, TARGETS)
    assert update.buffers["calls"].item() == 0 and not update.buffers["mean"].any()


def test_logits_under_a_loss_of_probabilities() -> None:
    """The sentence says what to write, and torch adds none of its own."""
    model, ones = nn.Linear(3, 1).double().eval(), torch.ones(1, 3, dtype=torch.float64)
    with torch.no_grad():
        model.bias.fill_(-9.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="binary_cross_entropy_with_logits"):
            capture(model, ones, ones[:, :1], loss="binary_cross_entropy")
