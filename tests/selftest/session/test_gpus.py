"""GPUs, MIG devices and AMD GPUs from a made-up NVML and a made-up sysfs; what CUDA_VISIBLE_DEVICES leaves of them."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantdet.engines.child import device, packages
from quantdet.engines.plan import EngineRefused, InvalidMeasurement, Plan
from quantdet.engines.vllm.engine import VllmEngine
from quantdet.session import plans
from quantdet.session.machine import gpus
from quantdet.session.machine.gpus import Card, Gpu, visible

A, B, C = (Gpu("NVIDIA H100", f"GPU-{letter}{i}", "9.0", 80.0) for i, letter in enumerate("abc"))
CARDS = ((A,), (B,), (C,))

# -------------------------------------------------------------------------------------------------- CUDA_VISIBLE_DEVICES


@pytest.mark.parametrize(
    ("variable", "wanted"),
    [
        (None, (A, B, C)),
        ("", ()),
        ("-1", ()),
        ("0", (A,)),
        ("2,0", (C, A)),
        (" 1 , 2 ", (B, C)),
        ("0,-1,1", (A,)),
        ("0,7,1", (A,)),
        ("x,0", ()),
        ("GPU-b1", (B,)),
        ("GPU-c,GPU-a0", (C, A)),
        ("GPU-none,GPU-a0", ()),
        ("MIG-GPU-a0/1/0", ()),
        ("NoDevFiles", ()),
    ],
)
def test_visible(variable: str | None, wanted: tuple[Gpu, ...]) -> None:
    """Indices and UUIDs (or the beginning of one) in the caller's order; the first bad entry ends the list."""
    assert wanted == visible(CARDS, variable)


@pytest.mark.parametrize("variable", ["0,0", "0,1,0", "GPU-a0,GPU-a0", "GPU-a0,0"])
def test_a_device_named_twice_is_not_two_devices(variable: str) -> None:
    """No two workers get the same GPU."""
    found = visible(CARDS, variable)

    assert len(found) == len(set(found))


def test_a_strange_digit_is_a_bad_entry() -> None:
    """What is no index ends the list, without an exception."""
    assert (A,) == visible(CARDS, "0,\u00b2")


def test_no_gpus() -> None:
    """Without GPUs nothing becomes visible."""
    assert () == visible((), "0,1")


# ------------------------------------------------------------------------------------------------------------------- MIG


def mig(uuid: str, parent: str, gi: int, ci: int = 0, *, index: int | None = None, driver: str = "550.90") -> Gpu:
    return Gpu("NVIDIA H100 MIG 1g.10gb", uuid, "9.0", 10.0, driver, index=index, parent=parent, gi=gi, ci=ci)


def mixed(driver: str) -> tuple[Card, ...]:
    """A whole GPU, one with two GPU instances (the first of two compute instances), one in MIG mode without any."""
    parts = ((1, 0, 1), (1, 1, None), (2, 0, None))
    migs = tuple(mig(f"MIG-{gi}{ci}", "GPU-m", gi, ci, index=index, driver=driver) for gi, ci, index in parts)
    return (A,), migs, ()


@pytest.mark.parametrize(
    ("driver", "variable", "wanted"),
    [
        # Before R570: the first MIG device alone, and no GPU beside it.
        ("550.90", None, ["MIG-10"]),
        ("550.90", "0", ["GPU-a0"]),
        ("550.90", "0,1", ["MIG-10"]),
        ("550.90", "MIG-20,MIG-10", ["MIG-20"]),
        ("", None, ["MIG-10"]),
        # From R570 on: one compute instance of each GPU instance.
        ("570.133.20", None, ["GPU-a0", "MIG-10", "MIG-20"]),
        ("580.1", "MIG-20,MIG-10", ["MIG-20", "MIG-10"]),
        ("580.1", "MIG-11,MIG-10,0", ["MIG-11", "GPU-a0"]),
        ("580.1", "0,1", ["GPU-a0", "MIG-10"]),
        # Names.
        ("580.1", "MIG-2", ["MIG-20"]),
        ("460.32", "MIG-GPU-m/2/0", ["MIG-20"]),
        ("460.32", "MIG-GPU-m/1/1", ["MIG-11"]),
        ("460.32", "MIG-GPU-m/3/0", []),
        ("460.32", "MIG-GPU-m/1", []),
        ("460.32", "MIG-GPU-a0/1/0", []),
        ("580.1", "1", ["MIG-10"]),
        ("580.1", "GPU-m", ["MIG-10"]),
        # A GPU in MIG mode without instances is no device, and ends the list.
        ("580.1", "2", []),
        ("580.1", "0,2,1", ["GPU-a0"]),
    ],
)
def test_mig_devices_as_cuda_shows_them(driver: str, variable: str | None, wanted: list[str]) -> None:
    """By driver, and by every way to name one."""
    assert wanted == [gpu.uuid for gpu in visible(mixed(driver), variable)]


