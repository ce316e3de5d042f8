"""Signals that end a run: SIGTERM and SIGHUP unwind it as Ctrl-C does, and none comes between a beginning and its end."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP. What Ctrl-C ends and cleans up, they end and clean up."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(signal.Signals(number).name)


def install() -> Callable[[], None]:
    """Let SIGTERM and SIGHUP raise `Terminated`; what is returned undoes it.

    Without it they end this process where it stands. A signal that is ignored (nohup) or handled by somebody stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _terminate)

    def undo() -> None:
        for number in taken:
            if signal.getsignal(number) is _terminate:
                signal.signal(number, signal.SIG_DFL)

    return undo


class Held:
    """Signals that wait. `fileno()` becomes readable with the first one, so that a wait for something else ends."""

    def __init__(self) -> None:
        self.caught: list[int] = []
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._open = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        return self._read

    def begin(self) -> None:
        for number in ENDING:
            handler = signal.getsignal(number)
            if callable(handler):  # others end or do nothing, in C
                self._before[number] = handler
                signal.signal(number, self._catch)

    def end(self) -> None:
        try:
            self._open = True  # first: a signal may come while the handlers are put back
            self._put_back()
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._open:
            self._before[number](number, frame)
            return
        self.caught.append(number)
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"!")

    def let(self) -> None:
        """Deliver what has waited.

        Raises:
            KeyboardInterrupt: or whatever the handler raises.
        """
        while self.caught:
            number = self.caught.pop(0)
            os.read(self._read, 1)
            self._before[number](number, None)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """A part that may be cut off at any point."""
        self._open = True
        try:
            self.let()
            yield
        finally:
            self._open = False


_active: Held | None = None


@contextlib.contextmanager
def held() -> Iterator[Held]:
    """Signals that would end the run wait for the end of the block, or for `let`; a block inside another is part of it."""
    global _active
    if _active is not None:
        yield _active
        return
    pending = Held()
    handles = threading.current_thread() is threading.main_thread()  # only there can handlers be set, or be called
    interrupted = False
    try:
        if handles:
            _active = pending
            pending.begin()
        yield pending
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        _active = None
        try:
            pending.end()
            if not interrupted:  # who pressed twice means the same as who pressed once
                pending.let()
        finally:
            pending.close()
