"""Data sets already on disk, read without running anything that they contain.

Both loaders return ``(pictures, labels)``.  The binary version of CIFAR-10 and the idx-ubyte files
of MNIST are plain bytes; the python version of CIFAR-10 is pickles, which run whatever code they
hold when they are loaded, and is refused.
"""

from __future__ import annotations

import gzip
import math
import operator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["cifar10", "floating", "mnist", "resize", "side", "window"]

_CIFAR_SIDE = 32
_CIFAR_RECORD = 1 + 3 * _CIFAR_SIDE**2
_CIFAR_FILES = {
    True: tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    False: ("test_batch.bin",),
}
_MNIST_STEM = {True: "train", False: "t10k"}


def cifar10(
    path: str | Path,
    count: int | None = None,
    size: int = _CIFAR_SIDE,
    *,
    start: int = 0,
    train: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """CIFAR-10 from its binary version (``cifar-10-binary.tar.gz``, unpacked).

    Args:
        path: the folder ``cifar-10-batches-bin``, or one of its ``.bin`` files.
        count: how many; None for all from ``start`` on.
        size: height and width, 1 to 32.
        start: place of the first.
        train: the training pictures, or the test pictures; of no effect if ``path`` is a file.
        dtype: of the pictures.

    Returns:
        Values in [0, 1], ``[count, 3, size, size]``, and class indices ``[count]``, long.

    Raises:
        FileNotFoundError: no such file, or a folder without the batches.
        TypeError: numbers that are not whole, a dtype that is not floating.
        ValueError: pickles, a file of another format, more pictures than there are.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as at:
        ...     record = bytes([7]) + bytes([255]) * 3072
        ...     _ = Path(at, "test_batch.bin").write_bytes(record * 2)
        ...     pictures, labels = cifar10(at, train=False)
        >>> pictures.shape, labels
        (torch.Size([2, 3, 32, 32]), tensor([7, 7]))
    """
    files = _cifar_files(Path(path), train)
    sizes = [_cifar_count(file) for file in files]
    first, last = window(count, start, sum(sizes), "pictures")
    size = side(size, _CIFAR_SIDE)
    parts, offset = [], 0
    for file, held in zip(files, sizes, strict=True):
        low, high = max(first - offset, 0), min(last - offset, held)
        if low < high:
            flat = np.fromfile(
                file, np.uint8, (high - low) * _CIFAR_RECORD, offset=low * _CIFAR_RECORD
            )
            parts.append(flat.reshape(-1, _CIFAR_RECORD))
        offset += held
    records = np.concatenate(parts)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise ValueError(
            f"path: {path} has the label {labels.max()}, expected 0 to 9; it is not the binary "
            "version of CIFAR-10 (its files are data_batch_1.bin ... test_batch.bin)."
        )
    pixels = records[:, 1:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE)
    return _pictures(pixels, size, dtype), torch.from_numpy(labels)


def mnist(
    path: str | Path,
    count: int | None = None,
    size: int = 28,
    *,
    start: int = 0,
    train: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """MNIST, or another set in its format, from the idx-ubyte files, plain or ``.gz``.

    Args:
        path: the folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the
            ``t10k`` pair.
        count: how many; None for all from ``start`` on.
        size: height and width, 1 to 28.
        start: place of the first.
        train: the training pictures, or the test pictures.
        dtype: of the pictures.

    Returns:
        Values in [0, 1], ``[count, 1, size, size]``, and class indices ``[count]``, long.

    Raises:
        FileNotFoundError: a missing file.
        TypeError: numbers that are not whole, a dtype that is not floating.
        ValueError: a file of another format, two files that do not belong together, more pictures
            than there are.

    Example:
        >>> import struct, tempfile
        >>> with tempfile.TemporaryDirectory() as at:
        ...     head = struct.pack(">IIII", 0x803, 1, 28, 28)
        ...     _ = Path(at, "t10k-images-idx3-ubyte").write_bytes(head + bytes(784))
        ...     labels = struct.pack(">II", 0x801, 1) + bytes([4])
        ...     _ = Path(at, "t10k-labels-idx1-ubyte").write_bytes(labels)
        ...     pictures, labels = mnist(at, train=False)
        >>> pictures.shape, labels
        (torch.Size([1, 1, 28, 28]), tensor([4]))
    """
    root, stem = Path(path), _MNIST_STEM[train]
    pixels = _idx(root, f"{stem}-images", 3)
    labels = _idx(root, f"{stem}-labels", 1)
    if len(pixels) != len(labels):
        raise ValueError(
            f"path: {root} has {len(pixels)} pictures and {len(labels)} labels, expected one label "
            "per picture; the two files come from different sets."
        )
    if pixels.shape[1] != pixels.shape[2]:
        raise ValueError(f"path: expected square pictures, got {pixels.shape[1:]} in {root}.")
    first, last = window(count, start, len(pixels), "pictures")
    size = side(size, pixels.shape[1])
    chosen = torch.from_numpy(labels[first:last].astype(np.int64))
    return _pictures(pixels[first:last, None], size, dtype), chosen


def window(count: int | None, start: int, available: int, what: str) -> tuple[int, int]:
    """First place and the one after the last, checked against what is there.

    >>> window(None, 2, 5, "pictures")
    (2, 5)
    """
    first = _whole("start", start)
    if not 0 <= first < available:
        raise ValueError(
            f"start: expected 0 to {available - 1} ({available} {what}), got {start}; write "
            "start=0 for the first."
        )
    if count is None:
        return first, available
    wanted = _whole("count", count)
    if not 1 <= wanted <= available - first:
        raise ValueError(
            f"count: expected 1 to {available - first} {what} from start={first}, got {count}; "
            "write count=None for all of them."
        )
    return first, first + wanted


def side(size: int, largest: int) -> int:
    """The height and width asked for, at most ``largest``.

    >>> side(28, 32)
    28
    """
    wanted = _whole("size", size)
    if not 1 <= wanted <= largest:
        raise ValueError(
            f"size: expected 1 to {largest}, got {size}; there is no detail beyond it: load "
            f"size={largest} and write torch.nn.functional.interpolate(pictures, {size}) or "
            "torch.nn.functional.pad to enlarge."
        )
    return wanted


def resize(pictures: Tensor, size: int) -> Tensor:
    """Area-average square pictures ``[N, C, S, S]`` to ``[N, C, size, size]``.

    If ``size`` divides S, every value is the mean of its own square of pixels; otherwise
    ``torch.nn.functional.interpolate(mode="area")``, whose squares share pixels.

    >>> resize(torch.arange(4.0).reshape(1, 1, 2, 2), 1)
    tensor([[[[1.5000]]]])
    """
    n, channels, stored, _ = pictures.shape
    step, rest = divmod(stored, size)
    if rest:
        return interpolate(pictures, (size, size), mode="area")
    return pictures.reshape(n, channels, size, step, size, step).mean((3, 5))


def floating(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, refused if values in [0, 1] would be rounded away in it."""
    if not dtype.is_floating_point:
        raise TypeError(
            f"dtype: expected a floating dtype for values in [0, 1], got {dtype}; write "
            "torch.float64 or torch.float32."
        )
    return dtype


def _pictures(pixels: NDArray[np.uint8], size: int, dtype: torch.dtype) -> Tensor:
    values = torch.from_numpy(pixels.astype(np.float64) / 255)
    return resize(values, size).to(floating(dtype))


def _whole(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}: expected a whole number, got {value!r}; write int({value!r}) if it is meant."
        ) from None


def _cifar_files(path: Path, train: bool) -> list[Path]:
    if path.is_file():
        return [path]
    files = [path / name for name in _CIFAR_FILES[train]]
    for file in files:
        if file.is_file():
            continue
        if file.with_suffix("").is_file():
            raise ValueError(_refused(file.with_suffix("")))
        raise FileNotFoundError(
            f"path: {file} is missing; expected the unpacked cifar-10-binary.tar.gz (a folder "
            "with data_batch_1.bin ... data_batch_5.bin and test_batch.bin), or one of its files."
        )
    return files


def _cifar_count(file: Path) -> int:
    """How many records of CIFAR-10 a file holds."""
    with file.open("rb") as stream:
        # 0x80 opens every pickle since protocol 2, and is no label.
        if stream.read(1) == b"\x80":
            raise ValueError(_refused(file))
    length = file.stat().st_size
    if length == 0 or length % _CIFAR_RECORD:
        raise ValueError(
            f"path: {file} has {length} bytes, expected a multiple of {_CIFAR_RECORD} (a label and "
            "3×32×32 pixels); write the path of a .bin file of cifar-10-binary.tar.gz."
        )
    return length // _CIFAR_RECORD


def _refused(file: Path) -> str:
    return (
        f"path: {file} is a pickle (the python version of CIFAR-10), and loading a pickle runs "
        "whatever code it holds; expected the binary version: unpack cifar-10-binary.tar.gz and "
        "write the path of its folder cifar-10-batches-bin."
    )


def _idx(root: Path, stem: str, ndim: int) -> NDArray[np.uint8]:
    """The array in an idx file of unsigned bytes: two zeros, 8, ndim, the sizes, the values."""
    names = [f"{stem}{dot}idx{ndim}-ubyte{gz}" for gz in ("", ".gz") for dot in "-."]
    file = next((root / name for name in names if (root / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"path: {root / names[0]} is missing (.gz would do as well).")
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"path: {file} cannot be unpacked ({error}); copy it again.") from error
    head = 4 + 4 * ndim
    magic = bytes((0, 0, 8, ndim))
    shape = tuple(int(n) for n in np.frombuffer(raw[4:head].ljust(4 * ndim, b"\0"), ">u4"))
    if raw[:4] != magic or len(raw) != head + math.prod(shape) or len(raw) == head:
        raise ValueError(
            f"path: {file} is no idx{ndim} file of bytes: expected it to begin with "
            f"{magic.hex()}, got {raw[:4].hex()} and {len(raw)} bytes in all; "
            "copy it again from the original set."
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)
