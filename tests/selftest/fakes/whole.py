"""Whole runs of the measured tests with the fake engine, as processes of their own, and what they may not leave behind."""

import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.cases import shows
from quantdet.observations.store import Store
from selftest.fakes.engine import alive, left_behind
from selftest.fakes.inner import Run, Suite, read_junit
from selftest.fakes.matrix import MATRIX, make_suite, setting

BESIDE = "alpha/bf16/cpu-here"
AWQ = "alpha/awq/cpu-here"
TWO = "alpha and cpu-here and (awq or bf16) and (test_kernel or test_repeat)"


def of(cell: str) -> set[str]:
    """The cases of a cell in these runs."""
    return {f"test_repeat[{cell}-decode]", f"test_repeat[{cell}-prefill]", f"test_kernel[{cell}]"}


def noted(tmp_path: Path) -> str:
    """A matrix whose engines note their process ids and their starts."""
    args = f'pids = "{tmp_path / "pids"}", starts = "{tmp_path / "starts"}"'
    return MATRIX + f'\n[[setting]]\nwhen = {{}}\nargs = {{ {args} }}\nreason = "counts"\n'


def starts(tmp_path: Path) -> list[str]:
    """MODEL/FORMAT of every engine that was started."""
    path = tmp_path / "starts"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def nothing_stayed(tmp_path: Path, temporary: Path, store: Path, whole: list[str]) -> None:
    """No process, no temporary folder, and in the store the observations of these cells and no half of one."""
    pids = [int(line) for line in (tmp_path / "pids").read_text(encoding="utf-8").split()]
    assert [] == alive(pids)
    assert [] == left_behind(temporary)
    assert sorted(whole) == sorted(str(one.cell) for one in Store(store).all())
    assert [] == [path for path in store.rglob(".*") if path.is_dir()]


def a_rerun_measures_the_rest(suite: Suite, tmp_path: Path, matrix: str, *cells: str, which: str = TWO) -> None:
    """The same store again, without the fault: these cells are measured, no other, and all pass."""
    before = len(starts(tmp_path))
    again = suite("-k", which, "--store", "s", matrix=matrix)
    assert (0, {}) == (again.code, again.failures()), again.output
    assert set().union(*map(of, cells)) <= set(again.ran())
    assert sorted(cell.rpartition("/")[0] for cell in cells) == sorted(starts(tmp_path)[before:])


def says(id_: str, run: Run, cell: str) -> None:
    """Every case of the cell fails with the row's verdict and message, and names the cell first."""
    for name in of(cell):
        shows(id_, run.cases[name].verdict, run.cases[name].message)
        assert cell in run.cases[name].message.splitlines()[0]


def started(folder: Path, *args: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A pytest run of the suite in `folder`, as its own process."""
    command = [sys.executable, "-m", "pytest", f"--junitxml={folder / 'report.xml'}", "--store=s", "--no-controls", *args]
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


def ended(
    id_: str, number: signal.Signals, args: tuple[str, ...], suite: Suite, tmp_path: Path, temporary: Path, folder: Path
) -> None:
    """A run gets a signal while its second engine hangs: what was measured stays, nothing else does."""
    poison, matrix = tmp_path / "poison", noted(tmp_path)
    poison.touch()
    make_suite(folder, matrix + setting("awq", "sleep", only_if=str(poison)))
    run = started(folder, "-k", TWO, *args, environment={"TMPDIR": str(temporary)})
    try:
        engines(tmp_path / "pids", 4)  # bf16's, awq's and two that this one started
        time.sleep(0.2)
        run.send_signal(number)
        said, _ = run.communicate(timeout=120)
    finally:
        run.kill()
        print(run.communicate()[0])

    shows(id_, f"exit {run.returncode}", said)
    killed = number is signal.SIGKILL  # then nobody can report, and half of an observation waits to be swept
    if killed:
        for half in (folder / "s").rglob(".*"):
            half.rmdir()
    else:
        assert of(BESIDE) & set(read_junit(folder / "report.xml")[0])
    nothing_stayed(tmp_path, temporary, folder / "s", [BESIDE])
    poison.unlink()
    a_rerun_measures_the_rest(suite, tmp_path, matrix, AWQ)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where engines' temporary files go. Its path is short: a forkserver's socket has to fit into 108 characters."""
    multiprocessing.util.get_temp_dir()  # this process's own stays where it is, since it outlives the test
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
