"""The folders are the road: what the page on the architecture says of them is so."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_every_formula_stands_in_a_file_that_is_there() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`.*) \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) >= 20
    for row in rows:
        folder = Path()
        for name in re.findall(r"`([^`]+)`", row):
            place = Path(name) if "/" in name else folder / name
            folder = place.parent
            assert (ROOT / place).exists(), (
                f"docs/architecture.md names {place}, which is not there"
            )


def test_what_the_guide_to_contributing_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    names = re.findall(r"`([\w.]+(?:/[\w.]*)+)`", outside)
    assert len(names) >= 15
    for name in names:
        places = (ROOT / name, (ROOT / "rgap" / name).with_suffix(".py"))
        assert any(place.exists() for place in places), f"CONTRIBUTING.md names {name}"


def test_what_a_paragraph_names_is_in_its_folder() -> None:
    """A module, a folder, or what one of its modules defines."""
    for paragraph in re.split(r"\n\n|(?<=\.\s)(?=\*\*`)", PAGE):
        named = re.match(r"\*\*`((?:rgap|analysis|solvers)/(?:\w+/)*)`\*\*", paragraph)
        if named is None or named[1] == "rgap/":
            continue
        files = list((ROOT / named[1]).rglob("*.py"))
        text = "\n".join(path.read_text(encoding="utf-8") for path in files)
        known = {path.stem for path in files} | {path.parent.name for path in files}
        for name in re.findall(r"`(\w+)/?`", paragraph):
            defined = re.search(rf"^(def|class) {name}\b", text, flags=re.MULTILINE)
            assert name in known or defined, f"docs/architecture.md: {named[1]} has no {name}"


def test_every_station_of_the_road_is_on_the_page() -> None:
    for path in (ROOT / "rgap/inversion").glob("[!_]*.py"):
        assert f"`{path.stem}`" in PAGE, f"docs/architecture.md does not name {path.name}"


@pytest.mark.parametrize(("top", "most"), [("rgap", 10), ("analysis", 6)])
def test_few_modules_stand_outside_the_folders(top: str, most: int) -> None:
    assert len(list((ROOT / top).glob("*.py"))) <= most


def test_every_folder_has_a_paragraph_and_a_floor() -> None:
    floors = (ROOT / ".importlinter").read_text(encoding="utf-8")
    for top in ("rgap", "analysis"):
        for folder in sorted(p.parent for p in (ROOT / top).glob("*/__init__.py")):
            name = folder.name
            if name == "data":
                continue
            assert f"{name}/" in PAGE, f"docs/architecture.md has no paragraph on {top}/{name}"
            assert re.search(rf"\b{name}\b", floors), f"{top}/{name} has no floor"


def test_no_module_stands_beside_the_folder_of_its_name() -> None:
    for top in ("rgap", "analysis", "solvers"):
        for folder in (ROOT / top).glob("**/__init__.py"):
            assert not folder.parent.with_suffix(".py").exists()


def test_no_step_of_an_inversion_loads_the_compiler() -> None:
    """``torch.func`` and forward mode import ``torch._dynamo``, two seconds of every process."""
    rooms = ("network", "update", "head", "constraints", "separation", "recursion", "inversion")
    for room in rooms:
        for path in (ROOT / "rgap" / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"torch\.func\.(vjp|jvp|grad|hessian)|forward_ad", text), path
