"""Every script of benchmarks/ is in its table, can be imported, and has a smallest case."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from benchmarks.common.arguments import Arguments
from benchmarks.smallest import chosen, scripts

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
SCRIPTS = [*scripts(), "smallest"]


def test_the_table_has_a_row_for_every_script_and_no_other() -> None:
    rows = re.findall(r"^\| `python -m benchmarks\.([\w.]+)`", README, flags=re.MULTILINE)
    assert sorted(rows) == sorted(SCRIPTS)
    assert len(SCRIPTS) > 25


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_how_it_is_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    assert f"    python -m benchmarks.{name}" in module.__doc__.replace("OMP_NUM_THREADS=1 ", "")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert re.search(r"--smallest +the smallest case: \S", told)
    assert module.__doc__.splitlines()[0] in told


def test_what_is_named_in_the_documentation_is_there() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    pages += [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.rst"), *ROOT.glob("benchmarks/**/*.py")]
    pages += [
        ROOT / "benchmarks/README.md",
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("rgap/**/*.py"),
    ]
    named = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        named |= set(re.findall(r"python -m (benchmarks\.[a-z_.]*[a-z_])", text))
        named |= {f.replace("/", ".") for f in re.findall(r"(benchmarks/[\w/]+)\.py\b", text)}
    assert len(named) > 30
    for name in named:
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), name


def test_options_beside_the_smallest_case_win() -> None:
    parser = Arguments("Words.", sizes=[2], seeds=1)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--seeds", type=int, default=9)
    plain, small, mixed = (
        parser.parse_args(words) for words in ([], ["--smallest"], ["--smallest", "--seeds", "3"])
    )
    assert (plain.sizes, plain.seeds) == ([4, 8], 9)
    assert (small.sizes, small.seeds) == ([2], 1)
    assert (mixed.sizes, mixed.seeds) == ([2], 3)


def test_a_smallest_case_has_options_of_the_script() -> None:
    with pytest.raises(ValueError, match="got \\['sise'\\]"):
        Arguments("Words.", sise=1).parse_args([])


def test_scripts_are_chosen_by_name_and_by_folder() -> None:
    assert chosen([]) == scripts()
    figures = ["figures.identifiability", "figures.priors"]
    assert chosen(["timing.dense", "figures"]) == [*figures, "timing.dense"]
    assert chosen(["nothing"]) == []
