"""Whole runs with the fake engine: each seeded defect fails the right test with the right verdict, and no other."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import rich.console
import rich.table  # noqa: F401
import scipy.stats  # noqa: F401  # here once: what is first imported in an inner run is imported in each

from quantdet import checkpoints
from quantdet.matrix.models import Model
from quantdet.matrix.rows import Format
from quantdet.session.cases.judge import PROPERTIES
from selftest.fakes.inner import Run, Suite
from selftest.fakes.matrix import MATRIX, expect, setting

pytest_plugins = ["pytester"]

CASE_PROPERTIES = {"case.model", "case.format", "case.hardware", "case.engine", "kernel.requested"}
TIMINGS = {"tokens_per_second", "seconds"}
HERE = "alpha and cpu-here"
TWO = f"{HERE} and (awq or bf16)"
THREE = f"{HERE} and (awq or bf16 or int8)"
TWINS = f"{HERE} and (gptq or /ct/)"
UNDECLARED = MATRIX.partition("\n[[expect]]")[0] + "\n"  # no row says which formats are the same
AWQ = "alpha/awq/cpu-here"


def of(cell: str, *tests: str) -> set[str]:
    """Names of a cell's tests: decode, prefill (test_repeat), distinct, kernel; all four by default."""
    names = {
        "decode": f"test_repeat[{cell}-decode]",
        "prefill": f"test_repeat[{cell}-prefill]",
        "distinct": f"test_distinct[{cell}]",
        "kernel": f"test_kernel[{cell}]",
    }
    return {names[test] for test in tests or names}


def test_an_honest_engine_passes_everywhere(suite: Suite) -> None:
    """Measured cells pass with their verdict words; every other cell is there, skipped with need and have."""
    run = suite()

    assert 0 == run.code, run.output
    assert {} == run.failures()
    cells = {f"alpha/{name}/cpu-here" for name in ("bf16", "gptq", "ct", "awq", "int8")}
    cells |= {"beta/bf16/cpu-here", "beta/ct/cpu-here"}
    assert set().union(*(of(cell) for cell in cells)) == set(run.ran())
    verdicts = {name: case.verdict for name, case in run.ran().items()}
    assert {"BIT_EXACT"} == {verdict for name, verdict in verdicts.items() if name.startswith("test_repeat")}
    assert {"CONFIRMED"} == {verdict for name, verdict in verdicts.items() if name.startswith("test_kernel")}
    assert {
        "test_distinct[alpha/bf16/cpu-here]": "DISTINCT", "test_distinct[alpha/awq/cpu-here]": "DISTINCT",
        "test_distinct[alpha/gptq/cpu-here]": "IDENTICAL", "test_distinct[alpha/ct/cpu-here]": "IDENTICAL",
        "test_distinct[alpha/int8/cpu-here]": "DISTINCT", "test_distinct[beta/bf16/cpu-here]": "DISTINCT",
        "test_distinct[beta/ct/cpu-here]": "DISTINCT",
    } == {name: verdict for name, verdict in verdicts.items() if name.startswith("test_distinct")}  # fmt: skip
    skipped = {name: case for name, case in run.cases.items() if case.outcome == "skipped" and "/" in name}
    assert {"UNAVAILABLE"} == {case.verdict for case in skipped.values()}
    assert all(re.match(r"UNAVAILABLE hardware: needs .*, have cpu-here", c.message) for c in skipped.values())
    assert of("alpha/bf16/sm90") <= set(skipped)
    assert not [name for name in run.cases if name.startswith("test_kernel[alpha/gptq/sm90")]


