"""Where an engine's start-up goes: wall-clock time inside functions of a library that are watched by name."""

import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

# The parts of a lifetime in `Header.timings`, seconds, in their order.
PARTS = ("import_s", "start_s", "load_s", "prepare_s", "compile_s", "measure_s", "claims_s", "speed_s")


class Stopwatch:
    """Adds up the time spent in watched functions, by part; a watched function inside another counts for its own part."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds: Counter[str] = Counter()
        self._clock = clock
        self._inner = [0.0]

    def watch(self, part: str, owner: Any, name: str) -> None:
        """Replace `owner.name` by itself with a clock around it; a name that this version lacks is left out."""
        function = getattr(owner, name, None)
        if function is None:
            return

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._clock()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = self._clock() - began
                self.seconds[part] += whole - self._inner.pop()  # type: ignore[assignment]  # a Counter of floats
                self._inner[-1] += whole

        setattr(owner, name, timed)
