"""Cut the photographs in rgap/data from the sample pictures of scikit-image and scikit-learn.

Only this script needs the two packages (pip install scikit-image scikit-learn); the library reads
the PNG files.

    python -m benchmarks.cut_photographs            write rgap/data/*.png and rgap/data/ORIGINS.md
    python -m benchmarks.cut_photographs --check    compare what is stored with a fresh cut
    python -m benchmarks.cut_photographs --stored   judge what is stored; needs neither package

The crops of one picture never overlap, every crop varies (mean standard deviation of its channels
above 0.08), and no two are alike (root mean square difference above 0.1). The script stops if one
of these fails.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.arguments import Arguments

SIDE = 64
SMALLEST_STD = 0.08
SMALLEST_DIFFERENCE = 0.1
DATA = Path(__file__).resolve().parents[1] / "rgap" / "data"


@dataclass(frozen=True)
class Source:
    """A sample picture: where it lies in which package, who made it, what it may be used for."""

    package: str
    path: str
    title: str
    author: str
    licence: str
    url: str

    def pixels(self) -> NDArray[np.uint8]:
        """The whole picture [H, W, 3]."""
        if self.package == "scikit-learn":
            from sklearn.datasets import load_sample_image

            return np.asarray(load_sample_image(Path(self.path).name))
        from skimage import data, io

        return np.asarray(io.imread(Path(data.__file__).parent / Path(self.path).name))


CC0 = "CC0 1.0 (no copyright restrictions)"
CC_BY = "CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/)"
FLICKR = "https://www.flickr.com/photos"

SOURCES = {
    "astronaut": Source(
        "scikit-image",
        "skimage/data/astronaut.png",
        "Eileen Collins",
        "NASA",
        "public domain (no known copyright restrictions)",
        "https://flic.kr/p/r9qvLn",
    ),
    "chelsea": Source(
        "scikit-image",
        "skimage/data/chelsea.png",
        "Chelsea the cat",
        "Stéfan van der Walt",
        CC0,
        "https://scikit-image.org/docs/stable/api/skimage.data.html",
    ),
    "coffee": Source(
        "scikit-image",
        "skimage/data/coffee.png",
        "Coffee cup, courtesy of Pikolo Espresso Bar",
        "Rachel Michetti",
        CC0,
        "https://scikit-image.org/docs/stable/api/skimage.data.html",
    ),
    "rocket": Source(
        "scikit-image",
        "skimage/data/rocket.jpg",
        "Falcon 9 with DSCOVR",
        "SpaceX",
        "public domain (released by SpaceX)",
        f"{FLICKR}/spacexphotos/16511594820/",
    ),
    "hubble": Source(
        "scikit-image",
        "skimage/data/hubble_deep_field.jpg",
        "Hubble eXtreme Deep Field",
        "NASA (Hubble Space Telescope)",
        "public domain (may be freely used, says NASA)",
        "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
    ),
    "retina": Source(
        "scikit-image",
        "skimage/data/retina.jpg",
        "Fundus photograph of a normal left eye",
        "Mikael Häggström",
        "CC0 1.0",
        "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
    ),
    "china": Source(
        "scikit-learn",
        "sklearn/datasets/images/china.jpg",
        "china.jpg",
        "danielbuechele",
        CC_BY,
        f"{FLICKR}/danielbuechele/6061409035/",
    ),
    "flower": Source(
        "scikit-learn",
        "sklearn/datasets/images/flower.jpg",
        "flower.jpg",
        "vultilion",
        CC_BY,
        f"{FLICKR}/vultilion/6056698931/",
    ),
}

# name: source, left, top, side. In the order of rgap.photos.names(): neighbours come from different
# pictures, so that a batch of consecutive photographs has little in common.
CROPS: dict[str, tuple[str, int, int, int]] = {
    "astronaut-face": ("astronaut", 146, 8, 176),
    "cat-left-eye": ("chelsea", 128, 72, 96),
    "coffee-cup": ("coffee", 152, 8, 192),
    "rocket-base": ("rocket", 256, 288, 128),
    "pagoda-roof": ("china", 130, 30, 144),
    "dahlia-heart": ("flower", 250, 160, 128),
    "galaxy-spiral": ("hubble", 90, 370, 64),
    "retina-disc": ("retina", 120, 540, 256),
    "astronaut-badge": ("astronaut", 116, 320, 128),
    "cat-nose": ("chelsea", 204, 196, 104),
    "coffee-spoon": ("coffee", 306, 226, 96),
    "rocket-lights": ("rocket", 60, 310, 112),
    "pagoda-storeys": ("china", 110, 176, 160),
    "dahlia-petals": ("flower", 180, 130, 64),
    "galaxy-red": ("hubble", 700, 440, 64),
    "astronaut-shuttle": ("astronaut", 352, 0, 160),
    "cat-right-eye": ("chelsea", 266, 96, 96),
    "coffee-handle": ("coffee", 190, 224, 96),
    "rocket-top": ("rocket", 282, 130, 72),
    "pagoda-pine": ("china", 536, 140, 104),
    "dahlia-edge": ("flower", 384, 160, 96),
    "galaxy-group": ("hubble", 260, 80, 64),
    "astronaut-collar": ("astronaut", 124, 186, 134),
    "cat-stripes": ("chelsea", 30, 64, 96),
    "coffee-board": ("coffee", 0, 180, 96),
    "pagoda-trees": ("china", 320, 300, 120),
    "astronaut-flag": ("astronaut", 0, 96, 112),
    "cat-forehead": ("chelsea", 170, 0, 72),
    "dahlia-second": ("flower", 300, 363, 64),
    "pagoda-forest": ("china", 0, 316, 108),
    "astronaut-orbiter": ("astronaut", 352, 160, 112),
    "cat-cheek": ("chelsea", 60, 170, 120),
}


def averaging(side: int) -> NDArray[np.float64]:
    """Weights [64, side]: which part of each source pixel lies under each stored pixel."""
    edges = np.arange(SIDE + 1) * side / SIDE
    pixel = np.arange(side)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.asarray(np.clip(overlap, 0, None) * SIDE / side)


def cut(picture: NDArray[np.uint8], left: int, top: int, side: int) -> NDArray[np.uint8]:
    """The crop's area average [64, 64, 3], in the stored (gamma-encoded) values."""
    crop = picture[top : top + side, left : left + side].astype(np.float64)
    if crop.shape != (side, side, 3):
        raise SystemExit(f"crop {(left, top, side)} leaves the picture {picture.shape}")
    weights = averaging(side)
    average = np.einsum("ai,ijc,bj->abc", weights, crop, weights, optimize=True)
    return np.asarray(np.rint(average), dtype=np.uint8)


