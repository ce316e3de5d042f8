"""Faults in whole runs with the fake engine: the verdict, the cells beside it, what is left, and what a rerun measures."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.cases import rows, shows
from quantdet.engines import ended, scratch
from quantdet.store import Store
from selftest.fakes import MATRIX, TESTS, alive, left_behind, make_suite, setting
from selftest.inner import Run, Suite, read_junit

pytest_plugins = ["pytester"]

AWQ = "alpha/awq/cpu-here"
BESIDE = "alpha/bf16/cpu-here"
TWO = "alpha and cpu-here and (awq or bf16) and (test_kernel or test_repeat)"
OF_AWQ = {f"test_repeat[{AWQ}-decode]", f"test_repeat[{AWQ}-prefill]", f"test_kernel[{AWQ}]"}
OF_BESIDE = {name.replace(AWQ, BESIDE) for name in OF_AWQ}


def here(test: str) -> list[str]:
    return rows(f"selftest/test_faults.py::{test}")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where engines' temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def noted(tmp_path: Path) -> str:
    """A matrix whose engines note their process ids and their starts."""
    args = f'pids = "{tmp_path / "pids"}", starts = "{tmp_path / "starts"}"'
    return MATRIX + f'\n[[setting]]\nwhen = {{}}\nargs = {{ {args} }}\nreason = "counts"\n'


def starts(tmp_path: Path) -> list[str]:
    path = tmp_path / "starts"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def costs_its_cell(id_: str, run: Run, tmp_path: Path, temporary: Path, store: Path) -> None:
    """The row's verdict and message on every case of the cell, the other cell judged, nothing left behind."""
    assert 1 == run.code, run.output
    assert OF_AWQ == set(run.failures()), run.output
    for name in OF_AWQ:
        shows(id_, run.cases[name].verdict, run.cases[name].message)
        assert AWQ in run.cases[name].message.splitlines()[0]
    assert {"passed"} == {run.cases[name].outcome for name in OF_BESIDE}
    pids = [int(line) for line in (tmp_path / "pids").read_text(encoding="utf-8").split()]
    assert [] == alive(pids)
    assert [] == left_behind(temporary)
    assert [BESIDE] == [str(one.cell) for one in Store(store).all()]
    assert [] == [path for path in store.rglob(".*") if path.is_dir()]


def a_rerun_measures_the_rest(suite: Suite, tmp_path: Path, matrix: str) -> None:
    before = len(starts(tmp_path))
    again = suite("-k", TWO, "--store", "s", matrix=matrix)
    assert (0, {}) == (again.code, again.failures()), again.output
    assert OF_AWQ <= set(again.ran())
    assert ["alpha/awq"] == starts(tmp_path)[before:]


@pytest.mark.parametrize("id_", here("test_a_fault_of_the_engine"))
def test_a_fault_of_the_engine(
    suite: Suite, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester, id_: str
) -> None:
    """QUANTDET_INJECT in the engine's own process: what the kernel does to it is the cell's verdict."""
    matrix = noted(tmp_path)
    suite("-k", f"{TWO} and bf16", "--store", "s", matrix=matrix)  # so that no other cell meets the short limit
    monkeypatch.setenv("QUANTDET_INJECT", f"{id_}:awq")
    limit = "time_limit_s = 2" if id_ == "hang" else "time_limit_s = 60"

    run = suite("-k", TWO, "--store", "s", matrix=matrix.replace("time_limit_s = 60", limit))

    costs_its_cell(id_, run, tmp_path, temporary, pytester.path / "s")
    assert f"SEEDED DEFECT {id_}:awq" in run.output
    monkeypatch.delenv("QUANTDET_INJECT")
    a_rerun_measures_the_rest(suite, tmp_path, matrix)


BEHAVIOURS = {
    "full-arrays": ("full_arrays", {}), "full-header": ("full_header", {}), "full-log": ("full_log", {}),
    "killed-late": ("kill_late", {}), "checkpoint-tensors": ("scribble", {"file": "model.safetensors"}),
    "checkpoint-config": ("scribble", {"file": "config.json"}), "checkpoint-gone": ("remove", {"file": "model.safetensors"}),
}  # fmt: skip


@pytest.mark.parametrize("id_", here("test_a_fault_around_the_engine"))
def test_a_fault_around_the_engine(
    suite: Suite, tmp_path: Path, temporary: Path, pytester: pytest.Pytester, id_: str
) -> None:
    """A full disk, a checkpoint that changes, a death after the last byte: nothing of it is taken for measured."""
    behaviour, more = BEHAVIOURS[id_]
    poison = tmp_path / "poison"
    poison.touch()
    matrix = noted(tmp_path) + setting("awq", behaviour, only_if=str(poison), **more)

    run = suite("-k", TWO, "--store", "s", matrix=matrix)

    costs_its_cell(id_, run, tmp_path, temporary, pytester.path / "s")
    poison.unlink()
    a_rerun_measures_the_rest(suite, tmp_path, matrix)