class Refusing(Exception):
    """NVMLError_NotSupported, NotFound and the like."""


def fake_nvml(cards: list[dict[str, Any]], *, driver: str = "580.1", broken: tuple[str, ...] = ()) -> SimpleNamespace:
    """As much of pynvml as is asked. A card: name, uuid, cc, memory (GiB), mode, migs (index -> card). Handles are cards."""

    def get(name: str) -> Any:
        def call(handle: Any) -> Any:
            if name not in handle:
                raise Refusing(name)
            return handle[name]

        return call

    def memory(handle: Any) -> Any:
        return SimpleNamespace(total=get("memory")(handle) * 2**30)

    def mig_handle(handle: Any, index: int) -> Any:
        try:
            return handle["migs"][index]
        except KeyError:
            raise Refusing("NotFound") from None

    found: dict[str, Any] = {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlSystemGetDriverVersion": lambda: driver,
        "nvmlDeviceGetCount": lambda: len(cards), "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
        "nvmlDeviceGetCudaComputeCapability": get("cc"), "nvmlDeviceGetName": get("name"), "nvmlDeviceGetUUID": get("uuid"),
        "nvmlDeviceGetMemoryInfo": memory, "nvmlDeviceGetMigMode": lambda handle: [get("mode")(handle), 0],
        "nvmlDeviceGetMaxMigDeviceCount": lambda handle: 7, "nvmlDeviceGetMigDeviceHandleByIndex": mig_handle,
        "nvmlDeviceGetGpuInstanceId": get("gi"), "nvmlDeviceGetComputeInstanceId": get("ci"),
        "nvmlDeviceGetAttributes": get("attributes"),
    }  # fmt: skip

    def refuse(*args: Any) -> Any:
        raise Refusing("NotSupported")

    return SimpleNamespace(**found | dict.fromkeys(broken, refuse))


def read(monkeypatch: pytest.MonkeyPatch, nvml: SimpleNamespace, variable: str | None = None) -> tuple[Gpu, ...]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    return gpus.detect()


def card(**changes: Any) -> dict[str, Any]:
    return {"name": "NVIDIA H100", "uuid": "GPU-m", "cc": (9, 0), "memory": 80, "mode": 0, **changes}


def in_mig_mode(*indices: int, **changes: Any) -> dict[str, Any]:
    migs = {
        i: {"name": "NVIDIA H100 MIG 2g.20gb", "uuid": f"MIG-{i}", "memory": 20, "gi": i, "ci": 0, **changes} for i in indices
    }
    return card(mode=1, migs=migs)


def test_mig_devices_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """UUID, memory and name are the instance's, the compute capability its GPU's; indices may have gaps."""
    found = read(monkeypatch, fake_nvml([card(uuid="GPU-w"), in_mig_mode(0, 3)]))

    assert ["GPU-w", "MIG-0", "MIG-3"] == [gpu.uuid for gpu in found]
    assert ("NVIDIA H100 MIG 2g.20gb", "9.0", 20.0, "580.1") == (
        found[2].name, found[2].compute_capability, found[2].memory_gib, found[2].driver,
    )  # fmt: skip
    assert [0, 1, None] == [gpu.index for gpu in found]
    assert ("GPU-m", 3, 0) == (found[2].parent, found[2].gi, found[2].ci)


def test_mig_mode_without_instances_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU itself cannot be used then."""
    assert () == read(monkeypatch, fake_nvml([in_mig_mode()]))
    assert () == read(monkeypatch, fake_nvml([in_mig_mode(0)], broken=("nvmlDeviceGetMaxMigDeviceCount",)))


def test_mig_and_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the environment."""
    assert ["MIG-3"] == [gpu.uuid for gpu in read(monkeypatch, fake_nvml([in_mig_mode(0, 3)]), "MIG-3")]
    assert ["MIG-3"] == [gpu.uuid for gpu in read(monkeypatch, fake_nvml([in_mig_mode(0, 3)]), "MIG-GPU-m/3/0")]


