"""Real photographs: 32 that come with the package, and loaders for data sets already on disk.

Nothing here reaches for the network. ``rgap/data/ORIGINS.md`` names the author, the licence and
the crop of every photograph. All loaders return values in [0, 1], ``[N, channels, size, size]``.

>>> batch = load(4)
>>> batch.shape, batch.dtype
(torch.Size([4, 3, 32, 32]), torch.float64)
>>> names()[:2]
('astronaut-face', 'cat-left-eye')
"""

from __future__ import annotations

import functools
import io
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rgap.photos.datasets import cifar10, floating, mnist, resize, side, window

__all__ = ["cifar10", "folder", "load", "mnist", "names"]

# Neighbours come from different pictures: a batch of consecutive photographs has little in common.
_NAMES = (
    "astronaut-face",
    "cat-left-eye",
    "coffee-cup",
    "rocket-base",
    "pagoda-roof",
    "dahlia-heart",
    "galaxy-spiral",
    "retina-disc",
    "astronaut-badge",
    "cat-nose",
    "coffee-spoon",
    "rocket-lights",
    "pagoda-storeys",
    "dahlia-petals",
    "galaxy-red",
    "astronaut-shuttle",
    "cat-right-eye",
    "coffee-handle",
    "rocket-top",
    "pagoda-pine",
    "dahlia-edge",
    "galaxy-group",
    "astronaut-collar",
    "cat-stripes",
    "coffee-board",
    "pagoda-trees",
    "astronaut-flag",
    "cat-forehead",
    "dahlia-second",
    "pagoda-forest",
    "astronaut-orbiter",
    "cat-cheek",
)
_STORED = 64
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def names() -> tuple[str, ...]:
    """Names of the photographs that come with the package, in the order of :func:`load`.

    >>> len(names())
    32
    """
    return _NAMES


def load(
    count: int | None = None,
    size: int = 32,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Photographs that come with the package, in colour.

    Args:
        count: how many; None for all from ``start`` on.
        size: height and width. 64 gives the pixels as stored; 32, 16, 8, ... exact averages of
            their squares; other sizes area averages by ``torch.nn.functional.interpolate``.
        start: place of the first in :func:`names`.
        dtype: of the result.

    Returns:
        Values in [0, 1], ``[count, 3, size, size]``.

    Raises:
        TypeError: numbers that are not whole.
        ValueError: a size below 1 or above 64, more photographs than there are.

    Example:
        >>> load(2, 28, start=5).shape
        torch.Size([2, 3, 28, 28])
    """
    first, last = window(count, start, len(_NAMES), "photographs")
    size = side(size, _STORED)
    pictures = torch.stack([_photograph(name) for name in _NAMES[first:last]])
    return resize(pictures, size).to(floating(dtype))


def folder(
    path: str | Path,
    size: int = 32,
    count: int | None = None,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Pictures from a folder and the folders below it, sorted by path.

    Each is cut to its central square and area-averaged to ``size``; grey pictures get three equal
    channels, an opaque alpha channel is left out.

    Args:
        path: the folder.
        size: height and width.
        count: how many; None for all from ``start`` on.
        start: place of the first.
        dtype: of the result.

    Returns:
        Values in [0, 1], ``[count, 3, size, size]``.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
        TypeError: numbers that are not whole.
        ValueError: a file that is no picture, is transparent or smaller than ``size``; more
            pictures than there are.

    Example:
        >>> folder(str(resources.files("rgap.data")), 16, 3).shape
        torch.Size([3, 3, 16, 16])
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"path: expected a folder of pictures, found none at {root}.")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in _PICTURES and f.is_file())
    if not files:
        raise FileNotFoundError(
            f"path: no picture in {root}, expected files ending in {', '.join(_PICTURES)}."
        )
    first, last = window(count, start, len(files), "pictures")
    return torch.stack([_square(file, size) for file in files[first:last]]).to(floating(dtype))


@functools.cache
def _photograph(name: str) -> Tensor:
    """One photograph [3, 64, 64], float64; shared, so never handed out as it is."""
    return _read(io.BytesIO((resources.files("rgap.data") / f"{name}.png").read_bytes()))


def _read(source: Path | io.BytesIO) -> Tensor:
    """A picture [3, H, W], float64: its whole-number values over the largest."""
    from matplotlib.image import imread

    values = imread(source)
    if np.issubdtype(values.dtype, np.integer):
        values = values / np.iinfo(values.dtype).max
    else:
        # PNG files come as float32; v/255 and v/65535 are both whole multiples of 1/65535.
        values = np.rint(values.astype(np.float64) * 65535) / 65535
    if values.ndim == 2:
        values = np.repeat(values[:, :, None], 3, axis=2)
    if values.shape[2] == 4 and values[:, :, 3].min() < 1:
        raise ValueError("it is transparent; save it on a background first")
    return torch.from_numpy(np.ascontiguousarray(values[:, :, :3].transpose(2, 0, 1)))


def _square(file: Path, size: int) -> Tensor:
    """The central square of a picture, [3, size, size]."""
    try:
        picture = _read(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"path: expected a picture, cannot read {file} ({error}); move it out of the folder."
        ) from error
    height, width = picture.shape[1:]
    short = min(height, width)
    try:
        size = side(size, short)
    except ValueError as error:
        raise ValueError(f"{error} The picture is {file}, {width}×{height} pixels.") from None
    top, left = (height - short) // 2, (width - short) // 2
    return resize(picture[None, :, top : top + short, left : left + short], size)[0]
