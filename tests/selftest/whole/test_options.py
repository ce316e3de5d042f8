"""Options, and what a run refuses."""

import json
import re
from typing import Any

import pytest

from quantdet import checkpoints
from quantdet.matrix.models import Model
from quantdet.matrix.rows import Format
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, TWO_GPUS, W4A4, expect, make_suite
from selftest.whole.test_run import AWQ, HERE, TWO, of

pytest_plugins = ["pytester"]


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
