"""Files of updates: what is written comes back, and nothing foreign is opened."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import rgap
from rgap.update.losses import Loss
from rgap.update.storage import opened
from rgap.update.update import Update


@pytest.fixture
def update() -> Update:
    """Two layers' worth of tensors, a buffer of integers, and labels."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (4, 3, 3, 3), "0.bias": (4,), "4.weight": (5, 16), "4.bias": (5,)}
    return Update(
        {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()},
        buffers={"1.running_var": torch.ones(4), "1.num_batches_tracked": torch.tensor(7)},
        batch_size=2,
        labels=torch.tensor([1, 4]),
        input_shape=(3, 4, 4),
    )


def same(a: Update, b: Update) -> bool:
    """All fields equal, order of the tensors included."""
    for group in ("gradients", "buffers"):
        one, other = getattr(a, group), getattr(b, group)
        if list(one) != list(other):
            return False
        if any(
            x.dtype != y.dtype or not torch.equal(x, y)
            for x, y in zip(one.values(), other.values(), strict=True)
        ):
            return False
    labels = a.labels is b.labels is None or torch.equal(a.labels, b.labels)  # type: ignore[arg-type]
    names = ("batch_size", "loss", "input_shape", "value_range", "dtype", "local_steps")
    return labels and all(getattr(a, n) == getattr(b, n) for n in names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(update: Update, tmp_path: Path, dtype: torch.dtype) -> None:
    cast = dataclasses.replace(
        update,
        # Backwards, because safetensors itself stores by name and size.
        gradients={k: v.to(dtype) for k, v in reversed(update.gradients.items())},
        dtype=dtype,
        loss=Loss("cross_entropy", "sum", 0.1, "index"),
        value_range=(-1.5, 2.5),
        local_steps=3,
    )
    cast.save(tmp_path / "u.safetensors")
    assert same(Update.load(tmp_path / "u.safetensors"), cast)
    assert os.listdir(tmp_path) == ["u.safetensors"]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    names=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True),
    batch=st.one_of(st.none(), st.integers(1, 10**9)),
    shape=st.one_of(st.none(), st.lists(st.integers(1, 99), min_size=1, max_size=4)),
    bounded=st.booleans(),
)
def test_any_names_and_fields_round_trip(
    tmp_path: Path, names: list[str], batch: int | None, shape: list[int] | None, bounded: bool
) -> None:
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return  # lone surrogates are no parameter names
    update = Update(
        {name: torch.full((place,), 0.5) for place, name in enumerate(names, 1)},
        batch_size=batch,
        input_shape=shape,  # type: ignore[arg-type]
        value_range=(0.0, 1.0) if bounded else None,
    )
    update.save(tmp_path / "u")
    assert same(Update.load(tmp_path / "u"), update)


def test_a_non_contiguous_gradient_is_saved(tmp_path: Path) -> None:
    update = Update({"w": torch.arange(6.0).reshape(2, 3).T})
    update.save(tmp_path / "u")
    assert same(Update.load(tmp_path / "u"), update)


class Bomb:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_refused_before_it_runs(tmp_path: Path, protocol: int) -> None:
    path, trap = tmp_path / "u.pt", tmp_path / "trap"
    path.write_bytes(pickle.dumps(Bomb(trap), protocol=protocol))
    with pytest.raises(ValueError, match="safetensors"):
        Update.load(path)
    assert not trap.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_save_is_refused_with_the_call_to_write(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "u.pt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"torch.load\(path, weights_only=True\)"):
        Update.load(path)


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    # 0x0280 = 640 is stored as the bytes 80 02, which also begin a pickle of protocol 2.
    for extra in range(700):
        update = Update({"w" * (1 + extra): torch.ones(1)})
        update.save(tmp_path / "u")
        start = (tmp_path / "u").read_bytes()[:2]
        if start in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            assert same(Update.load(tmp_path / "u"), update)
            return
    pytest.fail("no header of such a length was written")


@pytest.mark.parametrize("keep", [0, 4, 8, 9, 40, -1, -64])
def test_truncated_files(update: Update, tmp_path: Path, keep: int) -> None:
    update.save(tmp_path / "u")
    whole = (tmp_path / "u").read_bytes()
    (tmp_path / "u").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match="copy it again"):
        Update.load(tmp_path / "u")


