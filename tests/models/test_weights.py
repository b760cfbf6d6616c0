"""Weights files: all of one, or nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import small_conv, small_mlp
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from rgap.models.weights import load_weights


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_tensor_and_digit_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    saved, model = (small_conv("tanh", norm=True, seed=seed) for seed in (0, 1))
    saved.to(dtype)
    save_model(saved, str(tmp_path / "w.safetensors"))
    load_weights(model, tmp_path / "w.safetensors")
    assert_unchanged(model, contents(saved))


class Tied(nn.Module):
    """One matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("kept", ["first.weight", "second.weight"])
def test_a_tied_tensor_is_stored_once_under_either_name(tmp_path: Path, kept: str) -> None:
    saved, model = Tied().double(), Tied()
    state = contents(saved)
    dropped = {"first.weight": "second.weight", "second.weight": "first.weight"}[kept]
    del state[dropped]
    save_file(state, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert model.first.weight is model.second.weight
    assert_unchanged(model, contents(saved))


State = dict[str, Tensor]


def renamed(state: State) -> State:
    state["extra"] = state.pop("head.bias")
    return state


def shortened(state: State) -> State:
    del state["head.bias"]
    return state


def lengthened(state: State) -> State:
    return state | {"extra": torch.zeros(1, dtype=torch.float64)}


def misshapen(state: State) -> State:
    return state | {"head.bias": torch.zeros(7, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (renamed, r"lacks 'head\.bias' and has besides 'extra'"),
        (shortened, r"it lacks 'head\.bias'; write"),
        (lengthened, r"it has besides 'extra'; write"),
        (misshapen, r"'head\.bias' has shape \(7,\) .* expected \(5,\)"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, spoiled: Callable[[State], State], words: str
) -> None:
    model = small_mlp("tanh", seed=0)
    before = contents(model)
    other = contents(small_mlp("tanh", seed=1).double())
    save_file(spoiled(other), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=words):
        load_weights(model, tmp_path / "w.safetensors")
    assert_unchanged(model, before)


def test_state_dicts_of_other_libraries(tmp_path: Path) -> None:
    wanted = contents(small_mlp("tanh", seed=1))
    torch.save(wanted, tmp_path / "state.pt")
    torch.save({f"_module.{n}": t for n, t in wanted.items()}, tmp_path / "wrapped.pt")
    torch.save({"state_dict": {f"net.{n}": t for n, t in wanted.items()}}, tmp_path / "a.ckpt")
    np.savez(tmp_path / "row.npz", *[t.numpy() for t in wanted.values()])
    for name in ("state.pt", "wrapped.pt", "a.ckpt", "row.npz"):
        model = small_mlp("tanh", seed=0)
        load_weights(model, tmp_path / name)
        assert_unchanged(model, wanted)


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    model = small_mlp("tanh", seed=0)
    before = contents(model)
    (tmp_path / "text.safetensors").write_text("hello, world")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_weights(model, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="no file"):
        load_weights(model, tmp_path / "absent.safetensors")
    assert_unchanged(model, before)
