"""Ranks of a tensor-parallel engine: real processes, without vLLM."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from quantdet.engines.plan import EngineRefused, InvalidMeasurement
from quantdet.engines.process.ended import RANK_LOST
from quantdet.engines.vllm import ranks
from quantdet.observations.header import Executed, Layer
from selftest.fakes.engine import alive
from selftest.fakes.matrix import TESTS

RUNS = Executed(layers=(Layer(kind="linear", module="Linear", method="Marlin", count=4),), tensor_parallel_size=3)
OTHER = RUNS.model_copy(update={"layers": (RUNS.layers[0].model_copy(update={"method": "Machete"}),)})
Serve = Callable[[Connection], None]


def serving(
    executed: Executed = RUNS, generate: Callable[[ranks.Request], list[int]] = lambda r: [*r.ids][: r.tokens]
) -> Serve:
    def serve(connection: Connection) -> None:
        ranks.follow(connection, executed, generate)

    return serve


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Serve], ranks.OtherRanks]]:
    """Three ranks, this process being the first; the variables that they leave are taken back."""
    for name in ranks.VARIABLES:
        monkeypatch.setenv(name, "")
    ours: list[ranks.OtherRanks] = []

    def start(serve: Serve) -> ranks.OtherRanks:
        ours.append(ranks.OtherRanks(3, serve))
        return ours[-1]

    yield start
    for one in ours:
        one.close()


def pids_of(found: ranks.OtherRanks) -> list[int]:
    return [int(process.pid or 0) for process in found.processes]


def test_the_others_do_what_rank_0_does(started: Callable[[Serve], ranks.OtherRanks]) -> None:
    """Each request goes to all of them, and they end when they are told to."""
    found = started(serving())

    found.agree(RUNS)
    for ids in ([5, 6, 7], [9, 8, 7]):
        found.ask(ids, 2, {"logprobs": 8})
        found.answered(ids[:2])
    pids = pids_of(found)
    assert pids == alive(pids, within_s=0)
    assert 2 == len(pids)
    found.stop()
    assert [] == alive(pids)


def test_each_rank_knows_where_to_meet(started: Callable[[Serve], ranks.OtherRanks], tmp_path: Path) -> None:
    """One address, a number of its own for each, which is that of its device too; two engines have two addresses."""

    def serve(connection: Connection) -> None:
        (tmp_path / os.environ["RANK"]).write_text(repr([*ranks.meeting(), os.environ["WORLD_SIZE"]]), encoding="utf-8")
        serving()(connection)

    places = []
    for _ in range(2):
        found = started(serve)
        found.agree(RUNS)
        place, rank, device = ranks.meeting()
        places.append(place)
        assert (0, 0, "3") == (rank, device, os.environ["WORLD_SIZE"])
        assert {"1": repr([place, 1, 1, "3"]), "2": repr([place, 2, 2, "3"])} == {
            path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()
        }
        found.stop()
    assert 2 == len(set(places))


def test_ranks_that_run_other_kernels_are_no_measurement(started: Callable[[Serve], ranks.OtherRanks]) -> None:
    """Both are named."""
    with pytest.raises(InvalidMeasurement, match=r"rank 0 Marlin x4, each on 3 ranks; rank 1 Machete x4, each on 3 ranks"):
        started(serving(OTHER)).agree(RUNS)


def test_ranks_that_generate_other_tokens_are_no_measurement(started: Callable[[Serve], ranks.OtherRanks]) -> None:
    """One other token of one rank is enough: its logits were others."""
    found = started(serving(generate=lambda request: [5, 6 + (os.environ["RANK"] == "2")]))
    found.agree(RUNS)

    found.ask([5, 6, 7], 2, {})
    with pytest.raises(InvalidMeasurement, match=r"rank 2 generated \[5, 7\], rank 0 \[5, 6\]"):
        found.answered([5, 6])


def raising(error: BaseException) -> Serve:
    def serve(connection: Connection) -> None:
        if os.environ["RANK"] == "2":
            raise error
        ranks.follow(connection, RUNS, lambda request: [])

    return serve


@pytest.mark.parametrize(
    ("of_rank_2", "of_rank_0", "wanted"),
    [
        (
            MemoryError("no room"),
            RuntimeError("gloo: Connection closed by peer"),
            (RuntimeError, "rank 2 .* MemoryError: no room"),
        ),
        (MemoryError("no room"), EngineRefused("no such kernel"), (RuntimeError, "rank 2 .* MemoryError: no room")),
        (EngineRefused("no such kernel"), RuntimeError("NCCL error"), (EngineRefused, "^no such kernel$")),
        (EngineRefused("no such kernel"), EngineRefused("no such kernel"), (EngineRefused, "^no such kernel$")),
        (InvalidMeasurement("needs 9.0"), RuntimeError("NCCL error"), (InvalidMeasurement, "rank 2: needs 9.0")),
        (SystemExit(9), RuntimeError("NCCL error"), (RuntimeError, "rank 2 of the engine has ended: SystemExit: 9")),
        (None, EngineRefused("of rank 0 alone"), (EngineRefused, "^of rank 0 alone$")),
    ],
    ids=["dead", "dead, as if refused", "refused", "all refused", "invalid", "exit", "none"],
)
def test_why_a_rank_could_not_load_comes_before_that_rank_0_was_left_alone(
    started: Callable[[Serve], ranks.OtherRanks], of_rank_2: BaseException | None, of_rank_0: Exception,
    wanted: tuple[type[Exception], str],
) -> None:  # fmt: skip
    """A refusal is one only if no rank ended of anything else."""
    found = started(serving() if of_rank_2 is None else raising(of_rank_2))
    if of_rank_2 is not None:
        found.processes[1].join(timeout=10)

    with pytest.raises(wanted[0], match=wanted[1]):
        raise found.explain(of_rank_0)


def test_a_rank_that_ended_between_requests_is_named(started: Callable[[Serve], ranks.OtherRanks]) -> None:
    """Whether it is noticed when it is asked or when it should answer."""
    found = started(serving(generate=lambda request: os._exit(9)))
    found.agree(RUNS)

    found.ask([5], 1, {})
    with pytest.raises(RuntimeError, match="rank 1 of the engine has ended"):
        found.answered([5])
    for process in found.processes:
        process.join(timeout=10)
    with pytest.raises(RuntimeError, match="rank 1 of the engine has ended"):
        found.ask([5], 1, {})


def test_what_broke_is_said_at_the_end_whoever_caught_it(started: Callable[[Serve], ranks.OtherRanks]) -> None:
    """Hidden states and speed are measured behind a net: ranks that disagree there are no measurement all the same."""
    found = started(serving())
    found.agree(RUNS)
    error = InvalidMeasurement("rank 2 generated something else")

    found.broke(error)
    found.broke(RuntimeError("later"))

    with pytest.raises(InvalidMeasurement, match="something else"):
        found.ask([5], 1, {})
    with pytest.raises(InvalidMeasurement, match="something else"):
        found.stop()


def test_a_request_that_broke_because_a_rank_was_killed(
    started: Callable[[Serve], ranks.OtherRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo says "Connection reset by peer" at once; the engine ends for the cause. Where all ranks live, nothing ends."""
    found = started(serving())
    found.agree(RUNS)

    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", ended)
    found.broke(RuntimeError("of this rank's own"))
    os.kill(pids_of(found)[-1], signal.SIGKILL)

    with pytest.raises(SystemExit) as how:
        found.broke(RuntimeError("Connection reset by peer"))
    found.close()  # before the watching thread's time is over
    assert RANK_LOST == how.value.code


