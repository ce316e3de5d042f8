"""A case from the test to the reports: numbers stay numbers on every way, JUnit gets its text, and a file is not believed."""

import json
import math
from pathlib import Path
from typing import Any

import execnet
import numpy as np
import pytest

from quantdet.judging.verdicts import Reference, Verdict
from quantdet.report import junit_text, text_layout
from quantdet.report.case import Case, SharedCause
from quantdet.report.html.__main__ import main
from selftest.fakes.cases import a_pair, case

INF = float("inf")
WHOLE = case(
    "test_distinct", "NOISY", expected=False, detail="a\nb", among=("m/f/h", "m/g/h"),
    cause=SharedCause("m/g/h", "NOISY x", "log"),
    pairs=(a_pair("f", "g", l2=INF, p=None, references=(Reference("r", 1.0, None, INF, 0.0, None, 2.5),)),),
    reexecution={"distances": {"decode": {"own_metric": {"f": INF}}}, "own": ["f"], "snr": None},
    evidence={"vllm": "1", "layers": [["linear", "x", "K", 4]]},
    figures={"runs": 5, "l2": INF, "kernel.weight_only": False, "versions": ["1", "2"], "seconds": {"load": 0.25}, "word": "x"},
)  # fmt: skip


def test_a_case_crosses_to_the_controller() -> None:
    """As a tree that execnet carries; the same case comes back, with its types."""
    tree = execnet.loads(execnet.dumps(WHOLE.to_json()))

    found = Case.from_json(tree)

    assert WHOLE == found
    assert (Verdict, int, bool) == (type(found.verdict), type(found.figures["runs"]), type(found.figures["kernel.weight_only"]))


def test_what_execnet_does_not_know_becomes_plain() -> None:
    """numpy's numbers are numbers, tuples are lists, NaN stays; anything else is its text."""
    given = {
        "a": np.float64(0.5),
        "b": np.int64(3),
        "c": np.bool_(True),
        "d": (1, 2),
        "e": np.float32(0.25),
        "f": 1j,
        "g": math.nan,
    }

    found = execnet.loads(execnet.dumps(case(figures=given).to_json()))["figures"]

    assert math.isnan(found.pop("g"))
    known = {"case.model": "m", "case.format": "f", "case.hardware": "h"}
    assert known | {"a": 0.5, "b": 3, "c": True, "d": [1, 2], "e": 0.25, "f": "1j"} == found
    assert [float, int, bool] == [type(found[name]) for name in "abc"]


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "FINE"}, {"verdict": None}, {"nodeid": 5}, {"expected": "perhaps"}, {"among": "m/f/h"}, {"pairs": [{}]},
        {"pairs": [{"a": "a"}]}, {"cause": {"cell": "c"}}, {"figures": []}, {"reexecution": "x"}, {"evidence": None},
        {"more": 1},
    ],
)  # fmt: skip
def test_a_tree_that_is_no_case_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Case.from_json(WHOLE.to_json() | change)
    with pytest.raises(ValueError):
        Case.from_json({})


def test_a_figure_of_another_kind_is_none() -> None:
    """Neither guessed from a text nor 0; a truth is no number."""
    found = case(figures={"runs": "5", "l2": True, "versions": "1,2", "control": 5, "seconds": {"load": "1"}, "n": [1]})

    assert (None, None, [], "", {}) == (
        found.runs, found.number("l2"), found.names("versions"), found.text("control"), found.parts("seconds")
    )  # fmt: skip
    assert (None, None, False, False) == (found.flip_rate, case().runs, case().weight_only, case().controlled)
    assert {} == case(figures={"seconds": {"load": True}}).parts("seconds")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("l2", None, ""), ("l2", 0.0, "0.0"), ("l2", INF, "inf"), ("runs", 5, "5"), ("kernel.weight_only", False, "False"),
        ("identical_to", [], ""), ("versions", ["0.26.0", "0.32.0"], "0.26.0,0.32.0"), ("tokens_per_second", 12.34, "12.3"),
        ("tokens_per_second.decode", 999.94, "999.9"), ("tokens_per_second.prefill", 1234.5, "1234"),
        ("tokens_per_second.n", {"rounds": 3, "decode_steps": 8}, "rounds=3 decode_steps=8"),
        ("seconds", {"import": 0.0, "load": 0.031, "measure": 12.34}, "import=0.0 load=0.03 measure=12.3"),
        ("identified", {"own": 3, "prompts": 16, "low": 0.04, "high": 0.45678}, "3/16 [0.0400, 0.4568]"),
        ("distance.decode.awq", {"own": 0.123456789, "published": INF}, "own=0.123457 published=inf"),
        ("distance.hidden_states.awq", 0.123456789, "0.123457"),
    ],
)  # fmt: skip
def test_the_text_of_a_figure(name: str, value: Any, text: str) -> None:
    """As the JUnit file has it."""
    assert text == junit_text.text(name, value)


@pytest.mark.parametrize("value", [0.0, 0.0312, 0.00999, 0.0499, 0.05, 0.25, 1.05, 12.34, 999.96, 1234.5])
def test_what_is_added_up_is_what_was_told(value: float) -> None:
    """The number behind the text, without reading the text."""
    assert float(text_layout.figure(value)) == text_layout.told(value)
    assert float(junit_text.rate(value)) == junit_text.told_rate(value)


def test_without_takes_figures_away() -> None:
    assert case(figures={"runs": 5}) == case(figures={"runs": 5, "l2": 1.0}).without("l2", "other")


def test_a_file_of_the_first_schema_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not that a line of it is broken."""
    (tmp_path / "cases.jsonl").write_text(f'{{"kind": "run", "schema": 1}}\n{json.dumps({"kind": "case", "properties": {}})}\n')

    assert 1 == main([str(tmp_path)])
    assert "needs one run of schema 2" in capsys.readouterr().err
