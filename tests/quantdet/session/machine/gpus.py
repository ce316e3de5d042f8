"""GPUs of this machine as CUDA or HIP will show them to an engine, read from NVML and sysfs: no context is made.

MIG rules: NVIDIA MIG User Guide, "CUDA Device Enumeration"
(https://docs.nvidia.com/datacenter/tesla/mig-user-guide/mig-device-names.html). CUDA_VISIBLE_DEVICES: CUDA Programming
Guide, "CUDA Environment Variables". Where a docstring says "assumed", neither says it.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.version import Version

# Drivers from R570 on show a process one compute instance of each GPU instance; older ones a single MIG device in all.
_SEVERAL_MIG_DEVICES = 570
# vLLM 0.20 and 0.2x take CUDA_VISIBLE_DEVICES for integers (vllm#41848); 0.32 looks a UUID up in NVML.
_TAKES_UUIDS = Version("0.32.dev0")


@dataclass(frozen=True)
class Gpu:
    """One visible GPU, or one MIG device of it; memory in GiB.

    `gfx`: the AMD architecture, instead of a compute capability. `index`: what CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES
    calls it where no UUID can be given; None for a MIG device that is not the first of its GPU. `parent`, `gi`, `ci`: the
    UUID of a MIG device's GPU, and the ids of its GPU instance and compute instance.
    """

    name: str
    uuid: str
    compute_capability: str
    memory_gib: float
    driver: str = ""
    gfx: str = ""
    index: int | None = None
    parent: str = ""
    gi: int = -1
    ci: int = -1

    @property
    def architecture(self) -> str:
        """What a hardware row is found by: the compute capability, or the gfx name."""
        return self.gfx or self.compute_capability


# The CUDA devices of one physical GPU: itself; or its MIG devices, of which there may be none.
Card = tuple[Gpu, ...]


def detect() -> tuple[Gpu, ...]:
    """Visible NVIDIA GPUs, or else visible AMD GPUs."""
    return nvidia() or amd()


def variables(gpus: Sequence[Gpu], vllm: str | None) -> dict[str, str]:
    """The environment that shows a process of this vLLM `gpus` alone, at least one, of one vendor.

    A MIG device goes by its GPU's index where it is the first: vLLM takes the NVML index of a MIG UUID, which counts the
    MIG devices of one GPU, for that of a GPU (seen in the source of 0.32).
    """
    if gpus[0].gfx:  # HIP reads both names and wants them equal
        shown = ",".join(str(gpu.index or 0) for gpu in gpus)
        return dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), shown)
    takes_uuids = vllm is None or Version(vllm) >= _TAKES_UUIDS
    names = (gpu.uuid if gpu.index is None or (takes_uuids and not gpu.parent) else str(gpu.index) for gpu in gpus)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(names)}


# ---------------------------------------------------------------------------------------------------------------- NVIDIA


def nvidia() -> tuple[Gpu, ...]:
    """GPUs that CUDA_VISIBLE_DEVICES leaves visible, through NVML: no CUDA context is made."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: no GPU
        return ()
    try:
        count = int(_ask(0, pynvml.nvmlDeviceGetCount))
        driver = str(_ask("", pynvml.nvmlSystemGetDriverVersion))
        cards = [_card(pynvml, index, driver) for index in range(count)]
    finally:
        _ask(None, pynvml.nvmlShutdown)
    return visible(cards, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _ask(otherwise: Any, call: Callable[..., Any], *args: Any) -> Any:
    """NVML's answer, or `otherwise`: consumer GPUs answer NotSupported, old drivers FunctionNotFound."""
    try:
        return call(*args)
    except Exception:
        return otherwise


def _card(nvml: Any, index: int, driver: str) -> Card:
    """A physical GPU; a single call that fails costs its answer, not the device."""
    handle = _ask(None, nvml.nvmlDeviceGetHandleByIndex, index)
    if handle is None:
        return ()
    major_minor = _ask(None, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    capability = "" if major_minor is None else "{}.{}".format(*major_minor)
    name = str(_ask("NVIDIA GPU", nvml.nvmlDeviceGetName, handle))
    uuid = str(_ask("", nvml.nvmlDeviceGetUUID, handle))
    whole = Gpu(name, uuid, capability, _memory(nvml, handle), driver, index=index)
    mode = _ask((0, 0), lambda: nvml.nvmlDeviceGetMigMode(handle))
    if int(mode[0]) != 1:  # [current, pending]
        return (whole,)
    return tuple(_mig_devices(nvml, handle, whole))


def _memory(nvml: Any, handle: Any) -> float:
    """Total memory, GiB; where NVML has no answer (integrated GPUs share the host's), the host's."""
    info = _ask(None, nvml.nvmlDeviceGetMemoryInfo, handle)
    return host_memory_gib() if info is None else int(info.total) / 2**30


def host_memory_gib() -> float:
    """Memory of this machine, GiB; 0 where the system does not say."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return 0.0


def _mig_devices(nvml: Any, handle: Any, whole: Gpu) -> Iterable[Gpu]:
    """The MIG devices (compute instances) of a GPU in MIG mode, in NVML's order; indices may have gaps."""
    found = 0
    for index in range(int(_ask(0, lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle)))):
        mig = _ask(None, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        uuid = "" if mig is None else str(_ask("", nvml.nvmlDeviceGetUUID, mig))
        if not uuid:  # nothing there, or nothing that can be named
            continue
        yield replace(
            whole, name=_mig_name(nvml, mig, whole.name), uuid=uuid, memory_gib=_memory(nvml, mig), parent=whole.uuid,
            gi=int(_ask(-1, lambda mig=mig: nvml.nvmlDeviceGetGpuInstanceId(mig))),
            ci=int(_ask(-1, lambda mig=mig: nvml.nvmlDeviceGetComputeInstanceId(mig))),
            index=None if found else whole.index,
        )  # fmt: skip
        found += 1


def _mig_name(nvml: Any, mig: Any, parent: str) -> str:
    """With the profile: drivers that name only the GPU get it from the instance's slices and memory, as in "MIG 1g.5gb"."""
    name = str(_ask(parent, nvml.nvmlDeviceGetName, mig))
    if "MIG" in name:
        return name
    facts = _ask(None, lambda: nvml.nvmlDeviceGetAttributes(mig))
    if facts is None:
        return f"{name} MIG"
    gpu, compute = int(facts.gpuInstanceSliceCount), int(facts.computeInstanceSliceCount)
    part = "" if compute == gpu else f"{compute}c."
    return f"{name} MIG {part}{gpu}g.{math.ceil(int(facts.memorySizeMB) / 1024)}gb"


def visible(cards: Sequence[Card], variable: str | None) -> tuple[Gpu, ...]:
    """The CUDA devices of `cards` in the order of a CUDA_VISIBLE_DEVICES value, which ends at a bad entry.

    Entries: an index or "GPU-" UUID; "MIG-" UUID of a MIG device; "MIG-GPU-UUID/GI/CI", as drivers before R470 had it.
    The beginning of a UUID is enough. The index or UUID of a GPU in MIG mode means its first MIG device (assumed).
    """
    if variable is None:
        return _shown([gpu for card in cards for gpu in card])
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in variable.split(",")):
        gpu = _named(cards, entry)
        if gpu is None or gpu in chosen:  # CUDA sees none at all of a device named twice; two workers must not share it
            break
        chosen.append(gpu)
    return _shown(chosen)


def _named(cards: Sequence[Card], entry: str) -> Gpu | None:
    found: list[Gpu] = []
    if entry.isascii() and entry.isdecimal():
        found = [gpu for card in cards[int(entry) : int(entry) + 1] for gpu in card]
    elif entry.startswith("GPU-"):
        found = [gpu for card in cards for gpu in card if (gpu.parent or gpu.uuid).startswith(entry)]
    elif entry.startswith("MIG-GPU-"):
        uuid, *ids = entry.removeprefix("MIG-").split("/")
        found = [g for card in cards for g in card if g.parent.startswith(uuid) and [str(g.gi), str(g.ci)] == ids]
    elif entry.startswith("MIG-"):
        found = [gpu for card in cards for gpu in card if gpu.parent and gpu.uuid.startswith(entry)]
    return found[0] if found else None


def _shown(gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """Those of the visible that CUDA enumerates, by driver (MIG User Guide).

    From R570 on: one compute instance of each GPU instance, and GPUs without MIG beside them. Before: the first MIG device
    alone, and no other GPU.
    """
    migs = [gpu for gpu in gpus if gpu.parent]
    major = migs[0].driver.partition(".")[0] if migs else ""
    if migs and not (major.isdecimal() and int(major) >= _SEVERAL_MIG_DEVICES):
        return (migs[0],)
    seen: set[tuple[str, int]] = set()
    shown = []
    for gpu in gpus:
        if gpu.parent and gpu.gi >= 0 and (gpu.parent, gpu.gi) in seen:
            continue
        seen.add((gpu.parent, gpu.gi))
        shown.append(gpu)
    return tuple(shown)


# ------------------------------------------------------------------------------------------------------------------- AMD


def amd(sys: Path = Path("/sys")) -> tuple[Gpu, ...]:
    """AMD GPUs in the order of the kernel driver (amdkfd), those that ROCR_ and HIP_VISIBLE_DEVICES leave visible.

    HIP counts among what ROCr shows, and takes CUDA_VISIBLE_DEVICES for HIP_VISIBLE_DEVICES (ROCm documentation, "GPU
    isolation techniques"). What one bad entry does to the rest is assumed to be as in CUDA.
    """
    nodes = (sys / "class/kfd/kfd/topology/nodes").glob("[0-9]*")
    found = [gpu for node in sorted(nodes, key=lambda path: path.name.zfill(4)) if (gpu := _kfd_node(sys, node)) is not None]
    rocr = os.environ.get("ROCR_VISIBLE_DEVICES")  # UUIDs in capitals, indices, or both
    shown = visible([(gpu,) for gpu in found], None if rocr is None else rocr.upper())
    cards = [(replace(gpu, index=index),) for index, gpu in enumerate(shown)]
    return visible(cards, os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")))


def _kfd_node(sys: Path, node: Path) -> Gpu | None:
    """A node of the topology that is a GPU; None for a CPU, or where a container may not read it."""
    try:
        lines = (node / "properties").read_text(encoding="utf-8").splitlines()
        properties = {name: int(value) for name, value in (line.split() for line in lines)}
    except (OSError, ValueError):
        return None
    version = properties.get("gfx_target_version", 0)  # decimal, two digits each for minor and stepping: 90402 is gfx942
    if not version:
        return None
    gfx = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    device = sys / f"class/drm/renderD{properties.get('drm_render_minor', 0)}/device"
    name, total = _text(device / "product_name"), _text(device / "mem_info_vram_total")
    memory = int(total) / 2**30 if total.isdecimal() else 0.0
    uuid = f"GPU-{properties.get('unique_id', 0):016X}"
    return Gpu(name or f"AMD {gfx}", uuid, "", memory, _text(sys / "module/amdgpu/version"), gfx=gfx)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
