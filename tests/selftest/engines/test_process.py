"""An engine in a child process: every way in which it may end, and that nothing of it stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quantdet.engines.plan import Plan, PlannedPrompt
from quantdet.engines.process.outcome import Completed, Crashed, Invalid, Refused, TimedOut
from quantdet.engines.process.process import EngineSpec, run
from quantdet.observations.observation import read
from selftest.fakes.engine import FAKE, SPAWNED, alive
from selftest.fakes.matrix import TESTS
from selftest.fakes.observation import IDENTITY

PROMPT = PlannedPrompt("p0", tuple(range(10, 16)), tuple(range(20, 24)), 2)


def plan(behaviour: str = "honest", extra: dict[str, Any] | None = None, **args: Any) -> Plan:
    return Plan(
        identity=IDENTITY, checkpoint="none", dtype="float32", args={"behaviour": behaviour, **args}, env={},
        prompts=(PROMPT,), repeats=3, decode_tokens=4, top_k=4, **(extra or {}),
    )  # fmt: skip


def pids_in(path: Path, count: int) -> list[int]:
    """Process ids noted in a file, as soon as there are `count`."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if path.exists() and len(found := path.read_text(encoding="utf-8").split()) >= count:
            return [int(pid) for pid in found]
        time.sleep(0.02)
    raise AssertionError(f"fewer than {count} processes started")


def test_a_plan_survives_the_way_to_the_child() -> None:
    """JSON and back is the same plan, tuples included."""
    whole = plan(extra={"spawn": True})

    assert whole == Plan.from_json(whole.to_json())


@pytest.mark.parametrize("spec", [FAKE, SPAWNED], ids=["forkserver", "spawn"])
def test_completed(tmp_path: Path, spec: EngineSpec) -> None:
    """An honest engine leaves a readable observation and a log; forked and spawned children alike."""
    out = tmp_path / "out"
    out.mkdir()

    outcome = run(spec, plan(), out, tmp_path / "log", 60)

    assert isinstance(outcome, Completed), outcome
    assert ("alpha", (0, 0, 0)) == (read(out).header.model, read(out).header.prompts[0].runs)
    assert "fake engine: honest" in (tmp_path / "log").read_text()


def test_the_childs_environment_is_the_plans(tmp_path: Path) -> None:
    """Variables of the plan reach a spawned child and do not stay in this process."""
    spec = EngineSpec("selftest.engines.test_process:EnvironmentEngine")
    with_variable = Plan(**{**vars(plan()), "env": {"QUANTDET_TEST_VARIABLE": "seven"}})

    outcome = run(spec, with_variable, tmp_path, tmp_path / "log", 60)

    assert isinstance(outcome, Refused), outcome
    assert "QUANTDET_TEST_VARIABLE=seven" == outcome.message
    assert "QUANTDET_TEST_VARIABLE" not in os.environ


class EnvironmentEngine:
    """Answers with a variable of its environment."""

    def measure(self, plan: Plan, directory: Path) -> None:
        from quantdet.engines.plan import EngineRefused

        raise EngineRefused(f"QUANTDET_TEST_VARIABLE={os.environ.get('QUANTDET_TEST_VARIABLE')}")


def test_cold_caches_are_empty_folders_that_go_with_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variable names one of its own in the scratch, whatever the plan and this process say; none is left."""
    monkeypatch.setenv("QUANTDET_CACHE_A", str(tmp_path))
    spec = EngineSpec("selftest.engines.test_process:CachesEngine")
    names = ["QUANTDET_CACHE_A", "QUANTDET_CACHE_B"]
    warm = plan(extra={"spawn": True}, names=names)
    cold = Plan(**{**vars(warm), "env": {"QUANTDET_CACHE_B": str(tmp_path)}, "cold": tuple(names)})
    said = []
    for one in (warm, cold, cold):
        outcome = run(spec, one, tmp_path, tmp_path / "log", 60)
        assert isinstance(outcome, Refused), outcome
        said.append(json.loads(outcome.message))

    first, *others = said
    assert [str(tmp_path), None] == [place for place, _, _ in first]
    places = [place for one in others for place, _, _ in one]
    assert 4 == len(set(places))
    assert {(True, True)} == {(empty, inside) for one in others for _, empty, inside in one}
    assert not any(Path(place).exists() for place in places)


class CachesEngine:
    """Answers, by variable, with the folder that it names, whether that is empty, and in the scratch; and writes to it."""

    def measure(self, plan: Plan, directory: Path) -> None:
        import tempfile

        from quantdet.engines.plan import EngineRefused

        found = []
        for name in plan.args["names"]:
            place = os.environ.get(name)
            folder = Path(place or ".")
            inside = folder.is_relative_to(tempfile.gettempdir())
            found.append((place, folder.is_dir() and not any(folder.iterdir()), inside))
            if inside:
                (folder / "kernel").touch()
        raise EngineRefused(json.dumps(found))


def test_refused(tmp_path: Path) -> None:
    """A refusal carries the engine's own words."""
    outcome = run(FAKE, plan("refuse"), tmp_path, tmp_path / "log", 60)

    assert isinstance(outcome, Refused)
    assert "ValueError: the fake does not take this format" == outcome.message