def test_report_carries_the_promised_properties(suite: Suite) -> None:
    """Each case that ran has every property of the design, once; the suite's say what the figures depend on."""
    run = suite("-k", "beta")

    for name, case in run.ran().items():
        wanted = {*CASE_PROPERTIES, *PROPERTIES, *(("case.phase",) if name.startswith("test_repeat") else ())}
        assert wanted <= set(case.properties), name
    case = run.cases["test_repeat[beta/ct/cpu-here-prefill]"].properties
    assert ("beta", "ct", "cpu-here", "prefill") == tuple(
        case[f"case.{key}"] for key in ("model", "format", "hardware", "phase")
    )
    assert ("fake4", "Fake4Kernel x4") == (case["kernel.requested"], case["kernel.executed"])
    assert ("3", "1", "1", "bit-exact") == tuple(case[key] for key in ("runs", "lifetimes", "distinct_outputs", "expectation"))
    assert 1 - 0.05 ** (1 / 3) == pytest.approx(float(case["flip_rate_upper95"]), abs=1e-6)
    assert re.fullmatch(r"[0-9a-f]{64}", case["checkpoint.sha256"])
    assert re.fullmatch(r"[0-9a-f]{64}", case["logits.sha256"])
    assert ("no", "uncontrolled: --no-controls") == (case["controlled"], case["control"])
    assert "; UNCONTROLLED: none of 4 BIT_EXACT counts; " in run.suite["summary"]
    assert {"summary", "hardware", "suite.version", "env.vllm", "env.cpu"} <= set(run.suite)
    assert ("0.32.0", "fake cpu", "cpu-here") == (run.suite["env.vllm"], run.suite["env.cpu"], run.suite["hardware"])


def test_terminal_says_verdicts_classes_and_pairs(suite: Suite) -> None:
    """Header, table, effects, classes, comparisons and what was not measured are on the screen."""
    run = suite("-k", "alpha")

    assert re.search(r"^quantdet .*hardware cpu-here; cpu fake cpu", run.output, re.MULTILINE)
    assert re.search(r"gptq +BIT_EXACT +BIT_EXACT +Fake4Kernel x4 +IDENTICAL +3", run.output)
    words = " ".join(run.output.split())
    for phase in ("PREFILL", "DECODE"):
        assert f"WITHIN-HARDWARE QUANTIZATION EFFECTS ({phase}): alpha on cpu-here published bf16 gptq ct awq int8" in words
        assert {"alpha on cpu-here"} == set(json.loads(run.suite[f"effects.{phase.lower()}"]))
    assert "gptq = ct (4 classes of 5 formats)" in words
    assert "LOGPROB COMPARISON RESULTS: 1 identical pairs, 9 different" in run.output
    assert "published" in run.cases["test_distinct[alpha/gptq/cpu-here]"].properties["pair.ct"]
    assert re.search(r"gptq \| ct +IDENTICAL", run.output)
    assert "cpu-elsewhere (a machine that is not here): 16 cases, needs cpu-elsewhere, have cpu-here" in words


@pytest.mark.parametrize(
    ("outcome", "behaviour", "result"),
    [
        ("noisy", "noise", "xfail"),
        ("noisy", "honest", "failure"),
        ("may_be_noisy", "noise", "passed"),
        ("may_be_noisy", "honest", "passed"),
    ],
)
def test_declared_noise(suite: Suite, outcome: str, behaviour: str, result: str) -> None:
    """`noisy` is satisfied by noise alone (a silent kernel fails); `may_be_noisy` by either."""
    matrix = MATRIX + setting("awq", behaviour) + expect("awq", outcome, "decode")

    run = suite("-k", f"{TWO} and decode", matrix=matrix)

    case = run.cases[f"test_repeat[{AWQ}-decode]"]
    verdict = "NOISY" if behaviour == "noise" else "BIT_EXACT"
    assert (result, verdict) == (case.outcome, case.verdict), run.output
    assert (1 if result == "failure" else 0) == run.code
    assert case.properties["expectation"].startswith(f"{outcome}: for the test")
    if result != "passed":
        assert f"{verdict} {AWQ} decode" in case.message


