"""Each mutant of the judging code is killed by the self-test that it names: `pytest tests/mutation -n 2`."""

import ast
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from mutation import table
from mutation.mutants import TESTS, Moved, Mutant, load
from mutation.warm import Outcome, Warm
from selftest.fakes.matrix import MATRIX

ROOT = TESTS.parent
MUTANTS = load()
# What a self-test says by itself, or a judgement. Any other exception is a mutant that breaks down: any test would notice.
_SAID = re.compile(r"AssertionError|assert |Failed: |quantdet\.judging\.verdicts\.(Divergence|Violation)")
PASSED = 0
# Not in the list: the harness is tried with it.
EXACT = Mutant(
    "no-bound", "the bound is gone", "metrics/bounds.py", "return -math.expm1(math.log1p(-confidence) / n)", "return 0.0",
    "metrics/test_bounds.py::TestFlipRateUpper::test_no_flips_at_95_percent",
)  # fmt: skip


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    found = Warm()
    yield found
    found.close()


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unmutated copy of the checkout in which all the self-tests that this session names have passed.

    Made and tried once, by the first of several workers; the byte code that this leaves saves time in the copies.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if hasattr(request.config, "workerinput") else shared
    folder, said = shared / "unmutated", shared / "control.txt"
    with FileLock(shared / "control.lock"):
        if not said.is_file():
            copy_of(ROOT, folder)
            items: list[Any] = [item for item in request.session.items if _is_mutants(item)]
            named = {EXACT.test, *(item.callspec.params["mutant"].test for item in items)}
            outcome = warm.run(folder, sorted(named))
            said.write_text(_wanting(outcome, named), encoding="utf-8")
    if why := said.read_text(encoding="utf-8"):
        pytest.fail(f"the control: {why}", pytrace=False)
    return folder


def _is_mutants(item: Any) -> bool:
    return "mutant" in getattr(getattr(item, "callspec", None), "params", {})


