"""Every linear operator of the library passes the dot test and is the matrix it stands for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from operators import ROWS

from rgap.testing import dense_test, dot_test

ROOT = Path(__file__).resolve().parents[1]
# What the library calls the transpose of a product, a projection, an inverse or a curvature.
METHODS = {
    "adjoint", "pull", "pull_u", "vjp", "project", "columns", "clipped", "curvature", "explained",
    "solve_transposed", "precondition", "inverse", "split", "null",
}  # fmt: skip
FUNCTIONS = {"pull", "null_projection", "null_directions", "transposed_product"}
NONE = {
    "analysis/joint_rank/stage.py:ChainOptions": "its `inverse` makes a WeightInverse",
}


def operators() -> set[str]:
    """Classes that define one of the methods or inherit from one that does; and functions."""
    classes: dict[str, ast.ClassDef] = {}
    names: set[str] = set()
    for top in ("solvers", "rgap", "analysis"):
        for path in sorted((ROOT / top).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    classes[f"{place}:{node.name}"] = node
                elif isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
                    names.add(f"{place}:{node.name}")

    def own(node: ast.ClassDef) -> set[str]:
        return {part.name for part in node.body if isinstance(part, ast.FunctionDef)}

    def bases(node: ast.ClassDef) -> set[str]:
        return {ast.unparse(base).split("[")[0].rpartition(".")[2] for base in node.bases}

    parents = {node.name for node in classes.values() if own(node) & METHODS}
    for _ in range(len(classes)):
        heirs = {node.name for node in classes.values() if bases(node) & parents}
        if heirs <= parents:
            break
        parents |= heirs
    for name, node in classes.items():
        marks = {
            ast.unparse(mark)
            for part in node.body
            if isinstance(part, ast.FunctionDef)
            for mark in part.decorator_list
        }
        abstract = bases(node) & {"Protocol", "ABC"} or "abstractmethod" in marks
        if (own(node) & METHODS or bases(node) & parents) and not abstract:
            names.add(name)
    return names


def test_every_operator_has_a_row_and_every_row_an_operator() -> None:
    seen = operators()
    assert set(NONE) <= seen, "what is no operator by name either"
    seen -= set(NONE)
    assert not seen - set(ROWS), "write a row in tests/support/operators.py"
    assert not set(ROWS) - seen, "rows of what is no operator (any more)"


@pytest.mark.parametrize("name", ROWS)
def test_operator(name: str) -> None:
    wanted = name.rpartition(":")[2]
    tried = 0
    for case in ROWS[name]():
        kind = case.operator if callable(case.operator) else type(case.operator)
        kind = kind if hasattr(kind, "__name__") else type(case.operator)
        tried += kind.__name__ == wanted
        dot_test(case.apply, case.adjoint, case.domain, name=name, slack=case.slack)
        dense_test(
            case.apply, case.reference, case.domain, adjoint=case.adjoint, at=case.at, name=name,
            slack=case.slack,
        )  # fmt: skip
    assert tried, f"no case of the row is a {wanted}"
