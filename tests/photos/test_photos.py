"""The photographs that ship, and pictures from a folder."""

from __future__ import annotations

import itertools
import struct
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread, imsave
from numpy.typing import NDArray

from benchmarks import cut_photographs
from rgap.photos import packaged as photos

Pixels = NDArray[np.uint8]


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def stored(name: str) -> NDArray[np.float64]:
    """Whole-number pixels [64, 64, 3], read apart from the library."""
    with resources.as_file(resources.files("rgap.data") / f"{name}.png") as file:
        return np.rint(imread(file).astype(np.float64) * 255)


# The photographs that ship


def test_every_file_has_a_name_and_every_name_an_origin() -> None:
    folder = resources.files("rgap.data")
    files = [f.name.removesuffix(".png") for f in folder.iterdir() if f.name.endswith(".png")]
    assert len(photos.names()) == len(set(photos.names())) >= 24
    assert sorted(files) == sorted(photos.names())
    lines = (folder / "ORIGINS.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| `")]
    assert [row[1].strip("`").removesuffix(".png") for row in rows] == list(photos.names())
    assert all(len(row) == 7 and all(row[1:-1]) for row in rows)
    assert {row[4] for row in rows} <= {"CC0 1.0", "CC BY 2.0", "public domain"}


def test_the_files_are_small_and_in_colour() -> None:
    total = 0
    for name in photos.names():
        raw = (resources.files("rgap.data") / f"{name}.png").read_bytes()
        # width, height, bits per channel and colour type (2: RGB, no palette) of the IHDR chunk
        assert struct.unpack(">IIBB", raw[16:26]) == (64, 64, 8, 2), name
        total += len(raw)
    assert total < 400_000


def test_no_photograph_is_flat_grey_or_a_twin_of_another() -> None:
    pictures = photos.load(size=64)
    assert float(pictures.std((2, 3), correction=0).mean(1).min()) > 0.08
    assert float((pictures.amax(1) - pictures.amin(1)).mean((1, 2)).min()) > 0.02
    for a, b in itertools.combinations(range(len(pictures)), 2):
        difference = (pictures[a] - pictures[b]).square().mean().sqrt()
        assert float(difference) > 0.1, (photos.names()[a], photos.names()[b])


