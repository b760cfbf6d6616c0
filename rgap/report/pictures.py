"""Pictures in and out of files, whole files only: written beside their target, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = [
    "figure_format",
    "read_pictures",
    "replacing",
    "save_figure",
    "save_picture",
    "save_tensors",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PHOTOS = "photos:"


def read_pictures(sources: Sequence[str], shape: tuple[int, ...] | None) -> Tensor:
    """Read a batch of pictures in [0, 1], float64, [B, C, H, W].

    Args:
        sources: files, folders (their pictures in the order of their names), or the shipped
            photographs as ``photos:0-3``, ``photos:5`` or ``photos:0,4,7``.
        shape: (C, H, W) to bring every picture to (centred crop to that aspect, then resized);
            None keeps the files' own size, which must then be the same for all.

    Returns:
        One tensor, the sources in the order given.

    Raises:
        ValueError: no such source, no picture, sizes that differ, a shape that is no picture's.
    """
    import torch

    from rgap.photos.pixels import read_picture

    if shape is not None and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ValueError(
            f"--input-shape: expected channels,height,width with 1 or 3 channels for pictures, got "
            f"{','.join(map(str, shape))}"
        )
    pictures: list[Tensor] = []
    for source in sources:
        if source.startswith(PHOTOS):
            pictures += _photos(source.removeprefix(PHOTOS), shape)
        else:
            pictures += [read_picture(file, shape) for file in _files(source)]
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(
            f"--images: expected pictures of one size, got {sorted(shapes)}; write --input-shape "
            "3,32,32 to bring all of them to one"
        )
    return torch.stack(pictures)


def _photos(text: str, shape: tuple[int, ...] | None) -> list[Tensor]:
    import torch

    from rgap.photos import packaged as photos

    channels, height, width = shape or (3, 32, 32)
    count = len(photos.names())
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(
                f"--images: expected photos:0-3, photos:5 or photos:0,4, got {PHOTOS + text!r}"
            )
        chosen += range(int(first), int(last if dash else first) + 1)
    if not chosen or max(chosen) >= count:
        raise ValueError(f"--images: expected photographs 0 to {count - 1}, got {PHOTOS + text!r}")
    if height != width:
        raise ValueError(
            f"--input-shape: the shipped photographs are square, got {height} by {width}; give "
            "image files for other shapes"
        )
    loaded = [photos.load(count=1, size=height, start=i, dtype=torch.float64)[0] for i in chosen]
    return [p.mean(0, keepdim=True) if channels == 1 else p for p in loaded]


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"--images: no pictures ({', '.join(SUFFIXES[:4])} …) in {path}")
        return files
    if not path.is_file():
        raise ValueError(
            f"--images: no file or folder {source!r}; the shipped photographs are photos:0-3"
        )
    return [path]


def save_picture(picture: Tensor, path: Path, value_range: tuple[float, float] = (0, 1)) -> None:
    """Write one picture [C, H, W] as an 8-bit PNG; values beyond the range are clipped.

    Values that are NaN, as what an update leaves open is, become a checkerboard of greys.
    """
    from rgap.page import png

    with replacing(path) as beside:
        beside.write_bytes(png(picture, value_range))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file."""
    from rgap.update.storage import written

    written(path, {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's suffix names."""
    with replacing(path) as beside:
        figure.savefig(beside, dpi=200, format=figure_format(path))


def figure_format(path: Path, argument: str = "path") -> str:
    """The format that a figure's file name asks for.

    Args:
        path: of the figure.
        argument: what it was given as, for the error.

    Raises:
        ValueError: a suffix that matplotlib does not write.

    >>> figure_format(Path("heat.svg"))
    'svg'
    """
    known = ("png", "pdf", "svg", "eps", "jpg", "jpeg", "tif", "tiff", "webp")
    kind = path.suffix.lower().removeprefix(".")
    if kind not in known:
        raise ValueError(
            f"{argument}: expected a figure's file name such as {path.with_suffix('.png').name} "
            f"or {path.with_suffix('.pdf').name}, got {str(path)!r}"
        )
    return kind


@contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A name to write to, renamed over ``path`` once all is written and removed if that fails.

    Works for a file and for a folder (whose place must be free or an empty folder; with ``force``
    the folder that is there is moved away until the new one stands, then removed).

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with replacing(target) as beside:
    ...     _ = beside.write_text("whole")
    >>> target.read_text(), [file.name for file in target.parent.iterdir()]
    ('whole', ['note.txt'])
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    old = beside.with_suffix(".old")
    try:
        yield beside
        if beside.is_dir() and path.is_dir():
            if force:
                os.replace(path, old)
            else:
                path.rmdir()  # an empty folder; anything else raises
        os.replace(beside, path)
    except OSError as error:
        from rgap.update.storage import unwritable

        raise unwritable(path, error) from error
    finally:
        remove: Callable[..., Any] = shutil.rmtree if beside.is_dir() else os.unlink
        if beside.exists():
            remove(beside)
        if old.is_dir() and not path.exists():
            os.replace(old, path)
        elif old.is_dir():
            shutil.rmtree(old)
