"""Work on many tensors at once: threads, since NumPy and hashlib release the interpreter lock in all that takes long here."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_MOST = 8  # beyond it, writing the files is what takes the time, and engines run on the same machine


def workers() -> int:
    """How many threads to use: the processors that this process may use, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST, usable)


def in_order(jobs: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """The results of `jobs` in their order; threads work ahead while the caller uses a result.

    No more than two jobs for each worker are begun or waiting to be taken: that bounds the memory. Close the iterator
    (`contextlib.closing`) if it may be left early: what has not begun is then dropped.

    Raises:
        Whatever a job raises, when it is that job's turn.
    """
    count = workers()
    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="checkpoint") as pool:
        try:
            for job in jobs:
                if len(ahead) == 2 * count:
                    yield ahead.popleft().result()
                ahead.append(pool.submit(job))
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