@pytest.mark.parametrize(
    ("slices", "name"), [((2, 2), "NVIDIA H100 MIG 2g.20gb"), ((2, 1), "NVIDIA H100 MIG 1c.2g.20gb"), (None, "NVIDIA H100 MIG")]
)
def test_a_name_without_a_profile_gets_one(monkeypatch: pytest.MonkeyPatch, slices: tuple[int, int] | None, name: str) -> None:
    """From the instance's slices and memory, as nvidia-smi writes it."""
    facts = {}
    if slices is not None:
        gpu, compute = slices
        facts["attributes"] = SimpleNamespace(gpuInstanceSliceCount=gpu, computeInstanceSliceCount=compute, memorySizeMB=19968)

    assert [name] == [gpu.name for gpu in read(monkeypatch, fake_nvml([in_mig_mode(0, name="NVIDIA H100", **facts)]))]


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetMigMode", "nvmlSystemGetDriverVersion", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetMaxMigDeviceCount", "nvmlShutdown",
    ],
)  # fmt: skip
def test_one_call_that_fails_does_not_lose_the_device(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A consumer GPU answers NotSupported to questions about MIG."""
    (found,) = read(monkeypatch, fake_nvml([card()], broken=(call,)))

    assert ("GPU-m", "9.0") == (found.uuid, found.compute_capability)
    assert found.memory_gib == (gpus.host_memory_gib() if call == "nvmlDeviceGetMemoryInfo" else 80.0)


def test_an_old_binding_has_no_mig_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing functions are no MIG."""
    nvml = fake_nvml([card()])
    del nvml.nvmlDeviceGetMigMode

    assert ["GPU-m"] == [gpu.uuid for gpu in read(monkeypatch, nvml)]


def test_a_gpu_that_is_lost_keeps_the_others_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle that NVML does not give is no device, and no other device gets its index."""
    nvml = fake_nvml([card(uuid="GPU-0"), card(uuid="GPU-1")])

    def handle(index: int) -> Any:
        if index == 0:
            raise Refusing("GpuIsLost")
        return card(uuid="GPU-1")

    nvml.nvmlDeviceGetHandleByIndex = handle

    assert ["GPU-1"] == [gpu.uuid for gpu in read(monkeypatch, nvml, "1")]
    assert [] == [gpu.uuid for gpu in read(monkeypatch, nvml, "0")]


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvmlInit fails; what else there is is asked."""
    monkeypatch.setattr(gpus, "amd", tuple)

    assert () == read(monkeypatch, fake_nvml([card()], broken=("nvmlInit",)))


# -------------------------------------------------------------------------------------------------------- to the engine


@pytest.mark.parametrize(
    ("gpu", "vllm", "wanted"),
    [
        (Gpu("n", "GPU-a", "9.0", 1.0, index=3), "0.32.0", "GPU-a"),
        (Gpu("n", "GPU-a", "9.0", 1.0, index=3), None, "GPU-a"),
        (Gpu("n", "GPU-a", "9.0", 1.0, index=3), "0.26.0", "3"),
        (Gpu("n", "GPU-a", "9.0", 1.0), "0.26.0", "GPU-a"),
        (mig("MIG-a", "GPU-m", 1, index=3), "0.32.0", "3"),
        (mig("MIG-b", "GPU-m", 2), "0.32.0", "MIG-b"),
    ],
)
def test_how_a_gpu_is_shown_alone(gpu: Gpu, vllm: str | None, wanted: str) -> None:
    """By UUID; by index, in PCI order, where vLLM misreads the UUID and the index means the same."""
    assert {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": wanted} == gpus.variables([gpu], vllm)


def plan(**extra: Any) -> Plan:
    return Plan(identity={}, checkpoint="", dtype="", args={}, env={}, prompts=(), repeats=2, decode_tokens=2, top_k=2, **extra)


@pytest.mark.parametrize(
    ("wanted", "seen", "words"),
    [
        ("9.0", "8.0", "needs compute capability 9.0, torch sees 8.0 \\(CUDA_DEVICE_ORDER"),
        ("9.0", "no GPU", "needs compute capability 9.0, torch sees no GPU"),
        ("gfx942", "gfx90a", "needs architecture gfx942, torch sees gfx90a$"),
    ],
)
def test_another_gpu_than_the_rows_is_invalid(monkeypatch: pytest.MonkeyPatch, wanted: str, seen: str, words: str) -> None:
    """The engine's process looks at what torch computes on."""
    monkeypatch.setattr(device, "_architecture", lambda: seen)

    with pytest.raises(InvalidMeasurement, match=words):
        device.check(plan(architecture=wanted))


def test_the_rows_gpu_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a CPU's plan is not checked: torch is not even asked."""
    monkeypatch.setattr(device, "_architecture", lambda: "9.0")
    device.check(plan(architecture="9.0"))
    monkeypatch.delattr(device, "_architecture")
    device.check(plan())


@pytest.mark.parametrize("refusal", [None, EngineRefused("ValueError: needs compute capability 9.0")])
def test_the_engine_looks_at_its_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refusal: Exception | None) -> None:
    """As soon as the engine is up; and a refusal on another row's GPU is not taken for the cell's."""
    loaded = []

    def load(model: str, **_: Any) -> Any:
        loaded.append(model)
        if refusal is not None:
            raise refusal

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=load))  # type: ignore[arg-type]
    monkeypatch.setattr(packages, "hide", lambda names: None)
    monkeypatch.setattr(device, "_architecture", lambda: "8.0")

    with pytest.raises(InvalidMeasurement, match=r"needs compute capability 9.0, torch sees 8.0"):
        VllmEngine().measure(plan(architecture="9.0"), tmp_path)
    assert 1 == len(loaded)


