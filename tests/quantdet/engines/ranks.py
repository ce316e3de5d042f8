"""Tensor parallelism: the other ranks of an engine, each a process that does what rank 0 asks.

vLLM calls it the external launcher: every rank holds a whole engine with its part of the model, all of them schedule the same
requests, and each gets the full logits. So rank 0 takes logits, layers and times as an engine of size 1 does; the others are
asked whether they run the same kernels and generated the same tokens.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from quantdet.engines import InvalidMeasurement, ended
from quantdet.observation_header import Executed

LAUNCHER = "external_launcher"
_HERE = "127.0.0.1"
_SHARED_MEMORY = Path("/dev/shm")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun's
_GRACE_S = 15.0  # what made another rank end mostly ends rank 0 too, and that says more
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Request:
    """What all ranks generate at once: `tokens` after `ids`; `noisy`: with the seeded defect, in the last rank alone."""

    ids: list[int]
    tokens: int
    logprobs: dict[str, int]
    noisy: bool = False


class Ranks:
    """The ranks beside this process, which is rank 0; forked from it before it touches a device."""

    def __init__(self, size: int, serve: Callable[[Connection], None]) -> None:
        """Fork `size` - 1 processes that call `serve`; what they print is printed here."""
        port = _free_port()
        os.environ.update(_rendezvous(size, 0, port))
        self._noisy = False
        self.processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("fork")
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            held = [*self._connections, ours]
            process = context.Process(target=_follow, args=(serve, _rendezvous(size, rank, port), theirs, held))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._connections.append(ours)
        self._ending = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def agree(self, executed: Executed) -> None:
        """Wait until the others have loaded.

        Raises:
            InvalidMeasurement: one of them executes something else.
        """
        for rank, connection in enumerate(self._connections, start=1):
            other = Executed.model_validate_json(_answer(connection))
            if other != executed:
                raise InvalidMeasurement(
                    f"ranks execute different kernels: rank 0 {executed.summary}; rank {rank} {other.summary}"
                )
        # All of them have it open, and whatever ends them now leaves no name behind.
        for shared in _SHARED_MEMORY.glob(f"{os.environ['MASTER_PORT']}-*"):
            shared.unlink()

    def arm(self, on: bool, /) -> None:
        """See `quantdet.engines.lifetime.Noise`."""
        self._noisy = on

    def ask(self, ids: Sequence[int], tokens: int, logprobs: dict[str, int]) -> None:
        """Let the others generate what this process is about to."""
        for connection in self._connections:
            last = connection is self._connections[-1]
            connection.send_bytes(json.dumps(asdict(Request(list(ids), tokens, logprobs, self._noisy and last))).encode())

    def answered(self, token_ids: Sequence[int]) -> None:
        """Wait until the others have generated it too.

        Raises:
            InvalidMeasurement: one of them generated something else, so that its logits were others.
        """
        for rank, connection in enumerate(self._connections, start=1):
            if (other := json.loads(_answer(connection))) != list(token_ids):
                raise InvalidMeasurement(f"rank {rank} generated {other}, rank 0 {list(token_ids)}")

    def stop(self) -> None:
        """Let the others end, and wait for it."""
        self._ending.set()
        for connection in self._connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=10)

    def _watch(self) -> None:
        """A rank that has ended would be waited for without end, in a collective or on its connection."""
        wait([process.sentinel for process in self.processes])
        if self._ending.wait(_GRACE_S):
            return
        for rank, process in enumerate(self.processes, start=1):
            if process.exitcode is not None:
                print(f"quantdet: rank {rank} of the engine has ended (exit code {process.exitcode})", flush=True)
        os._exit(ended.RANK_LOST)


def meeting() -> tuple[str, int, int]:
    """Where this rank meets the others (a URL of torch.distributed), its number, and that of its device."""
    rank = int(os.environ["RANK"])
    return f"tcp://{_HERE}:{os.environ['MASTER_PORT']}", rank, rank


def follow(connection: Connection, executed: Executed, generate: Callable[[Request], Sequence[int]]) -> None:
    """In another rank: say what is `executed`, then `generate` what rank 0 asks for, until it asks no more."""
    connection.send_bytes(executed.model_dump_json().encode())
    while True:
        try:
            request = Request(**json.loads(connection.recv_bytes()))
        except EOFError:
            return
        connection.send_bytes(json.dumps([int(token) for token in generate(request)]).encode())


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
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _answer(connection: Connection) -> bytes:
    try:
        return connection.recv_bytes()
    except EOFError:  # the watcher says which rank ended, and how
        time.sleep(2 * _GRACE_S)
        raise


def _rendezvous(size: int, rank: int, port: int) -> dict[str, str]:
    """What vLLM reads in place of torchrun's."""
    return dict(zip(VARIABLES, (str(rank), str(rank), str(size), _HERE, str(port)), strict=True))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HERE, 0))
        return int(free.getsockname()[1])
