"""Faults in whole runs with the fake engine: the verdict, the cells beside it, what is left, and what a rerun measures."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from faults.cases import rows, shows
from quantdet.engines.plan import EngineRefused
from quantdet.engines.process import ended as endings
from quantdet.engines.process import scratch
from quantdet.engines.vllm.engine import VllmEngine
from quantdet.matrix.cell import Cell
from quantdet.observations.store import Store
from selftest.engines.test_process import plan
from selftest.fakes.engine import alive
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, TESTS, setting
from selftest.fakes.whole import (
    AWQ,
    BESIDE,
    TWO,
    a_rerun_measures_the_rest,
    ended,
    engines,
    noted,
    nothing_stayed,
    of,
    says,
    starts,
)
from selftest.fakes.whole import temporary as temporary

pytest_plugins = ["pytester"]

FIVE = "alpha and cpu-here and (test_kernel or test_repeat)"


def here(test: str) -> list[str]:
    return rows(f"selftest/engines/test_faults.py::{test}")


@pytest.mark.parametrize("id_", here("test_a_fault_of_the_engine"))
def test_a_fault_of_the_engine(
    suite: Suite, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester, id_: str
) -> None:
    """QUANTDET_INJECT in the engine's own process: what the kernel does to it is the cell's verdict."""
    matrix, limit = noted(tmp_path), "time_limit_s = 60"
    if id_ == "hang":
        limit = "time_limit_s = 1.5"
        suite("-k", f"{TWO} and bf16", "--store", "s", matrix=matrix)  # so that no other cell meets the short limit
    monkeypatch.setenv("QUANTDET_INJECT", f"{id_}:awq")

    run = suite("-k", TWO, "--store", "s", matrix=matrix.replace("time_limit_s = 60", limit))

    assert (1, of(AWQ)) == (run.code, set(run.failures())), run.output
    says(id_, run, AWQ)
    nothing_stayed(tmp_path, temporary, pytester.path / "s", [BESIDE])
    assert f"SEEDED DEFECT {id_}:awq" in run.output
    monkeypatch.delenv("QUANTDET_INJECT")
    a_rerun_measures_the_rest(suite, tmp_path, matrix, AWQ)


# By row: the format whose engine behaves so. What happens to one cell of a run does not show in the others.
AROUND = {
    "full-arrays": ("gptq", "full_arrays", {}), "full-header": ("ct", "full_header", {}), "full-log": ("awq", "full_log", {}),
    "killed-late": ("int8", "kill_late", {}),
    "checkpoint-tensors": ("gptq", "scribble", {"file": "model.safetensors"}),
    "checkpoint-config": ("ct", "scribble", {"file": "config.json"}),
    "checkpoint-gone": ("awq", "remove", {"file": "model.safetensors"}),
}  # fmt: skip


@pytest.mark.parametrize("group", ["full,killed", "checkpoint"])
def test_faults_around_the_engine(suite: Suite, tmp_path: Path, temporary: Path, pytester: pytest.Pytester, group: str) -> None:
    """A full disk, a checkpoint that changes, a death after the last byte: nothing of it is taken for measured."""
    poison, matrix = tmp_path / "poison", noted(tmp_path)
    poison.touch()
    mine = [id_ for id_ in here("test_faults_around_the_engine") if id_.startswith(tuple(group.split(",")))]
    faulty = {f"alpha/{AROUND[id_][0]}/cpu-here": id_ for id_ in mine}
    for format_id, behaviour, more in (AROUND[id_] for id_ in mine):
        matrix += setting(format_id, behaviour, only_if=str(poison), **more)
    whole = {f"alpha/{name}/cpu-here" for name in ("bf16", "gptq", "ct", "awq", "int8")} - set(faulty)

    run = suite("-k", FIVE, "--store", "s", matrix=matrix)

    assert set().union(*map(of, faulty)) == set(run.failures()), run.output
    assert set().union(*map(of, whole)) <= {name for name, case in run.cases.items() if case.outcome == "passed"}
    for cell, id_ in faulty.items():
        says(id_, run, cell)
    nothing_stayed(tmp_path, temporary, pytester.path / "s", sorted(whole))
    poison.unlink()
    a_rerun_measures_the_rest(suite, tmp_path, matrix, *faulty, which=FIVE)


OBSTACLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "store-unwritable": ("s/logs", ()),
    "record-unwritable": ("r/cpu-here", ("--record", "r")),
}


@pytest.mark.parametrize("id_", here("test_a_folder_that_cannot_be_written"))
def test_a_folder_that_cannot_be_written(suite: Suite, pytester: pytest.Pytester, id_: str) -> None:
    """A file stands where the folder has to be: each case has a verdict and the system's words, no traceback."""
    name, args = OBSTACLES[id_]
    (pytester.path / name).parent.mkdir()
    (pytester.path / name).touch()

    run = suite("-k", f"{TWO} and awq", "--store", "s", *args)

    assert of(AWQ) == set(run.failures())
    says(id_, run, AWQ)
    assert "Traceback" not in run.output


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "header-truncated": ("bf16", "observation.json", truncated), "header-flipped": ("gptq", "observation.json", flipped),
    "arrays-truncated": ("ct", "tensors.safetensors", truncated), "arrays-flipped": ("awq", "tensors.safetensors", flipped),
    "arrays-gone": ("int8", "tensors.safetensors", Path.unlink),
}  # fmt: skip


