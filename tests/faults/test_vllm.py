"""The same faults on real vLLM: seeded in the process that loads and runs the model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.cases import rows, shows
from quantdet.matrix import load
from quantdet.observations.store import Store
from quantdet.session.machine import machine
from selftest.fakes.engine import alive, left_behind
from selftest.fakes.inner import Run, read_junit
from selftest.fakes.matrix import ROOT, TESTS
from selftest.fakes.whole import temporary as temporary

pytest_plugins = ["pytester"]

SHIPPED = (ROOT / "quant_matrix.toml").read_text(encoding="utf-8")
SOFTWARE, MATRIX = machine.software(), load.load(ROOT / "quant_matrix.toml")
ROWS = [row for row in machine.detect().rows(MATRIX) if MATRIX.hardware[row].kind == SOFTWARE.flavour]
pytestmark = pytest.mark.skipif(not ROWS, reason=f"needs vLLM for this machine, have {SOFTWARE.vllm or 'none'}")
HERE = ROWS[0] if ROWS else ""
SEVERAL = pytest.mark.skipif(
    not HERE.startswith("cpu"), reason=f"needs a CPU, which is as many devices as one likes; have {HERE}"
)
FAULTY, BESIDE = f"tiny-qwen3/int8_w8a8/{HERE}", f"tiny-qwen3/bf16/{HERE}"
BOTH = f"(tiny-qwen3/int8_w8a8/{HERE} or tiny-qwen3/bf16/{HERE}) and (test_kernel or test_repeat)"
KEPT = ("--no-controls", "--repeats=2", "--store=s", f"--hardware={HERE}")

Vllm = Callable[..., Run]


def of(cell: str) -> set[str]:
    return {f"test_repeat[{cell}-decode]", f"test_repeat[{cell}-prefill]", f"test_kernel[{cell}]"}


def make(folder: Path, text: str = SHIPPED) -> None:
    """A copy of the suite in `folder`."""
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "conftest.py").write_text('pytest_plugins = ["quantdet.plugin"]\n', encoding="utf-8")
    (folder / "quant_matrix.toml").write_text(text, encoding="utf-8")
    tests = folder / "tests" / "determinism"
    tests.mkdir(parents=True, exist_ok=True)
    for path in (TESTS / "determinism").glob("test_*.py"):
        shutil.copy(path, tests / path.name)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder in which the cell beside the faulty one was measured, checkpoints and store included."""
    folder = tmp_path_factory.mktemp("prepared")
    make(folder)
    here = Path.cwd()
    try:
        os.chdir(folder)
        assert 0 == pytest.main([*KEPT, "-q", "-k", BOTH.replace("int8_w8a8", "none"), f"--rootdir={folder}"])
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def vllm(prepared: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Vllm:
    """Runs the measured tests in this process, whose forkserver has vLLM imported, in a copy of what was prepared."""
    shutil.copytree(prepared, pytester.path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.delenv("QUANTDET_INJECT", raising=False)

    def run(*args: str, text: str = SHIPPED) -> Run:
        make(pytester.path, text)
        report = pytester.path / "report.xml"
        report.unlink(missing_ok=True)
        options = (f"--junitxml={report}", "-p", "no:xdist", *KEPT, *args)
        result = pytester.runpytest_inprocess(*options, no_reraise_ctrlc=True)
        cases, properties = read_junit(report) if report.is_file() else ({}, {})
        return Run(int(result.ret), result.stdout.str() + "\n" + result.stderr.str(), cases, properties)

    return run


def children() -> list[int]:
    """Processes of this session that run an engine: forked by the forkserver, each the leader of its group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, fields = int(path.parent.name), path.read_text(encoding="utf-8").rpartition(")")[2].split()
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if b"multiprocessing" in command and int(fields[2]) == pid and str(TESTS).encode() in _environment(pid):
            found.append(pid)
    return found


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def nothing_stayed(folder: Path, temporary: Path) -> None:
    assert [] == alive(children())
    assert [] == left_behind(temporary)
    assert [BESIDE] == [str(one.cell) for one in Store(folder / "s").all()]
    assert [] == [path for path in (folder / "s").rglob(".*") if path.is_dir()]


@pytest.mark.parametrize("id_", rows("faults/test_vllm.py::test_a_fault_of_vllm"))
def test_a_fault_of_vllm(
    vllm: Vllm, temporary: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, id_: str
) -> None:
    """The cell's verdict, the cell beside it judged from the store, nothing left; a rerun measures the one cell."""
    monkeypatch.setenv("QUANTDET_INJECT", f"{id_}:{FAULTY}")
    text = SHIPPED.replace("time_limit_s = ", "time_limit_s = 15 # ", 1) if id_ == "hang" else SHIPPED
    assert id_ != "hang" or text != SHIPPED

    run = vllm("-k", BOTH, text=text)

    assert (1, of(FAULTY)) == (run.code, set(run.failures())), run.output
    for name in of(FAULTY):
        shows(id_, run.cases[name].verdict, run.cases[name].message)
    assert {"passed"} == {run.cases[name].outcome for name in of(BESIDE)}
    (log,) = (pytester.path / "s" / "logs").rglob("int8_w8a8.*.log")
    assert f"quantdet: seeded fault: {id_}" in log.read_text(encoding="utf-8", errors="replace")
    nothing_stayed(pytester.path, temporary)
    if id_ == "sigkill":
        monkeypatch.delenv("QUANTDET_INJECT")
        again = vllm("-k", BOTH)
        assert (0, {}) == (again.code, again.failures()), again.output
        assert "2 cells, 1 of them from the store" in " ".join(again.output.split())


@pytest.mark.parametrize("id_", rows("faults/test_vllm.py::test_a_rank_of_vllm"))
@SEVERAL
def test_a_rank_of_vllm(
    vllm: Vllm, temporary: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, id_: str
) -> None:
    """Rank 0 would wait for it without end; no process and no shared memory stays."""
    cell, shared = f"tiny-qwen3/bf16_tp2/{HERE}", set(Path("/dev/shm").glob("*cpushm*"))
    monkeypatch.setenv("QUANTDET_INJECT", f"{id_}:{cell}")

    run = vllm("-k", f"{cell} and test_kernel")

    assert {f"test_kernel[{cell}]"} == set(run.failures()), run.output
    case = run.cases[f"test_kernel[{cell}]"]
    shows(id_, case.verdict, case.message)
    nothing_stayed(pytester.path, temporary)
    assert shared == set(Path("/dev/shm").glob("*cpushm*"))  # others are tracked, and go with the forkserver


@SEVERAL
def test_noise_of_another_rank(vllm: Vllm, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """One ulp in one layer of the last rank is in the logits that rank 0 gives, and comes to it where parts are added.

    The defect is not in the bundle's script, whose ranks run without the suite.
    """
    cell = f"tiny-qwen3/bf16_tp2/{HERE}"
    monkeypatch.setenv("QUANTDET_INJECT", f"noise:{cell}")
    run = vllm("-k", f"{cell} and test_repeat", "--report=r")

    assert {f"test_repeat[{cell}-decode]"} == set(run.failures()), run.output
    case = run.cases[f"test_repeat[{cell}-decode]"]
    assert "1 of 2 repeats differ, first prompt len20 step 1 in repeat 1" in case.message
    assert "each on 2 ranks" in case.properties["kernel.executed"]
    assert case.properties["first_divergent_layer"].startswith("model.layers.1.self_attn.o_proj (")
    (bundle,) = (pytester.path / "r" / "bundles").iterdir()
    assert "Traced in rank 0 of 2: what differs there may come from another rank" in (bundle / "README.md").read_text()
    done = subprocess.run(
        [sys.executable, bundle / "repro.py", "--repeats=2"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (0, "0 of 2 repeats differ from repeat 0") == (done.returncode, done.stdout.splitlines()[-1]), (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize("id_", rows("faults/test_vllm.py::test_a_run_with_vllm_that_is_ended"))
def test_a_run_with_vllm_that_is_ended(
    vllm: Vllm, temporary: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, id_: str
) -> None:
    """Ctrl-C and SIGTERM while vLLM has the model loaded: exit code 2, what was judged is reported, nothing stays.

    In this process, which has vLLM imported; `test_whole_runs.py` ends processes of their own.
    """
    number = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM}[id_]
    seen: list[int] = []
    end = threading.Thread(target=when_it_hangs, args=(pytester.path / "s" / "logs", number, seen), daemon=True)
    end.start()
    monkeypatch.setenv("QUANTDET_INJECT", f"hang:{FAULTY}")

    run = vllm("-k", BOTH)

    end.join()
    assert seen  # what is asserted to be gone was there
    shows(id_, f"exit {run.code}", run.output)
    assert of(BESIDE) & set(run.cases)
    nothing_stayed(pytester.path, temporary)


def when_it_hangs(logs: Path, number: signal.Signals, seen: list[int]) -> None:
    """Send the signal once the engine has loaded; in 60 s at the latest, so that no test waits for its limit."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if any("seeded fault: hang" in log.read_text(errors="replace") for log in logs.rglob("int8_w8a8.*.log")):
            break
        time.sleep(0.1)
    seen += children()
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("id_", rows("faults/test_vllm.py::test_the_code_of_a_checkpoint"))
def test_the_code_of_a_checkpoint(vllm: Vllm, temporary: Path, pytester: pytest.Pytester, id_: str) -> None:
    """A folder of weights whose config.json asks for its own Python is refused by vLLM, and the Python does not run."""
    (plain,) = {
        path.parent for path in pytester.path.rglob("checkpoints/*/config.json")
        if "quantization_config" not in path.read_text(encoding="utf-8")
    }  # fmt: skip
    folder, trap = pytester.path / "hostile", pytester.path / "trap"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "trap",
        "architectures": ["Trap"],
        "auto_map": {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "trap.py").write_text(f"open({str(trap)!r}, 'w').close()\n", encoding="utf-8")
    row = f'title = "x"\nworkload = "synthetic-v1"\npath = "{folder}"\nformats = ["bf16"]\n'

    run = vllm("-k", "hostile/bf16 and test_kernel", text=f"{SHIPPED}\n[models.hostile]\n{row}")

    case = run.cases[f"test_kernel[hostile/bf16/{HERE}]"]
    shows(id_, case.verdict, case.message)
    assert not trap.exists()
    nothing_stayed(pytester.path, temporary)
