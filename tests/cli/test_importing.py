"""``rgap import``: what other libraries write becomes the update that they mean."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import rgap
from rgap.cli.app import app
from rgap.update import Update

LR = 0.1
State = dict[str, Tensor]
MODEL = "lenet5:input_shape=1x28x28"


def client() -> tuple[State, State, Update]:
    """Weights before and after a step, and the gradient between them."""
    model = rgap.models.lenet5(input_shape=(1, 28, 28), seed=0)
    with torch.no_grad():
        for p in model.parameters():  # no weights that a command would draw itself
            p.mul_(1.1)
    x = rgap.photos.load(2, 28).float().mean(1, keepdim=True)
    update = rgap.capture(model, x, torch.tensor([3, 5]))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    after = {n: t - LR * update.gradients[n] for n, t in before.items()}
    return before, after, update


def torch_file(state: State, path: Path) -> None:
    torch.save(OrderedDict(state), path)


def lightning(state: State, path: Path) -> None:
    inner = {f"net.{name}": t for name, t in state.items()}
    torch.save({"epoch": 3, "state_dict": inner, "optimizer_states": [{}]}, path)


def opacus(state: State, path: Path) -> None:
    torch.save({f"_module.{name}": t for name, t in state.items()}, path)


def tensors(state: State, path: Path) -> None:
    save_file({name: t.contiguous() for name, t in state.items()}, path)


def named_arrays(state: State, path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, **{name: t.numpy() for name, t in state.items()})


def flower(state: State, path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, *[t.numpy() for t in state.values()])


def a_list(state: State, path: Path) -> None:
    torch.save(list(state.values()), path)


WRITERS = (torch_file, lightning, opacus, tensors, named_arrays, flower, a_list)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["import", *words])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, ["import", *words])
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    return line


@pytest.mark.parametrize("write", WRITERS)
def test_weights_before_and_after(write: Callable[[State, Path], None], tmp_path: Path) -> None:
    before, after, update = client()
    write(before, tmp_path / "before")
    write(after, tmp_path / "after")
    out = tmp_path / "update.safetensors"
    words = run(
        "--model", MODEL, "--before", str(tmp_path / "before"), "--after", str(tmp_path / "after"),
        "--lr", str(LR), "--batch-size", "2", "-o", str(out),
    )  # fmt: skip
    assert f"{MODEL} {out}" in words
    read = Update.load(out)
    assert read.batch_size == 2 and read.input_shape == (1, 28, 28) and read.value_range is None
    expected = Update.from_delta(before, after, LR)
    for name, g in update.gradients.items():
        assert torch.equal(read.gradients[name], expected.gradients[name])
        assert torch.allclose(read.gradients[name].double(), g.double(), atol=1e-5)
        assert read.noise is not None and bool((read.noise[name] > 0).any())


@pytest.mark.parametrize("write", [w for w in WRITERS if w is not lightning])
def test_gradients(write: Callable[[State, Path], None], tmp_path: Path) -> None:
    _, _, update = client()
    write(dict(update.gradients), tmp_path / "sent")
    out = tmp_path / "update.safetensors"
    words = run(
        "--model", MODEL, "--gradients", str(tmp_path / "sent"), "--labels", "3,5",
        "--value-range", "0,1", "--output", str(out), "--json",
    )  # fmt: skip
    assert json.loads(words)["batch_size"] == 2
    read = Update.load(out)
    assert read.labels is not None and read.labels.tolist() == [3, 5]
    assert all(torch.equal(read.gradients[n], g) for n, g in update.gradients.items())


def test_what_was_imported_is_recovered(tmp_path: Path) -> None:
    model, x = rgap.models.mlp(seed=3), rgap.photos.load(1).float()
    update = rgap.capture(model, x, torch.tensor([3]))
    before = {f"module.{n}": t.clone() for n, t in model.state_dict().items()}
    torch.save(before, tmp_path / "before.pt")
    after = {n: t - update.gradients[n.removeprefix("module.")] for n, t in before.items()}
    torch.save(after, tmp_path / "after.pt")
    out, weights = tmp_path / "update.safetensors", str(tmp_path / "before.pt")
    run("--model", "mlp", "--before", weights, "--after", str(tmp_path / "after.pt"),
        "--lr", "1", "--batch-size", "1", "-o", str(out))  # fmt: skip
    result = CliRunner().invoke(
        app, ["invert", "mlp", str(out), "--weights", weights, "--quiet",
              "--output", str(tmp_path / "x.safetensors")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = rgap.invert(model, Update.load(out))
    assert found.inputs is not None
    assert float((found.inputs - x).abs().max()) < 1e-2


def test_prefixes(tmp_path: Path) -> None:
    before, after, _ = client()
    for name, state in (("before", before), ("after", after)):
        own = {f"student.{n}": t for n, t in state.items()}
        other = {f"teacher.{n}": 0.0 * t for n, t in state.items()}
        torch.save({**other, **own}, tmp_path / name)
    words = (
        "--model", MODEL, "--before", str(tmp_path / "before"), "--lr", "0.1",
        "--after", str(tmp_path / "after"), "-o", str(tmp_path / "u.safetensors"),
    )  # fmt: skip
    run(*words, "--prefix", "student.")
    wrong = refused(*words, "--force", "--prefix", "pupil.")
    assert "--prefix: expected" in wrong and "'teacher." in wrong


class Trap:
    """Unpickling this would leave a folder behind."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.mkdir, (Path("trap"),)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda p: torch.save({"w": torch.ones(2), "x": Trap()}, p), "holds Python objects"),
        (lambda p: torch.save(nn.Linear(2, 1), p), "holds Python objects"),
        (lambda p: torch.save(torch.ones(2), p), "holds a Tensor"),
        (lambda p: torch.save({"epoch": 3, "lr": 0.1}, p), "holds the entries 'epoch', 'lr'"),
        (lambda p: torch.save({"exp_avg": {"a": torch.ones(2)}}, p), "entries 'exp_avg'"),
        (lambda p: torch.save({"a": torch.ones(2).to_sparse()}, p), "no values of its own"),
        (lambda p: torch.save({"a": torch.ones(2, device="meta")}, p), "no values of its own"),
        (lambda p: torch.save({"a": torch.ones(2) * 1j}, p), "dtype torch.complex64"),
        (lambda p: torch.save({"a": torch.ones(2).to(torch.float8_e5m2)}, p), "float8_e5m2"),
        (lambda p: np.save(p, np.ones(2)), "is one array"),
        (lambda p: np.savez(p, np.array([{}], dtype=object)), "an array that is none of numbers"),
        (lambda p: np.savez(p, np.array(["a"])), "an array that is none of numbers"),
        (lambda p: p.write_bytes(b""), "is not a safetensors file"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(40)), "copy it again"),
        (lambda p: p.write_bytes(b"\x80\x02" + bytes(40)), "holds Python objects"),
        (lambda p: p.mkdir(), "got the folder"),
    ],
)
def test_what_holds_no_weights_is_one_line(
    made: Callable[[Path], object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("sent.npz")
    made(path)
    if not path.exists():  # NumPy adds its own suffix
        path = Path("sent.npz.npy")
    line = refused("--model", "mlp", "--gradients", str(path), "-o", "u.safetensors")
    assert line.startswith("rgap: error: --gradients: ") and words in line, line
    assert not Path("trap").exists() and not Path("u.safetensors").exists()


def test_options_that_need_each_other(tmp_path: Path) -> None:
    before, after, _ = client()
    torch.save(before, tmp_path / "b.pt")
    torch.save(after, tmp_path / "a.pt")
    b, a, out = str(tmp_path / "b.pt"), str(tmp_path / "a.pt"), str(tmp_path / "u.safetensors")
    start = "--model", MODEL, "-o", out
    assert "got neither" in refused(*start, "--before", b)
    assert "got both" in refused(*start, "--before", b, "--after", a, "--gradients", a)
    assert "--before: expected the weights" in refused(*start, "--after", a, "--lr", "0.1")
    assert "write --lr 0.01" in refused(*start, "--before", b, "--after", a)
    wrong = refused("--model", "mlp", "-o", out, "--before", b, "--after", a, "--lr", "0.1")
    assert "--before: 'fc1.weight' has shape (120, 256)" in wrong
    assert "--gradients: no file" in refused(*start, "--gradients", str(tmp_path / "none.pt"))


def test_a_checkpoint_with_weights_and_gradients(tmp_path: Path) -> None:
    before, _, update = client()
    torch.save({"model": before, "gradients": dict(update.gradients)}, tmp_path / "both.pt")
    words = "--model", MODEL, "-o", str(tmp_path / "u.safetensors")
    run(*words, "--gradients", str(tmp_path / "both.pt"))
    read = Update.load(tmp_path / "u.safetensors")
    assert all(torch.equal(read.gradients[n], g) for n, g in update.gradients.items())
    torch.save({"model": before, "state_dict": before}, tmp_path / "two.pt")
    gradients = str(tmp_path / "both.pt")
    told = refused(
        *words, "--force", "--before", str(tmp_path / "two.pt"), "--gradients", gradients
    )
    assert "--before" in told and "holds the entries 'model', 'state_dict'" in told
    told = refused(*words, "--force", "--gradients", gradients, "--lr", "0.1")
    assert "leave out --lr" in told


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_weights_before_that_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    before, after, _ = client()
    torch.save({n: t.to(dtype) for n, t in before.items()}, tmp_path / "b.pt")
    torch.save(after, tmp_path / "a.pt")
    told = refused(
        "--model", MODEL, "--before", str(tmp_path / "b.pt"), "--lr", "0.1",
        "--after", str(tmp_path / "a.pt"), "-o", str(tmp_path / "u.safetensors"),
    )  # fmt: skip
    assert told.startswith("rgap: error: --before: ") and f"has dtype {dtype}" in told