def test_a_damaged_store(suite: Suite, tmp_path: Path, pytester: pytest.Pytester) -> None:
    """Damaged observations are said, kept aside and measured again; a replay of them ends before it judges."""
    matrix, store = noted(tmp_path), pytester.path / "s"
    suite("-k", FIVE, "--store", "s", matrix=matrix)
    paths = {}
    for id_ in here("test_a_damaged_store"):
        format_id, name, damage = DAMAGE[id_]
        (paths[id_],) = (store / "cpu-here").glob(f"*/alpha/{format_id}/*/{name}")
        damage(paths[id_])

    replayed = suite("-k", FIVE, "--replay", "s", matrix=matrix)
    before = len(starts(tmp_path))
    run = suite("-k", FIVE, "--store", "s", matrix=matrix)

    assert (4, {}) == (replayed.code, replayed.cases)
    assert f"--replay or --reference: {paths['arrays-flipped'].parent}" in replayed.output  # awq: the first by name
    assert (0, {}) == (run.code, run.failures()), run.output
    assert len(paths) == len(starts(tmp_path)) - before
    for id_, path in paths.items():
        cell = f"alpha/{DAMAGE[id_][0]}/cpu-here"
        (line,) = [line for line in run.output.splitlines() if f"{path.parent.parent.name}/.damaged-" in line]
        shows(id_, run.cases[f"test_repeat[{cell}-decode]"].verdict, line)


@pytest.mark.parametrize("id_", here("test_a_run_that_is_ended"))
def test_a_run_that_is_ended(suite: Suite, tmp_path: Path, temporary: Path, pytester: pytest.Pytester, id_: str) -> None:
    """Whatever ends the run: what was judged is reported, what was measured stays, nothing else does."""
    number = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM}[id_]

    ended(id_, number, (), suite, tmp_path, temporary, pytester.path)


# ---------------------------------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize("id_", here("test_the_out_of_memory_killer"))
def test_the_out_of_memory_killer(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id_: str) -> None:
    """A SIGKILL while the kernel's count of such kills rose says so; one without does not."""
    count = tmp_path / "vmstat"
    count.write_text("nr_free_pages 7\noom_kill 3\n")
    monkeypatch.setattr(endings, "_VMSTAT", count)
    matrix = MATRIX + setting("awq", "oom_killed", count=str(count))

    run = suite("-k", f"{TWO} and awq", matrix=matrix)

    shows(id_, run.cases[f"test_kernel[{AWQ}]"].verdict, run.cases[f"test_kernel[{AWQ}]"].message)
    assert 4 == endings.oom_kills()
    assert "killed by SIGKILL" == endings.words(-signal.SIGKILL, 4)


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
    cell = Cell("alpha", "awq", "cpu-here")
    first = Store(tmp_path).log(cell, "0")
    running = first.with_name(first.name.replace(str(os.getpid()), "1"))
    over = first.with_name(first.name.replace(str(os.getpid()), str(2**22 + 1)))
    for path in (first, running, over):
        path.write_text("x")

    again = Store(tmp_path).log(cell, "0")

    assert (again, "") == (first, first.read_text())
    assert [True, False] == [running.exists(), over.exists()]


def test_an_engine_that_keeps_the_interpreter_dies_with_its_run(tmp_path: Path) -> None:
    """A hang in C leaves its process no thread that could notice: another process ends it when its run is gone."""
    code = (
        "import sys; from pathlib import Path; from quantdet.engines.process.process import run\n"
        "from selftest.fakes.engine import SPAWNED; from selftest.engines.test_process import plan\n"
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


class OutOfMemoryError(RuntimeError):
    """Has the name that torch's has."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("tried to allocate"), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        ValueError("No available memory for the cache blocks"), MemoryError(), OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=str,
)  # fmt: skip
def test_no_room_while_loading_is_no_refusal(error: Exception) -> None:
    """vLLM that finds no memory for a format says nothing of the format: ERROR, never the UNSUPPORTED of a refusal."""

    def llm(**arguments: object) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        VllmEngine._load(SimpleNamespace(LLM=llm), plan(), None)
    assert caught.value is error
    with pytest.raises(EngineRefused):
        VllmEngine._load(SimpleNamespace(LLM=lambda **arguments: int("not a format")), plan(), None)
