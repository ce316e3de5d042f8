"""The gate in front of a cell: why it cannot be measured on this machine, as need and have."""

from quantdet.engines.child.packages import module_is_here, version
from quantdet.judging.results import Lack
from quantdet.matrix.cell import Cell
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.rows import Hardware, takes
from quantdet.session.machine.machine import Machine, Software

_INSTALL = {"cpu": "pip install -e '.[cpu]'", "cuda": "pip install -e '.[gpu]'", "rocm": "a ROCm build of vLLM"}


def _lacks_vllm(row: Hardware, installed: Software) -> Lack | None:
    if installed.flavour is None:
        return Lack("vllm", f"vLLM ({_INSTALL[row.kind]})", "none")
    if installed.flavour != row.kind:
        need = f"a {row.kind.upper()} build of vLLM ({_INSTALL[row.kind]})"
        return Lack("vllm", need, f"{installed.vllm} for {installed.flavour.upper()}")
    return None


def _lacks_transformers(row: Hardware, machine: Machine, installed: Software) -> Lack | None:
    """A CUDA build of torch computes on the GPU where there is one, as vLLM's does, and on the CPU elsewhere."""
    if installed.transformers is None or installed.torch is None:
        return Lack("transformers", "transformers and torch (pip install -e '.[transformers]')", "none")
    if installed.torch_flavour != row.kind and (row.kind != "cpu" or machine.gpus):
        have = f"{installed.torch} for {(installed.torch_flavour or 'nothing').upper()}"
        return Lack("torch", f"a {row.kind.upper()} build of torch", have)
    return None


def gate(matrix: Matrix, cell: Cell, machine: Machine, installed: Software, *, ignore_native: bool = False) -> Lack | None:
    """Why `cell` cannot be measured here, as need and have; None if it can. Few different texts, so that they fold.

    `ignore_native`: a number format that the chip does not multiply is no reason; the kernel that ran is judged.
    """
    row, format_ = matrix.hardware[cell.hardware_id], matrix.formats[cell.format_id]
    here = machine.rows(matrix)
    if row.limits and not machine.has(row):
        lacking = ", ".join(sorted(set(row.isa) - machine.cpu_flags))
        return Lack("hardware", f"a CPU with {lacking} to be limited ({row.title})", machine.cpu_name)
    if cell.hardware_id not in here and not row.limits:
        return Lack("hardware", f"{cell.hardware_id} ({row.title})", ", ".join(here) or "none of the rows")
    lacks = _lacks_vllm(row, installed) if format_.engine == "vllm" else _lacks_transformers(row, machine, installed)
    if lacks is not None:
        return lacks
    if format_.native is not None and not (takes(row, format_) or ignore_native):
        return Lack(f"native_{format_.native}", f"native {format_.native.upper()}", ", ".join(row.native))
    for package in format_.packages:
        if version(package) is None:
            return Lack("package", f"{package} (pip install {package})", "none")
    if format_.modules and not any(map(module_is_here, format_.modules)):
        return Lack("module", " or ".join(format_.modules), "none of them")
    model = matrix.models[cell.model_id]
    size = matrix.tensor_parallel_size(cell)
    if size > 1 and format_.engine != "vllm":
        return Lack("tensor parallelism", f"size {size}", f"size 1 in {format_.engine}")
    gpus = () if row.kind == "cpu" else machine.gpus_of(row)
    has = min(gpu.memory_gib for gpu in gpus[:size]) if gpus else machine.memory_gib
    if has < model.memory_gib or (gpus and len(gpus) < size):
        several = f"{size} GPUs of " if size > 1 else ""
        found = f"{len(gpus)} of " if size > 1 else ""
        return Lack("memory", f"{several}{model.memory_gib:g} GiB", f"{found}{has:.0f} GiB")
    if size > 1 and any(gpu.parent for gpu in gpus[:size]):
        return Lack("tensor parallelism", f"{size} GPUs that are whole", "MIG devices")
    return None
