"""Pictures of every mode: their values come in as they are, or a line says why they cannot."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rgap.photos.pixels import read_picture

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
COLOURS = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
WIDE = RNG.integers(0, 65536, (6, 5)).astype(np.uint16)
FLOATS = RNG.random((6, 5)).astype(np.float32)


def with_alpha(table: np.ndarray, alpha: int = 255) -> np.ndarray:
    flat = table if table.ndim == 3 else table[..., None]
    return np.concatenate([flat, np.full((*flat.shape[:2], 1), alpha, np.uint8)], -1)


def palette(table: np.ndarray) -> Image.Image:
    """30 colours of its own, exactly."""
    image = Image.new("P", (5, 6))
    image.putpalette(table.reshape(-1).tolist())
    image.putdata(list(range(30)))
    return image


CASES: dict[str, tuple[Any, str, np.ndarray]] = {
    "grey": (Image.fromarray(BYTES), "png", BYTES / 255),
    "colours": (Image.fromarray(COLOURS), "png", COLOURS / 255),
    "black and white": (Image.fromarray(BYTES > 99), "png", (BYTES > 99) * 1.0),
    "16 bits": (Image.fromarray(WIDE), "png", WIDE / 65535),
    "16 bits, tiff": (Image.fromarray(WIDE), "tiff", WIDE / 65535),
    "palette": (palette(COLOURS), "png", COLOURS / 255),
    "palette, gif": (palette(COLOURS), "gif", COLOURS / 255),
    "grey, opaque": (Image.fromarray(with_alpha(BYTES)), "png", BYTES / 255),
    "colours, opaque": (Image.fromarray(with_alpha(COLOURS)), "png", COLOURS / 255),
    "floats": (Image.fromarray(FLOATS), "tiff", FLOATS.astype(np.float64)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_values_are_kept(name: str, tmp_path: Path) -> None:
    image, suffix, expected = CASES[name]
    image.save(tmp_path / f"a.{suffix}")
    found = read_picture(tmp_path / f"a.{suffix}")
    table = expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)
    assert found.dtype == torch.float64 and found.shape == table.shape
    assert np.allclose(found.numpy(), table, rtol=0, atol=1e-7)
    wide = read_picture(tmp_path / f"a.{suffix}", (3, 6, 5))
    assert np.allclose(wide.numpy(), np.broadcast_to(table, (3, 6, 5)), rtol=0, atol=1e-7)
    small = read_picture(tmp_path / f"a.{suffix}", (1, 3, 3))
    assert small.shape == (1, 3, 3) and 0 <= float(small.min()) <= float(small.max()) <= 1
    assert abs(float(small.mean()) - float(table.mean())) < 0.2


def deep_png(path: Path) -> None:
    """A PNG with 16 bits for each of three colours, which Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + RNG.integers(0, 256, 24, dtype=np.uint8).tobytes() for _ in range(4))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip


LOST: dict[str, tuple[Any, str, str]] = {
    "transparent": (Image.fromarray(with_alpha(COLOURS, 7)), "png", "100 % of the pixels"),
    "transparent grey": (Image.fromarray(with_alpha(BYTES, 0)), "png", "transparent"),
    "inks": (Image.new("CMYK", (4, 4)), "jpg", "CMYK, expected grey or RGB"),
    "32 bits": (Image.fromarray(WIDE.astype(np.int32)), "tiff", "32-bit integers"),
    "floats beyond": (Image.fromarray(300 * FLOATS), "tiff", "expected 0 to 1; scale it"),
    "no number": (Image.fromarray(FLOATS * np.float32("nan")), "tiff", "expected 0 to 1"),
}


@pytest.mark.parametrize("name", list(LOST))
def test_values_that_would_be_lost_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    image, suffix, words = LOST[name]
    image.save(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match=words) as said:
        read_picture(tmp_path / f"a.{suffix}")
    assert "\n" not in str(said.value)


def test_sixteen_bits_a_colour_are_refused(tmp_path: Path) -> None:
    deep_png(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="16 bits a colour, of which Pillow keeps 8"):
        read_picture(tmp_path / "deep.png")


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(ValueError, match=r"a\.png is damaged"):
        read_picture(file)
    file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no picture that Pillow can read"):
        read_picture(file)