def in_the_way(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


OBSTACLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "store-unwritable": ("s/logs", ()),
    "record-unwritable": ("r/cpu-here", ("--record", "r")),
}


@pytest.mark.parametrize("id_", here("test_a_folder_that_cannot_be_written"))
def test_a_folder_that_cannot_be_written(suite: Suite, pytester: pytest.Pytester, temporary: Path, id_: str) -> None:
    """A file stands where the folder has to be: each case has a verdict and the system's words, no traceback."""
    name, args = OBSTACLES[id_]
    in_the_way(pytester.path / name)

    run = suite("-k", TWO, "--store", "s", *args)

    assert OF_AWQ | OF_BESIDE == set(run.failures())
    for case in run.ran().values():
        shows(id_, case.verdict, case.message)
    assert "Traceback" not in run.output
    assert [] == left_behind(temporary)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "header-truncated": ("observation.json", truncated), "header-flipped": ("observation.json", flipped),
    "arrays-truncated": ("tensors.safetensors", truncated), "arrays-flipped": ("tensors.safetensors", flipped),
    "arrays-gone": ("tensors.safetensors", Path.unlink),
}  # fmt: skip


@pytest.mark.parametrize("id_", here("test_a_damaged_store"))
def test_a_damaged_store(suite: Suite, tmp_path: Path, pytester: pytest.Pytester, id_: str) -> None:
    """A damaged observation is said, kept aside, and measured again; a replay of it ends before it judges."""
    matrix = noted(tmp_path)
    suite("-k", TWO, "--store", "s", matrix=matrix)
    name, damage = DAMAGE[id_]
    (path,) = (pytester.path / "s" / "cpu-here").glob(f"*/alpha/awq/*/{name}")
    damage(path)

    replayed = suite("-k", TWO, "--replay", "s", matrix=matrix)
    before = len(starts(tmp_path))
    run = suite("-k", TWO, "--store", "s", matrix=matrix)

    assert (4, {}) == (replayed.code, replayed.cases)
    assert f"--replay or --reference: {path}: " in replayed.output
    assert (0, {}) == (run.code, run.failures()), run.output
    shows(id_, run.cases[f"test_repeat[{AWQ}-decode]"].verdict, run.output)
    assert ["alpha/awq"] == starts(tmp_path)[before:]


# --------------------------------------------------------------------------------------------------------- whole runs


