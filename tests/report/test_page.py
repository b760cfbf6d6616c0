"""The pages that are handed on: whole, readable by everyone, asking nothing of the network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rgap
from rgap.cli.app import app
from rgap.page import Cell, Page, Section, Table, Text, Verdict
from rgap.recovery import Recovery, Status
from rgap.report.full import Beside, full
from rgap.update import Update

VOID = {"meta", "img", "br", "link", "path", "use", "rect"}
SHAPE = (1, 8, 8)


class Outline(HTMLParser):
    """What a reader of the screen, and a checker of accessibility, goes by."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.faults: list[str] = []
        self.feed(page)
        self.close()
        if self.open:
            self.faults.append(f"left open: {self.open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def faults(page: str) -> list[str]:
    """What WCAG 2.1 and the promise of one file forbid, of what can be read off the source."""
    outline = Outline(page)
    found = list(outline.faults)
    if outline.of("html")[0].get("lang") != "en":
        found.append("no language")
    for wanted in ("title", "main", "h1"):
        if len(outline.of(wanted)) != 1:
            found.append(f"expected one <{wanted}>")
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    found += [f"a heading skips to {b}" for a, b in pairwise(levels)
              if b > a + 1]  # fmt: skip
    found += ["a picture without words" for attrs in outline.of("img") if not attrs.get("alt")]
    found += ["a head cell without scope" for a in outline.of("th") if not a.get("scope")]
    if len(outline.of("caption")) != len(outline.of("table")):
        found.append("a table without a caption")
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    if len(set(ids)) < len(ids):
        found.append("an id twice")
    named = [a["aria-labelledby"] for _, a in outline.tags if "aria-labelledby" in a]
    found += [f"nothing has the id {name}" for name in named if name not in ids]
    if outline.of("script") or outline.of("link") or outline.of("iframe"):
        found.append("something to load")
    for _, attrs in outline.tags:
        for key in ("src", "href", "xlink:href", "style", "action"):
            value = attrs.get(key) or ""
            if re.search(r"(https?:)?//", value) and not value.startswith("data:image/png;"):
                found.append(f"asks the network: {value[:60]}")
    if re.search(r"url\(\s*['\"]?(https?:)?//|@import", page):
        found.append("a style asks the network")
    return found


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2.1 defines it."""

    def light(colour: str) -> float:
        code = colour.lstrip("#")
        code = "".join(c * 2 for c in code) if len(code) == 3 else code
        parts = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = sorted((light(one), light(other)))
    return (b + 0.05) / (a + 0.05)


def over(back: str, cell: tuple[int, ...], share: float) -> str:
    """A cell's colour on its background."""
    own = [int(back[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(
        f"{round(share * c + (1 - share) * o):02x}" for c, o in zip(cell, own, strict=True)
    )


def client(batch: int = 1, seed: int = 0) -> tuple[nn.Module, torch.Tensor, Update]:
    model = rgap.models.mlp((12,), 4, input_shape=SHAPE, seed=seed)
    x = rgap.photos.load(batch, 8).mean(1, keepdim=True).float()
    return model, x, rgap.capture(model, x, torch.arange(batch) % 4)


def narrow() -> tuple[nn.Module, torch.Tensor, Update]:
    """A network whose pool loses what no equation brings back."""
    layers = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)
    model = nn.Sequential(*layers).eval()
    x = rgap.photos.load(1, 8).mean(1, keepdim=True).float()
    return model, x, rgap.capture(model, x, torch.tensor([3]))


def recoveries() -> dict[str, tuple[Recovery, torch.Tensor]]:
    model, x, update = client()
    exact = rgap.invert(model, update)
    small, y, sent = narrow()
    wrong = Update(
        {n: torch.randn_like(g) for n, g in update.gradients.items()}, batch_size=1,
        input_shape=SHAPE,
    )  # fmt: skip
    made = {
        "EXACT": (exact, x),
        "COMPLETED": (rgap.invert(small, sent, complete=True), y),
        "UNDERDETERMINED": (rgap.invert(small, sent), y),
        "INCONSISTENT": (rgap.invert(model, wrong), x),
    }
    searched = rgap.match(model, update, time_limit=5, iterations=3)
    return {**made, "search": (searched, x)}


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Recovery, torch.Tensor]]:
    return recoveries()


@pytest.mark.parametrize(
    "name", ["EXACT", "COMPLETED", "UNDERDETERMINED", "INCONSISTENT", "search"]
)
def test_every_status_has_a_page(
    name: str, made: dict[str, tuple[Recovery, torch.Tensor]], tmp_path: Path
) -> None:
    recovery, x = made[name]
    page = recovery.report(x)
    html = page.html()
    assert faults(html) == []
    assert recovery.status.name in html and len(html) < 2_000_000
    assert page.verdict.sentence in html.replace("&#39;", "'")
    assert ("certificate that no other" in html) == (recovery.status.name == "EXACT")
    if name != "search":
        assert recovery.status.name == name
    else:
        assert "Nothing certifies" in page.verdict.sentence and "recovered" not in html
    path = page.save(tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == html and list(tmp_path.iterdir()) == [path]


def test_what_was_made_up_is_never_called_recovered(
    made: dict[str, tuple[Recovery, torch.Tensor]],
) -> None:
    html = made["COMPLETED"][0].report(made["COMPLETED"][1]).html()
    assert "completed: partly made up" in html and ": recovered" not in html


def test_each_picture_is_beside_its_own_original() -> None:
    model, x, update = client(3)
    recovery = rgap.invert(model, update)
    assert recovery.exact and recovery.inputs is not None
    turned = recovery.report(x.flip(0)).html()
    levels = [float(found) for found in re.findall(r", label \d, ([\d.]+) dB", turned)]
    assert len(levels) == 3 and min(levels) > 60


def test_words_of_others_are_escaped() -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    table = Table(evil, [evil, "b"], [[evil, Cell(evil, 0.5, evil)]])
    page = Page(evil, Verdict(evil, "open", evil), [Section(evil, [Text(evil, [evil]), table])],
                {evil: evil})  # fmt: skip
    html = page.html()
    assert "<script>" not in html and "<img" not in html
    assert faults(html) == []


def test_colours_can_be_told_apart_by_everyone() -> None:
    """4.5 : 1 for every text on every ground, in the light, in the dark and on paper."""
    html = Page("t", Verdict("v", "open", "s"), [], {}).html()
    modes = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    assert len(modes) == 3
    for mode in modes:
        colours = dict(re.findall(r"--(\w+): ([^;]+);", mode))
        cell = tuple(int(c) for c in colours["cell"].split(","))
        back = colours["back"] if len(colours["back"]) == 7 else "#ffffff"
        grounds = [colours["back"], colours["card"]]
        for name in ("text", "soft", "red", "amber", "green", "grey"):
            assert min(contrast(colours[name], ground) for ground in grounds) >= 4.5, (mode, name)
        for share in (0.0, 0.25, 0.55):
            assert contrast(colours["text"], over(back, cell, share)) >= 4.5


def test_an_audit_says_the_equation_of_every_cell() -> None:
    audit = rgap.analysis.audit(rgap.models.lenet5(input_shape=(1, 28, 28)), (1, 28, 28), (1, 2))
    html = audit.report().html()
    assert faults(html) == []
    for row in audit.rows:
        assert f"of {row.unknowns} unknowns, {row.nullity} missing" in html


def test_a_page_with_everything(tmp_path: Path) -> None:
    model, x, update = narrow()
    recovery = rgap.invert(model, update, complete=True)
    page = full(
        recovery,
        (0.0, 1.0),
        {"network": "small"},
        originals=x,
        prior="the prior 'natural'",
        beside=Beside(
            rgap.check(model, update),
            rgap.analysis.audit(model, SHAPE, (1, 2)),
            rgap.analysis.harden(model, SHAPE, changes=("batch size",)),
            rgap.analysis.made_up(model, recovery, update=update),
        ),
    )
    html = page.html()
    assert faults(html) == []
    assert "the prior 'natural'" in page.verdict.sentence and "<svg" in html
    titles = [section.title for section in page.sections]
    assert {"What was made up", "What would change this", "Is the update what it says?"} <= {
        *titles
    }


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    words = ["capture", "mlp", "--images", "photos:8", "--labels", "3", "-o", "u.safetensors"]
    assert run.invoke(app, words).exit_code == 0
    result = run.invoke(app, ["report", "mlp", "u.safetensors", "--originals", "photos:8",
                              "--batch-sizes", "1,2", "--quiet"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "EXACT: This update gives its one sample away" in result.output
    html = Path("report.html").read_text(encoding="utf-8")
    assert faults(html) == [] and html.count("<img ") == 2
    again = run.invoke(app, ["report", "mlp", "u.safetensors", "--quiet"])
    assert again.exit_code == 2 and "--force" in again.output
    told = run.invoke(app, ["report", "mlp", "u.safetensors", "--quiet", "-o", "b.html", "--json",
                            "--batch-sizes", "1"])  # fmt: skip
    assert json.loads(told.stdout)["status"] == "EXACT" and Path("b.html").exists()
    assert not list(tmp_path.glob(".*"))


def test_what_is_wrong_with_an_update_is_said() -> None:
    model, _, update = client()
    wrong = Update({n: -g for n, g in update.gradients.items()}, batch_size=1, input_shape=SHAPE)
    check = rgap.check(model, wrong)
    assert check.best is not None
    page = full(rgap.invert(model, wrong), None, {}, beside=Beside(check))
    html = page.html().replace("&#39;", "'")
    assert faults(page.html()) == []
    assert page.verdict.tone == "given away", "ratios of gradients do not know their sign"
    assert "Probably not." in html and check.best.claim in html


def made_of(status: Status, **fields: Any) -> Recovery:
    """A recovery by hand."""
    usual: dict[str, Any] = dict.fromkeys(
        ("inputs", "labels", "residual", "predicted_error", "error_bound")
    )
    return Recovery(**{**usual, "status": status, "layers": (), "reason": "by hand", **fields})


def test_of_several_batches_all_are_shown_and_none_is_called_recovered() -> None:
    torch.manual_seed(1)
    x = 0.1 + 0.8 * torch.rand(1, 1, 8, 8).double()
    layers = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.LeakyReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(384, 1, bias=False)).double().eval()
    with torch.no_grad():
        model[3].weight.mul_(2 / float(model(x)))
    loss = "binary_cross_entropy_with_logits"
    update = rgap.capture(model, x, torch.ones(1), loss, dtype=torch.float64)
    recovery = rgap.invert(model, update)
    assert recovery.status is Status.AMBIGUOUS and len(recovery.candidates) == 2
    html = recovery.report(x).html()
    assert html.count("not certified") >= 2 and "recovered" not in html
    assert "leaves 2 batches" in html and faults(html) == []


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.EXACT])
@pytest.mark.parametrize("certified", [True, False])
def test_only_what_is_certified_is_called_recovered(status: Status, certified: bool) -> None:
    x = torch.rand(2, 1, 8, 8)
    recovery = made_of(status, inputs=x, certified=frozenset(["inputs"] if certified else []))
    page = recovery.report(x)
    called = ": recovered" in page.html()
    assert called == (certified and status is not Status.COMPLETED)
    assert (page.verdict.tone == "given away") == certified


def test_known_entries_alone_pair_a_sample_with_its_original() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        x = torch.rand(4, 1, 8, 8, generator=draw)
        order = torch.randperm(4, generator=draw)
        partial = x[order].clone()
        partial[torch.rand(x.shape, generator=draw) < 0.7] = torch.nan
        known = partial.isfinite()
        recovery = made_of(Status.UNDERDETERMINED, partial=partial, determined=known)
        html = recovery.report(x).html()
        found = [int(n) for n in re.findall(r": original (\d)", html)]
        assert found == order.tolist()


def test_fewer_originals_and_no_range() -> None:
    x = torch.rand(3, 1, 8, 8)
    recovery = made_of(Status.EXACT, inputs=x, certified=frozenset(["inputs"]))
    html = recovery.report(x[1:2]).html()
    assert html.count(": original 0") == 1 and "1: recovered, equal" in html
    wide = made_of(Status.EXACT, inputs=255 * x + 1, certified=frozenset(["inputs"]))
    html = wide.report(255 * x, None).html()
    assert "rms error 1" in html and " dB" not in html


@pytest.mark.parametrize(
    ("originals", "value_range", "words"),
    [
        (torch.rand(2, 1, 9, 9), (0.0, 1.0), r"originals: expected .*\[B, 1, 8, 8\], got"),
        (torch.rand(0, 1, 8, 8), (0.0, 1.0), "originals: expected"),
        ([1.0], (0.0, 1.0), "got list"),
        (torch.full((2, 1, 8, 8), torch.nan), (0.0, 1.0), "finite"),
        (None, (1.0, 0.0), "value_range"),
    ],
)
def test_originals_that_are_none(originals: Any, value_range: Any, words: str) -> None:
    recovery = made_of(Status.EXACT, inputs=torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=words):
        recovery.report(originals, value_range)


def test_large_pictures_make_no_large_page(tmp_path: Path) -> None:
    x = torch.rand(16, 3, 512, 512)
    page = made_of(Status.EXACT, inputs=x, certified=frozenset(["inputs"])).report(x)
    assert len(page.html()) < 2_000_000 and "more are not shown" in page.html()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".r.html.part").symlink_to(victim)
    page.save(tmp_path / "r.html")
    assert victim.read_text() == "mine" and not (tmp_path / "r.html").is_symlink()
