"""The table of faults and hostile input: each row is shown by the tests that it names, and the README is what it makes."""

import ast
import re
from pathlib import Path

import pytest

from faults import cases
from quantdet.judging.verdicts import Verdict
from selftest.engines import test_faults
from selftest.fakes.matrix import TESTS
from selftest.whole import test_hostile

ROWS = cases.cases()


def functions(path: Path) -> dict[str, str]:
    """The source of every test in a file, decorators included."""
    text = path.read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            parts = [*(ast.unparse(one) for one in node.decorator_list), ast.unparse(node)]
            found[node.name] = "\n".join(parts)
    return found


@pytest.mark.parametrize("test", sorted({test for row in ROWS.values() for test in row.test}))
def test_a_named_test_takes_its_rows_from_the_table(test: str) -> None:
    """It exists, asks for the rows that name it, and asserts what they say."""
    file, _, name = test.partition("::")
    source = functions(TESTS / file)[name]

    assert f"here('{name}')" in source or f"rows('{test}')" in source
    assert re.search(r"\b(shows|says|ended)\(", source)


def test_the_readme_is_the_table() -> None:
    """Committed as it is generated: cd tests && python -m faults.cases > faults/README.md"""
    assert cases.table() == (TESTS / "faults" / "README.md").read_text(encoding="utf-8")


def test_every_row_says_something() -> None:
    """A verdict of the suite or an exit code, and words; only of a run that was killed are there none."""
    for row in ROWS.values():
        assert row.verdict in set(map(str, Verdict)) | {"KeyboardInterrupt"} or re.fullmatch(r"exit (-9|[0-9])", row.verdict)
        assert row.message or row.verdict == "exit -9"
        assert row.test


def test_everything_that_is_made_has_a_row() -> None:
    """No hostile file is made without being in the table."""
    made = {*test_hostile.RECORDINGS, *test_hostile.MATRICES, *test_hostile.BESIDE}
    made |= {*test_hostile.CHECKPOINTS, *test_hostile.REPORTS}
    made |= {*test_faults.AROUND, *test_faults.OBSTACLES, *test_faults.DAMAGE}

    assert made <= set(ROWS)


@pytest.mark.parametrize(
    ("verdict", "message"), [("TIMEOUT", "engine process killed by SIGKILL, no completion record"), ("ERROR", "x")]
)
def test_a_row_that_is_not_met_fails(verdict: str, message: str) -> None:
    """`shows` compares both."""
    with pytest.raises(AssertionError, match="sigkill"):
        cases.shows("sigkill", verdict, message)
