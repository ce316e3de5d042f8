"""The gate in front of a cell: why it cannot be measured on this machine, as need and have."""

from quantdet.engines.child.packages import module_is_here, version
from quantdet.matrix.cell import Cell
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.rows import Hardware, takes
from quantdet.session.machine.machine import Machine, Software

_INSTALL = {"cpu": "pip install -e '.[cpu]'", "cuda": "pip install -e '.[gpu]'", "rocm": "a ROCm build of vLLM"}


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