def _wanting(outcome: Outcome, named: set[str]) -> str:
    """What keeps the unmutated run from being a control; empty if nothing does."""
    if outcome.code == PASSED and not outcome.skipped and outcome.tests >= len(named):
        return ""
    return f"not every named self-test passes without a mutant (exit code {outcome.code}):\n{outcome.output}"


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the checkout to be mutated."""
    folder = tmp_path / "mutated"
    copy_of(base, folder)
    yield folder
    shutil.rmtree(folder)


def copy_of(root: Path, folder: Path) -> None:
    """What self-tests need, as it is; the fixtures, which nothing writes to, by a link."""
    folder.mkdir()
    shutil.copytree(root / "tests", folder / "tests")
    for name in ("conftest.py", "pyproject.toml", "quant_matrix.toml"):
        shutil.copy2(root / name, folder / name)
    (folder / "fixtures").symlink_to((root / "fixtures").resolve())
    # Without arguments that the fake engine alone has: a run here would check them against the installed vLLM's.
    honest = MATRIX.replace('args = { executes = "Fake4Kernel" }', "args = { seed = 0 }")
    (folder / "small.toml").write_text(honest, encoding="utf-8")
    (folder / "nothing").mkdir()


def survives(mutant: Mutant, folder: Path, warm: Warm) -> str:
    """Mutate `folder` and run the self-test there: empty if the mutant is killed, else what happened instead.

    Raises:
        Moved: see `Mutant.mutated`.
    """
    text = mutant.mutated(folder)
    module = folder / mutant.path
    module.write_text(text, encoding="utf-8")
    for stale in module.parent.glob(f"__pycache__/{module.stem}.*"):
        stale.unlink()
    outcome = warm.run(folder, [mutant.test])
    if outcome.code == PASSED:
        return f"survived: {mutant.killed_by} passes although {mutant.does}"
    if outcome.code != 1 or outcome.errors or not outcome.failures:
        return f"not a kill: {mutant.killed_by} did not fail but break (exit code {outcome.code}):\n{outcome.output}"
    if broken := [message for message in outcome.failures if not _SAID.match(message)]:
        return f"not a kill: {mutant.killed_by} did not fail on what it asserts, but on {broken[0]}"
    return ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_a_mutant_is_killed(mutant: Mutant, copy: Path, warm: Warm) -> None:
    """The named self-test fails, on an assertion, with the mutant; without it, it passes (`base`)."""
    if why := survives(mutant, copy, warm):
        pytest.fail(why, pytrace=False)


def test_every_mutant_fits_the_code() -> None:
    """Its old text stands there once, and its test exists: told at each push, whatever part of the mutants is run."""
    assert not (moved := _moved(MUTANTS)), "\n".join(moved)


def _moved(mutants: list[Mutant]) -> list[str]:
    """What does not fit the code any more."""
    found = []
    for mutant in mutants:
        try:
            mutant.mutated(ROOT)
        except Moved as error:
            found.append(str(error))
        file, *names = mutant.killed_by.partition("[")[0].split("::")
        if not _defines(ROOT / "tests" / "selftest" / file, names):
            found.append(f"{mutant.id}: {mutant.killed_by} is not there: update the mutant")
    return found


def _defines(path: Path, names: list[str]) -> bool:
    """Whether the file has the function, in the classes before it."""
    if not path.is_file():
        return False
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for name in names:
        found = [one for one in body if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == name]
        if not found:
            return False
        body = found[0].body
    return bool(names)


def test_the_table_is_that_of_the_mutants() -> None:
    """README.md is what `(cd tests && python -m mutation.table)` writes."""
    assert table.text(MUTANTS) == table.README.read_text(encoding="utf-8")


def test_a_bad_list_is_named(tmp_path: Path) -> None:
    """A key that is missing, misspelt or no text, and an id that is there twice."""
    good = 'id = "a"\ndoes = "b"\nfile = "c"\nold = "d"\nnew = "e"\nkilled_by = "f"\n'
    for rows, words in [
        (["does = 1\n"], "mutant number 1: file, id, killed_by, new, old: missing"),
        ([good + "olds = 1\n"], "mutant a: olds: missing, unknown, or no text"),
        ([good.replace('"b"', "7")], "mutant a: does: missing, unknown, or no text"),
        ([good, good], "id used twice: a"),
    ]:
        path = tmp_path / "list.toml"
        path.write_text("".join(f"[[mutant]]\n{row}" for row in rows), encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            load(path)


# --------------------------------------------------------------------------------------------- what is not called a kill


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"new": "return +(-math.expm1(math.log1p(-confidence) / n))"}, "survived: .* although the bound is gone"),
        ({"new": "return nowhere"}, "not a kill: .* not fail on what it asserts, but on NameError"),
        ({"old": "import itertools\n", "new": "import itertools, nowhere\n"}, "not a kill: .*exit code [^1]"),
        ({"killed_by": "metrics/test_bounds.py::test_nothing"}, "not a kill: .*exit code 4"),
        ({"old": "import operator\n", "new": "import operator\nimport os\nos._exit(1)\n"}, "not a kill: .*exit code 1"),
    ],
    ids=["killed", "equivalent", "crash", "import", "no test", "silent"],
)
def test_only_an_assertion_that_fails_is_a_kill(copy: Path, warm: Warm, change: dict[str, str], words: str) -> None:
    """Of one mutant in six versions the harness takes the first only; it runs the copy and not the checkout."""
    found = survives(replace(EXACT, **change), copy, warm)

    assert re.match(words, found, re.DOTALL) if words else "" == found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"old": "no such text"},
            "no-bound: old text is 0 times in tests/quantdet/metrics/bounds.py: the code has moved: update",
        ),
        ({"old": "confidence"}, r"old text is \d\d times in .*: the code has moved: update the mutant"),
        ({"file": "metrics/statistics.py"}, "is not there: the code has moved: update the mutant"),
        ({"new": "return ("}, "is no Python"),
        ({"new": "return -math.expm1(math.log1p(-confidence) / n)  # the same"}, "changes nothing"),
    ],
    ids=["gone", "ambiguous", "file", "syntax", "comment"],
)
def test_a_mutant_that_does_not_fit_the_code_is_an_error(change: dict[str, str], words: str) -> None:
    """Nothing is run, and the message says what to do."""
    with pytest.raises(Moved, match=words):
        replace(EXACT, **change).mutated(ROOT)


def test_a_mutant_whose_text_or_test_is_gone_is_told() -> None:
    """The text, the class, the function and the file of the test."""
    gone = [
        "metrics/test_bounds.py::TestFlipRate::test_no_flips_at_95_percent",
        "metrics/test_bounds.py::TestFlipRateUpper::test_flips",
        "metrics/test_statistics.py::test_nothing",
    ]
    bad = [replace(EXACT, old="no such text"), *(replace(EXACT, killed_by=test) for test in gone)]

    assert [] == _moved([EXACT])
    assert len(bad) == len(found := _moved(bad))
    assert all("update the mutant" in line for line in found)


def test_a_control_that_fails_or_skips_is_none(tmp_path: Path) -> None:
    """A test that is red, skipped or missing without any mutant cannot kill one."""
    good = Outcome(PASSED, 2, (), (), 0, "")

    assert "" == _wanting(good, {"a", "b"})
    assert all(_wanting(one, {"a", "b"}) for one in (replace(good, code=1), replace(good, skipped=1), replace(good, tests=1)))
