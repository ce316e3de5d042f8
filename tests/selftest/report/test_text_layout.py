"""Tables of text: within the width, no character lost, whatever the names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantdet.report import nearest, reexecution, text_layout
from quantdet.report.case import Case
from selftest.fakes.cases import case

ALPHABETS = ("abc_", "def-", "ghi.", "0123", "jkl[", "4567")  # one for each column, so that its characters can be told
LONG = st.text("abcdefgh_.-0123456789", min_size=1, max_size=64)


@st.composite
def contents(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    """Headers and rows; the characters of a column are its own."""
    count = draw(st.integers(1, len(ALPHABETS)))
    text = [st.text(alphabet, min_size=1, max_size=70) for alphabet in ALPHABETS[:count]]
    rows = draw(st.lists(st.tuples(*text), min_size=1, max_size=4))
    return list(draw(st.tuples(*text))), [list(row) for row in rows]


@given(made=contents(), width=st.integers(60, 120), right=st.booleans())
def test_no_line_is_longer_and_no_character_is_lost(made: tuple[list[str], list[list[str]]], width: int, right: bool) -> None:
    """Cells are broken, never cut; lines end without blanks."""
    names, rows = made

    text = text_layout.fitted([f"{'>' * right}{name}" for name in names], rows, width, fold=(names[-1],))

    assert all(len(line) <= width for line in text.splitlines()), text
    assert text == "\n".join(line.rstrip() for line in text.splitlines())
    for at, alphabet in enumerate(ALPHABETS[: len(names)]):
        assert "".join([names[at], *(row[at] for row in rows)]) == "".join(c for c in text if c in alphabet)


@given(text=st.text("ab _-[=/.:\n", max_size=60), width=st.integers(1, 20))
def test_folding_keeps_what_is_no_blank(text: str, width: int) -> None:
    """Lines of at most the width, the same characters in the same order."""
    found = text_layout.folded(text, width)

    assert all(len(line) <= width for line in found.split("\n"))
    assert "".join(text.split()) == "".join(found.split())


def test_a_name_is_broken_after_its_marks() -> None:
    """And a table that has room is left as it is."""
    assert "gptq_\nmachete_\ncompiled" == text_layout.folded("gptq_machete_compiled", 9)
    assert "CPUWNA16\n[w4a8] x8" == text_layout.folded("CPUWNA16 [w4a8] x8", 9)
    assert "format  n\nbf16    5" == text_layout.fitted(("format", "n"), [("bf16", "5")], 80)


def record(claimed: str, verified: list[str], own: list[str], verdict: str = "DETECTABLE") -> Case:
    metric = {name: 0.001 * (1 + at) for at, name in enumerate(verified)}
    comparison = {"verdict": verdict, "difference": 0.0684, "low": 0.061, "high": 0.0749, "mde": 0.01, "snr": 48.2, "p": 0.01}
    data = {
        "model": "tiny", "claimed": claimed, "source": "sm90, vLLM 0.26.0, NVIDIA H200", "by": "cpu", "by_text": "cpu-amx",
        "prompts": 32, "own": own, "comparisons": {name: comparison for name in verified if name != claimed},
        "distances": {phase: dict.fromkeys(("own_metric", "published"), metric) for phase in ("decode", "prefill")},
        "nearest": {claimed: 1.0}, "identified": {"share": 1.0, "low": 0.89, "high": 1.0},
    }  # fmt: skip
    return case("test_reexecution", verdict, model="tiny", hardware="cpu", reexecution=data)


@given(names=st.lists(LONG, min_size=5, max_size=8, unique=True))
def test_re_executions_in_short_fit(names: list[str]) -> None:
    """Claims and verifying formats with names up to the longest that a matrix may have."""
    cases = [record(name, names, [name], "UNDERPOWERED") for name in names]

    text = "\n".join(nearest.sections(cases, names, 80))

    assert all(len(line) <= 80 for line in text.splitlines()), text


def test_re_executions_in_short_say_what_matters_and_where_the_whole_is() -> None:
    """Five claims by five formats: a row each with intervals, four lines of SNR, and not the long tables."""
    names = ["bf16", "awq", "gptq", "int8", "fp8"]
    cases = [record(name, names, [name, "awq"] if name == "gptq" else [name]) for name in names]

    texts = nearest.sections(cases, names, 80)

    words = " ".join("\n".join(texts).split())
    assert "bf16 1.00 1.00e-03 awq 0.068 48.20 4 of 4 [0.89, 1.00] [0.061, 0.075]" in words
    assert "gptq 1.00 3.00e-03 bf16 0.068 48.20 3 of 3" in words
    assert "compared with other formats that hold the claim's own numbers: 1 DETECTABLE" in words
    assert 4 == words.count(" over 10 pairs (mean signal")
    assert "whole: JUnit properties snr.decode, snr.prefill, identification (--junitxml=FILE); drawn in report.html" in words
    assert "DIRECTIONAL DISTANCES" not in words
    assert len("\n".join(texts).splitlines()) < len("\n".join(reexecution.whole(cases, names, 80)).splitlines()) / 3


def test_small_re_executions_are_printed_whole() -> None:
    """Four by four: the published tables."""
    names = ["bf16", "awq", "gptq", "int8"]
    cases = [record(name, names, [name]) for name in names]

    assert reexecution.whole(cases, names, 80) == nearest.sections(cases, names, 80)


def test_what_is_nearer_or_not_told_is_said() -> None:
    """A claim that another format matches better, and one that the prompts do not tell apart."""
    names = ["bf16", "awq", "gptq", "int8", "fp8"]
    cases = [record(name, names, [name]) for name in names]
    found = cases[0].reexecution
    assert found is not None
    found["comparisons"]["awq"] = {**found["comparisons"]["awq"], "difference": -0.5, "low": -0.6, "high": -0.4}
    found["comparisons"]["fp8"] = {**found["comparisons"]["fp8"], "verdict": "NOT_DETECTABLE", "low": -0.01}

    words = " ".join("\n".join(nearest.sections(cases, names, 80)).split())

    assert "2 of 4 [0.89, 1.00] [-0.6, -0.4] 1 NEARER" in words
    assert "bf16 -> awq: NEARER, -0.5 [-0.6, -0.4], detectable from 0.01 nats" in words
    assert "bf16 -> fp8: NOT_DETECTABLE, 0.068 [-0.01, 0.075], detectable from 0.01 nats" in words


@pytest.mark.parametrize("name", ["a" * 64, "a_" * 32, "x"])
def test_a_matrix_of_long_names_fits(name: str) -> None:
    """Rows and columns with the longest ids."""
    names = [f"{name}{n}"[-64:] for n in range(3)]

    blocks = text_layout.matrix("published", names, names, lambda a, b: "-" if a == b else "1.00e-03", 80)

    assert all(len(line) <= 80 for block in blocks for line in block.splitlines())
    assert 6 == sum(block.count("1.00e-03") for block in blocks)
