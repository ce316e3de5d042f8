"""What an observation's environment is known by: the part that the parent knows before an engine starts."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from quantdet.matrix.rows import Hardware
from quantdet.session.machine.machine import Machine, Software

# Variables that change kernels, threads or devices. Echoed in the header, so that a typo in a name is seen.
RELEVANT = re.compile(
    r"^(VLLM_|OMP_|KMP_|GOMP_|MKL_|ONEDNN_|DNNL_|ATEN_|TORCH|PYTORCH_|CUDA_|CUBLAS|NCCL_|RCCL_|NVSHMEM_|NVIDIA_TF32|HIP_|ROCR_|TRITON_|"
    r"FLASHINFER_|DG_|LD_PRELOAD$|QUANTDET_)"
)
# They name places or verbosity, and change no number.
_HARMLESS = re.compile(r"^(VLLM_(CACHE_ROOT|CONFIG_ROOT|LOGGING_.*|NO_USAGE_STATS|DO_NOT_TRACK)|QUANTDET_INJECT|CUDA_HOME)$")


_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
# Instruction sets that libraries choose their code by.
_ISA = re.compile(r"^(avx|amx|fma$|f16c$|sse4|asimd|sve|bf16|i8mm|neon)")


def relevant_variables() -> dict[str, str]:
    """Environment variables that can change what runs; none that may hold a secret."""
    return {name: value for name, value in sorted(os.environ.items()) if RELEVANT.match(name) and not _SECRET.search(name)}


def environment_of(machine: Machine, installed: Software) -> dict[str, Any]:
    """Versions, device and variables. Two observations with equal values here may be taken for each other."""
    gpu = machine.gpus[0] if machine.gpus else None
    return {
        "vllm": installed.vllm or "",
        "vllm_flavour": installed.flavour or "",
        "torch_package": installed.torch or "",
        "transformers_package": installed.transformers or "",
        "compressed_tensors_package": installed.compressed_tensors or "",
        "python": platform.python_version(),
        "cpu": machine.cpu_name,
        "cpu_isa": " ".join(sorted(flag for flag in machine.cpu_flags if _ISA.match(flag))),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "gpu": gpu.name if gpu else "",
        "gpu_uuid": gpu.uuid if gpu else "",
        "driver": gpu.driver if gpu else "",
        "variables": {name: value for name, value in relevant_variables().items() if not _HARMLESS.match(name)},
    }


def environment_on(environment: dict[str, Any], machine: Machine, row: Hardware) -> dict[str, Any]:
    """`environment` of a cell of `row`: where that is not the first visible GPU's, it names the GPU that the cell runs on."""
    gpus = machine.gpus_of(row)
    if not gpus or gpus[0] == machine.gpus[0]:
        return environment
    return {**environment, "gpu": gpus[0].name, "gpu_uuid": gpus[0].uuid, "driver": gpus[0].driver}


def git_revision(root: Path) -> str:
    """Revision of the suite's checkout, with `-dirty` where it was changed; empty outside git."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
