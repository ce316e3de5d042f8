"""The job summary of GitHub Actions: the same verdicts as elsewhere, and nothing of an engine's words that Markdown obeys."""

from pathlib import Path

import pytest

from quantdet.report import markdown
from quantdet.report.case import Case
from quantdet.report.record import Records
from selftest.fakes.cases import case
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import QUESTIONS, setting
from selftest.whole.test_hidden_states import ASKED

pytest_plugins = ["pytester"]


def a_case(verdict: str, message: str = "") -> Case:
    return case("test_repeat", verdict, message=message, expected=not message, phase="decode", figures={"runs": 5})


def test_a_run_appends_its_summary(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what other steps have written: summary line, controls, a row for each format."""
    path = tmp_path / "summary.md"
    path.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv(markdown.VARIABLE, str(path))

    run = suite("-k", "alpha and cpu-here and (bf16 or awq)")

    text = path.read_text(encoding="utf-8")
    assert 0 == run.code, run.output
    assert text.startswith("before\n## quantdet\n\n")
    assert run.suite["summary"].replace("_", "\\_") in text
    assert "| awq | BIT_EXACT | BIT_EXACT | CONFIRMED Fake4Kernel x4 | DISTINCT | 3 |" in text
    assert "### Unexpected" not in text


def test_what_is_unexpected_comes_first_and_is_plain_text() -> None:
    """An engine's or a recording's words are shown, not obeyed."""
    text = markdown.summary(Records([a_case("NOISY", "NOISY <img src=x> | [a](b) `c`\nnext")]), "1 unexpected")

    assert "### Unexpected: 1 case, 1 cause\n\n- NOISY &lt;img src=x&gt; \\| \\[a\\](b) \\`c\\` next\n" in text
    assert "| f | **NOISY !** |" in text
    assert text.index("### Unexpected") < text.index("### m on h")


def test_a_summary_that_cannot_be_written_fails_nothing(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(markdown.VARIABLE, str(tmp_path / "none" / "summary.md"))

    assert 0 == suite("-k", "alpha and cpu-here and bf16 and test_kernel").code


def test_hidden_states_and_answers(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column where some cell has them; questions below the tables, each once, as plain text."""
    path = tmp_path / "summary.md"
    monkeypatch.setenv(markdown.VARIABLE, str(path))

    suite("-k", "cpu-here and (beta or question)", matrix=ASKED + QUESTIONS + setting("bf16", "hidden_noise"))

    text = path.read_text(encoding="utf-8")
    tables, _, answers = text.partition("### Published questions\n\n")
    assert "| format | decode | prefill | kernel | distinct | hidden states | n |\n|---|---|---|---|---|---|---|\n" in tables
    assert "| bf16 | BIT_EXACT | BIT_EXACT | CONFIRMED UnquantizedLinearMethod x4 | DISTINCT | **NOISY !** | 3 |" in tables
    assert "| ct | BIT_EXACT | BIT_EXACT | CONFIRMED Fake4Kernel x4 | DISTINCT | BIT_EXACT | 3 |" in tables
    assert (
        "- Are &lt;b&gt;three&lt;/b&gt; formats \\| apart?\n  - DISTINCT alpha/three/cpu-here: ct BIT\\_EXACT (n = 3), "
        in answers
    )
    assert 1 == answers.count("- Which formats repeat?\n  - BIT_EXACT alpha/which/cpu-here: ")
    assert "\n  - BIT_EXACT beta/which/cpu-here: BIT\\_EXACT: bf16" in answers


def test_a_run_without_questions_has_no_word_of_them() -> None:
    assert "questions" not in markdown.summary(Records([a_case("BIT_EXACT")]), "fine")