def test_invalid(tmp_path: Path) -> None:
    """A precondition that fails in the engine is neither a refusal nor a crash."""
    outcome = run(FAKE, plan("invalid"), tmp_path, tmp_path / "log", 60)

    assert isinstance(outcome, Invalid)
    assert "the fake's rows do not add up" == outcome.message


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("raise", "RuntimeError: the fake broke down"),
        ("exit", "ended with exit code 3, no completion record"),
        ("kill", "killed by SIGKILL, no completion record"),
        ("segv", "killed by SIGSEGV, no completion record"),
    ],
)
def test_crashed(tmp_path: Path, behaviour: str, words: str) -> None:
    """However an engine dies: how it ended, and the log's path; its last lines too, but after a SIGKILL, of which it cannot
    say anything."""
    log = tmp_path / "log"

    outcome = run(FAKE, plan(behaviour), tmp_path, log, 60)

    assert isinstance(outcome, Crashed), outcome
    assert words in outcome.message
    assert (f"fake engine: {behaviour}" in outcome.excerpt) is (behaviour != "kill")
    assert log == outcome.log


def test_a_log_that_is_not_text(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 in the log do not hide the crash."""
    outcome = run(FAKE, plan("garbage"), tmp_path, tmp_path / "log", 60)

    assert isinstance(outcome, Crashed)
    assert "not UTF-8" in "".join(outcome.excerpt)


def test_a_log_that_is_lost_costs_nothing_else(tmp_path: Path) -> None:
    """A disk that is full when the last lines of the log are written: what was measured is measured."""
    outcome = run(FAKE, plan("full_log_late"), tmp_path, tmp_path / "log", 60)

    assert isinstance(outcome, Completed), outcome
    assert "alpha" == read(tmp_path).header.model


def test_an_engine_that_cannot_be_imported(tmp_path: Path) -> None:
    """A missing module is a crash that names it."""
    outcome = run(EngineSpec("no_such_module:Engine"), plan(), tmp_path, tmp_path / "log", 60)

    assert isinstance(outcome, Crashed)
    assert "No module named 'no_such_module'" in outcome.message


def test_time_limit_ends_the_engine_and_what_it_started(tmp_path: Path) -> None:
    """At the limit the outcome is TimedOut, soon, and neither the engine nor its children live on."""
    pids = tmp_path / "pids"
    run(FAKE, plan("refuse"), tmp_path, tmp_path / "log", 60)  # the server that forks is up before the clock runs
    began = time.monotonic()

    outcome = run(FAKE, plan("sleep", pids=str(pids)), tmp_path, tmp_path / "log", 1.5)

    assert isinstance(outcome, TimedOut)
    assert 1.5 == outcome.limit_s
    assert time.monotonic() - began < 10
    assert [] == alive(pids_in(pids, 3))


@pytest.mark.parametrize("behaviour", ["children", "kill_with_children"])
def test_children_of_an_engine_that_ended_are_ended(tmp_path: Path, behaviour: str) -> None:
    """What an engine started and left behind is killed, after a good end and after a crash."""
    pids = tmp_path / "pids"

    outcome = run(FAKE, plan(behaviour, pids=str(pids)), tmp_path, tmp_path / "log", 60)

    assert isinstance(outcome, Completed if behaviour == "children" else Crashed), outcome
    noted = pids_in(pids, 3)
    assert 3 == len(noted)
    assert [] == alive(noted)


def test_no_scratch_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place for an engine's temporary files is gone after a crash."""
    import tempfile

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    run(FAKE, plan("kill"), tmp_path, tmp_path / "log", 60)

    assert [] == list(scratch.iterdir())


_PARENT = """
import sys
from pathlib import Path
from quantdet.engines.process.process import run
from selftest.engines.test_process import plan
from selftest.fakes.engine import SPAWNED

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(run(SPAWNED, plan("sleep", pids=str(folder / "pids")), folder, folder / "log", 120))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_the_end_of_the_parent_is_the_end_of_the_engine(tmp_path: Path, how: signal.Signals) -> None:
    """Whether this process is interrupted or killed: the engine and what it started do not outlive it."""
    script, pids = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(_PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        noted = pids_in(pids, 3)
        assert sorted(noted) == sorted(alive(noted, 0))
        parent.send_signal(how)
        said, _ = parent.communicate(timeout=20)

        assert [] == alive(noted)
        assert 0 != parent.returncode
        assert how is signal.SIGKILL or b"KeyboardInterrupt" in said
    finally:
        parent.kill()
        parent.wait()
