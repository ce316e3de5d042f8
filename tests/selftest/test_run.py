"""Whole runs with the fake engine: each seeded defect fails the right test with the right verdict, and no other."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rich.console
import rich.table  # noqa: F401
import scipy.stats  # noqa: F401  # here once: what is first imported in an inner run is imported in each

from quantdet import checkpoints
from quantdet.matrix.rows import Format, Model
from quantdet.session.cases.judge import PROPERTIES
from selftest.fakes import EXPERTS, MATRIX, ROOT, TESTS, TWO_GPUS, W4A4, alive, expect, make_suite, setting
from selftest.inner import Run, Suite, read_junit

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


# ------------------------------------------------------------------------------------------------------ honest engine


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


# ------------------------------------------------------------------------------------------------------ seeded defects

DEFECTS = {
    "flip_decode": (("decode",), "NOISY", r"1 of 4 repeats differ, first prompt len44 step 2 in repeat 3 \(token 7: 1 ulp"),
    "flip_prefill": (
        ("prefill",), "NOISY", r"1 of 4 repeats differ, first prompt len96 position 33 in repeat 3 \(token 7: 1 ulp",
    ),
    "swap": (("decode",), "NOISY", r"1 of 4 repeats differ, first prompt len20 step 1 in repeat 3"),
    "wrong_kernel": (("kernel",), "INVALID", r"requested auto -> fake4 \(Fake4Kernel\), executed OtherKernel x4"),
    "mixed_kernels": (("kernel",), "INVALID", r"mixed kernels: Fake4Kernel x4 \+ OtherKernel x4"),
    "ignored": (("kernel",), "INVALID", r"requested auto -> fake4 \(Fake4Kernel\), executed UnquantizedLinearMethod x4"),
    "missing": ((), "ERROR", r"the engine completed but left no whole observation"),
    "damaged": ((), "ERROR", r"the engine completed but left no whole observation"),
    "kill": ((), "ERROR", r"engine process killed by SIGKILL, no completion record"),
    "exit": ((), "ERROR", r"engine process ended with exit code 3"),
    "raise": ((), "ERROR", r"RuntimeError: the fake broke down"),
    "invalid": ((), "INVALID", r"the fake's rows do not add up"),
    "refuse": ((), "UNSUPPORTED", r"engine refused: ValueError: the fake does not take this format"),
}  # fmt: skip


@pytest.mark.parametrize("behaviour", DEFECTS)
def test_a_seeded_defect_fails_exactly_its_test(suite: Suite, behaviour: str) -> None:
    """The defect of one cell fails that cell's test (or all of them, if nothing was measured) and no other."""
    tests, verdict, pattern = DEFECTS[behaviour]

    # Four repeats: three of each cannot tell two formats apart of which one is noisy.
    run = suite("-k", TWO, "--repeats", "4", matrix=MATRIX + setting("awq", behaviour))

    names = of(AWQ, *tests)
    if not tests:  # the cell's only peer has nothing to be compared with
        assert "skipped" == run.cases["test_distinct[alpha/bf16/cpu-here]"].outcome
    assert 1 == run.code
    assert dict.fromkeys(names, verdict) == run.failures(), run.output
    for name in names:
        message = run.cases[name].message
        assert message.startswith(f"{verdict} {AWQ}"), message
        assert re.search(pattern, message), message
        assert message.splitlines()[0] in run.words


@pytest.mark.parametrize(
    ("behaviour", "failing"),
    [
        ("honest", {}),
        ("wrong_experts", {"test_kernel[mixture/moe/cpu-here]": "INVALID"}),
        ("wrong_kernel", {"test_kernel[mixture/moe/cpu-here]": "INVALID"}),
    ],
)
def test_substituted_experts_fail_exactly_the_kernel_test(suite: Suite, behaviour: str, failing: dict[str, str]) -> None:
    """A model with experts is measured like any; other experts than the row asks for are INVALID."""
    run = suite("-k", "mixture", matrix=MATRIX + EXPERTS + setting("moe", behaviour))

    assert failing == run.failures(), run.output
    case = run.cases["test_kernel[mixture/moe/cpu-here]"]
    assert ("Fake4Kernel x4 + Moe4Experts x2" == case.properties["kernel.executed"]) is (not failing)
    if behaviour == "wrong_experts":
        words = "requested moe4 (Moe4Experts), executed Fake4Kernel x4 + OtherExperts x2"
        assert words in case.message


