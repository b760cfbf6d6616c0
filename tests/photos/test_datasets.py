"""CIFAR-10 and MNIST as they lie on disk, on files that the tests write."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgap.photos import packaged as photos

Pixels = NDArray[np.uint8]


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def cifar_records(count: int, seed: int) -> tuple[bytes, Pixels, list[int]]:
    pixels = noise(count, 3, 32, 32, seed=seed)
    labels = [(seed + i) % 10 for i in range(count)]
    raw = b"".join(bytes([c]) + p.tobytes() for c, p in zip(labels, pixels, strict=True))
    return raw, pixels, labels


@pytest.fixture
def cifar(tmp_path: Path) -> tuple[Path, Pixels, list[int]]:
    """Five training batches of 4 pictures, and a test batch of 3."""
    pixels, labels = [], []
    for i in range(1, 6):
        raw, some, named = cifar_records(4, i)
        (tmp_path / f"data_batch_{i}.bin").write_bytes(raw)
        pixels.append(some)
        labels += named
    (tmp_path / "test_batch.bin").write_bytes(cifar_records(3, 9)[0])
    return tmp_path, np.concatenate(pixels), labels


def test_cifar10_reads_across_batches(cifar: tuple[Path, Pixels, list[int]]) -> None:
    path, pixels, labels = cifar
    got, classes = photos.cifar10(path)
    assert np.array_equal(got.numpy(), pixels / 255)
    assert classes.tolist() == labels and classes.dtype == torch.int64
    for first, count in [(0, 1), (3, 2), (4, 4), (2, 11), (19, 1)]:
        some, theirs = photos.cifar10(path, count, start=first)
        assert torch.equal(some, got[first : first + count])
        assert theirs.tolist() == labels[first : first + count]
    halved, _ = photos.cifar10(path, 2, 16, dtype=torch.float32)
    torch.testing.assert_close(halved, got[:2].reshape(2, 3, 16, 2, 16, 2).mean((3, 5)).float())


def test_cifar10_reads_the_test_batch_and_single_files(
    cifar: tuple[Path, Pixels, list[int]],
) -> None:
    path, pixels, _ = cifar
    _, wanted, labels = cifar_records(3, 9)
    got, classes = photos.cifar10(path, train=False)
    assert np.array_equal(got.numpy(), wanted / 255) and classes.tolist() == labels
    one, _ = photos.cifar10(path / "data_batch_2.bin")
    assert np.array_equal(one.numpy(), pixels[4:8] / 255)


class Bomb:
    """Leaves a file behind where it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_cifar10_never_loads_a_pickle(tmp_path: Path, protocol: int) -> None:
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    trace = tmp_path / "loaded"
    for i in range(1, 6):
        (batches / f"data_batch_{i}").write_bytes(pickle.dumps(Bomb(trace), protocol))
    words = "is a pickle .* expected the binary version: unpack cifar-10-binary"
    for path in (batches, batches / "data_batch_1"):
        with pytest.raises(ValueError, match=words):
            photos.cifar10(path)
    assert not trace.exists()
    pickle.loads((batches / "data_batch_1").read_bytes())
    assert trace.exists()  # the pickle was live


def test_cifar10_says_what_is_wrong(cifar: tuple[Path, Pixels, list[int]]) -> None:
    path, _, _ = cifar
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin is missing"):
        photos.cifar10(path / "nowhere")
    with pytest.raises(ValueError, match="count: expected 1 to 20 pictures"):
        photos.cifar10(path, 21)
    with pytest.raises(ValueError, match="size: expected 1 to 32, got 33"):
        photos.cifar10(path, 1, 33)
    odd = path / "odd.bin"
    odd.write_bytes(bytes(3074))
    with pytest.raises(ValueError, match="has 3074 bytes, expected a multiple of 3073"):
        photos.cifar10(odd)
    odd.write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        photos.cifar10(odd)
    odd.write_bytes(bytes([11]) + bytes(3072))
    with pytest.raises(ValueError, match="label 11, expected 0 to 9"):
        photos.cifar10(odd)


def idx(values: Pixels) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.tobytes()


def write_mnist(path: Path, stem: str, dot: str = "-", pack: bool = False) -> tuple[Pixels, Pixels]:
    pixels, labels = noise(6, 28, 28, seed=len(stem)), noise(6, seed=1) % 10
    for kind, values in (("images", pixels), ("labels", labels)):
        raw = idx(values)
        name = f"{stem}-{kind}{dot}idx{values.ndim}-ubyte"
        if pack:
            (path / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (path / name).write_bytes(raw)
    return pixels, labels


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("pack", [True, False])
def test_mnist_reads_every_spelling(tmp_path: Path, train: bool, dot: str, pack: bool) -> None:
    pixels, labels = write_mnist(tmp_path, "train" if train else "t10k", dot, pack)
    got, classes = photos.mnist(tmp_path, train=train)
    assert np.array_equal(got.numpy(), pixels[:, None] / 255)
    assert classes.tolist() == labels.tolist() and classes.dtype == torch.int64
    some, theirs = photos.mnist(tmp_path, 2, 14, start=3, train=train, dtype=torch.float32)
    halved: Tensor = got[3:5].reshape(2, 1, 14, 2, 14, 2).mean((3, 5)).float()
    torch.testing.assert_close(some, halved)
    assert theirs.tolist() == labels[3:5].tolist()


def test_mnist_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte is missing"):
        photos.mnist(tmp_path)
    pixels, labels = write_mnist(tmp_path, "train")
    images, named = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    with pytest.raises(ValueError, match="size: expected 1 to 28, got 32"):
        photos.mnist(tmp_path, size=32)
    named.write_bytes(idx(labels[:5]))
    with pytest.raises(ValueError, match="6 pictures and 5 labels"):
        photos.mnist(tmp_path)
    named.write_bytes(idx(labels))
    for broken in (idx(pixels)[:-1], idx(pixels) + b"0", idx(labels), b"", idx(pixels[:0])):
        images.write_bytes(broken)
        with pytest.raises(ValueError, match=r"idx3-ubyte is no idx3 file of bytes"):
            photos.mnist(tmp_path)
    images.unlink()
    packed = gzip.compress(idx(pixels))
    for broken in (packed[:40], b"no archive"):
        images.with_name(f"{images.name}.gz").write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be unpacked"):
            photos.mnist(tmp_path)
    images.write_bytes(idx(noise(6, 28, 20)))
    with pytest.raises(ValueError, match="expected square pictures"):
        photos.mnist(tmp_path)
