"""One cause, one entry: on the terminal, on the page and in the job summary; the JUnit file keeps every case."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from quantdet.report import entries, markdown
from quantdet.report.case import Case, SharedCause
from selftest.fakes import cases as made
from selftest.fakes.inner import Run, Suite
from selftest.fakes.matrix import MATRIX, QUESTIONS, setting
from selftest.fakes.whole import AWQ, of
from selftest.report.test_html import page
from selftest.session.test_reexecution import WITH_CLAIMS
from selftest.session.test_reexecution import recordings as recordings

pytest_plugins = ["pytester"]

HERE = "cpu-here and (alpha or beta)"
FORMATS = ("bf16", "gptq", "ct", "awq", "int8")
CELLS = [f"alpha/{name}/cpu-here" for name in FORMATS] + ["beta/bf16/cpu-here", "beta/ct/cpu-here"]
LINE = "RuntimeError: the fake broke down"
QUOTED = f"    | {LINE}"


def section(run: Run) -> str:
    """What the terminal says of the unexpected, without the last line's counts."""
    text = run.output.partition("quantdet: unexpected")[2]
    return re.split(r"^(?:=+ )?\d+ failed\b|^!!!", text, maxsplit=1, flags=re.MULTILINE)[0]


def told(run: Run) -> dict[str, list[str]]:
    """First line of each entry -> its other lines."""
    found: dict[str, list[str]] = {}
    for line in section(run).splitlines()[1:]:
        if line.startswith(" "):
            found[next(reversed(found))].append(line)
        else:
            found[line] = []
    return found


