"""Figures by name: what a report reads, somebody writes; what is written, the documentation has.

A report that reads a name that no code sets counts nothing, and says so to nobody: the correction over a run once read `p`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantdet.session.cases.judge import PROPERTIES
from selftest.fakes.matrix import TESTS

PACKAGE = TESTS / "quantdet"
ACCESSORS = ("number", "text", "names", "parts")


def trees(*rooms: str) -> Iterator[ast.AST]:
    for room in rooms:
        for path in sorted((PACKAGE / room).rglob("*.py") if (PACKAGE / room).is_dir() else [PACKAGE / room]):
            yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def texts(*nodes: ast.AST | None) -> set[str]:
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def of_figures(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "figures"


def read(nodes: Iterator[ast.AST]) -> set[str]:
    """Names that are asked of a case: `case.number("l2")`, `case.figures.get("l2")`, `case.figures["l2"]`."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            asks = node.func.attr in ACCESSORS or (node.func.attr == "get" and of_figures(node.func.value))
            found |= texts(node.args[0]) if asks else set()
        elif isinstance(node, ast.Subscript) and of_figures(node.value):
            found |= texts(node.slice)
    return found


def written(nodes: Iterator[ast.AST]) -> tuple[set[str], tuple[str, ...]]:
    """Names that are given: keys of tables and of assignments, first parts of pairs; and beginnings of made-up ones."""
    found: set[str] = set()
    beginnings: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Dict):
            found |= texts(*node.keys)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found |= texts(node.slice)
        elif isinstance(node, ast.Tuple):
            found |= texts(*node.elts[:1])
        elif isinstance(node, ast.JoinedStr) and re.fullmatch(r"[a-z_]+\.", beginning := "".join(texts(node.values[0]))):
            beginnings.add(beginning)
    return found, tuple(beginnings)


def test_what_reports_read_is_written() -> None:
    """By a judgement, by the session, or by the part that measures speed."""
    asked = read(trees("report"))
    given, beginnings = written(trees("judging", "session", "report/speed.py"))

    assert len(asked) > 25
    assert [] == sorted(name for name in asked - given if not name.startswith(beginnings))


def test_what_every_case_has_is_written_and_told() -> None:
    """No property is only ever empty, and none is without a line in the documentation."""
    given, beginnings = written(trees("judging", "session", "report/speed.py"))
    told = (PACKAGE / "report" / "README.md").read_text(encoding="utf-8")

    assert [] == [name for name in PROPERTIES if name not in given and not name.startswith(beginnings)]
    assert [] == [name for name in PROPERTIES if f"`{name}`" not in told]


@pytest.mark.parametrize("line", ['case.number("p")', 'case.figures.get("p")', 'case.figures["p"]'])
def test_a_name_that_nobody_writes_is_seen(line: str, tmp_path: Path) -> None:
    """However it is asked for."""
    given, beginnings = written(ast.walk(ast.parse('figures["l2"] = 1.0\nfigures = {"runs": 3}\nname = f"pair.{b}"')))

    assert {"p"} == read(ast.walk(ast.parse(line))) - given
    assert ({"l2", "runs"}, ("pair.",)) == (given, beginnings)