def test_boxes_of_one_picture_do_not_overlap() -> None:
    boxes: dict[str, list[tuple[int, ...]]] = {}
    text = (resources.files("rgap.data") / "ORIGINS.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("| `"):
            cells = line.split("|")
            boxes.setdefault(cells[2].strip(), []).append(tuple(map(int, cells[5].split(","))))
    assert sum(map(len, boxes.values())) == len(photos.names())
    for of_one in boxes.values():
        for a, b in itertools.combinations(of_one, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert all(right - left == low - top >= 64 for left, top, right, low in of_one)


def test_a_cut_averages_areas() -> None:
    script = cut_photographs
    picture = noise(200, 150, 3)
    doubled = script.cut(picture, 10, 30, 128)
    blocks = picture[30:158, 10:138].reshape(64, 2, 64, 2, 3).astype(float).mean((1, 3))
    assert np.array_equal(doubled, np.rint(blocks))
    weights = script.averaging(100)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights.sum(0), 64 / 100)  # every source pixel counts the same
    ramp = np.arange(100.0)
    np.testing.assert_allclose(weights @ ramp, (np.arange(64) + 0.5) * 100 / 64 - 0.5, atol=0.16)
    with pytest.raises(SystemExit, match="leaves the picture"):
        script.cut(picture, 100, 0, 64)


def test_the_script_cuts_what_is_stored() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    script = cut_photographs
    assert tuple(script.CROPS) == photos.names()
    pictures = {name: source.pixels() for name, source in script.SOURCES.items()}
    for name, (source, *box) in script.CROPS.items():
        fresh = script.cut(pictures[source], *box)
        # another libjpeg may decode a source picture one level off
        assert float(np.abs(fresh - stored(name)).max()) <= 1, name


# load


def test_size_64_is_what_is_stored() -> None:
    pictures = photos.load(size=64)
    assert tuple(pictures.shape) == (len(photos.names()), 3, 64, 64)
    for picture, name in zip(pictures, photos.names(), strict=True):
        assert np.array_equal(picture.numpy(), stored(name).transpose(2, 0, 1) / 255), name


@pytest.mark.parametrize("size", [32, 16, 8, 1])
def test_sizes_that_divide_64_are_exact_averages(size: int) -> None:
    step = 64 // size
    for picture, name in zip(photos.load(3, size), photos.names(), strict=False):
        blocks = stored(name).reshape(size, step, size, step, 3).mean((1, 3)) / 255
        np.testing.assert_allclose(picture.numpy(), blocks.transpose(2, 0, 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [28, 20, 63])
def test_other_sizes_are_area_averages(size: int) -> None:
    got = photos.load(2, size)
    whole = photos.load(2, 64)
    bounds = [(i * 64 // size, -(-(i + 1) * 64 // size)) for i in range(size)]
    for i, j in [(0, 0), (3, 7), (size - 1, 2), (size - 1, size - 1)]:
        (top, low), (left, right) = bounds[i], bounds[j]
        torch.testing.assert_close(
            got[:, :, i, j], whole[:, :, top:low, left:right].mean((2, 3)), rtol=0, atol=1e-14
        )


def test_start_and_count_choose_by_name() -> None:
    everything = photos.load()
    assert everything.dtype == torch.float64
    assert 0 <= float(everything.min()) < float(everything.max()) <= 1
    assert torch.equal(photos.load(3, start=4), everything[4:7])
    assert torch.equal(photos.load(start=30), everything[30:])
    assert torch.equal(photos.load(2, dtype=torch.float32), everything[:2].float())
    assert photos.load(np.int64(2), np.int64(16)).shape[0] == 2  # type: ignore[arg-type]


def test_a_batch_belongs_to_its_caller() -> None:
    before = photos.load(1, 64)
    photos.load(1, 64).zero_()
    assert torch.equal(photos.load(1, 64), before)


def test_consecutive_photographs_come_from_different_pictures() -> None:
    kinds = [name.split("-")[0] for name in photos.names()]
    assert all(len(set(kinds[i : i + 4])) == 4 for i in range(len(kinds) - 3))


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"size": 0}, ValueError, "size: expected 1 to 64, got 0"),
        ({"size": 65}, ValueError, "size: expected 1 to 64, got 65"),
        ({"size": 32.0}, TypeError, r"size: expected a whole number, got 32\.0"),
        ({"count": 0}, ValueError, "count: expected 1 to 32 photographs from start=0, got 0"),
        ({"count": 33}, ValueError, "count: expected 1 to 32 .* got 33"),
        ({"count": 3, "start": 30}, ValueError, "count: expected 1 to 2 .* start=30, got 3"),
        ({"start": 32}, ValueError, "start: expected 0 to 31"),
        ({"start": -1}, ValueError, "start: expected 0 to 31"),
        ({"dtype": torch.uint8}, TypeError, "dtype: expected a floating dtype"),
    ],
)
def test_load_says_what_is_wrong(
    options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        photos.load(**options)


# folder


def test_folder_reads_in_the_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    pixels = {
        name: noise(32, 32, 3, seed=i) for i, name in enumerate(["a.png", "b/c.png", "d.PNG"])
    }
    for name, values in pixels.items():
        imsave(tmp_path / name, values)
    (tmp_path / "notes.txt").write_text("no picture")
    got = photos.folder(tmp_path, 32)
    assert got.dtype == torch.float64
    for picture, values in zip(got, pixels.values(), strict=True):
        assert np.array_equal(picture.numpy(), values.transpose(2, 0, 1) / 255)
    assert torch.equal(photos.folder(str(tmp_path), 32, 1, start=1), got[1:2])
    halved = got.reshape(3, 3, 16, 2, 16, 2).mean((3, 5))
    torch.testing.assert_close(photos.folder(tmp_path, 16, dtype=torch.float32), halved.float())


def test_folder_takes_the_central_square(tmp_path: Path) -> None:
    values = noise(20, 33, 3)
    imsave(tmp_path / "wide.png", values)
    expected = values[:, 6:26].transpose(2, 0, 1) / 255
    assert np.array_equal(photos.folder(tmp_path, 20)[0].numpy(), expected)


def test_folder_reads_grey_pictures_and_jpeg(tmp_path: Path) -> None:
    from PIL import Image

    grey = noise(16, 16)
    Image.fromarray(grey).save(tmp_path / "1.png")
    deep = noise(16, 16).astype(np.uint16) * 257 + 3
    Image.fromarray(deep).save(tmp_path / "2.png")
    smooth = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None] * 12, (16, 16, 3))
    Image.fromarray(np.ascontiguousarray(smooth)).save(tmp_path / "3.jpg", quality=95)
    first, second, third = photos.folder(tmp_path, 16)
    assert np.array_equal(first.numpy(), np.repeat(grey[None] / 255, 3, 0))
    np.testing.assert_allclose(second[0].numpy(), deep / 65535, rtol=0, atol=1e-12)
    assert float((third - torch.tensor(smooth.transpose(2, 0, 1) / 255)).abs().max()) < 0.03


def test_folder_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder of pictures"):
        photos.folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected files ending in \.bmp"):
        photos.folder(tmp_path)
    imsave(tmp_path / "small.png", noise(20, 24, 3))
    with pytest.raises(ValueError, match=r"size: expected 1 to 20, got 32.*small\.png, 24×20"):
        photos.folder(tmp_path)
    with pytest.raises(ValueError, match="count: expected 1 to 1 pictures"):
        photos.folder(tmp_path, 16, 2)
    see_through = noise(20, 20, 4)
    imsave(tmp_path / "small.png", see_through)
    with pytest.raises(ValueError, match=r"small\.png \(it is transparent"):
        photos.folder(tmp_path, 16)
    see_through[:, :, 3] = 255
    imsave(tmp_path / "small.png", see_through)
    expected = see_through[:, :, :3].transpose(2, 0, 1) / 255
    assert np.array_equal(photos.folder(tmp_path, 20)[0].numpy(), expected)
    (tmp_path / "small.png").write_bytes(b"no picture at all")
    with pytest.raises(ValueError, match=r"cannot read .*small\.png"):
        photos.folder(tmp_path, 16)
