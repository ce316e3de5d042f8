"""Figures by name: what a report reads, somebody writes; what is written, the documentation has.

A report that reads a name that no code sets counts nothing, and says so to nobody: the correction over a run once read `p`.
"""

import ast
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
    """Names that are given to figures, and beginnings of those that are made up.

    In `figures = ...`, `figures |= ...`, `figures["l2"] = ...`, `figures=...` of a call, a table handed to `Judgement`, and in
    functions that make figures or properties (`_figures`, `properties`, `case_properties`).
    """
    found: set[str] = set()
    beginnings: set[str] = set()
    for node in nodes:
        for part in given(node):
            for one in ast.walk(part):
                if isinstance(one, ast.Dict):
                    found |= texts(*one.keys)
                    made = [key for key in one.keys if isinstance(key, ast.JoinedStr)]
                elif isinstance(one, ast.Tuple | ast.DictComp):
                    first = one.elts[:1] if isinstance(one, ast.Tuple) else [one.key]
                    found |= texts(*first)
                    made = [key for key in first if isinstance(key, ast.JoinedStr)]
                else:
                    continue
                beginnings |= {"".join(texts(key.values[0])) for key in made}
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and named_figures(node.value):
            found |= texts(node.slice)
            beginnings |= {"".join(texts(node.slice.values[0]))} if isinstance(node.slice, ast.JoinedStr) else set()
    return found, tuple(filter(None, beginnings))


def named_figures(node: ast.AST) -> bool:
    return of_figures(node) or (isinstance(node, ast.Name) and node.id == "figures")


def given(node: ast.AST) -> list[ast.AST]:
    """The parts of a statement that become figures."""
    if isinstance(node, ast.Assign) and any(map(named_figures, node.targets)):
        return [node.value]
    if isinstance(node, ast.AnnAssign | ast.AugAssign) and named_figures(node.target) and node.value is not None:
        return [node.value]
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        tables = [one for one in node.args if isinstance(one, ast.Dict)] if name in ("Judgement", "Corroboration") else []
        return [*tables, *(one.value for one in node.keywords if one.arg == "figures")]
    if isinstance(node, ast.FunctionDef) and node.name in ("_figures", "properties", "case_properties", "_pace", "figures"):
        return [node]
    return []


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


def test_what_was_once_overlooked_is_seen() -> None:
    """The property `p`, which no code sets: a table that is no figure (the record of a re-execution) does not vouch for it."""
    given, beginnings = written(trees("judging", "session", "report/speed.py"))

    assert {"p", "schema", "--matrix"} & given == set()
    assert not "p".startswith(beginnings)


@pytest.mark.parametrize("line", ['case.number("p")', 'case.figures.get("p")', 'case.figures["p"]'])
def test_a_name_that_nobody_writes_is_seen(line: str, tmp_path: Path) -> None:
    """However it is asked for."""
    given, beginnings = written(ast.walk(ast.parse('figures["l2"] = 1.0\nfigures = {"runs": 3}\nfigures[f"pair.{b}"] = 1')))

    assert {"p"} == read(ast.walk(ast.parse(line))) - given
    assert ({"l2", "runs"}, ("pair.",)) == (given, beginnings)
