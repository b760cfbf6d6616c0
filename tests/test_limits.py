"""Numbers that decide have one home, and ranks are counted: read off the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DECIDING = (
    "inversion/certificate",
    "head/target",
    "inversion/replay",
    "head/behind",
    "inversion/polish",
    "recursion/descend",
    "recursion/reached",
    "recursion/steps",
    "inversion/batch_rows",
    "head/features",
    "head/scale",
    "inversion/parts",
    "inversion/places",
    "inversion/single",
    "inversion/several",
    "inversion/targets",
    "constraints/determined",
    "inversion/factor",
    "inversion/batch_size",
    "recursion/stage",
)
NUMERICS = [
    path.relative_to(ROOT).as_posix()
    for package in ("analysis", "solvers")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "plots" not in path.parts  # sizes of figures
]
INSIDE = {
    ("analysis/discard/layer_ranks.py", "_refuse_large", 8e-9): "bytes of a number, in GB",
    ("analysis/discard/layer_ranks.py", "needs", 3): "matrices that are held",
    ("analysis/discard/layer_ranks.py", "needs", 8): "bytes of a number",
    ("analysis/joint_rank/blocks.py", "jacobian_blocks", 8): "bytes of a number",
    ("analysis/joint_rank/identifiability.py", "answered", 8): "bytes of a number",
    ("analysis/joint_rank/stage.py", "fits", 8): "bytes of a number",
    ("analysis/joint_rank/stage.py", "kept", 8): "bytes of a number",
    ("analysis/noise_bound/fisher.py", "information", 4): "matrices that are held",
    ("analysis/noise_bound/fisher.py", "information", 8): "bytes of a number",
    ("analysis/noise_bound/report.py", "psnr", 10): "decibel",
    ("analysis/noise_bound/report.py", "psnr", 20): "decibel",
    ("analysis/scoring.py", "_decibel", 10): "decibel",
    ("solvers/conjugate.py", "cgls", 1e-8): "a default: where an iteration ends",
    ("solvers/kronecker.py", "solve", 1e-15): "a default: where a refinement ends",
    ("solvers/first_order.py", "step", 1e-8): "of Adam, as published",
    ("solvers/first_order.py", "step", 1e-30): "against a division by zero",
    ("solvers/gauss_newton.py", "Schedule", 1e-9): "a default of the schedule",
    ("solvers/gauss_newton.py", "Schedule", 1e-4): "a default of the schedule",
    ("solvers/gauss_newton.py", "gauss_newton", 10): "growth of the damping after a failed step",
    ("solvers/least_squares.py", "levenberg_marquardt", 4): "growth of the damping",
    ("solvers/least_squares.py", "geodesic", 1e-18): "least damping of steps that bend",
    ("solvers/least_squares.py", "_step", 1e-12): "keeps a diagonal of zeros invertible",
    ("solvers/lowrank.py", "_leading", 1e-15): "rounding: a block has reached the noise",
}
GUARD = 1e-300  # against a division by zero
NO_LIMITS = {
    ("head/target", "LISTED", 4096): "effort: targets that are tried one by one",
    ("head/target", "BLOCK", 512): "effort: targets that are compared to all others at a time",
    ("head/target", "READ", 4): "effort: targets of which a reading is made in any case",
    ("inversion/polish", "STEPS", 4): "effort: Gauss–Newton steps",
    ("inversion/polish", "BRIEF, FULL", 12): "effort: iterations",
    ("inversion/polish", "BRIEF, FULL", 300): "effort: iterations",
    ("inversion/polish", "HELD", 32): "bytes",
    ("inversion/polish", "COPIES", 4): "effort: matrices that are held",
    ("inversion/polish", "_solved", 8): "bytes of a number",
    ("inversion/replay", "COPIES", 32): "bytes",
    ("inversion/polish", "SAMPLES", 4): "effort: noise samples",
    ("inversion/polish", "MEMBERS", 8): "effort: members of an ensemble",
    (
        "inversion/polish",
        "HARD",
        2e-5,
    ): "effort: when the full solve pays; its answer is judged alike",
    ("head/scale", "BELOW, ABOVE", 1e-4): "where roots are looked for",
    ("head/scale", "BELOW, ABOVE", 1e7): "where roots are looked for",
    ("head/scale", "GRID", 215): "where roots are looked for",
    ("head/scale", "HALVINGS", 2200): "effort: steps of a bisection",
    ("head/scale", "DRAWS, NUDGE", 4): "effort: random relative errors of the logits",
    ("head/scale", "DRAWS, NUDGE", 1e-6): "step of a finite difference",
    ("inversion/batch_size", "DRAWS", 8): "effort: directions that are drawn, of each kind",
    ("inversion/batch_size", "STEP", 1e-5): "step of a finite difference",
    ("inversion/factor", "STEP", 1e-6): "step of a finite difference",
    ("head/scale", "_scales", 1e-100): "logits that are 0",
    ("head/scale", "_zeros", 1e-15): "precision of a root, in float64",
    ("head/scale", "_zeros", 2001): "points of a grid",
    ("inversion/parts", "STEPS, SOLVING", 30): "effort: the prior chooses, nothing is certified",
    ("inversion/parts", "STEPS, SOLVING", 200): "effort: the prior chooses, nothing is certified",
    ("inversion/parts", "SETTLED, SMALL", 1e-6): "ends a choice of the prior",
    ("inversion/parts", "SETTLED, SMALL", 1e-12): "ends a choice of the prior",
    ("inversion/places", "FEW", 6): "words",
    ("inversion/targets", "MOST", 1000): "effort: labels that are tried",
    ("inversion/targets", "MOVED", 4): "effort: members of an ensemble",
    ("recursion/descend", "_mistaken", 2.0): "the end of an even spread, in units of its mean",
    ("recursion/stage", "BUDGET", 4e9): "bytes",
    ("recursion/stage", "DEAR", 5e10): "effort: multiply-adds of a joint factor",
    ("recursion/stage", "ridge", 1e-6): "damping of a first look, that only weighs rows",
    ("recursion/stage", "compute", 1e-15): "where a refinement ends, far below the rounding",
    ("recursion/stage", "compute", 30): "effort: refinements of an ensemble",
}
COUNTED = {
    "solvers/rank.py": "numerical_rank itself",
    "solvers/subspace.py": "extreme singular values of a matrix of full rank",
    "solvers/joint_rank.py": "singular values of the joint rows, or sizes that make it full",
    "solvers/kronecker.py": "the sum of the groups' ranks",
    "solvers/solution.py": "an example",
    "rgap/recovery/layers.py": "a layer whose input was read off its gradient, entry by entry",
    "rgap/constraints/ranks.py": "extreme singular values, and sums of exact counts",
    "analysis/joint_rank/inverses.py": "extreme singular values of a matrix of full rank",
    "analysis/joint_rank/nullspace.py": "an upper bound of the largest singular value",
    "analysis/joint_rank/blocks.py": "no rows at all: an exact 0",
    "analysis/generic_rank/sketched.py": "the sum of the ranks of the blocks",
    "analysis/discard/coupled.py": "an empty or zero matrix: an exact 0",
    "analysis/joint_rank/stage.py": "no unknowns at all: an exact 0",
}


def source(path: str) -> ast.Module:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


def place(node: ast.AST) -> str:
    """Name of the constant or the function that a number stands in."""
    while not isinstance(node.parent, ast.Module):  # type: ignore[attr-defined]
        if isinstance(node, ast.FunctionDef):
            return node.name
        node = node.parent  # type: ignore[attr-defined]
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]).strip("()")
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    return getattr(node, "name", "")


def numbers(tree: ast.Module) -> Iterator[tuple[str, float]]:
    """Numbers of 2 and more, or below 1e-3, that are no exponent, index, count or default of 0."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
            continue
        value, parent = abs(node.value), node.parent  # type: ignore[attr-defined]
        if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Pow):
            continue
        if value == GUARD or not (value >= 2 or 0 < value < 1e-3):
            continue
        if isinstance(node.value, int):
            module_level = isinstance(parent, (ast.Assign, ast.Tuple)) and place(node).isupper()
            counting = isinstance(parent, ast.Compare) and "len(" in ast.unparse(parent)
            scaling = isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Mult)
            if value == 2 or counting or not (module_level or scaling):
                continue
        yield place(node), float(value)


