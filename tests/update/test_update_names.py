"""Updates of wrapped models, of partly frozen ones, and in other orders and shapes."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from cases import dense
from torch import nn

from rgap.inversion.invert import invert
from rgap.labels import estimate
from rgap.matching.search import match
from rgap.update.capture import capture
from rgap.update.naming import renaming
from rgap.update.update import Update

SHAPE = (1, 6, 6)
X = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([2])


mlp = partial(dense, 36, 48, 60, 6)


def conv(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.Tanh(), nn.Conv2d(12, 20, 3, 1, 1),
        nn.Tanh(), nn.Flatten(), nn.Linear(180, 6),
    ).eval()  # fmt: skip


def right(model: nn.Module, update: Update) -> bool:
    found = invert(model, update)
    assert found.status.name == "EXACT", found.reason
    assert found.inputs is not None and found.error_bound is not None
    return float((found.inputs - X).abs().max()) <= found.error_bound


# --- wrapped ----------------------------------------------------------------------------------

PREFIXES = ["module.", "_orig_mod.", "_module.", "model.", "module._orig_mod.", "a.b."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapped", ["update", "model"])
def test_a_common_prefix_is_left_out_on_either_side(prefix: str, wrapped: str) -> None:
    model = conv()
    update = capture(model, X, Y)
    if wrapped == "update":
        named = {f"{prefix}{n}": g for n, g in update.gradients.items()}
        buffers = {f"{prefix}{n}": b for n, b in update.buffers.items()}
        update = dataclasses.replace(update, gradients=named, buffers=buffers)
        holder: nn.Module = model
    else:
        holder = model
        for word in reversed(prefix.rstrip(".").split(".")):
            outer = Holder()
            outer.add_module(word, holder)
            holder = outer.eval()
    assert right(holder, update)


class Holder(nn.Module):
    """Hands its only child's output on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(iter(self.children()))(x)


def test_a_wrapper_in_the_middle_is_left_out() -> None:
    model = mlp()
    update = capture(model, X, Y)
    inner = {n.replace("3.", "3.module."): g for n, g in update.gradients.items()}
    assert right(model, dataclasses.replace(update, gradients=inner))


def test_noise_follows_its_gradient_to_its_new_name() -> None:
    model = mlp()
    update = capture(model, X, Y)
    named = {f"module.{n}": g for n, g in update.gradients.items()}
    std = {n: torch.full_like(g, 1e-9) for n, g in named.items()}
    found = dataclasses.replace(update, gradients=named, noise=std).fitted(model)
    assert found.noise is not None and list(found.noise) == list(update.gradients)


@pytest.mark.parametrize(
    ("sent", "model"),
    [
        (["fc.weight", "fc.bias"], ["head.weight", "head.bias"]),  # another layer, no wrapper
        (["module.w", "_module.w"], ["w"]),  # the words tell them apart
        (["a.w", "b.w"], ["w", "v"]),
        (["0.w"], ["0.w", "1.w"]),  # nothing to do
    ],
)
def test_other_names_stay(sent: list[str], model: list[str]) -> None:
    assert renaming(sent, model) == {}


# --- frozen -----------------------------------------------------------------------------------


def frozen(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(not name.startswith(names))
    return twin


@pytest.mark.parametrize("way", ["absent", "zeros"])
@pytest.mark.parametrize(
    ("build", "names"),
    [
        (mlp, ("1.",)), (mlp, ("3.",)), (mlp, ("1.", "3.")), (mlp, ("1.bias", "5.bias")),
        (conv, ("0.",)), (conv, ("3.",)), (conv, ("0.", "1.", "3.")), (conv, ("1.", "6.bias")),
    ],
)  # fmt: skip
def test_frozen_layers_leave_their_weight_constraints(
    build: Any, names: tuple[str, ...], way: str
) -> None:
    model = build()
    update = capture(model, X, Y)
    kept = {n: g for n, g in update.gradients.items() if not n.startswith(names)}
    zeros = {n: kept.get(n, torch.zeros_like(g)) for n, g in update.gradients.items()}
    sent = dataclasses.replace(update, gradients=kept if way == "absent" else zeros)
    assert right(frozen(model, names), sent)


def test_a_frozen_layer_whose_weights_do_not_suffice_is_named_with_its_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 24), nn.Tanh(),
        nn.Linear(24, 6),
    ).eval()  # fmt: skip
    update = capture(model, X, Y)
    names = ("0.", "3.")
    kept = {n: g for n, g in update.gradients.items() if not n.startswith(names)}
    found = invert(frozen(model, names), dataclasses.replace(update, gradients=kept))
    assert found.status.name == "UNDERDETERMINED" and found.inputs is None
    assert "gradient of '3' was not sent" in found.reason
    assert "rank 24 for 36 unknowns: 12 equations are missing" in found.reason


@pytest.mark.parametrize("count", [1, 2])
def test_a_frozen_head_leaves_the_target_open(count: int) -> None:
    model = mlp()
    x, y = torch.rand(count, *SHAPE), torch.tensor([2, 4][:count])
    update = capture(model, x, y)
    kept = {n: g for n, g in update.gradients.items() if not n.startswith("5.")}
    found = invert(frozen(model, ("5.",)), dataclasses.replace(update, gradients=kept))
    assert found.status.name == "UNDERDETERMINED", found.reason
    assert "the last layer '5' was not sent" in found.reason


