"""Each seeded defect fails exactly its test."""

import json
import re
from pathlib import Path

import pytest

from selftest.fakes.engine import alive
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import EXPERTS, MATRIX, TWO_GPUS, setting
from selftest.whole.test_run import AWQ, HERE, TWINS, TWO, UNDECLARED, of

pytest_plugins = ["pytester"]

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