def started(folder: Path, *args: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A pytest run of the suite in `folder`, as its own process."""
    command = [sys.executable, "-m", "pytest", f"--junitxml={folder / 'report.xml'}", "--store=s", *args]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "QUANTDET_", "CI"))}
    return subprocess.Popen(
        command, cwd=folder, env={**clean, **(environment or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def engines(path: Path, count: int) -> list[int]:
    """Process ids noted in a file, as soon as there are `count`."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = path.read_text(encoding="utf-8").split() if path.exists() else []
        if len(found) >= count:
            return [int(pid) for pid in found]
        time.sleep(0.02)
    raise AssertionError(f"fewer than {count} processes started")


SIGNALS = {
    "ctrl-c": (signal.SIGINT, ()), "sigterm": (signal.SIGTERM, ()), "sighup": (signal.SIGHUP, ()),
    "sigterm-workers": (signal.SIGTERM, ("-n", "2", "-p", "xdist")), "sigkill-run": (signal.SIGKILL, ()),
}  # fmt: skip


@pytest.mark.parametrize("id_", here("test_a_run_that_is_ended"))
def test_a_run_that_is_ended(suite: Suite, tmp_path: Path, temporary: Path, pytester: pytest.Pytester, id_: str) -> None:
    """Whatever ends the run: what was judged is reported, what was measured stays, nothing else does."""
    number, args = SIGNALS[id_]
    poison, matrix = tmp_path / "poison", noted(tmp_path)
    poison.touch()
    make_suite(pytester.path, matrix + setting("awq", "sleep", only_if=str(poison)))
    run = started(pytester.path, "-k", TWO, *args, environment={"TMPDIR": str(temporary)})
    pids = engines(tmp_path / "pids", 4)  # bf16's, awq's and two that this one started
    time.sleep(0.2)

    run.send_signal(number)
    said, _ = run.communicate(timeout=30)

    shows(id_, f"exit {run.returncode}", said)
    assert [] == alive(pids)
    assert [] == left_behind(temporary)
    if number is not signal.SIGKILL:  # pytest reports and cleans up
        assert OF_BESIDE & {name for name, case in read_junit(pytester.path / "report.xml")[0].items()}
        assert [] == [path for path in (pytester.path / "s").rglob(".*") if path.is_dir()]
    assert [BESIDE] == [str(one.cell) for one in Store(pytester.path / "s").all()]
    poison.unlink()
    a_rerun_measures_the_rest(suite, tmp_path, matrix)


@pytest.mark.parametrize("id_", here("test_two_runs_on_one_store"))
def test_two_runs_on_one_store(tmp_path: Path, pytester: pytest.Pytester, id_: str) -> None:
    """Both measure the same cell at the same moment: both judge it, and the store has one whole observation."""
    make_suite(pytester.path, noted(tmp_path) + setting("awq", "meet"))
    reports = [f"--junitxml={tmp_path / name}" for name in "ab"]

    runs = [started(pytester.path, "-k", f"{TWO} and awq", report) for report in reports]
    said = [run.communicate(timeout=60)[0] for run in runs]

    assert ["alpha/awq"] * 2 == starts(tmp_path)
    for name, run, words in zip("ab", runs, said, strict=True):
        assert 0 == run.returncode, words
        cases, _ = read_junit(tmp_path / name)
        assert OF_AWQ == {case for case, found in cases.items() if found.outcome == "passed"}
        shows(id_, cases[f"test_repeat[{AWQ}-decode]"].verdict, words)
    assert [AWQ] == [str(one.cell) for one in Store(pytester.path / "s").all()]
    assert [] == [path for path in (pytester.path / "s").rglob(".*") if path.is_dir()]


# ---------------------------------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize("id_", here("test_the_out_of_memory_killer"))
def test_the_out_of_memory_killer(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id_: str
) -> None:
    """A SIGKILL while the kernel's count of such kills rose says so; one without does not."""
    count = tmp_path / "vmstat"
    count.write_text("nr_free_pages 7\noom_kill 3\n")
    monkeypatch.setattr(ended, "_VMSTAT", count)
    matrix = MATRIX + setting("awq", "oom_killed", count=str(count))

    run = suite("-k", f"{TWO} and awq", matrix=matrix)

    shows(id_, run.cases[f"test_kernel[{AWQ}]"].verdict, run.cases[f"test_kernel[{AWQ}]"].message)
    assert 4 == ended.oom_kills()
    assert "killed by SIGKILL" == ended.words(-signal.SIGKILL, 4)


def test_scratch_of_killed_runs_is_swept(temporary: Path) -> None:
    """A folder whose run is gone is removed; one that is in use, is young, or has another name stays."""
    dead, young, other = (temporary / name for name in (f"{scratch.PREFIX}dead", f"{scratch.PREFIX}new", "quantdet-results"))
    for folder in (dead, young, other):
        folder.mkdir()
        (folder / "file").touch()
    with scratch.folder() as used:
        for folder in (dead, other, used):
            os.utime(folder, (0, 0))

        scratch.sweep()

        assert [False, True, True, True] == [folder.exists() for folder in (dead, young, other, used)]
    assert not used.exists()


def test_each_run_has_its_own_log(tmp_path: Path) -> None:
    """Logs of two runs that measure one cell are two files; those of runs that are over are removed."""
    store, cell = Store(tmp_path), Store(tmp_path)
    first = store.log(_cell(), "0")
    running = first.with_name(first.name.replace(str(os.getpid()), "1"))
    over = first.with_name(first.name.replace(str(os.getpid()), str(2**22 + 1)))
    for path in (first, running, over):
        path.write_text("x")

    again = cell.log(_cell(), "0")

    assert (again, "") == (first, first.read_text())
    assert [True, False] == [running.exists(), over.exists()]


def _cell() -> Any:
    from quantdet.schema import Cell

    return Cell("alpha", "awq", "cpu-here")


def test_an_engine_that_keeps_the_interpreter_dies_with_its_run(tmp_path: Path) -> None:
    """A hang in C leaves its process no thread that could notice: the kernel ends it when its parent is gone."""
    code = (
        "import sys; from pathlib import Path; from quantdet.engines.process import run\n"
        "from selftest.fakes import SPAWNED; from selftest.test_process import plan\n"
        "if __name__ == '__main__':\n"
        "    folder = Path(sys.argv[1])\n"
        "    run(SPAWNED, plan('hold_interpreter', pids=str(folder / 'pids')), folder, folder / 'log', 120)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": str(TESTS)})
    try:
        pids = engines(tmp_path / "pids", 1)
        time.sleep(0.3)
        assert pids == alive(pids, 0)
    finally:
        parent.kill()
        parent.wait()
    assert [] == alive(pids)