def test_foreign_safetensors(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "u")
    with pytest.raises(ValueError, match="order, the loss and the batch size are missing"):
        Update.load(tmp_path / "u")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": "9"}, "format version '9'"),
        ({"update": "{"}, "not JSON"),
        ({"update": "{}"}, "lacks gradients, buffers, batch_size"),
        ({"update": '{"gradients": ["v"], "buffers": []}'}, "lacks batch_size"),
    ],
)
def test_edited_metadata(tmp_path: Path, change: dict[str, str], match: str) -> None:
    metadata = {"format": "rgap.update", "version": "1", "update": "{}", **change}
    save_file({"gradients/w": torch.ones(2)}, tmp_path / "u", metadata=metadata)
    with pytest.raises(ValueError, match=match):
        Update.load(tmp_path / "u")


def test_a_listed_tensor_that_is_absent(update: Update, tmp_path: Path) -> None:
    update.save(tmp_path / "u")
    raw = (tmp_path / "u").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    save_file({"gradients/0.weight": torch.ones(1)}, tmp_path / "u", metadata=metadata)
    with pytest.raises(ValueError, match=r"'gradients/0\.bias' that its metadata lists is missing"):
        Update.load(tmp_path / "u")


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "u").write_text("a long enough text file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Update.load(tmp_path / "u")
    with pytest.raises(FileNotFoundError):
        Update.load(tmp_path / "absent")


def test_a_failed_save_leaves_the_old_file(
    update: Update, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update.save(tmp_path / "u")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        dataclasses.replace(update, batch_size=None, labels=None).save(tmp_path / "u")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["u"]
    assert same(Update.load(tmp_path / "u"), update)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_advice_for_npz_reads_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "g.npz"
    save(path, weight=np.ones((2, 3), np.float32), bias=np.ones(2, np.float32))
    with pytest.raises(ValueError, match="arrays of NumPy") as refused:
        Update.load(path)
    line = str(refused.value).split("write ")[1].split(".save(")[0]
    line = line.replace("batch_size=..., loss=...", "batch_size=1")
    made = eval(line, {"Update": Update, "torch": torch, "np": np, "path": path})
    assert made.gradients["weight"].shape == (2, 3) and made.gradients["bias"].shape == (2,)


# --- files that have changed since ------------------------------------------------------------


def test_a_changed_file_is_refused_and_an_old_one_is_read(tmp_path: Path) -> None:
    model = rgap.models.mlp((6,), 3, input_shape=(1, 2, 2), seed=0)
    update = rgap.capture(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 2]))
    path = tmp_path / "update.safetensors"
    update.save(path)
    metadata, tensors = opened(path)
    name = next(iter(tensors))
    moved = {**tensors, name: tensors[name] + 1.0}
    for changed, words in ((tensors, {"note": "mine"}), (moved, {})):
        save_file(changed, path, {**metadata, **words})
        with pytest.raises(ValueError, match="leave 'digest' out of its metadata"):
            rgap.Update.load(path)
    save_file(moved, path, {n: t for n, t in metadata.items() if n != "digest"})
    assert set(rgap.Update.load(path).gradients) == set(update.gradients)


@pytest.mark.parametrize("seed", range(40))
def test_one_flipped_bit_is_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    """Of the name of the digest itself it takes the digest away, and nothing else."""
    model = rgap.models.mlp((3,), 2, input_shape=(1, 2, 2), seed=0)
    path = tmp_path / "update.safetensors"
    draw = torch.Generator().manual_seed(seed)
    update = rgap.capture(model, torch.rand(1, 1, 2, 2, generator=draw), torch.tensor([1]))
    update.save(path)
    held = bytearray(path.read_bytes())
    end = len(held) if seed % 2 else 8 + int.from_bytes(held[:8], "little")
    held[int(torch.randint(end, (1,), generator=draw))] ^= 1 << seed % 8
    path.write_bytes(held)
    told, again = "", None
    try:
        again = rgap.Update.load(path)
    except ValueError as error:
        told = str(error)
    assert path.name in told if again is None else same(again, update)


def test_a_damaged_zip_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "update.safetensors"
    torch.save({"w": torch.ones(2)}, path)
    whole = bytearray(path.read_bytes())
    start = whole.rindex(b"PK\x01\x02")  # of the table of contents
    whole[start] = 0
    path.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="expected safetensors") as caught:
        Update.load(path)
    assert "\n" not in str(caught.value)
