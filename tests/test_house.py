"""The folders are the road: what the page on the architecture says of them is so."""

import ast
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


@pytest.mark.parametrize(("top", "most"), [("rgap", 8), ("analysis", 5)])
def test_few_modules_stand_outside_the_folders(top: str, most: int) -> None:
    assert len(list((ROOT / top).glob("[!_]*.py"))) <= most


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


LIBRARY = ("rgap", "analysis", "solvers")
LONG, MANY, WINDOW = 80, 8, 6
PUBLIC = {
    "audit", "audit_training", "dense_test", "from_delta", "from_ndarrays", "harden",
    "identifiability", "invert", "largest_identifiable_batch", "leakage_indices", "match", "noise",
    "noise_trials", "train",
}  # fmt: skip


def _modules() -> list[Path]:
    return [path for top in LIBRARY for path in sorted((ROOT / top).rglob("*.py"))]


def _functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def _documented(node: ast.FunctionDef | ast.ClassDef | ast.Module) -> range:
    """Lines of the docstring."""
    if ast.get_docstring(node, clean=False) is None:
        return range(0)
    return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)


def test_functions_are_short_and_take_few_parameters() -> None:
    """Docstrings apart; users name the options of the public functions, which may be more."""
    for path in _modules():
        for node in _functions(path):
            lines = (node.end_lineno or 0) - node.lineno + 1 - len(_documented(node))
            own = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            taken = [a.arg for a in own if a.arg not in ("self", "cls")]
            assert lines <= LONG, f"{path}: {node.name} has {lines} lines"
            few = len(taken) <= MANY or node.name in PUBLIC
            assert few, f"{path}: {node.name} takes {len(taken)} parameters"


def _code(path: Path) -> list[tuple[int, str]]:
    """Lines that do something: no imports, signatures, docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    left_out = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, (node.end_lineno or 0) + 1))
        if isinstance(node, ast.FunctionDef):
            left_out.update(range(node.lineno, node.body[0].lineno))
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            left_out.update(_documented(node))
    stripped = [(at, line.split("#")[0].strip()) for at, line in enumerate(text.splitlines(), 1)]
    return [(at, line) for at, line in stripped if line and at not in left_out]


def test_nothing_is_written_twice() -> None:
    """Six lines of code in a row stand in one place."""
    places: dict[tuple[str, ...], str] = {}
    for path in _modules():
        lines = _code(path)
        for first in range(len(lines) - WINDOW + 1):
            window = tuple(line for _, line in lines[first : first + WINDOW])
            here = f"{path.relative_to(ROOT)}:{lines[first][0]}"
            if len(set(window)) == WINDOW:
                assert window not in places, f"{here} repeats {places[window]}"
            places[window] = here
