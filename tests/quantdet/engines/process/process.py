"""Runs an engine in a child process of its own: a plan goes in, a completion record comes out.

The absence of a completion record is itself a result (`Crashed`, with signal or exit code and the log's last lines).
The child leads its own process group; whatever the way out (end, time limit, crash, Ctrl-C here, death of this
process), that group is killed, so that no worker of an engine stays behind.
"""

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from quantdet.engines.plan import EngineLacks, EngineRefused, InvalidMeasurement, NeedsSpawn, Plan
from quantdet.engines.process import ended, reaper, scratch
from quantdet.engines.process.interrupts import Held, held
from quantdet.engines.process.outcome import Completed, Crashed, Invalid, Lacking, Outcome, Refused, TimedOut
from quantdet.untrusted import plain

_TESTS = Path(__file__).resolve().parents[3]
_SHIM = Path(__file__).resolve().parent / "shim"


@dataclass(frozen=True)
class EngineSpec:
    """Where the engine class is (`module:Class`), and the module that a forkserver imports ahead for it.

    `apart`: that forkserver is this engine's own, so that its processes hold nothing of another engine.
    """

    target: str
    preload: str = ""
    apart: bool = False

    def load(self) -> Any:
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)()


VLLM = EngineSpec("quantdet.engines.vllm.engine:VllmEngine", "quantdet.engines.vllm.preload")
TRANSFORMERS = EngineSpec(
    "quantdet.engines.transformers.engine:TransformersEngine", "quantdet.engines.transformers.preload", apart=True
)

_servers: dict[str, multiprocessing.forkserver.ForkServer] = {}


def run(spec: EngineSpec, plan: Plan, directory: Path, log: Path, time_limit_s: float) -> Outcome:
    """Execute `plan` in a child process; blocks until it ends or the limit is reached.

    Args:
        spec: the engine.
        plan: what to do.
        directory: existing, empty; the engine writes its observation here.
        log: file that gets the child's standard output and error.
        time_limit_s: seconds; then the child's process group is killed.
    """
    started = time.monotonic()
    context = _context(spec, plan)
    kills = ended.oom_kills()
    # Engines leave rendezvous files behind when they are killed: each has a place of its own, and that is removed.
    with held() as pending, scratch.folder() as place:
        ours, theirs = context.Pipe(duplex=False)
        lifeline_theirs, lifeline_ours = context.Pipe(duplex=False)
        child = context.Process(
            target=_child,
            args=(spec, plan.to_json(), str(directory), str(log), str(place), theirs, lifeline_theirs),
            name=f"engine {plan.identity.get('model')}/{plan.identity.get('format')}",
        )
        try:
            # A spawned child reads the environment at import; a forked one sets it itself. Cut off here, the child that
            # may come yet ends by its lifeline.
            with pending.allowed(), _environment(plan.env), _server(spec):
                child.start()
            reaper.watch(child.pid, place)
            theirs.close()
            lifeline_theirs.close()
            _wait([ours, child.sentinel], pending, started + time_limit_s)
            record = _receive(ours)
            if record is None and child.is_alive() and time.monotonic() - started >= time_limit_s:
                return TimedOut(time_limit_s, log)
            child.join(timeout=10)
            seconds = time.monotonic() - started
            if record is None and child.exitcode == -signal.SIGILL:
                return Refused(f"engine process {ended.words(child.exitcode, kills)}", seconds)
            if record is None:
                how = ended.words(child.exitcode, kills)
                excerpt = ended.said(child.exitcode, log)
                return Crashed(f"engine process {how}, no completion record", log, seconds, excerpt)
        finally:
            if child.pid is not None:
                _kill_group(child.pid)
                child.join(timeout=10)
                reaper.forget(child.pid)
            ours.close()
            lifeline_ours.close()
    if record["status"] == "needs spawn":
        return run(spec, replace(plan, spawn=True), directory, log, time_limit_s - seconds)
    return _outcome(record["status"], plain(record.get("message", "")), log, seconds)