class Residual(nn.Module):
    """No chain: read from the data up to its lowest fully connected layer that was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(36, 40), nn.Linear(40, 40), nn.Linear(40, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x.flatten(1)).tanh()
        return self.c(h + self.b(h).tanh())


@pytest.mark.parametrize("names", [("a.",), ("b.",), ("a.bias",), ("c.",)])
def test_frozen_layers_of_a_network_that_is_no_chain_break_nothing(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    update = capture(model, X, Y)
    kept = {n: g for n, g in update.gradients.items() if not n.startswith(names)}
    found = invert(frozen(model, names), dataclasses.replace(update, gradients=kept))
    if names in (("a.",), ("a.bias",)):  # nothing else reads the data
        assert found.status.name == "UNSUPPORTED" and found.inputs is None, found.reason
    else:
        assert found.exact, found.reason
        assert float((found.inputs - X).abs().max()) <= found.error_bound


def test_a_missing_layer_that_the_model_trains_is_named_with_what_to_write() -> None:
    model = mlp()
    update = capture(model, X, Y)
    kept = {n: g for n, g in update.gradients.items() if not n.startswith("3.")}
    sent = dataclasses.replace(update, gradients=kept)
    with pytest.raises(
        ValueError, match=r"'3.weight' is missing and 1 more.*requires_grad_\(False"
    ):
        invert(model, sent)


def test_a_search_counts_on_no_gradient_that_was_not_sent() -> None:
    model = mlp()
    update = capture(model, X, Y)
    kept = {n: g for n, g in update.gradients.items() if not n.startswith("1.")}
    sent = dataclasses.replace(update, gradients=kept)
    found = match(frozen(model, ("1.",)), sent, labels=Y, iterations=12)
    assert found.nearest is not None
    assert float((found.nearest - X).abs().max()) < 0.05
    short = match(frozen(model, ("1.",)), sent, labels=Y, method="ig", iterations=3)
    assert short.nearest is not None


# --- counters, weights, orders ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [[], [1], [1, 1]])
def test_a_counter_of_batches_may_have_any_shape(shape: list[int]) -> None:
    model = conv()
    update = capture(model, X, Y)
    buffers = {
        n: b.reshape(shape) if n.endswith("num_batches_tracked") else b
        for n, b in update.buffers.items()
    }
    assert right(model, dataclasses.replace(update, buffers=buffers))


@pytest.mark.parametrize("moved", [0.0, 1e-4, 0.02])
def test_weights_where_gradients_are_expected_are_named(moved: float) -> None:
    model = mlp()
    rng = torch.Generator().manual_seed(0)
    weights = {
        n: p.detach() * (1 + moved * torch.randn(p.shape, generator=rng))
        for n, p in model.named_parameters()
    }
    update = Update(weights, batch_size=1, input_shape=SHAPE)
    for read in (invert, estimate, match):
        with pytest.raises(ValueError, match=r"the model's own parameters.*from_ndarrays\(.*lr="):
            read(model, update)  # type: ignore[operator]


def test_arrays_in_another_order_are_told_apart_by_shape() -> None:
    model = mlp()
    update = capture(model, X, Y)
    arrays = [g.numpy() for g in update.gradients.values()]
    turned = Update.from_ndarrays(model, arrays[::-1], batch_size=1, input_shape=SHAPE)
    assert list(turned.gradients) == list(update.gradients)
    assert right(model, turned)


def test_arrays_that_two_orders_fit_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    update = capture(model.eval(), torch.rand(1, 5), torch.tensor([1]))
    arrays = [g.numpy() for g in update.gradients.values()]
    with pytest.raises(ValueError, match=r"place 0 has shape \(2,\).*several have shape \(5,\)"):
        Update.from_ndarrays(model, arrays[::-1])
    with pytest.raises(ValueError, match=r"place 0 has shape \(7,\), expected \(5, 5\)"):
        Update.from_ndarrays(model, [torch.ones(7).numpy(), *arrays[1:]])


# --- the shape of a sample --------------------------------------------------------------------


def pooled() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 6),
    ).eval()  # fmt: skip


def test_a_shape_that_the_layers_fix_is_not_asked_for() -> None:
    flat = nn.Sequential(*mlp()[1:])
    update = dataclasses.replace(capture(flat, X.flatten(1), Y), input_shape=None)
    found = invert(flat, update)
    assert found.inputs is not None and found.inputs.shape == (1, 36)
    fixed = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(288, 6))
    update = dataclasses.replace(capture(fixed.eval(), X, Y), input_shape=None)
    assert right(fixed, update)
    assert match(fixed, update, labels=Y, iterations=1).nearest is not None


@pytest.mark.parametrize(
    ("model", "both"),
    [
        (pooled(), r"\(1, 2, 2\) and \(1, 3, 3\)|\(1, 1, 1\) and \(1, 2, 2\)"),
        (conv(), r"\(1, 5, 5\) and \(1, 6, 6\)"),  # a stride of 2 reads both alike
    ],
)
def test_a_shape_that_several_sizes_fit_is_asked_for(model: nn.Module, both: str) -> None:
    update = dataclasses.replace(capture(model, X, Y), input_shape=None)
    for read in (invert, match):
        with pytest.raises(ValueError, match=f"{both}.* both fit.*write input_shape="):
            read(model, update)  # type: ignore[operator]
    if both.startswith(r"\(1, 5"):
        found = invert(model, update, input_shape=SHAPE)
        assert found.status.name == "EXACT" and found.inputs is not None
        assert float((found.inputs - X).abs().max()) <= found.error_bound
    assert match(model, update, labels=Y, input_shape=SHAPE, iterations=1).nearest is not None


def test_a_stated_shape_is_overridden_and_checked() -> None:
    model = mlp()
    update = dataclasses.replace(capture(model, X, Y), input_shape=(1, 4, 9))
    assert invert(model, update, input_shape=SHAPE).inputs.shape == (1, *SHAPE)
    with pytest.raises(ValueError, match="input_shape"):
        invert(model, update, input_shape=(0, 36))
