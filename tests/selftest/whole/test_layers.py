"""The house: imports go down from room to room and never in a circle; what is seeded against that is noticed."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from selftest.fakes.matrix import ROOT, TESTS

PACKAGE = TESTS / "quantdet"
MOST_LINES, MOST_OF_A_FUNCTION = 300, 60


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(("quantdet", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"), path


def imports(text: str, known: set[str], package: str = "") -> set[str]:
    """Modules of the suite that a module of `package` imports anywhere, in whatever form, for types too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join(filter(None, (*above, node.module)))
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= (names & known) or ({module} & known)
    return found


@pytest.mark.parametrize(
    "line",
    ["import quantdet.metrics.bits", "from quantdet.metrics import bits", "from quantdet.metrics.bits import x",
     "from . import bits", "from .bits import x", "from ..metrics import bits", "def f():\n    from . import bits"],
)  # fmt: skip
def test_every_form_of_import_is_read(line: str) -> None:
    """Each of them may close a circle."""
    assert {"quantdet.metrics.bits"} == imports(line, {"quantdet.metrics.bits", "quantdet.metrics.bounds"}, "quantdet.metrics")


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of circles of imports, and between them; none if there is none.

    Taken away, until nothing more can be: a module that imports none of the rest, and one that none of the rest imports.
    """
    left = {name: set(others) - {name} for name, others in graph.items()}
    while True:
        imported = set().union(*left.values()) if left else set()
        left_over = {name: others & left.keys() for name, others in left.items() if others & left.keys() and name in imported}
        if left_over == left:
            return sorted(left)
        left = left_over


def contract(tests: Path) -> subprocess.CompletedProcess[str]:
    """import-linter, over the package in the folder `tests`, with the contract of pyproject.toml."""
    pytest.importorskip("importlinter", reason="needs import-linter (pip install -e '.[dev]'), have none")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(
        [*command, "--config", str(ROOT / "pyproject.toml")], cwd=tests, env={"PYTHONPATH": str(tests)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_rooms_import_downwards() -> None:
    """plugin, session, report, judging beside engines and checkpoints, observations, matrix beside metrics, untrusted."""
    run = contract(TESTS)

    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("report/text_layout.py", "from quantdet.session.session import Session", "quantdet.report is not allowed to import"),
        ("judging/pairs.py", "from quantdet.engines.plan import Plan", "quantdet.judging is not allowed to import"),
        ("metrics/bits.py", "from quantdet.matrix.cell import Cell", "quantdet.metrics is not allowed to import"),
        ("observations/store.py", "from quantdet.judging.verdicts import Verdict", "quantdet.observations is not allowed"),
        ("report/text_layout.py", "def f():\n    import quantdet.session.plans", "quantdet.report is not allowed to import"),
        ("judging/pairs.py", "if False:\n    from ..report import tables", "quantdet.judging is not allowed to import"),
        ("attic/__init__.py", "", "attic"),
    ],
    ids=[
        "report-to-session",
        "judging-to-engines",
        "metrics-to-matrix",
        "observations-to-judging",
        "in-a-function",
        "relative",
        "a-room",
    ],
)
def test_an_import_upwards_is_noticed(tmp_path: Path, file: str, line: str, words: str) -> None:
    """And one between rooms that stand side by side, and a room that the contract does not know."""
    shutil.copytree(PACKAGE, tmp_path / "quantdet", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "quantdet" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + f"\n{line}\n", encoding="utf-8")

    run = contract(tmp_path)

    assert run.returncode == 1
    assert words in run.stdout


def test_no_circle_of_imports() -> None:
    """Between modules, imports that only type checkers follow included."""
    known = dict(modules())
    packages = {name: name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in known.items()}
    graph = {name: imports(path.read_text("utf-8"), set(known), packages[name]) for name, path in known.items()}

    assert [] == circle(graph)


def test_a_circle_is_seen() -> None:
    """However long, and nothing is one that only leads to it or away from it."""
    assert ["a", "b", "c"] == circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set(), "e": {"a"}})
    assert [] == circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_modules_and_functions_can_be_read_at_once() -> None:
    """A file of at most 300 lines, a function of at most 60."""
    long = [f"{name}: {lines} lines" for name, path in modules() if (lines := len(path.read_text().splitlines())) > MOST_LINES]
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_OF_A_FUNCTION:
                long.append(f"{name}.{node.name}: {lines} lines")

    assert [] == long
