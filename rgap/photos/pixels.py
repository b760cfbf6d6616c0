"""The values of a picture file in [0, 1], whatever its mode: exactly, or not at all.

Pillow's own ``convert`` clips 16-bit values at 255, cuts floats to integers and drops an alpha
channel without a word.  Every mode is read here by what its numbers mean, and one whose values
would be lost is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["read_picture"]

_GREY = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_DEPTH = 16  # of a value in a wide grey picture


def read_picture(file: Path, shape: tuple[int, ...] | None = None) -> Tensor:
    """One picture in [0, 1], float64, [C, H, W].

    Args:
        file: the picture.
        shape: (C, H, W) to bring it to: centred crop to that aspect, then resized; None keeps its
            own size, and one channel where it has no colours.

    Raises:
        ValueError: no picture; values that Pillow cannot keep (16 bits a colour), that mean no
            light (inks, transparent pixels), or lie outside [0, 1] (float pictures).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            opened.load()
            image = _plain(opened, file)
    except UnidentifiedImageError as error:
        raise ValueError(f"--images: {file} is no picture that Pillow can read") from error
    except OSError as error:
        raise ValueError(f"--images: {file} is damaged ({error}); copy it again") from error
    grey = image.mode in ("L", "F") if shape is None else shape[0] == 1
    if image.mode != "F":
        image = image.convert("L" if grey else "RGB")
    if shape is not None and image.size != (shape[2], shape[1]):
        image = ImageOps.fit(image, (shape[2], shape[1]), Image.Resampling.LANCZOS)
    table = torch.from_numpy(np.asarray(image, dtype=np.float64).copy())
    if image.mode == "F":
        wide = table.clamp(0.0, 1.0)[None]  # resampling overshoots at edges, as 8 bits clip
        return wide if grey else wide.expand(3, -1, -1).clone()
    table = table / 255
    return table[None] if grey else table.movedim(-1, 0)


def _plain(image: Image, file: Path) -> Image:
    """The picture in mode L or RGB, or F with values in [0, 1]."""
    from PIL import Image as Pillow

    if image.mode not in _GREY and _png_depth(file) == _DEPTH:
        raise ValueError(
            f"--images: {file} has 16 bits a colour, of which Pillow keeps 8; write it with 8 bits "
            "a colour, or its values as a grey 16-bit picture each"
        )
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info
                              else "RGB")  # fmt: skip
    if image.mode in ("LA", "RGBA"):
        alpha = np.asarray(image.getchannel("A"))
        if alpha.min() < 255:
            share = 100 * float((alpha < 255).mean())
            raise ValueError(
                f"--images: {share:.0f} % of the pixels of {file} are transparent, and their "
                "colours are not what is seen; put it on a background first"
            )
        return image.convert(image.mode[:-1])
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("L", "RGB"):
        return image.copy()
    if image.mode == "F" or image.mode.startswith("I"):
        return Pillow.fromarray(_wide(image, file).astype(np.float32))
    raise ValueError(
        f"--images: {file} has the colours {image.mode}, expected grey or RGB; convert it to RGB "
        "with the colour profile that it was made for"
    )


def _wide(image: Image, file: Path) -> NDArray[np.float64]:
    """Values of a grey picture of more than 8 bits, in [0, 1]."""
    values: NDArray[np.float64] = np.asarray(image).astype(np.float64)
    if image.mode == "I" and _png_depth(file) != _DEPTH:
        raise ValueError(
            f"--images: {file} holds 32-bit integers, from {values.min():.0f} to "
            f"{values.max():.0f}, and nothing says which of them is white; write it with 16 bits, "
            "or as floats from 0 to 1"
        )
    if image.mode != "F":
        return np.divide(values, 2.0**_DEPTH - 1.0)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"--images: {file} holds floats from {values.min():.3g} to {values.max():.3g}, "
            "expected 0 to 1; scale it first"
        )
    return values


def _png_depth(file: Path) -> int | None:
    """Bits a channel of a PNG, which its header states; None for another file."""
    with file.open("rb") as stream:
        head = stream.read(25)
    return head[24] if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 25 else None