def test_no_other_verdict_satisfies_noisy(suite: Suite) -> None:
    """A cell declared noisy whose engine dies is an ERROR, not an expected failure."""
    matrix = MATRIX + setting("awq", "kill") + expect("awq", "noisy")

    run = suite("-k", TWO, matrix=matrix)

    assert dict.fromkeys(of(AWQ), "ERROR") == run.failures()


@pytest.mark.parametrize(("behaviour", "verdict"), [("refuse", "UNSUPPORTED"), ("honest", "INVALID")])
def test_declared_unsupported(suite: Suite, behaviour: str, verdict: str) -> None:
    """A refusal that the matrix declares passes test_refusal; an engine that takes the format fails it."""
    matrix = MATRIX + setting("awq", behaviour) + expect("awq", "unsupported")

    run = suite("-k", TWO, matrix=matrix)

    case = run.cases[f"test_refusal[{AWQ}]"]
    assert verdict == case.verdict
    assert ("passed" if behaviour == "refuse" else "failure") == case.outcome
    assert {"skipped"} == {run.cases[name].outcome for name in of(AWQ)}
    assert {"UNSUPPORTED"} == {run.cases[name].verdict for name in of(AWQ)}


def test_a_killed_child_costs_one_cell_and_a_rerun_resumes(suite: Suite, tmp_path: Path) -> None:
    """SIGKILL of an engine is ERROR for its cell; with the same --store only that cell is measured again."""
    poison, starts = tmp_path / "poison", tmp_path / "starts"
    poison.touch()
    every = f'\n[[setting]]\nwhen = {{}}\nargs = {{ starts = "{starts}" }}\nreason = "counts"\n'
    matrix = MATRIX + setting("int8", "kill", only_if=str(poison)) + every

    first = suite("-k", THREE, "--store", "s", matrix=matrix)
    engines = starts.read_text().splitlines()
    poison.unlink()
    second = suite("-k", THREE, "--store", "s", matrix=matrix)

    assert dict.fromkeys(of("alpha/int8/cpu-here"), "ERROR") == first.failures()
    assert sorted(f"alpha/{name}" for name in ("bf16", "awq", "int8")) == sorted(engines)
    assert (0, {}) == (second.code, second.failures())
    assert ["alpha/int8"] == starts.read_text().splitlines()[3:]
    assert of("alpha/int8/cpu-here") <= set(second.ran())


def test_fresh_measures_again(suite: Suite, tmp_path: Path) -> None:
    """--fresh starts an engine for a cell that the store already holds."""
    starts = tmp_path / "starts"
    every = f'\n[[setting]]\nwhen = {{}}\nargs = {{ starts = "{starts}" }}\nreason = "counts"\n'
    counts = []
    for extra in ((), (), ("--fresh",)):
        suite("-k", f"{HERE} and awq and decode", "--store", "s", *extra, matrix=MATRIX + every)
        counts.append(len(starts.read_text().splitlines()))

    assert [1, 1, 2] == counts


def test_replay_gives_the_same_verdicts_without_an_engine(suite: Suite, tmp_path: Path) -> None:
    """--replay of a store repeats every verdict and figure, and starts nothing."""
    starts = tmp_path / "starts"
    every = f'\n[[setting]]\nwhen = {{}}\nargs = {{ starts = "{starts}" }}\nreason = "counts"\n'
    matrix = MATRIX + setting("awq", "flip_decode") + every

    measured = suite("-k", THREE, "--store", "s", matrix=matrix)
    engines = starts.read_text()
    replayed = suite("-k", THREE, "--replay", "s", matrix=matrix)

    assert engines == starts.read_text()
    assert measured.code == replayed.code == 1
    assert measured.ran() == replayed.ran()


def test_recording_is_replayed(suite: Suite) -> None:
    """--record copies the observations; the copy is judged like the store."""
    measured = suite("-k", "beta", "--record", "kept")
    replayed = suite("-k", "beta", "--replay", "kept")

    assert 0 == replayed.code
    assert measured.ran() == replayed.ran()


