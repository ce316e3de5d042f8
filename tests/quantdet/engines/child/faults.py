"""Faults on purpose, in the engine's own process: `QUANTDET_INJECT=sigkill:GLOB` shows what the suite makes of them.

They are raised where the real ones come from: a signal from the kernel, an allocation that is refused, a call that does not
return. Fired when the engine has loaded and has not answered yet.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

from quantdet.engines.plan import InvalidMeasurement

KINDS = ("sigkill", "sigkill-rank", "sigsegv", "hang", "oom", "oom-device")
_SPARE = 64 << 20
_HANG_S = 86_400.0


def fire(kind: str, rank: int = 0, ranks: int = 1) -> None:
    """The fault `kind` in `rank`; nothing where it is no fault (empty, or a defect of the numbers) or one of another rank.

    Raises:
        MemoryError, torch.OutOfMemoryError: as the allocator does.
        InvalidMeasurement: a fault of another rank than 0, and there is none.
    """
    if kind == "sigkill-rank" and ranks == 1:
        raise InvalidMeasurement(f"seeded fault {kind}: needs a tensor parallel size above 1")
    if kind not in KINDS or rank != (ranks - 1 if kind == "sigkill-rank" else 0):
        return
    print(f"quantdet: seeded fault: {kind}", flush=True)
    match kind:
        case "sigkill" | "sigkill-rank":  # as Linux's out-of-memory killer does
            os.kill(os.getpid(), signal.SIGKILL)
        case "sigsegv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(_HANG_S)
        case "oom":
            _exhaust_host()
        case "oom-device":
            _exhaust_device()


def _exhaust_host() -> None:
    """Allocate under a limit of the kernel until it refuses; the memory stays taken while the error is handled."""
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    taken, size = [], _SPARE
    while size >= 4096:
        try:
            taken.append(bytearray(size))
        except MemoryError:
            size //= 2
    raise MemoryError(f"cannot allocate: {sum(map(len, taken)) >> 20} MiB taken, none left")


def _exhaust_device() -> None:
    """Ask for more than the device has; without a device, the error that torch raises then."""
    torch = sys.modules.get("torch")
    if torch is None:
        raise MemoryError("CUDA out of memory. (no torch in this process)")
    if torch.cuda.is_available():
        torch.empty(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (no device here)")