@pytest.mark.parametrize("module", DECIDING)
def test_numbers_that_decide_are_in_limits(module: str) -> None:
    path = f"rgap/{module}.py"
    allowed = {(where, float(value)) for name, where, value in NO_LIMITS if name == module}
    found = set(numbers(source(path)))
    strange = sorted(found - allowed)
    assert not strange, f"{path}: name these in rgap/limits.py and say what they follow from"


@pytest.mark.parametrize("path", NUMERICS)
def test_numbers_of_analysis_and_solvers_have_a_name_and_a_reason(path: str) -> None:
    tree = source(path)
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    named = set()
    for node in tree.body:
        value = getattr(node, "value", None)
        if not isinstance(node, ast.Assign | ast.AnnAssign) or value is None:
            continue
        written = [c.value for c in ast.walk(value) if isinstance(c, ast.Constant)]
        if not any(type(number) in (int, float) for number in written):
            continue
        named.add(place(value))
        own = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        assert "#" in own or lines[node.lineno - 2].startswith("#"), f"{path}: no reason: {own}"
    allowed = {(where, float(value)) for name, where, value in INSIDE if name == path}
    inside = {(where, value) for where, value in numbers(tree) if where not in named and value != 2}
    assert not inside - allowed, f"{path}: name these, in solvers/limits.py if they decide"


