"""Hardware that is not here: whole in the JUnit file, with need and have, and a line on the terminal; what is asked first."""

from pathlib import Path

import pytest

from quantdet.report import absent_hardware
from selftest.fakes.inner import Run, Suite
from selftest.fakes.matrix import MATRIX, QUESTIONS, expect, setting
from selftest.fakes.whole import noted, starts
from selftest.whole.test_hidden_states import ASKED

pytest_plugins = ["pytester"]

ROWS = ("cpu-elsewhere (a machine that is not here): 16 cases, needs cpu-elsewhere, have cpu-here",
        "sm90 (a GPU that is not here): 8 cases, needs sm90, have cpu-here")  # fmt: skip
LETTERS = set(".sFxEX")


def letters(run: Run) -> str:
    """What stands for cases in the progress, whatever the file."""
    head = run.output.partition("quantdet: verdicts")[0].partition("quantdet: not measured")[0]
    parts = [part for line in head.splitlines() for part in line.partition("[")[0].split()[-1:]]
    return "".join(part for part in parts if part and set(part) <= LETTERS)


@pytest.mark.parametrize("args", [(), ("-q",), ("-n", "2"), ("-q", "-n", "2")], ids=["plain", "q", "xdist", "q-xdist"])
def test_rows_that_are_not_here_cost_a_line_each(suite: Suite, args: tuple[str, ...]) -> None:
    """No letter, no name of a file, all percent; in the JUnit file they have need, have and their properties."""
    run = suite("-k", "alpha", *args, apart="-n" in args)

    ran = run.ran()
    assert len(ran) == len(letters(run)) == 20
    assert 44 == len(run.cases)
    assert "[100%]" in run.output
    words = run.words
    for row in ROWS:
        assert 1 == words.count(row)
    assert "24 skipped" in run.output.splitlines()[-2] or "24 skipped" in run.output
    for name, case in run.cases.items():
        if name not in ran:
            assert ("skipped", "UNAVAILABLE", "alpha") == (case.outcome, case.verdict, case.properties["case.model"])
            assert case.message.startswith(f"UNAVAILABLE hardware: needs {case.properties['case.hardware']} (a ")
            assert case.message.endswith(", have cpu-here")


def test_a_run_of_nothing_that_is_here_is_a_line(suite: Suite) -> None:
    """All skipped, none shown, none lost."""
    run = suite("-k", "sm90 and alpha")

    assert (0, "", 8) == (run.code, letters(run), len(run.cases))
    assert ".py" not in run.output.partition("not measured")[0].partition("collected")[2]
    assert ROWS[1] in run.words


@pytest.mark.parametrize("args", [("-v",), ("-v", "-n", "2")], ids=["v", "v-xdist"])
def test_the_curious_see_them(suite: Suite, args: tuple[str, ...]) -> None:
    """-v shows a line for each, as of any other case."""
    run = suite("-k", "alpha and kernel", *args, apart="-n" in args)

    shown = [line for line in run.output.splitlines() if "SKIPPED" in line]
    assert 6 == len(shown) == sum("/sm90]" in line or "/cpu-elsewhere]" in line for line in shown)
    assert "sm90 (a GPU that is not here): 2 cases, needs sm90, have cpu-here" in run.words


def test_what_a_replay_lacks_costs_a_line_each(suite: Suite) -> None:
    """Two cells of the matrix were recorded."""
    suite("-k", "beta", "--record", "kept")

    run = suite("--replay", "kept")

    assert len(letters(run)) == len(run.ran()) == 8
    where = Path("kept").resolve()
    assert f"cpu-here (the fake's machine): 20 cases, needs a recording, have none in {where}" in run.words
    assert f"sm90 (a GPU that is not here): 8 cases, needs a recording, have none in {where}" in run.words


def test_skips_for_another_reason_are_shown(suite: Suite) -> None:
    """What is here and cannot be judged is news: a cell without any other to be compared with."""
    run = suite("-k", "alpha and awq and (cpu-here or sm90)")

    assert "..." in letters(run)
    assert 1 == letters(run).count("s")
    assert "1 cell UNAVAILABLE distinct: needs another format of alpha" in run.words


def test_a_machine_that_lacks_something_is_not_elsewhere(suite: Suite) -> None:
    """No vLLM on this machine: its cells are skipped and seen, beside those of machines that are not here."""
    none = """
def pytest_quantdet_machine(config):
    return Machine("fake cpu", frozenset({"avx2"}), 64.0), Software()
"""

    run = suite("-k", "beta and kernel or sm90", machine=none)

    assert "ss" == letters(run)
    assert "2 cells UNAVAILABLE vllm: needs vLLM (pip install -e '.[cpu]'), have none" in run.words
    assert ROWS[1] in run.words


def test_a_required_row_is_not_silent(suite: Suite) -> None:
    """--require-hardware: what is missing is an error, and seen."""
    run = suite("-k", "alpha and sm90 and kernel", "--require-hardware", "sm90")

    assert 1 == run.code
    assert "EE" == letters(run)


def test_the_count_of_tests_is_given_back(suite: Suite) -> None:
    """It is pytest's, and CUT SHORT rests on it."""
    assert "CUT SHORT" not in suite("-k", "alpha and kernel").output
    run = suite("-k", "alpha and kernel", "-x", matrix=MATRIX + setting("bf16", "wrong_kernel"))
    assert "CUT SHORT: 1 of 11 selected cases ran (stopped by -x or --maxfail)" in run.words


def test_a_report_of_what_is_here_has_no_row() -> None:
    report = pytest.TestReport("t.py::t", ("t.py", 1, "t"), {}, "skipped", None, "setup")  # type: ignore[arg-type]

    assert absent_hardware.of(report) is None


# ----------------------------------------------------------------------------------------------------------- first things


def test_what_is_asked_first_is_judged_first(suite: Suite, tmp_path: Path) -> None:
    """Model by model: repeat, kernel, distinct, then the rest; each cell is measured once all the same."""
    matrix = noted(tmp_path).replace(MATRIX, ASKED + QUESTIONS + expect("int8", "unsupported"))

    run = suite("-k", "cpu-here", "--lifetimes", "2", matrix=matrix + setting("int8", "refuse"))

    assert 0 == run.code, run.output
    order: list[tuple[str, str]] = []
    for name in run.ran():
        test, _, cell = name.partition("[")
        order.append((cell.partition("/")[0], test))
    for model in ("alpha", "beta"):
        tests = list(dict.fromkeys(test for one, test in order if one == model))
        assert ["test_repeat", "test_kernel", "test_distinct"] == tests[:3]
        assert len(tests) == len(set(tests)) > 3
    assert [model for model, _ in order] == sorted(model for model, _ in order)
    measured = starts(tmp_path)
    assert {2} == {measured.count(cell) for cell in measured if not cell.endswith("int8")}


def test_columns_stand_in_the_same_order(suite: Suite) -> None:
    """Terminal and page."""
    run = suite("-k", "alpha and cpu-here and (bf16 or awq)", "--lifetimes", "2", "--report", "r")

    assert "format decode prefill kernel distinct restart n flips <" in run.words
    page = Path("r", "report.html").read_text(encoding="utf-8")
    heads = [page.index(f">{name}</th>") for name in ("decode", "prefill", "kernel", "distinct", "restart")]
    assert heads == sorted(heads)
