"""A page for people: one HTML file with everything in it, that asks nothing of the network.

What is shown is a verdict and sections of paragraphs, tables, pictures and figures; how they look,
on a screen, a phone, in the dark and on paper, is in ``page.html``.  Every picture has words beside
it, every cell whose colour means something its number, so that nothing is said by colour alone.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import platform
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rgap._version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = [
    "Cell",
    "Drawing",
    "Page",
    "Part",
    "Pictures",
    "Section",
    "Shown",
    "Table",
    "Text",
    "Verdict",
    "extent",
    "picture",
    "pictures",
    "png",
]

Tone = Literal["given away", "partly", "open", "failed"]
HATCHING = (0.35, 0.65)  # greys of what is not known
WIDEST = 256  # pixels a side, beyond which every second or third is shown
ENLARGED = 160  # pixels that the longer side of a picture is shown at, on screens that have them


@dataclass(frozen=True)
class Verdict:
    """What the page comes to.

    Attributes:
        word: a status, as EXACT.
        tone: which colour it has.
        sentence: the same for someone who is no mathematician.
    """

    word: str
    tone: Tone
    sentence: str


@dataclass(frozen=True)
class Text:
    """A paragraph, or with ``items`` a list.

    Attributes:
        words: of the paragraph; "" for none.
        items: of the list below it.
    """

    words: str = ""
    items: Sequence[str] = ()
    kind: str = "text"


@dataclass(frozen=True)
class Cell:
    """Of a table.

    Attributes:
        words: in it.
        share: in [0, 1], how dark it is; None for none.
        told: when it is pointed at, and to who hears the page read.
    """

    words: str
    share: float | None = None
    told: str = ""


@dataclass(frozen=True)
class Table:
    """Rows whose first cell names them.

    Attributes:
        caption: what the table is of.
        head: of the columns.
        rows: cells, or words.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    kind: str = "table"

    @property
    def worded(self) -> set[int]:
        """Columns of words, by their place: they are read from the left and may be broken."""
        columns = zip(*self.cells, strict=True)
        return {
            place
            for place, column in enumerate(columns)
            if not all(_numeric(cell.words) for cell in column)
        }

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, every entry a cell."""
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]


@dataclass(frozen=True)
class Shown:
    """A picture on the page.

    Attributes:
        source: its bytes as an address.
        width: in pixels, as it is.
        height: likewise.
        words: below it.
        alt: to who does not see it.
    """

    source: str
    width: int
    height: int
    words: str
    alt: str

    @property
    def enlarged(self) -> int:
        """Width on the page: whole multiples of a small picture's pixels."""
        return self.width * max(1, ENLARGED // max(self.width, self.height))


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, each with its words."""

    shown: Sequence[Shown]
    kind: str = "pictures"


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        svg: as it stands in the page.
        alt: what it shows.
    """

    svg: str
    alt: str
    kind: str = "drawing"

    @classmethod
    def of(cls, figure: Figure, alt: str) -> Drawing:
        """Of a figure of matplotlib, whose ids are made this page's own."""
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None}, bbox_inches="tight")
        svg = stream.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        mark = f"f{abs(hash(svg)) % 10**8}-"
        svg = re.sub(r'\bid="', f'id="{mark}', svg)
        svg = re.sub(r'(href="|url\()#', rf"\1#{mark}", svg)
        svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
        return cls(svg, alt)


Part = Text | Table | Pictures | Drawing


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: of the page.
        verdict: what it comes to.
        sections: one after the other.
        settings: what was asked for, by name: shown at the end, with versions and the date.

    >>> page = Page("Audit", Verdict("OPEN", "open", "Nothing is given away."), [], {"seed": "0"})
    >>> html = page.html()
    >>> html.startswith("<!DOCTYPE html>"), "Nothing is given away." in html
    (True, True)
    """

    title: str
    verdict: Verdict
    sections: Sequence[Section]
    settings: Mapping[str, str]

    def html(self) -> str:
        """The whole page."""
        return str(_template().render(page=self, versions=_versions(), today=date.today()))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all.

        Args:
            path: of a file; one that is there is replaced.

        Raises:
            OSError: the place cannot be written to.
        """
        target = Path(path)
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            with beside.open("xb") as stream:  # never what is there, nor where a link leads
                stream.write(self.html().encode("utf-8", "replace"))
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        return target

    def _repr_html_(self) -> str:
        return f'<iframe style="width:100%;height:40em" srcdoc="{_quoted(self.html())}"></iframe>'

    def __repr__(self) -> str:
        titles = ", ".join(section.title for section in self.sections)
        return f"Page({self.title!r}, {self.verdict.word}, sections: {titles})"


def _numeric(text: str) -> bool:
    """True for a number, a share, or a dash for none."""
    return re.fullmatch(r"[\W\d]*(e[-+]\d+)?%?", text) is not None


def picture(
    data: Tensor, value_range: tuple[float, float] | None, words: str, alt: str
) -> Shown | None:
    """A sample as a picture; None for what is none: other channels than 1 or 3, no two sides."""
    if data.ndim != 3 or data.shape[0] not in (1, 3) or min(data.shape[1:]) < 2:
        return None
    ends = value_range or extent(data)
    if max(data.shape[1:]) > WIDEST:
        step = -(-max(data.shape[1:]) // WIDEST)
        data = data[:, ::step, ::step]
    coded = base64.b64encode(png(data, ends)).decode()
    height, width = data.shape[1:]
    return Shown(f"data:image/png;base64,{coded}", width, height, words, alt)


def pictures(shown: Iterable[Shown | None]) -> list[Part]:
    """Those that are pictures, side by side."""
    kept = [each for each in shown if each is not None]
    return [Pictures(kept)] if kept else []


def png(data: Tensor, value_range: tuple[float, float]) -> bytes:
    """A sample [C, H, W] as an 8-bit PNG; values beyond the range are clipped.

    Values that are NaN, as what an update leaves open is, become a checkerboard of greys.
    """
    import torch
    from PIL import Image

    low, high = value_range
    rows, columns = data.shape[-2:]
    odd = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2
    grey = torch.tensor(HATCHING, dtype=torch.float64)[odd] * (high - low) + low
    data = data.detach().cpu().double()
    data = torch.where(data.isnan(), grey, data)
    scaled = ((data - low) / (high - low)).clamp(0, 1) * 255
    table = scaled.round().byte().movedim(0, -1).numpy()
    stream = io.BytesIO()
    image = Image.fromarray(table[..., 0] if table.shape[-1] == 1 else table)
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def extent(data: Tensor) -> tuple[float, float]:
    """Smallest and largest value, as what is white and black where no range is stated."""
    known = data[data.isfinite()]
    if known.numel() == 0 or not float(known.max()) > float(known.min()):
        return 0.0, 1.0
    return float(known.min()), float(known.max())


def _quoted(html: str) -> str:
    return html.replace("&", "&amp;").replace('"', "&quot;")


def _versions() -> dict[str, str]:
    """What computed."""
    import torch

    return {
        "rgap": __version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
    }


@functools.cache
def _template():  # type: ignore[no-untyped-def]
    """The page's own, with everything that is put into it escaped."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((resources.files("rgap.page") / "page.html").read_text("utf-8"))
