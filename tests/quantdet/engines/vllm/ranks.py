"""Tensor parallelism: the other ranks of an engine, each a process that does what rank 0 asks.

vLLM calls it the external launcher: every rank holds a whole engine with its part of the model, all of them schedule the same
requests, and each gets the full logits. So rank 0 takes logits, layers and times as an engine of size 1 does; the others are
asked whether their layers execute the same and whether they generated the same tokens.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from quantdet.engines.plan import EngineRefused, InvalidMeasurement
from quantdet.engines.process import ended
from quantdet.observations.header import Executed

LAUNCHER = "external_launcher"
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun's
_HERE = "127.0.0.1"
_SHARED_MEMORY = Path("/dev/shm")
_GRACE_S = 15.0  # what ended another rank mostly ends rank 0 too, which can say more than that it was left alone
_PR_SET_PDEATHSIG = 1
_REFUSED = 3  # exit code of a rank whose engine refused the cell


@dataclass(frozen=True)
class Request:
    """What all ranks generate at once: `tokens` after `ids`; `noisy`: with the seeded defect, in the last rank alone."""

    ids: list[int]
    tokens: int
    logprobs: dict[str, int]
    noisy: bool = False


class OtherRanks:
    """The ranks beside this process, which is rank 0; forked from it before it touches a device."""

    def __init__(self, size: int, serve: Callable[[Connection], None]) -> None:
        """Fork `size` - 1 processes that call `serve`; what they print is printed here."""
        self._port = _free_port()
        os.environ.update(_rendezvous(size, 0, self._port))
        self._noisy = False
        self._broken: BaseException | None = None
        self.processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("fork")
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            held = [*self._connections, ours]
            process = context.Process(target=_follow, args=(serve, _rendezvous(size, rank, self._port), theirs, held))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._connections.append(ours)
        self._ending = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def agree(self, executed: Executed) -> None:
        """Wait until the others have loaded.

        Raises:
            InvalidMeasurement: the layers of one of them execute something else.
            EngineRefused, RuntimeError: one of them could not load.
        """
        for rank, answer in self._answers():
            other = Executed.model_validate(answer)
            if other != executed:
                raise InvalidMeasurement(
                    f"ranks execute different kernels: rank 0 {executed.summary}; rank {rank} {other.summary}"
                )
        self._forget_shared_memory()  # all of them have it open, and whatever ends them now leaves no name behind

    def explain(self, error: Exception) -> Exception:
        """What to raise for `error`, with which rank 0 could not load: another rank may have ended before it."""
        for rank, (process, connection) in enumerate(zip(self.processes, self._connections, strict=True), start=1):
            process.join(timeout=1.0)  # of one that waits for rank 0 nothing more is to be known
            if process.exitcode is None:
                continue
            try:
                _received(rank, connection)
            except (EngineRefused, InvalidMeasurement) as reason:
                return reason
            except RuntimeError as reason:
                return error if isinstance(error, InvalidMeasurement) else reason
        return error

    def arm(self, on: bool, /) -> None:
        """See `quantdet.engines.child.lifetime.SeededNoise`."""
        self._noisy = on

    def ask(self, ids: Sequence[int], tokens: int, logprobs: dict[str, int]) -> None:
        """Let the others generate what this process is about to."""
        if self._broken is not None:
            raise self._broken
        for rank, connection in enumerate(self._connections, start=1):
            request = Request(list(ids), tokens, logprobs, self._noisy and connection is self._connections[-1])
            try:
                connection.send_bytes(json.dumps(asdict(request)).encode())
            except OSError:
                _received(rank, connection)

    def answered(self, token_ids: Sequence[int]) -> None:
        """Wait until the others have generated it too.

        Raises:
            InvalidMeasurement: one of them generated something else, so that its logits were others.
        """
        found = list(self._answers())
        for rank, other in found:
            if other != list(token_ids):
                raise InvalidMeasurement(f"rank {rank} generated {other}, rank 0 {list(token_ids)}")

    def broke(self, error: BaseException) -> None:
        """A request was not answered by all ranks alike: nothing more can be asked, and `stop` says so, whoever caught it.

        Where another rank was killed, that is why: this process ends, as it does where it waits for that rank. Through
        gloo (on CPUs whose vLLM has no shared memory for it) a rank's end is an error of this rank's at once.
        """
        self._broken = self._broken or error
        for rank, process in enumerate(self.processes, start=1):
            process.join(timeout=1.0)
            if process.exitcode is not None and process.exitcode < 0:
                self._end(rank, process.exitcode)

    def stop(self) -> None:
        """Let the others end, and wait for it.

        Raises:
            BaseException: what broke an earlier request.
        """
        self.close()
        for process in self.processes:
            process.join(timeout=10)
        if self._broken is not None:
            raise self._broken

    def close(self) -> None:
        """Let the others end."""
        self._ending.set()
        self._forget_shared_memory()
        for connection in self._connections:
            connection.close()

    def _answers(self) -> list[tuple[int, Any]]:
        return [(rank, _received(rank, one)) for rank, one in enumerate(self._connections, start=1)]

    def _forget_shared_memory(self) -> None:
        for shared in _SHARED_MEMORY.glob(f"{self._port}-*"):
            shared.unlink(missing_ok=True)

    def _watch(self) -> None:
        """A rank that has ended would be waited for without end, in a collective."""
        left = dict(enumerate(self.processes, start=1))
        while left:
            wait([process.sentinel for process in left.values()])
            for rank, process in list(left.items()):
                if process.is_alive():
                    continue
                del left[rank]
                if process.exitcode == _REFUSED:  # rank 0 comes to the same, in its own time
                    continue
                if self._ending.wait(_GRACE_S):
                    return
                self._end(rank, process.exitcode)

    def _end(self, rank: int, exitcode: int | None) -> NoReturn:
        print(f"quantdet: rank {rank} of the engine has ended (exit code {exitcode})", flush=True)
        self._forget_shared_memory()
        os._exit(ended.RANK_LOST)


def meeting() -> tuple[str, int, int]:
    """Where this rank meets the others (a URL of torch.distributed), its number, and that of its device."""
    rank = int(os.environ["RANK"])
    return f"tcp://{_HERE}:{os.environ['MASTER_PORT']}", rank, int(os.environ["LOCAL_RANK"])


def follow(connection: Connection, executed: Executed, generate: Callable[[Request], Sequence[int]]) -> None:
    """In another rank: say what is `executed`, then `generate` what rank 0 asks for, until it asks no more."""
    _send(connection, answer=executed.model_dump(mode="json"))
    while True:
        try:
            request = Request(**json.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            return
        _send(connection, answer=[int(token) for token in generate(request)])


def _follow(
    serve: Callable[[Connection], None], variables: dict[str, str], connection: Connection, held: list[Connection]
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # rank 0 may be killed while this one is in a collective
    for other in held:  # of rank 0: while they are open here, nobody sees that it has closed them
        other.close()
    os.environ.update(variables)
    code = 0
    try:
        serve(connection)
    except EngineRefused as refusal:
        _send(connection, refused=str(refusal))
        code = _REFUSED
    except InvalidMeasurement as error:
        _send(connection, invalid=str(error))
        code = 1
    except BaseException as error:
        traceback.print_exc()
        _send(connection, failed=f"{type(error).__name__}: {error}")
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _send(connection: Connection, **message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _received(rank: int, connection: Connection) -> Any:
    """What a rank answers.

    Raises:
        EngineRefused, InvalidMeasurement, RuntimeError: what ended it.
    """
    try:
        message: dict[str, Any] = json.loads(connection.recv_bytes())
    except (EOFError, OSError):
        raise RuntimeError(f"rank {rank} of the engine has ended") from None
    if "refused" in message:
        raise EngineRefused(message["refused"])
    if "invalid" in message:
        raise InvalidMeasurement(f"rank {rank}: {message['invalid']}")
    if "failed" in message:
        raise RuntimeError(f"rank {rank} of the engine has ended: {message['failed']}")
    return message["answer"]


def _rendezvous(size: int, rank: int, port: int) -> dict[str, str]:
    """What vLLM reads in place of torchrun's."""
    return dict(zip(VARIABLES, (str(rank), str(rank), str(size), _HERE, str(port)), strict=True))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HERE, 0))
        return int(free.getsockname()[1])
