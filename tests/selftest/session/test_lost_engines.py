"""An engine that refused or died is not started again in the same run, whoever asks; and what counts as a refusal."""

from pathlib import Path

import pytest

from quantdet.engines.child.lifetime import needing_code
from quantdet.engines.plan import EngineRefused
from quantdet.judging.results import Missing, Refusal
from quantdet.judging.verdicts import Verdict
from quantdet.matrix.cell import Cell
from quantdet.session.lost_engines import Lost
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, setting
from selftest.session.test_reexecution import WITH_CLAIMS

pytest_plugins = ["pytester"]

CELL = Cell("alpha", "awq", "cpu-here")


def raised(error: Exception) -> Exception | None:
    """What comes out of a call that raises `error`."""
    try:
        with needing_code():
            raise error
    except Exception as found:
        return found
    return None


def counted(starts: Path) -> str:
    return f'\n[[setting]]\nwhen = {{}}\nargs = {{ starts = "{starts}" }}\nreason = "counts"\n'


@pytest.mark.parametrize(
    ("behaviour", "verdict"),
    [("refuse", "UNSUPPORTED"), ("kill", "ERROR"), ("raise", "ERROR"), ("invalid", "INVALID"), ("ill", "UNSUPPORTED")],
)
def test_an_engine_is_lost_once(suite: Suite, tmp_path: Path, behaviour: str, verdict: str) -> None:
    """Repeats, kernel, distinct, hidden states, controls: every case of the cell fails of the one start."""
    starts = tmp_path / "starts"
    matrix = MATRIX.replace('formats = ["*"]\n', 'formats = ["*"]\nhidden_states = true\n', 1)

    run = suite("-k", "alpha and cpu-here", matrix=matrix + setting("int8", behaviour) + counted(starts))

    failed = {name: found for name, found in run.failures().items() if "alpha/int8/" in name}
    assert 6 <= len(failed) and {verdict} == set(failed.values())
    assert 1 == starts.read_text(encoding="utf-8").splitlines().count("alpha/int8")


@pytest.mark.parametrize("behaviour", ["refuse", "kill"])
def test_a_verifier_that_is_lost_is_not_started_to_verify(suite: Suite, tmp_path: Path, behaviour: str) -> None:
    """One start for the measurement and the re-execution, which says what became of it."""
    verified(suite, tmp_path, behaviour)


def test_nor_by_another_worker(suite: Suite, tmp_path: Path) -> None:
    """Of pytest-xdist's workers one measures, another re-executes: one start all the same."""
    verified(suite, tmp_path, "kill", "-n", "2")


def verified(suite: Suite, tmp_path: Path, behaviour: str, *workers: str) -> None:
    kept, starts = tmp_path / "kept", tmp_path / "starts"
    suite("-k", "alpha and cpu-here and test_kernel", f"--record={kept}", matrix=WITH_CLAIMS)

    asked = "alpha and cpu-here and (test_repeat or reexecution)"
    matrix = WITH_CLAIMS + setting("ct", behaviour) + counted(starts)
    run = suite("-k", asked, f"--reference={kept}", *workers, matrix=matrix, apart=bool(workers))

    assert 1 == starts.read_text(encoding="utf-8").splitlines().count("alpha/ct")
    claims = [case for name, case in run.cases.items() if name.startswith("test_reexecution")]
    assert 3 == len(claims)
    # A refusal is an answer; a verifier that died may have given another one.
    assert {"refuse": {"DETECTABLE"}, "kill": {"ERROR"}}[behaviour] == {case.verdict for case in claims}


def test_what_workers_tell_each_other(tmp_path: Path) -> None:
    """By the name of their run; another run, and one without workers, knows nothing of it."""
    one, two, other, alone = Lost(tmp_path, "r1"), Lost(tmp_path, "r1"), Lost(tmp_path, "r2"), Lost(tmp_path)
    died = Missing(Verdict.ERROR, "engine process killed by SIGKILL\n  | the log", "/log")
    one.remember(CELL, "float16", "measure", died)
    one.remember(Cell("alpha", "ct", "cpu-here"), "float16", "verify", Refusal("ValueError: no"))

    for lost, known in ((one, died), (two, died), (other, None), (alone, None)):
        with lost.turn(CELL, "bfloat16") as loss:
            assert known == loss
    with two.turn(Cell("alpha", "ct", "cpu-here"), "float16") as loss:
        assert Refusal("ValueError: no") == loss
    alone.remember(CELL, "float16", "measure", died)
    assert ["r1", "r2"] == sorted(path.name for path in (tmp_path / "lost").iterdir())


@pytest.mark.parametrize(
    ("role", "dtype", "verdict", "known"),
    [
        ("measure", "float16", Verdict.TIMEOUT, True), ("measure", "bfloat16", Verdict.ERROR, True),
        ("verify", "float16", Verdict.ERROR, True), ("verify", "bfloat16", Verdict.ERROR, False),
        ("verify", "float16", Verdict.TIMEOUT, False), ("control", "float16", Verdict.ERROR, True),
    ],
)  # fmt: skip
def test_what_a_loss_says_of_the_cell(tmp_path: Path, role: str, dtype: str, verdict: Verdict, known: bool) -> None:
    """A measurement that was lost is lost for all; a re-execution says nothing of another dtype, nor by the time it takes."""
    lost = Lost(tmp_path)
    lost.remember(CELL, dtype, role, Missing(verdict, "why"))

    with lost.turn(CELL, "float16") as loss:
        assert known == (loss is not None)


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        NotImplementedError("Could not run '_C::x' with arguments from the 'CPU' backend."),
        RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Float8_e4m3fn'"),
        RuntimeError("operator _C::gptq_gemm does not exist"),
        RuntimeError("could not create a primitive descriptor for the matmul primitive"),
        RuntimeError("CUDA error: invalid device function"),
        RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0"),
        AttributeError("module 'vllm._custom_ops' has no attribute 'marlin_gemm'"),
        RuntimeError("ptxas fatal   : Value 'sm_90a' is not defined for option 'gpu-name'"),
    ],
)
def test_an_engine_without_the_code_refuses(error: Exception) -> None:
    """Also where the error is the cause of another; the words are the engine's own."""
    outer = RuntimeError("engine core failed")
    outer.__cause__ = error

    found = raised(outer)

    assert isinstance(found, EngineRefused) and str(error) in str(found)


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("'NoneType' object has no attribute 'shape'"), RuntimeError("CUDA error: an illegal memory access"),
        ValueError("the fake broke down"), MemoryError("out of memory"),
    ],
)  # fmt: skip
def test_an_engine_that_breaks_does_not_refuse(error: Exception) -> None:
    """Anything else that goes wrong at a call is an error of this run."""
    assert raised(error) is error