def test_every_answer_is_read_before_one_is_judged(started: Callable[[Serve], ranks.OtherRanks]) -> None:
    """Otherwise the next request would be compared with what is left of this one."""
    found = started(serving(generate=lambda request: [int(os.environ["RANK"]) if request.ids == [5] else 0]))
    found.agree(RUNS)

    found.ask([5], 1, {})
    with pytest.raises(InvalidMeasurement, match=r"rank 1 generated \[1\]"):
        found.answered([0])
    found.ask([6], 1, {})
    found.answered([0])


def test_the_seeded_defect_is_in_the_last_rank(started: Callable[[Serve], ranks.OtherRanks]) -> None:
    """The farthest from where logits are taken, while it is armed."""
    found = started(serving(generate=lambda request: [int(os.environ["RANK"]) if request.noisy else 0]))
    found.agree(RUNS)

    found.arm(True)
    found.ask([5], 1, {})
    with pytest.raises(InvalidMeasurement, match=r"rank 2 generated \[2\], rank 0 \[0\]"):
        found.answered([0])
    found.arm(False)
    found.ask([5], 1, {})
    found.answered([0])


def test_the_memory_that_ranks_share_has_no_name_once_they_have_loaded(
    started: Callable[[Serve], ranks.OtherRanks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed engines leave nothing; another engine's is not touched."""
    monkeypatch.setattr(ranks, "_SHARED_MEMORY", tmp_path)
    found = started(serving())
    own, others = tmp_path / f"{os.environ['MASTER_PORT']}-tp:0-[0-1-2]-cpushm_0", tmp_path / "1-tp:0-[0-1]-cpushm_0"
    own.touch()
    others.touch()

    found.agree(RUNS)

    assert [others] == list(tmp_path.iterdir())
    own.touch()  # an engine that was refused
    found.close()
    assert [others] == list(tmp_path.iterdir())


ENGINE = """
    import os, sys, time
    from pathlib import Path
    from quantdet.engines.vllm import ranks
    ranks._GRACE_S = 0.3

    def serve(connection):
        Path("pid").write_text(str(os.getpid()))
        {serve}
    found = ranks.OtherRanks(2, serve)
    {then}
"""


def engine(folder: Path, serve: str, then: str) -> "subprocess.Popen[str]":
    script = textwrap.dedent(ENGINE).format(serve=serve, then=then)
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("how", "code"), [("raise ValueError('of rank 1')", "1"), ("os.kill(os.getpid(), 9)", "-9")], ids=["raises", "killed"]
)
def test_an_engine_ends_with_any_of_its_ranks(tmp_path: Path, how: str, code: str) -> None:
    """In a collective it would wait without end; the log says which rank it was, and how it ended."""
    process = engine(tmp_path, how, "time.sleep(60)")

    said, _ = process.communicate(timeout=30)

    assert 70 == process.returncode, said
    assert f"rank 1 of the engine has ended (exit code {code})" in said
    assert ("ValueError: of rank 1" in said) == (code == "1")


def test_a_rank_that_is_refused_leaves_rank_0_its_time(tmp_path: Path) -> None:
    """It comes to the same refusal, perhaps later: not an engine that has broken down."""
    process = engine(
        tmp_path, "from quantdet.engines.plan import EngineRefused; raise EngineRefused('no')", "time.sleep(2); os._exit(5)"
    )

    said, _ = process.communicate(timeout=30)

    assert 5 == process.returncode, said


def test_ranks_end_with_rank_0(tmp_path: Path) -> None:
    """Also where they hang in C, and rank 0 was killed."""
    process = engine(tmp_path, "import ctypes; ctypes.CDLL(None).sleep(60)", "time.sleep(60)")
    end = time.monotonic() + 20
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text(encoding="utf-8"):
        assert time.monotonic() < end
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    assert [pid] == alive([pid], within_s=0)

    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)

    while alive([pid]) and time.monotonic() < end:
        time.sleep(0.02)
    assert [] == alive([pid])