def test_nan_logits_are_invalid_and_name_their_place(suite: Suite) -> None:
    """NaN in one decode step: that phase is INVALID at that step, the other phase is still judged."""
    run = suite("-k", TWO, matrix=MATRIX + setting("awq", "nan"))

    assert of(AWQ, "decode") <= set(run.failures())
    case = run.cases[f"test_repeat[{AWQ}-decode]"]
    assert "INVALID" == case.verdict
    assert f"INVALID {AWQ} decode: non-finite logits, first prompt len44 step 2 in repeat 1" == case.message
    assert "BIT_EXACT" == run.cases[f"test_repeat[{AWQ}-prefill]"].verdict
    assert set() == of("alpha/bf16/cpu-here", "decode", "prefill", "kernel") & set(run.failures())


def test_an_engine_that_hangs_is_a_timeout(suite: Suite, tmp_path: Path) -> None:
    """At its time limit a cell is TIMEOUT, its processes are gone, and the other cells are judged."""
    pids = tmp_path / "pids"
    matrix = MATRIX.replace("time_limit_s = 60", "time_limit_s = 1.5") + setting("awq", "sleep", pids=str(pids))
    suite("-k", f"{HERE} and bf16", "--store", "s")  # so that no other cell meets the short limit

    run = suite("-k", TWO, "--store", "s", matrix=matrix)

    assert dict.fromkeys(of(AWQ), "TIMEOUT") == run.failures()
    assert of("alpha/bf16/cpu-here", "decode", "prefill", "kernel") <= set(run.ran())
    assert "no answer within 1.5 s" in run.cases[f"test_kernel[{AWQ}]"].message
    noted = [int(line) for line in pids.read_text().split()]
    assert 3 == len(noted)
    assert [] == alive(noted)


