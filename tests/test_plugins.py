"""Distributions that add to the library: the walk of CONTRIBUTING.md, and broken ones."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rgap
from rgap.cli.app import app
from rgap.cli.options import DefenceName, PriorName
from rgap.plugins import PluginError, PluginWarning, Registry, offered
from rgap.priors import PRIORS

PAGE = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
GROUPS = ("layers", "labels", "priors", "presets", "defences")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of installed packages, forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    offered.cache_clear()
    yield tmp_path
    offered.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0].startswith("rgap_"):
            del sys.modules[name]


def install(site: Path, name: str, version: str, points: dict[str, dict[str, str]]) -> None:
    """What an installer leaves of a distribution beside its modules."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    text = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in own.items())
            for group, own in points.items()]  # fmt: skip
    (info / "entry_points.txt").write_text("\n".join(text))
    offered.cache_clear()


def written(site: Path) -> None:
    """The package of the walk, as its code blocks say."""
    for text in re.findall(r"```python\n(# rgap_example/.*?)```", PAGE, flags=re.DOTALL):
        path = site / text.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    (table,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    project = tomllib.loads(table)["project"]
    assert set(project["entry-points"]) == {f"rgap.{group}" for group in GROUPS}
    install(site, project["name"], project["version"], project["entry-points"])


def test_the_walk_does_what_it_says(site: Path) -> None:
    written(site)
    examples = "\n".join(re.findall(r"```python\n(>>>.*?)```", PAGE, flags=re.DOTALL))
    assert examples.count("rgap.") > 8
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    walk = doctest.DocTestParser().get_doctest(examples, {}, "walk", "CONTRIBUTING.md", 0)
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=flags).run(walk, out=said.append).failed
    assert not failed, "".join(said)


def test_commands_list_what_is_installed(site: Path) -> None:
    written(site)
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom rgap.cli import app\n"
        "for c in ('labels', 'match', 'harden'):\n"
        "    print(CliRunner().invoke(app, [c, '--help'], env={'COLUMNS': '300'}).output)\n"
        "assert 'torch' not in sys.modules and 'rgap_example' not in sys.modules"
    )
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for names in (
        "idlg, all or uniform",
        "untrained or quick",
        "squares or flat",
        "sign or mask",
    ):
        assert names in done.stdout
    update = site / "update.safetensors"
    model = rgap.models.mlp(classes=4, seed=0)
    rgap.capture(model, torch.rand(2, 3, 32, 32), torch.tensor([1, 2])).save(update)
    line = ["labels", "mlp:classes=4", str(update), "--json", "--method"]
    assert '"uniform"' in CliRunner().invoke(app, [*line, "uniform"]).output
    assert '"uniform"' in CliRunner().invoke(app, [*line, "all"]).output
    wrong = CliRunner().invoke(app, [*line, "wrong"])
    assert wrong.exit_code == 2
    assert "all or uniform, got 'wrong'" in " ".join(wrong.output.split())


def test_built_in_names_of_the_commands_are_those_of_the_library() -> None:
    assert {name.value for name in PriorName} == set(PRIORS)
    levelled = {n for n, kind in rgap.analysis.DEFENCES.items() if kind.levels()}
    assert {name.value for name in DefenceName} == levelled


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.asinh(x)


@pytest.fixture
def broken(site: Path) -> Path:
    """A distribution of which nothing works."""
    (site / "rgap_broken.py").write_text("number = 3\n\ndef half(x):\n    return x / 2\n")
    missing = {f"rgap.{group}": {"lost": "rgap_lost:it"} for group in GROUPS}
    missing["rgap.layers"] = {f"{Unknown.__module__}.{Unknown.__qualname__}": "rgap_lost:it"}
    for group in ("presets", "labels", "priors", "defences"):
        missing[f"rgap.{group}"]["number"] = "rgap_broken:number"
    install(site, "rgap-broken", "0.3", missing)
    return site


def test_a_broken_distribution_is_one_sentence_with_its_name(broken: Path) -> None:
    model = rgap.models.lenet(seed=0)
    update = rgap.capture(model, rgap.photos.load(1).float(), torch.tensor([3]))
    lost = (
        r"the {} 'lost' of rgap-broken 0\.3 does not load \(rgap_lost:it: ModuleNotFoundError: No "
        r"module named 'rgap_lost'\); mend or uninstall that distribution$"
    )
    number = r"the {} 'number' of rgap-broken 0\.3 is no .* expected .*, got int"
    for said, end in ((lost, "lost"), (number, "number")):
        with pytest.raises(PluginError, match=said.format("label method")):
            rgap.labels.estimate(model, update, method=end)
        with pytest.raises(PluginError, match=said.format("preset")):
            rgap.match(model, update, method=end)
        with pytest.raises(PluginError, match=said.format("prior")):
            rgap.match(model, update, prior=end)
        with pytest.raises(PluginError, match=said.format("defence")):
            rgap.analysis.harden(model, (3, 32, 32), defence=end)


def test_a_broken_distribution_stops_nothing_else(broken: Path) -> None:
    with pytest.warns(PluginWarning, match="of rgap-broken 0.3") as said:
        names = list(rgap.labels.METHODS.working())
    assert len(said) == 2
    assert names[0] == "best" and not {"lost", "number"} & set(names)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 2), Unknown(), nn.Flatten(), nn.Linear(36, 3)).eval()
    x = torch.rand(1, 1, 4, 4)
    update = rgap.capture(model, x, torch.tensor([1]))
    recovery = rgap.invert(model, update)
    assert recovery.status.name == "UNSUPPORTED"
    assert "of rgap-broken 0.3 does not load (rgap_lost:it:" in recovery.reason
    model[1] = nn.Tanh()
    found = rgap.invert(model, rgap.capture(model, x, torch.tensor([1])))
    assert found.status.name == "EXACT" and bool((found.inputs - x).abs().max() < 1e-4)


def test_two_distributions_of_one_name(site: Path) -> None:
    (site / "rgap_two.py").write_text("def half(x):\n    return x / 2\n\nthird = str\n")
    install(site, "rgap-one", "1", {"rgap.example": {"part": "rgap_two:half"}})
    install(site, "rgap-two", "2", {"rgap.example": {"part": "rgap_two:third"}})
    registry = Registry("rgap.example", "example", "a function", callable)
    said = r"'part' of the group rgap.example is offered by rgap-\w+ \d and by rgap-\w+ \d"
    with pytest.warns(PluginWarning, match=said):
        assert "part" in registry
    assert callable(registry["part"]) and list(registry) == ["part"]
    with pytest.raises(TypeError, match="example 'four': expected a function, got 4"):
        registry.register("four", 4)
    registry.register("part", abs)  # what is registered here comes first
    assert registry["part"] is abs and len(registry) == 1
    with pytest.raises(ValueError, match="size: expected one of 'part', got 'all'; write size='p"):
        registry.chosen("size", "all")