def test_limits_of_the_solvers_have_one_home() -> None:
    """Each stands under its derivation, and no other module sets one of the same name."""
    home = "solvers/limits.py"
    lines = (ROOT / home).read_text(encoding="utf-8").splitlines()
    names: set[str] = set()
    for node in source(home).body:
        if isinstance(node, ast.Assign):
            assert lines[node.lineno - 2].startswith("#"), f"{ast.unparse(node)} has no derivation"
            names |= {c.id for c in ast.walk(node.targets[0]) if isinstance(c, ast.Name)}
    assert len(names) > 20
    for path in set(NUMERICS) - {home}:
        own = {where for where, _ in numbers(source(path)) if where.isupper()}
        assert not own & names, f"{path} defines {own & names} again"


def test_the_walk_sees_a_number_written_out() -> None:
    tree = ast.parse("CAP = 30.0\ndef f(x):\n    return x > 100 * 1e-9 and x < 0.25 ** 2\n")
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    assert set(numbers(tree)) == {("CAP", 30.0), ("f", 100.0), ("f", 1e-9)}


def test_limits_have_one_home_and_a_reason() -> None:
    """No other module has a limit of the same name, and each stands under a comment."""
    lines = (ROOT / "rgap/limits.py").read_text(encoding="utf-8").splitlines()
    names = set()
    for number, line in enumerate(lines):
        if " = " in line and line.split(" = ")[0].isupper():
            name = line.split(" = ")[0]
            names.add(name)
            above = next(r for r in reversed(lines[:number]) if " = " not in r or r[0] == "#")
            assert above.startswith("#"), f"{name} has no reason"
    assert len(names) > 30
    for module in DECIDING:
        path = ROOT / f"rgap/{module}.py"
        if path.exists():
            own = {place(n) for n in ast.walk(source(f"rgap/{module}.py")) if _assigned(n)}
            assert not own & names, f"{module} defines {own & names} again"


def _assigned(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.parent, ast.Module)  # type: ignore[attr-defined]


def test_a_rank_is_built_from_what_was_counted() -> None:
    found = set()
    for package in ("rgap", "solvers", "analysis"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and "Rank" in ast.unparse(node.func).split("."):
                    found.add(name)
    assert found <= set(COUNTED), "singular values or exact counts; anything else is an Evidence"


def test_a_limit_is_named_once() -> None:
    """A second constant of one name would change what the first decides, without a word."""
    tree = ast.parse((ROOT / "rgap/limits.py").read_text())
    names = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})
