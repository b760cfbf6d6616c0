"""The package as it is installed: what a wheel holds, what an import costs, one version."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import rgap

ROOT = Path(__file__).resolve().parents[1]
# What these cost is paid when a function needs them, not by everyone who types `import rgap`.
HEAVY = ("torch", "scipy", "matplotlib", "torchmetrics", "pandas", "sympy")


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def names(requirements: str) -> set[str]:
    """Distribution names of a list in setup.cfg."""
    lines = (line.strip() for line in requirements.splitlines())
    return {re.split(r"[<>=!~;\[ ]", line)[0].lower() for line in lines if line}


def test_requirement_names_are_read_without_their_versions() -> None:
    assert names("\nnumpy>=1.26\nRich\na[b]==2; python_version < '4'\n") == {"numpy", "rich", "a"}


# --- importing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "import rgap; rgap.__version__; dir(rgap)",
        "from rgap.cli import app",
        "from importlib.metadata import entry_points\n"
        "(script,) = entry_points(group='console_scripts', name='rgap')\n"
        "sys.argv = ['rgap', '--help']\n"
        "try: script.load()()\n"
        "except SystemExit as end: assert not end.code, end.code",
    ],
    ids=["import rgap", "import rgap.cli", "rgap --help"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement: str) -> None:
    code = f"import sys\n{statement}\nsys.exit(' '.join({set(HEAVY)} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"imports {done.stderr}"
    if "--help" in statement:
        for command in ("demo", "capture", "audit", "invert"):
            assert command in done.stdout


def test_the_check_above_sees_an_import_of_torch() -> None:
    code = "import sys, rgap; rgap.Update; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 1


@pytest.mark.parametrize("name", rgap.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(rgap, name)
    assert value is not None
    if callable(value):
        assert value.__module__.startswith("rgap.")
        assert value.__doc__, f"rgap.{name} says nothing"
    assert name in dir(rgap)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'rgap' has no attribute 'invrt'"):
        rgap.invrt  # noqa: B018


# --- one version, the right dependencies ----------------------------------------------------


def test_the_version_is_one() -> None:
    assert metadata.version("rgap") == rgap.__version__
    citation = re.search(r"^version: *(\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None
    assert citation[1].strip("\"'") == rgap.__version__


def test_the_core_needs_no_test_tool_and_no_extra() -> None:
    config = setup()
    core = names(config["options"]["install_requires"])
    extras = {name: names(text) for name, text in config["options.extras_require"].items()}
    assert {"torch", "numpy", "scipy", "safetensors"} <= core
    for extra, wanted in extras.items():
        assert wanted, extra
        assert not core & wanted, f"core depends on what is the extra {extra!r}'s"
    assert {"pytest", "hypothesis"} <= extras["test"]
    assert not {"pytest", "hypothesis", "ruff", "mypy", "pandas"} & core
    assert extras["frames"] <= extras["test"], "else no test ever sees a data frame"


def test_every_import_of_the_package_is_a_stated_dependency() -> None:
    config = setup()
    stated = names(config["options"]["install_requires"])
    for extra in ("evolution", "frames", "interop"):
        stated |= names(config["options.extras_require"][extra])
    # networkx comes with torch but is not here: whoever imports it has to state it
    allowed = stated | {"rgap"} | sys.stdlib_module_names
    if "pillow" in names("\n".join(metadata.requires("matplotlib") or ())):
        allowed |= {"pil"}  # matplotlib cannot read or write a PNG without it
    foreign = {
        (str(path.relative_to(ROOT)), name)
        for folder in ("rgap", "analysis", "solvers")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"^ *(?:import|from) +(\w+)", code_of(path), re.MULTILINE)
        if name.lower() not in allowed
    }
    assert not foreign


def code_of(path: Path) -> str:
    """Source without docstrings, whose prose and examples may begin a line with "from"."""
    return re.sub(r'"""(?:.|\n)*?"""', "", path.read_text())


# --- the wheel ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """A wheel built offline from a copy of the tree, tests included in the copy."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("rgap", "analysis", "solvers", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "wheel"]
    done = subprocess.run(
        [*pip, "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    assert built.name == f"rgap-{rgap.__version__}-py3-none-any.whl"
    return zipfile.Path(built)


def test_the_wheel_holds_every_module_and_every_data_file(wheel: zipfile.Path) -> None:
    held = set(wheel.root.namelist())
    places = {"rgap": "rgap", "analysis": "rgap/analysis", "solvers": "rgap/solvers"}
    kinds = {".py", ".png", ".md", ".typed"}
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in places.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds or path.name == "py.typed"
    }
    assert {"rgap/py.typed", "rgap/data/ORIGINS.md", "rgap/analysis/discard/audit.py"} <= expected
    assert sum(name.endswith(".png") for name in expected) >= 24
    assert not expected - held, "missing in the wheel; is a new folder absent from setup.cfg?"


def test_the_wheel_holds_nothing_else(wheel: zipfile.Path) -> None:
    info = f"rgap-{rgap.__version__}.dist-info/"
    foreign = [n for n in wheel.root.namelist() if not n.startswith(("rgap/", info))]
    assert not foreign
    # pytest's own rule for test files
    tests = [n for n in wheel.root.namelist() if re.search(r"(^|/)(tests?/|test_|conftest)", n)]
    assert not tests
    assert f"{info}licenses/LICENSE" in wheel.root.namelist()


def test_the_wheel_says_what_setup_cfg_says(wheel: zipfile.Path) -> None:
    info = wheel / f"rgap-{rgap.__version__}.dist-info"
    about = (info / "METADATA").read_text()
    assert f"\nVersion: {rgap.__version__}\n" in about
    assert f"\nRequires-Python: {setup()['options']['python_requires']}\n" in about
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", about, re.MULTILINE))
    assert required == names(setup()["options"]["install_requires"])
    assert "rgap = rgap.cli:main" in (info / "entry_points.txt").read_text()


def test_the_wheel_works_from_where_it_is_put(wheel: zipfile.Path, tmp_path: Path) -> None:
    wheel.root.extractall(tmp_path)
    code = (
        "import sys, rgap, rgap.analysis, rgap.solvers; from rgap import photos\n"
        "assert rgap.__file__.startswith(sys.argv[1]), rgap.__file__\n"
        "assert rgap.analysis.__file__.startswith(sys.argv[1]), rgap.analysis.__file__\n"
        "assert len(photos.load(1)) == 1"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{code}", tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_the_build_back_end_is_the_one_that_is_declared() -> None:
    system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert system["build-backend"] == "setuptools.build_meta"
    assert all(required.startswith("setuptools") for required in system["requires"])