@pytest.mark.parametrize("args", [(), ("-q",), ("-v",), ("-rA",), ("-n", "2")], ids=["plain", "q", "v", "rA", "xdist"])
def test_cells_that_die_of_the_same_are_an_entry_each(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    """The engine's words in the first line, the log's end once, every case below it; in JUnit every case with its words."""
    monkeypatch.setenv(markdown.VARIABLE, str(tmp_path / "summary.md"))
    matrix = MATRIX + "".join(setting(name, "raise") for name in FORMATS)

    run = suite("-k", HERE, "--report", "r", *args, matrix=matrix, apart="-n" in args)

    found, failed = told(run), run.failures()
    assert {f"ERROR {cell}: {LINE}" for cell in CELLS} == set(found)
    assert 28 == len(failed) and {"ERROR"} == set(failed.values())
    for cell in CELLS:
        for name in (*of(cell), f"test_distinct[{cell}]"):
            assert f"ERROR {cell}: {LINE}" == run.cases[name].message.splitlines()[0]
        lines = found[f"ERROR {cell}: {LINE}"]
        assert "  took 4 cases: test_repeat (decode, prefill), test_kernel, test_distinct" in lines
        assert [f"  rerun: pytest . -k {cell} --no-controls"] == [line for line in lines if "rerun" in line]
        assert 20 > len(lines)
    assert 28 == Path("report.xml").read_text(encoding="utf-8").count(f"\n{QUOTED}\n  log: ")
    assert len(CELLS) == run.output.count(QUOTED)
    assert "FAILURES" not in run.output
    assert not re.search("^FAILED", run.output, re.MULTILINE)
    assert re.search(r"\b28 failed\b.* in ", run.output)
    assert "(28 cases, 7 causes)" in run.output
    assert "; 28 unexpected (7 causes); " in run.suite["summary"]
    assert 5 == len(run.suite["unexpected"].split(" | "))
    said = page().sections["unexpected"]
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    for text in (said, summary.replace("\\", "")):
        assert (
            len(CELLS) == text.count(QUOTED.strip()) == text.count("took 4 cases: test_repeat (decode, prefill), test_kernel")
        )
        assert all(1 == text.count(f"pytest . -k {cell}") for cell in CELLS)


def test_a_refusal_that_nobody_declared_is_an_entry(suite: Suite) -> None:
    """With the engine's words, and what to do if it is right."""
    run = suite("-k", f"{HERE} and (awq or bf16)", matrix=MATRIX + setting("awq", "refuse"))

    (first,) = (line for line in told(run) if not line.startswith(" "))
    assert first.startswith(f"UNSUPPORTED {AWQ}: engine refused: ValueError: the fake does not")
    hint = "not declared: if this is right, add an [[expect]] row with outcome = 'unsupported' (--expect FILE)"
    assert hint in " ".join(section(run).split())
    assert dict.fromkeys((*of(AWQ), f"test_distinct[{AWQ}]"), "UNSUPPORTED") == run.failures()


def test_a_question_is_among_the_cases_of_the_cell_that_died(suite: Suite) -> None:
    """It failed for nothing else."""
    run = suite("-k", f"{HERE} and alpha", matrix=MATRIX + QUESTIONS + setting("awq", "raise"))

    assert [f"ERROR {AWQ}: {LINE}"] == list(told(run))
    words = " ".join(section(run).split())
    assert (
        "took 6 cases: test_repeat (decode, prefill), test_kernel, test_distinct; of others: "
        "test_question[alpha/three/cpu-here], test_question[alpha/which/cpu-here] rerun: pytest . -k alpha/awq/cpu-here"
    ) in words
    assert 6 == len(run.failures())


def test_reexecutions_are_among_the_cases_of_the_verifier_that_died(suite: Suite, recordings: Path) -> None:
    """Three claims, one cause; beside it what the dead cell's own tests say, with the same words."""
    matrix = WITH_CLAIMS + setting("ct", "raise")

    run = suite("-k", "reexecution and cpu-here", f"--reference={recordings}", matrix=matrix)

    assert ["ERROR alpha/ct/cpu-here: RuntimeError: the fake broke down"] == list(told(run))
    claims = [f"test_reexecution[alpha/{name}/cpu-here-by-cpu-here]" for name in ("awq", "ct", "gptq")]
    assert dict.fromkeys(claims, "ERROR") == run.failures()
    assert "took 3 cases: " + ", ".join(claims) in " ".join(section(run).split())
    assert 1 == section(run).count("rerun: ")
    both = suite("-k", "cpu-here and alpha and (reexecution or kernel)", f"--reference={recordings}", matrix=matrix)
    assert ["ERROR alpha/ct/cpu-here: RuntimeError: the fake broke down"] == list(told(both))
    assert "took 4 cases: test_kernel; of others: " in " ".join(section(both).split())


def test_a_control_that_was_missed_is_the_cause_of_all_that_rests_on_it(suite: Suite) -> None:
    """Every BIT_EXACT of the hardware is INVALID: one entry, at the control's cell, and its names are counted, not listed."""
    matrix = MATRIX + setting("bf16", "blind") + setting("gptq", "blind")

    run = suite("-k", f"{HERE} and (test_repeat or bit_flip)", matrix=matrix, controls=True)

    first, *others = told(run)
    assert [] == others
    assert first.startswith("INVALID alpha/bf16/cpu-here control: ")
    assert 15 == len(run.failures())
    words = " ".join(section(run).split())
    assert "took 15 cases: test_repeat (decode, prefill), test_bit_flip; of others: test_repeat[alpha/gptq/cpu-here-" in words
    assert "test_repeat[alpha/int8/cpu-here-prefill] and 4 more" in words


def test_noise_in_both_phases_is_one_entry(suite: Suite) -> None:
    """The messages of both, and a command that runs both and no more."""
    run = suite("-k", f"{HERE} and alpha and (awq or bf16)", "--repeats", "4", matrix=MATRIX + setting("awq", "noise"))

    (first,) = told(run)
    assert first.startswith(f"NOISY {AWQ} decode: 3 of 4 repeats differ, first prompt len20")
    words = " ".join(section(run).split())
    assert 1 == words.count(f"NOISY {AWQ} prefill: 3 of 4 repeats differ")
    assert f"took 2 cases: test_repeat (decode, prefill) rerun: pytest test_repeat.py -k {AWQ} --repeats=4" in words


def test_formats_that_say_the_same_of_each_other_are_one_entry(suite: Suite) -> None:
    """A and B are IDENTICAL and were expected DISTINCT: each case says it of the other."""
    twins = setting("awq", "honest", numerics="one") + setting("int8", "honest", numerics="one")

    run = suite("-k", f"{HERE} and alpha and (awq or int8 or bf16)", matrix=MATRIX + twins)

    assert {"test_distinct[alpha/awq/cpu-here]", "test_distinct[alpha/int8/cpu-here]"} == set(run.failures())
    first, *others = told(run)
    assert [] == others
    assert first.startswith(f"IDENTICAL {AWQ} distinct: IDENTICAL to int8, expected DISTINCT")
    words = " ".join(section(run).split())
    assert "IDENTICAL alpha/int8/cpu-here distinct: IDENTICAL to awq, expected DISTINCT" in words
    assert "took 2 cases: test_distinct; of others: test_distinct[alpha/int8/cpu-here]" in words
    assert "rerun: pytest test_distinct.py -k 'alpha/awq/cpu-here or alpha/int8/cpu-here'" in words


def test_what_the_log_says_is_in_the_first_line(suite: Suite) -> None:
    """An engine that ends without a word: not "engine process ended" alone."""
    says = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"

    run = suite("-k", f"{HERE} and alpha and awq and kernel", matrix=MATRIX + setting("awq", "say", says=says))

    message = f"ERROR {AWQ}: {says} (engine process ended with exit code 1, no completion record)"
    assert message == run.cases[f"test_kernel[{AWQ}]"].message.splitlines()[0]
    assert message in " ".join(section(run).split())


@pytest.mark.parametrize("args", [(), ("-n", "2"), ("-x",)], ids=["plain", "xdist", "x"])
def test_what_carries_no_judgement_is_pytests_to_say(suite: Suite, pytester: pytest.Pytester, args: tuple[str, ...]) -> None:
    """A user's own test that fails beside a cell that died: its traceback and its line of the summary, and the right counts."""
    pytester.makepyfile(test_mine="def test_mine():\n    assert 1 == 2, 'mine'\n")

    run = suite("-k", f"mine or ({HERE} and awq)", *args, matrix=MATRIX + setting("awq", "raise"), apart="-n" in args)

    assert re.search(r"^FAILED test_mine.py::test_mine - AssertionError: mine", run.output, re.MULTILINE)
    assert re.search("^E +AssertionError: mine", run.output, re.MULTILINE)
    assert "FAILED test_kernel" not in run.output
    assert re.search(r"rerun the first failure without a verdict: pytest test_mine.py::test_mine", run.output)
    if not args or "-n" in args:
        assert [f"ERROR {AWQ}: {LINE}"] == list(told(run))
        assert "5 failed" in run.output
    else:
        assert "1 failed" in run.output


@pytest.mark.parametrize(("style", "lines"), [("line", 0), ("no", 2), ("short", 11)])
def test_tracebacks_are_as_long_as_asked(suite: Suite, style: str, lines: int) -> None:
    """--tb=line: first lines alone; --tb=no: without the log."""
    run = suite("-k", f"{HERE} and alpha and awq", f"--tb={style}", matrix=MATRIX + setting("awq", "raise"))

    (found,) = told(run).values()
    assert lines <= len(found) <= 2 * lines
    assert (QUOTED in run.output) == (style == "short")


@pytest.mark.parametrize(
    ("extra", "which"),
    [(setting("awq", "raise"), "awq"), (setting("awq", "noise"), "awq"), (setting("awq", "refuse"), "awq or bf16")],
    ids=["died", "noisy", "refused"],
)
def test_the_command_of_an_entry_gives_the_same_entry(suite: Suite, extra: str, which: str) -> None:
    """As printed: the same first line, the same cases, none that passed for another reason."""
    run = suite("-k", f"{HERE} and alpha and ({which})", matrix=MATRIX + extra)
    (line,) = re.findall(r"rerun: pytest (.*)", run.output)

    again = suite(*shlex.split(line), matrix=MATRIX + extra)

    assert list(told(run)) == list(told(again))
    assert run.failures() == again.failures() == {name: case.verdict for name, case in again.ran().items()}


def test_a_long_entry_fits_a_screen() -> None:
    """Of a hundred lines sixteen, of a hundred cases eight names; a first line of any length is cut."""
    cases = [
        case(f"test_repeat[alpha/f{number}/h-decode]", cause=SharedCause("alpha/f0/h", "E " * 999, "x\n" * 99))
        for number in range(100)
    ]

    (one,) = entries.of(cases)

    assert (600, 16) == (len(one.first), len(one.lines))
    assert "and 84 lines more in the JUnit file" == one.lines[-1]
    assert "took 100 cases: test_repeat (decode); of others: test_repeat[alpha/f1/h-decode], " in one.took
    assert one.took.endswith("test_repeat[alpha/f8/h-decode] and 91 more")


def test_other_causes_and_other_cells_are_other_entries() -> None:
    """Neither the same words of two cells nor two causes of one are thrown together; what is expected is no entry."""
    cases = [
        case("test_kernel[m/a/h]", cause=SharedCause("m/a/h", "ERROR x", "")),
        case("test_kernel[m/b/h]", cause=SharedCause("m/b/h", "ERROR x", "")),
        case("test_distinct[m/b/h]", cause=SharedCause("m/b/h", "ERROR y", "")),
        case("test_repeat[m/c/h-decode]"), case("test_repeat[m/c/h-prefill]", "INVALID"), case("test_restart[m/c/h]"),
        case("test_kernel[m/d/h]", expected=True),
    ]  # fmt: skip

    assert [1] * 6 == [len(one.cases) for one in entries.of(cases)]


def test_figures_make_no_other_cause() -> None:
    """Of one cell: what was free, and where, is another figure each time. The first stands there as it was said."""
    said = ("MemoryError: 98.5 MiB taken at 0x7fa0", "MemoryError: 112 MiB taken at 0x1b")
    cases = [case("test_kernel[m/a/h]", cause=SharedCause("m/a/h", first, "")) for first in said]

    assert [("MemoryError: 98.5 MiB taken at 0x7fa0", 2)] == [(one.first, len(one.cases)) for one in entries.of(cases)]


def test_pairs_are_one_entry_as_far_as_they_reach() -> None:
    """A is said of B and C, B of A, C of A: one; D and E are another; another test's are its own."""
    among = [("a", "bc"), ("b", "a"), ("c", "a"), ("d", "e"), ("e", "d")]
    cases = [case(f"test_distinct[m/{one}/h]", among=tuple(f"m/{name}/h" for name in (one, *others))) for one, others in among]
    cases.append(case("test_versions[m/a/h]", among=("m/a/h", "m/b/h")))

    found = entries.of(cases)

    assert [3, 2, 1] == [len(one.cases) for one in found]
    assert cases[:3] == found[0].own


def case(name: str, verdict: str = "NOISY", **more: Any) -> Case:
    test = name.partition("[")[0]
    given = {"nodeid": f"{test}.py::{name}", "expected": False, "message": f"{verdict} {name}"}
    return made.case(test, verdict, **(given | more))