def check(cuts: dict[str, NDArray[np.uint8]]) -> None:
    """Stop if crops overlap, hardly vary, or are alike."""
    for (a, (source, x, y, k)), (b, (other, u, v, m)) in itertools.combinations(CROPS.items(), 2):
        if source == other and x < u + m and u < x + k and y < v + m and v < y + k:
            raise SystemExit(f"{a} and {b} overlap")
    scaled = {name: pixels / 255 for name, pixels in cuts.items()}
    for name, pixels in scaled.items():
        std = pixels.std((0, 1)).mean()
        if std <= SMALLEST_STD:
            raise SystemExit(f"{name} is flat: standard deviation {std:.3f}")
    for a, b in itertools.combinations(scaled, 2):
        difference = np.sqrt(((scaled[a] - scaled[b]) ** 2).mean())
        if difference <= SMALLEST_DIFFERENCE:
            raise SystemExit(f"{a} and {b} are alike: root mean square difference {difference:.3f}")


def origins() -> str:
    """The text of ORIGINS.md."""
    lines = [
        "# Where the photographs come from",
        "",
        "Written by `benchmarks/cut_photographs.py`. Each PNG file is a square crop of one of the "
        f"pictures below, reduced to {SIDE}×{SIDE} pixels by exact area average: every stored "
        "pixel is the mean of the source pixels under it, parts of pixels counted in proportion, "
        "computed in float64 on the gamma-encoded values of the file and rounded once. Nothing "
        "else was changed. Crops of one picture do not overlap.",
        "",
        "## Pictures",
        "",
        "| picture | package, file | author | licence | origin |",
        "|---|---|---|---|---|",
    ]
    for name, s in SOURCES.items():
        where = f"{s.package} {version(s.package)}, `{s.path}`"
        lines.append(f"| {name}: {s.title} | {where} | {s.author} | {s.licence} | <{s.url}> |")
    lines += [
        "",
        "The authors and licences are those that the packages state: scikit-image in the "
        "docstrings of `skimage.data`, scikit-learn in `sklearn/datasets/images/README.txt`. The "
        "crops carry the licence of their picture; those of `china` and `flower` need their "
        "author named wherever they are shown.",
        "",
        "## Crops",
        "",
        "In the order of `rgap.photos.names()`; the box is left, top, right, bottom in pixels of "
        "the picture, right and bottom excluded.",
        "",
        "| file | picture | author | licence | box |",
        "|---|---|---|---|---|",
    ]
    for name, (source, left, top, side) in CROPS.items():
        s = SOURCES[source]
        box = f"{left}, {top}, {left + side}, {top + side}"
        short = s.licence.split(" (")[0]
        lines.append(f"| `{name}.png` | {source} | {s.author} | {short} | {box} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the photographs, or compare them."""
    parser = Arguments(__doc__, stored=True)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--stored", action="store_true", help="judge what is stored, cut nothing")
    parser.add_argument("--folder", type=Path, default=DATA, help="where the files go")
    options = parser.parse_args()
    from PIL import Image

    files = {name: options.folder / f"{name}.png" for name in CROPS}
    if options.stored:
        check({name: np.asarray(Image.open(file)) for name, file in files.items()})
        print(f"{len(files)} photographs differ, vary and do not overlap: {options.folder}")
        return 0
    pictures = {name: source.pixels() for name, source in SOURCES.items()}
    cuts = {name: cut(pictures[source], *box) for name, (source, *box) in CROPS.items()}
    check(cuts)
    different = []
    for name, pixels in cuts.items():
        file = files[name]
        if options.check:
            stored = np.asarray(Image.open(file)).astype(int)
            # Another libjpeg may decode a source picture one level off.
            if stored.shape != pixels.shape or np.abs(stored - pixels).max() > 1:
                different.append(name)
        else:
            Image.fromarray(pixels).save(file, optimize=True)
    if different:
        sys.exit(f"different from a fresh cut: {', '.join(different)}")
    if not options.check:
        (options.folder / "ORIGINS.md").write_text(origins(), encoding="utf-8")
    print(f"{len(cuts)} photographs {'agree' if options.check else 'written'}: {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