def test_injected_bit_flip_fails_its_cell_only(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """QUANTDET_INJECT turns over one bit of one logit in one repeat: that decode test fails, with the position."""
    monkeypatch.setenv("QUANTDET_INJECT", "bitflip:awq")

    run = suite("-k", TWO)

    assert {f"test_repeat[{AWQ}-decode]": "NOISY"} == run.failures()
    message = run.cases[f"test_repeat[{AWQ}-decode]"].message
    assert re.search(r"1 of 3 repeats differ, first prompt len20 step 1 in repeat 2 \(token 0: 1 ulp", message)
    assert "SEEDED DEFECT bitflip:awq" in run.output
    assert "bitflip:awq" == run.suite["suite.injected"]


def test_an_injected_run_does_not_spoil_the_store(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a run with a seeded defect the same store gives an honest run its honest verdict."""
    monkeypatch.setenv("QUANTDET_INJECT", "bitflip:awq")
    first = suite("-k", f"{HERE} and awq and decode", "--store", "s")
    monkeypatch.delenv("QUANTDET_INJECT")
    second = suite("-k", f"{HERE} and awq and decode", "--store", "s")

    assert (1, 0) == (first.code, second.code)


def test_the_same_integers_in_two_layouts_are_identical_without_a_row(suite: Suite) -> None:
    """GPTQ and compressed-tensors with the same integers on one kernel: IDENTICAL is expected, from the checkpoints alone."""
    run = suite("-k", TWINS, matrix=UNDECLARED)

    assert {} == run.failures()
    case = run.cases["test_distinct[alpha/ct/cpu-here]"]
    assert "IDENTICAL" == case.properties["verdict"] and "identical to gptq (the same numbers" in case.properties["expectation"]


def test_strangers_that_agree_fail_on_both_sides(suite: Suite) -> None:
    """AWQ with the logits of GPTQ's integers: its checkpoint holds other numbers, so that it cannot be IDENTICAL to it."""
    matrix = UNDECLARED + setting("awq", "honest", numerics="int4-sym")

    run = suite("-k", f"{HERE} and (gptq or awq)", matrix=matrix)

    failed = {f"test_distinct[alpha/{name}/cpu-here]": "IDENTICAL" for name in ("gptq", "awq")}
    assert failed == run.failures()
    assert "IDENTICAL to awq, expected DISTINCT" in run.cases["test_distinct[alpha/gptq/cpu-here]"].message


def test_the_same_numerics_that_differ_fail_on_both_sides(suite: Suite) -> None:
    """The same integers on the same kernel have to give the same bits: formats that are DISTINCT break it."""
    matrix = UNDECLARED + setting("ct", "honest", numerics="something-else")

    run = suite("-k", TWINS, matrix=matrix)

    failed = {f"test_distinct[alpha/{name}/cpu-here]": "DISTINCT" for name in ("gptq", "ct")}
    assert failed == run.failures()
    assert "expected IDENTICAL" in run.cases["test_distinct[alpha/ct/cpu-here]"].message


def test_lifetimes_are_compared_when_there_are_several(suite: Suite) -> None:
    """With --lifetimes 2 an engine process that answers otherwise than the first fails test_restart, nothing else."""
    run = suite("-k", TWO, "--lifetimes", "2", matrix=MATRIX + setting("awq", "restart_noise"))

    assert {f"test_restart[{AWQ}]": "NOISY"} == run.failures()
    assert "1 of 2 lifetimes differ" in run.cases[f"test_restart[{AWQ}]"].message
    assert "BIT_EXACT" == run.cases["test_restart[alpha/bf16/cpu-here]"].verdict
    assert "2" == run.cases[f"test_restart[{AWQ}]"].properties["lifetimes"]
    assert "as found,as found" == run.cases[f"test_restart[{AWQ}]"].properties["caches"]  # a CPU's engine has none that matter


def test_on_a_gpu_the_last_lifetime_has_cold_caches(suite: Suite, pytester: pytest.Pytester) -> None:
    """It says so, is kept apart from a warm one, and a row may excuse what it recompiles."""
    row = 'when = { format = "awq" }\noutcome = "may_recompile"\nmax_l2 = 0.03\nreason = "compiles"\nsource = "the test"\n'
    defects = setting("awq", "restart_noise") + setting("bf16", "restart_noise")
    matrix = f'{MATRIX}{defects}\n[[expect]]\n{row}\n[engine]\ncaches = ["A_CACHE"]\n'
    select = ("--hardware", "sm90", "-k", "alpha and (awq or bf16) and test_restart")

    run = suite(*select, "--lifetimes", "2", "--store", "s", matrix=matrix, machine=TWO_GPUS)

    assert {"test_restart[alpha/bf16/sm90]": "NOISY"} == run.failures(), run.output
    words = "; the last one with cold caches; lifetime 1 differs from the first at prompt len20 prefill position 0; L2 0 nats"
    assert run.cases["test_restart[alpha/bf16/sm90]"].message.endswith(f"per lifetime at 95 %{words}")
    excused = run.cases["test_restart[alpha/awq/sm90]"]
    assert ("passed", "NOISY", "as found,cold") == (excused.outcome, excused.verdict, excused.properties["caches"])
    headers = [json.loads(path.read_text(encoding="utf-8")) for path in (pytester.path / "s").rglob("observation.json")]
    assert {(0, "warm"), (1, "cold")} == {(header["lifetime"], header["caches"]) for header in headers}
    assert 4 == len({header["key"] for header in headers})


def test_a_bound_on_the_flip_rate_decides_the_repeats(suite: Suite, tmp_path: Path) -> None:
    """59 of an exact cell; a noisy one ends as soon as the least number has been made, and the store keeps both."""
    starts = tmp_path / "starts"
    every = f'\n[[setting]]\nwhen = {{}}\nargs = {{ starts = "{starts}" }}\nreason = "counts"\n'
    args = ("-k", f"{TWO} and test_repeat", "--max-flip-rate", "0.05", "--store", "s")
    matrix = MATRIX + setting("awq", "noise") + every

    run = suite(*args, matrix=matrix)
    engines = starts.read_text()
    again = suite(*args, matrix=matrix)

    assert dict.fromkeys(of(AWQ, "decode", "prefill"), "NOISY") == run.failures(), run.output
    for name in of("alpha/bf16/cpu-here", "decode", "prefill"):
        assert ("BIT_EXACT", "59") == (run.cases[name].verdict, run.cases[name].properties["runs"])
        assert 0.05 >= float(run.cases[name].properties["flip_rate_upper95"])
    assert "2 of 3 repeats differ" in run.cases[f"test_repeat[{AWQ}-decode]"].message
    assert re.search(r"rerun: .* --max-flip-rate=0\.05", run.output)
    assert (engines, run.ran()) == (starts.read_text(), again.ran())


# -------------------------------------------------------------------------------------------------------- expectations


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
    """A refusal that the matrix declares passes test_hardware; an engine that takes the format fails it."""
    matrix = MATRIX + setting("awq", behaviour) + expect("awq", "unsupported")

    run = suite("-k", TWO, matrix=matrix)

    case = run.cases[f"test_hardware[{AWQ}]"]
    assert verdict == case.verdict
    assert ("passed" if behaviour == "refuse" else "failure") == case.outcome
    assert {"skipped"} == {run.cases[name].outcome for name in of(AWQ)}
    assert {"UNSUPPORTED"} == {run.cases[name].verdict for name in of(AWQ)}


# --------------------------------------------------------------------------------------------- store, rerun and replay


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


# ------------------------------------------------------------------------------------------------------------- workers


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


# ------------------------------------------------------------------------------------------------- options and refusal


def test_required_hardware_that_is_not_here_is_an_error_per_case(suite: Suite) -> None:
    """--require-hardware turns gate skips into errors; the run fails."""
    run = suite("--require-hardware", "cpu-elsewhere")

    assert 1 == run.code
    assert {"error"} == {case.outcome for name, case in run.cases.items() if "/" in name}
    assert all("needs cpu-elsewhere" in case.message for name, case in run.cases.items() if "/" in name)


@pytest.mark.parametrize("more", [(), ("--ignore-native",)])
def test_required_gpu_that_is_not_here_is_no_green_run_of_skips(suite: Suite, more: tuple[str, ...]) -> None:
    """On a machine without that GPU every case is an error with its gate, also where the native gate is lifted."""
    run = suite("--require-hardware", "sm90", *more, matrix=MATRIX + W4A4)

    cases = [case for name, case in run.cases.items() if "/" in name]
    assert 1 == run.code
    assert of("alpha/w4a4/sm90") <= set(run.cases)
    assert {"error"} == {case.outcome for case in cases}
    assert all("UNAVAILABLE hardware: needs sm90" in case.message for case in cases)


def test_a_format_that_is_not_native_is_skipped_required_or_run_on_purpose(suite: Suite) -> None:
    """W4A4 on a chip without FP4: a skip; an error where the row is required; with --ignore-native what ran is said."""
    matrix, args = MATRIX + W4A4, ("--hardware", "sm90", "-k", "w4a4 or bf16")
    cells = of("alpha/w4a4/sm90")

    skipped = suite(*args, matrix=matrix, machine=TWO_GPUS)
    required = suite(*args, "--require-hardware", "sm90", matrix=matrix, machine=TWO_GPUS)
    purposely = suite(*args, "--require-hardware", "sm90", "--ignore-native", matrix=matrix, machine=TWO_GPUS)

    assert 0 == skipped.code, skipped.output
    assert cells == {name for name, case in skipped.cases.items() if case.message.startswith("UNAVAILABLE native_fp4: ")}
    assert 1 == required.code
    assert cells == {name for name, case in required.cases.items() if case.outcome == "error"}
    assert 0 == purposely.code, purposely.output
    assert cells <= set(purposely.ran())
    kernel = purposely.cases["test_kernel[alpha/w4a4/sm90]"]
    assert ("CONFIRMED", "True") == (kernel.verdict, kernel.properties["kernel.weight_only"])
    assert "FakeMarlin x4 weight-only" in re.sub(r"\s+", " ", purposely.output)


def test_a_weight_only_kernel_on_a_native_chip_is_invalid(suite: Suite) -> None:
    """Where the chip multiplies FP4, W4A4 without quantized activations is another computation than the one asked for."""
    matrix = (MATRIX + W4A4).replace('native = ["bf16", "fp8"]', 'native = ["bf16", "fp8", "fp4"]')

    run = suite("--hardware", "sm90", "-k", "w4a4 or bf16", matrix=matrix, machine=TWO_GPUS)

    assert {"test_kernel[alpha/w4a4/sm90]": "INVALID"} == run.failures()
    words = "W4A4 requested, weight-only kernel FakeMarlin executed: activations are not quantized"
    assert words in run.cases["test_kernel[alpha/w4a4/sm90]"].message


def test_a_cell_runs_on_the_gpu_of_its_row(suite: Suite, pytester: pytest.Pytester) -> None:
    """The second of two GPUs: the engine is shown that one, the observation names it, and it is found again."""
    args = ("--hardware", "sm90", "-k", "bf16 and test_repeat", "--store", "kept")
    run, again = suite(*args, machine=TWO_GPUS), suite(*args, machine=TWO_GPUS)

    assert 0 == run.code == again.code, run.output
    (file,) = (pytester.path / "kept").glob("sm90/*/alpha/bf16/*/observation.json")
    header = json.loads(file.read_text(encoding="utf-8"))
    assert "GPU-h" == header["engine_env"]["CUDA_VISIBLE_DEVICES"]
    assert ("H100", "GPU-h") == (header["environment"]["gpu"], header["environment"]["gpu_uuid"])
    assert "H100" == run.suite["env.gpu"]


def test_required_hardware_that_is_here_passes(suite: Suite) -> None:
    """--require-hardware of this machine's row: its cells only, and all pass."""
    run = suite("--require-hardware", "cpu-here", "-k", "beta")

    assert 0 == run.code
    assert {"cpu-here"} == {case.properties["case.hardware"] for case in run.ran().values()}


def test_required_hardware_fails_a_run_that_measured_nothing(suite: Suite) -> None:
    """A selection that leaves nothing of the required row is not a success."""
    run = suite("--require-hardware", "cpu-here", "-k", "no_such_test")

    assert 1 == run.code


def test_required_hardware_fails_a_run_of_declared_skips(suite: Suite) -> None:
    """Every selected case is skipped, since the matrix declares its cell unsupported: not a success either."""
    selected = ("-k", f"{HERE} and awq and test_repeat")

    run, free = (suite(*more, *selected, matrix=MATRIX + expect("awq", "unsupported")) for more in (
        ("--require-hardware", "cpu-here"), (),
    ))  # fmt: skip

    assert {"skipped"} == {case.outcome for case in run.cases.values()}
    assert (1, 0) == (run.code, free.code)


def test_required_hardware_without_its_weights_is_no_skip(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """What turns out to be missing only when a cell is measured fails a required row, and is a skip elsewhere."""
    resolve = checkpoints.resolve

    def absent(model_id: str, model: Model, format_: Format, **options: Any) -> checkpoints.Checkpoint:
        if format_.layout == "awq":
            raise checkpoints.Unavailable("no such package")
        return resolve(model_id, model, format_, **options)

    monkeypatch.setattr(checkpoints, "resolve", absent)

    run, free = suite("--require-hardware", "cpu-here", "-k", TWO), suite("-k", TWO)

    assert dict.fromkeys(of(AWQ), "UNAVAILABLE") == run.failures()
    assert (0, {}) == (free.code, free.failures())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--repeats", "1"), "--repeats: needs at least 2"),
        (("--lifetimes", "0"), "--lifetimes: needs at least 1"),
        (("--repeats", "many"), "invalid int value"),
        (("--hardware", "sm999"), "--hardware: no hardware 'sm999'"),
        (("--require-hardware", "sm999"), "hardware: no hardware 'sm999'"),
        (("--hardware", "sm90", "--require-hardware", "cpu-here"), "contradict"),
        (("--matrix", "no_such.toml"), "no such file"),
        (("--replay", "no_such_folder"), "--replay: no such folder"),
        (("--replay", ".", "--record", "x"), "--record does not go with it"),
        (("--replay", ".", "--fresh"), "--fresh does not go with it"),
        (("--replay", ".", "--max-flip-rate", "0.05"), "--max-flip-rate does not go with it"),
        (("--repeats", "5", "--max-flip-rate", "0.05"), "--repeats does not go with it"),
        (("--max-flip-rate", "1"), "--max-flip-rate: needs 0.001 to 1"),
        (("--max-flip-rate", "0"), "--max-flip-rate: needs 0.001 to 1"),
        (("--reruns", "2"), "unrecognized arguments: --reruns"),
    ],
)
def test_a_bad_option_is_a_usage_error(suite: Suite, args: tuple[str, ...], words: str) -> None:
    """Exit code 4 and a line that names the option; no test runs."""
    run = suite(*args)

    assert (4, {}) == (run.code, run.cases)
    assert words in run.output


@pytest.mark.parametrize("value", ["bitflip:nosuch", "bitflip", "bitflip:", "melt:awq", "sigkill:nosuch"])
def test_a_bad_defect_is_a_usage_error(suite: Suite, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """QUANTDET_INJECT with an unknown kind or format exits 4, so that no defect is thought to be seeded."""
    monkeypatch.setenv("QUANTDET_INJECT", value)

    run = suite()

    assert (4, {}) == (run.code, run.cases)
    assert "QUANTDET_INJECT" in run.output


def test_rerun_plugins_are_refused(suite: Suite, pytester: pytest.Pytester) -> None:
    """With a rerun plugin active the suite exits 4: a retry would turn "it differs" into a pass."""
    make_suite(pytester.path)
    active = """
import types

def pytest_addoption(parser, pluginmanager):
    pluginmanager.register(types.ModuleType("flaky"), "flaky")
"""
    conftest = pytester.path / "conftest.py"
    conftest.write_text(conftest.read_text() + active)

    result = pytester.runpytest_inprocess()

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    assert "the suite never retries: disable the plugin (-p no:flaky)" in result.stderr.str()


def test_reruns_through_the_environment_are_refused(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTEST_ADDOPTS cannot bring retries in either."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "--reruns=3")

    assert 4 == suite().code


# ------------------------------------------------------------------------------------------------------------- imports

HEAVY = ("torch", "vllm", "transformers")


def test_the_controller_imports_no_engine() -> None:
    """The plugin and all of its modules but the engine's own leave torch, vllm and transformers alone."""
    code = f"""
import importlib, pkgutil, sys
import quantdet
ENGINE = ("quantdet.engines.vllm", "quantdet.engines.transformers")
for module in pkgutil.walk_packages(quantdet.__path__, "quantdet."):
    if not module.name.startswith((*ENGINE, "quantdet.engines.process.shim")):
        importlib.import_module(module.name)
import selftest.fakes
assert "quantdet.plugin" in sys.modules and "quantdet.report.terminal" in sys.modules
print([name for name in {HEAVY} if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}

    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert ("[]", 0) == (found.stdout.strip(), found.returncode), found.stderr


def test_collection_works_without_an_engine(tmp_path: Path) -> None:
    """On a machine where torch, vllm and transformers cannot be imported, the shipped suite collects its cases."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CI": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    quick = ["-p", "no:hypothesispytest", "-p", "no:cacheprovider", "--assert=plain"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *quick, "tests/determinism"]

    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert 0 == found.returncode, found.stdout + found.stderr
    assert "test_repeat.py::test_repeat[tiny-qwen3/gptq_marlin/sm90-decode]" in found.stdout


def test_an_empty_machine_skips_with_the_install_command(suite: Suite, pytester: pytest.Pytester) -> None:
    """Without vLLM every cell is UNAVAILABLE and says how to get it."""
    make_suite(pytester.path)
    conftest = pytester.path / "conftest.py"
    conftest.write_text(conftest.read_text().replace('Software("0.32.0", "cpu", "2.0")', "Software()"))

    result = pytester.runpytest_inprocess("-k", HERE, f"--junitxml={pytester.path / 'r.xml'}")

    cases, _ = read_junit(pytester.path / "r.xml")
    assert 0 == result.ret
    assert {"UNAVAILABLE vllm: needs vLLM (pip install -e '.[cpu]'), have none"} == {
        case.message for name, case in cases.items() if "/" in name
    }


# ------------------------------------------------------------------------------------------------- once bugs


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