def _outcome(status: str, message: str, log: Path, seconds: float) -> Outcome:
    """What a completion record says."""
    match status:
        case "completed":
            return Completed(seconds)
        case "refused":
            return Refused(message, seconds)
        case "lacking":
            return Lacking(message)
        case "invalid":
            return Invalid(message, log, seconds)
    return Crashed(message, log, seconds, ended.tail(log))


def _wait(ready: list[Any], pending: Held, end: float) -> None:
    """Until something is ready or the time is over.

    Raises:
        KeyboardInterrupt: a signal that ends the run came.
    """
    while not wait([*ready, pending.fileno()], timeout=max(0.0, end - time.monotonic())) or pending.caught:
        pending.let()
        if time.monotonic() >= end:
            return


def _context(spec: EngineSpec, plan: Plan) -> Any:
    """Forkserver with the engine imported ahead; spawn where the cell needs its own environment or a masked package.

    Environment variables that are read at import cannot be changed in a server that has imported already.
    """
    if plan.spawn or not spec.preload:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    if spec.apart and spec.preload not in _servers:
        _servers[spec.preload] = multiprocessing.forkserver.ForkServer()
    # pytest too: multiprocessing imports the parent's main module in every child.
    (_servers[spec.preload] if spec.apart else context).set_forkserver_preload([spec.preload, "pytest"])
    # The variables too: OpenMP reads its own once, when its library is loaded.
    with _environment(plan.env), _server(spec):
        # Python 3.11 and 3.12 hand no sys.path to the server and swallow a failed preload: it must find the module
        # through PYTHONPATH, which is read when it starts.
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _server(spec: EngineSpec) -> Iterator[None]:
    """For the time of the block, multiprocessing forks from the engine's own server, if it has one.

    multiprocessing knows a single server, by functions of its module that are that server's methods.
    """
    module, names = multiprocessing.forkserver, ("connect_to_new_process", "ensure_running")
    known = {name: getattr(module, name) for name in names}
    try:
        if spec.preload in _servers:
            for name in names:
                setattr(module, name, getattr(_servers[spec.preload], name))
        yield
    finally:
        for name, function in known.items():
            setattr(module, name, function)


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """The environment that engine processes start with, for the time of the block."""
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    path = [str(_SHIM), str(_TESTS), *(p for p in inherited if p not in (str(_SHIM), str(_TESTS)))]
    wanted = {**changes, "PYTHONPATH": os.pathsep.join(path)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _child(
    spec: EngineSpec, plan_json: str, directory: str, log: str, place: str, record: Connection, lifeline: Connection
) -> None:
    os.setsid()
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["TMPDIR"] = tempfile.tempdir = place
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_SHIM), str(_TESTS), os.environ.get("PYTHONPATH", "")])
    plan = Plan.from_json(plan_json)
    os.environ.update(plan.env)
    for name in plan.cold:  # a folder in the scratch: empty now, gone afterwards
        os.environ[name] = os.path.join(place, "caches", name.lower())
        os.makedirs(os.environ[name], exist_ok=True)
    answer: dict[str, str]
    try:
        spec.load().measure(plan, Path(directory))
        answer = {"status": "completed"}
    except EngineRefused as refusal:
        answer = {"status": "refused", "message": str(refusal)}
    except EngineLacks as error:
        answer = {"status": "lacking", "message": str(error)}
    except NeedsSpawn as error:
        answer = {"status": "needs spawn", "message": str(error)}
    except InvalidMeasurement as error:
        answer = {"status": "invalid", "message": str(error)}
    except BaseException as error:
        with contextlib.suppress(Exception):  # on a full disk, or without memory, the record has to do
            import traceback

            traceback.print_exc()
        answer = {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    record.send_bytes(json.dumps(answer).encode())
    os._exit(0)  # a normal exit would run the engine's teardown, which says nothing about the cell and takes a second


def _die_with_parent(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _receive(connection: Connection) -> dict[str, str] | None:
    try:
        if connection.poll():
            answer = json.loads(connection.recv_bytes())
            return answer if isinstance(answer, dict) else None
    except (EOFError, OSError, ValueError):
        pass
    return None


def _kill_group(pid: int) -> None:
    # The child may not have reached setsid yet; then it is alone in nobody's group and is killed by its own id.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