def test_two_workers_say_the_same_as_none(suite: Suite) -> None:
    """-n 2: the same cases, outcomes, messages and properties (but for speed), and the suite's properties are there."""
    matrix = MATRIX + setting("awq", "flip_decode")

    some = f"beta or ({TWO})"
    alone = suite("-k", some, "--store", "a", matrix=matrix)
    shared = suite("-k", some, "-n", "2", "--store", "b", matrix=matrix, apart=True)

    def facts(run: Run) -> dict[str, tuple[str, str, dict[str, str]]]:
        return {
            name: (case.outcome, case.message, {k: v for k, v in case.properties.items() if k not in TIMINGS})
            for name, case in run.cases.items()
        }

    assert 1 == shared.code, shared.output
    assert facts(alone) == facts(shared)
    assert alone.suite == shared.suite
    assert {"summary", "env.vllm", "suite.version"} <= set(shared.suite)


def test_an_expected_failure_is_not_unexpected(suite: Suite) -> None:
    """Declared noise that shows is not counted as unexpected in the summaries."""
    run = suite("-k", f"{TWO} and decode", matrix=MATRIX + setting("awq", "noise") + expect("awq", "noisy", "decode"))

    assert "; 0 unexpected;" in run.suite["summary"]
    assert "" == run.suite["unexpected"]
    assert "NOISY !" not in run.output


def test_deselected_cells_are_not_measured(suite: Suite, tmp_path: Path) -> None:
    """What the store holds of a deselected cell may be compared with; an engine is never started for one."""
    starts = tmp_path / "starts"
    every = f'\n[[setting]]\nwhen = {{}}\nargs = {{ starts = "{starts}" }}\nreason = "counts"\n'

    suite("-k", TWO, "--store", "s", matrix=MATRIX + every)
    starts.unlink()
    run = suite("-k", f"{HERE} and awq", "--store", "s", "--repeats", "4", matrix=MATRIX + every)

    assert 0 == run.code
    assert ["alpha/awq"] == starts.read_text().splitlines()


@pytest.mark.parametrize("error", [ValueError, MemoryError, OSError])
def test_a_damaged_weight_file_costs_its_cell(suite: Suite, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """ValueError from the checkpoints (a damaged source file) is an ERROR verdict, not a traceback; no room for them too."""
    resolve = checkpoints.resolve

    def damaged(model_id: str, model: Model, format_: Format, **options: Any) -> checkpoints.Checkpoint:
        if format_.layout == "awq":
            raise error("model.safetensors: cut short")
        return resolve(model_id, model, format_, **options)

    monkeypatch.setattr(checkpoints, "resolve", damaged)

    run = suite("-k", TWO)

    assert dict.fromkeys(of(AWQ), "ERROR") == run.failures()
    assert "cut short" in run.cases[f"test_kernel[{AWQ}]"].message


def test_a_vocabulary_that_is_too_small_is_a_mistake_in_the_matrix(suite: Suite) -> None:
    """A synthetic model without the workload's token ids is told so before any engine starts."""
    run = suite("-k", f"{HERE} and awq and decode", matrix=MATRIX.replace("vocab_size = 1024", "vocab_size = 512"))

    assert 4 == run.code
    assert "models.alpha.workload: synthetic-v1: 4 mistakes" in run.output


def test_a_defect_for_a_cell_that_does_not_exist_is_a_usage_error(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """QUANTDET_INJECT with a cell that is not in the matrix would seed nothing."""
    monkeypatch.setenv("QUANTDET_INJECT", "bitflip:alpha/nosuch/cpu-here")

    assert 4 == suite().code


def test_no_case_is_reported_for_nothing(suite: Suite) -> None:
    """Without several lifetimes, or without unsupported rows, there is no NOTSET case among the skipped ones."""
    run = suite("-k", "beta or NOTSET")

    assert [] == [name for name in run.cases if "NOTSET" in name]
    assert "empty parameter set" not in run.output