def test_what_ends_the_start_keeps_its_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The log shows the chain down to where it began."""

    def load(**_: Any) -> Any:
        raise RuntimeError("out of memory") from KeyError("began here")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=load))  # type: ignore[arg-type]
    monkeypatch.setattr(packages, "hide", lambda names: None)

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        VllmEngine().measure(plan(), tmp_path)
    assert "began here" in str(caught.value.__cause__)


def test_the_check_is_not_part_of_the_key() -> None:
    """Observations from before there was a check stay valid; what else is beside the identity counts."""
    keys = [plans.key_of(plan(**extra), 0) for extra in ({}, {"architecture": "9.0"}, {"spawn": True})]

    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("hip", "available", "wanted"), [(None, True, "9.0"), ("6.4", True, "gfx942"), (None, False, "no GPU")]
)
def test_what_torch_sees(monkeypatch: pytest.MonkeyPatch, hip: str | None, available: bool, wanted: str) -> None:
    """Compute capability, or the gfx name without its features."""
    properties = SimpleNamespace(major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    of = {3: properties}.__getitem__  # of a rank's own device
    cuda = SimpleNamespace(is_available=lambda: available, get_device_properties=of, current_device=lambda: 3)
    torch: Any = SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip=hip))
    monkeypatch.setitem(sys.modules, "torch", torch)

    assert wanted == device._architecture()


# ------------------------------------------------------------------------------------------------------------------- AMD


@pytest.fixture
def kfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with a CPU node, two MI300X (nodes 2 and 10) and an MI250X (node 3), and a node that may not be read."""
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    nodes = {0: (0, 0, 0), 2: (90402, 128, 0xAB), 3: (90010, 129, 0xCD), 10: (90402, 130, 0xEF), 11: None}
    for number, node in nodes.items():
        folder = tmp_path / f"class/kfd/kfd/topology/nodes/{number}"
        folder.mkdir(parents=True)
        if node is None:
            (folder / "properties").write_text("", encoding="utf-8")  # as a container sees a GPU that is not its own
            continue
        version, minor, unique = node
        text = f"cpu_cores_count 0\ngfx_target_version {version}\ndrm_render_minor {minor}\nunique_id {unique}\n"
        (folder / "properties").write_text(text, encoding="utf-8")
        device = tmp_path / f"class/drm/renderD{minor}/device"
        device.mkdir(parents=True, exist_ok=True)
        (device / "mem_info_vram_total").write_text(f"{192 * 2**30}\n", encoding="utf-8")
    return tmp_path


def test_amd_gpus_from_sysfs(kfd: Path) -> None:
    """Architecture, memory and identity, in the driver's order; no library is needed."""
    found = gpus.amd(kfd)

    assert ["gfx942", "gfx90a", "gfx942"] == [gpu.architecture for gpu in found]
    assert (192.0, "GPU-00000000000000AB", "AMD gfx942") == (found[0].memory_gib, found[0].uuid, found[0].name)
    assert {"CUDA_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "2"} == gpus.variables([found[2]], "0.32.0")
    assert {"2,0"} == set(gpus.variables([found[2], found[0]], "0.32.0").values())


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, ["CD"]),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, ["EF", "AB"]),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "1"}, ["CD"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-00000000000000cd"}, ["CD"]),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
    ],
)
def test_visible_amd_gpus(kfd: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: list[str]) -> None:
    """HIP counts among what ROCr shows."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert wanted == [gpu.uuid[-2:] for gpu in gpus.amd(kfd)]


def test_no_amd_driver(tmp_path: Path) -> None:
    """Most machines."""
    assert () == gpus.amd(tmp_path)
