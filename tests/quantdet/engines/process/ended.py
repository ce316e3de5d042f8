"""How an engine's process ended, in words, and the last of what it said."""

import contextlib
import signal
from pathlib import Path

from quantdet.untrusted import plain

RANK_LOST = 70  # exit code of rank 0 when another rank has ended (`quantdet.engines.vllm.ranks`)
_LOG_TAIL_LINES = 12
_VMSTAT = Path("/proc/vmstat")


def oom_kills() -> int:
    """How many processes Linux's out-of-memory killer has killed since the machine started."""
    with contextlib.suppress(OSError, ValueError):
        for line in _VMSTAT.read_text(encoding="ascii").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def words(exitcode: int | None, kills_before: int) -> str:
    """For example `killed by SIGKILL`; `kills_before`: `oom_kills` when the process was started."""
    if exitcode is None:
        return "closed its pipe but did not end"
    if exitcode == -signal.SIGKILL and oom_kills() > kills_before:
        return "killed by SIGKILL while Linux's out-of-memory killer was at work"
    if exitcode == RANK_LOST:
        why = " while Linux's out-of-memory killer was at work" if oom_kills() > kills_before else ""
        return f"ended itself because another of its ranks had ended{why}"
    if exitcode == -signal.SIGILL:
        return "killed by SIGILL: an instruction that this CPU does not have"
    if exitcode < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-exitcode).name}"
        return f"killed by signal {-exitcode}"
    return f"ended with exit code {exitcode}"


def said(exitcode: int | None, log: Path) -> tuple[str, ...]:
    """What the log adds to how a process ended; nothing of one that was killed by SIGKILL, since its log does not say why."""
    return () if exitcode == -signal.SIGKILL else tail(log)


def tail(log: Path) -> tuple[str, ...]:
    """The log's last lines, as plain text; none where it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            lines = file.read().decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:]
    except OSError:
        lines = []
    return tuple(plain(line)[:500] for line in lines)
