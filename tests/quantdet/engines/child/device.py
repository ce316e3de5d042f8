"""Whether the device that torch computes on is of the cell's hardware row; runs in the engine's process."""

import contextlib

from quantdet.engines.plan import InvalidMeasurement, Plan


def check(plan: Plan) -> None:
    """Compare torch's current device with `plan.architecture` (a compute capability or a gfx name), if it is there.

    Raises:
        InvalidMeasurement: another GPU than the hardware row asks for; CUDA and NVML may count GPUs in different orders.
    """
    wanted = plan.architecture
    if not wanted:
        return
    seen = _architecture()
    if seen != wanted:
        name = "architecture" if wanted.startswith("gfx") else "compute capability"
        hint = "" if name == "architecture" else " (CUDA_DEVICE_ORDER=PCI_BUS_ID makes CUDA count GPUs as nvidia-smi does)"
        raise InvalidMeasurement(f"needs {name} {wanted}, torch sees {seen}{hint}")


def _architecture() -> str:
    """What torch's current device is: "9.0", "gfx942", or "no GPU"."""
    import torch

    with contextlib.suppress(RuntimeError, AssertionError):
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            if torch.version.hip:
                return str(properties.gcnArchName).partition(":")[0]
            return f"{properties.major}.{properties.minor}"
    return "no GPU"
