"""pytest-xdist: which tests stay together, which worker gets which GPU, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantdet.matrix.cell import ID_PATTERN
from quantdet.matrix.rows import Hardware
from quantdet.session.cases import workers
from quantdet.session.machine.gpus import Gpu
from quantdet.session.machine.machine import Machine, Software
from quantdet.session.session import SESSION

GPUS = tuple(Gpu("H100", f"GPU-{letter}", "9.0", 80.0) for letter in "abc")
ROWS = {
    "sm90": Hardware(kind="cuda", title="", native=(), compute_capability="9.0"),
    "cpu": Hardware(kind="cpu", title="", native=(), isa=("avx2",)),
}
ID = st.from_regex(ID_PATTERN, fullmatch=True).filter(str.isascii)


class Config:
    """As much of pytest's configuration as the functions look at."""

    def __init__(
        self, gpus: tuple[Gpu, ...] = (), plugins: tuple[str, ...] = (), *, hardware: str | None = None,
        vllm: str = "0.32.0", **options: Any,
    ) -> None:  # fmt: skip
        session = SimpleNamespace(
            machine=Machine("cpu", frozenset(), 1.0, gpus), software=Software(vllm, "cuda"),
            options=SimpleNamespace(hardware=hardware), matrix=SimpleNamespace(hardware=ROWS),
        )  # fmt: skip
        self.stash = {SESSION: session}
        self.options = options
        self.pluginmanager = SimpleNamespace(has_plugin=lambda name: name in plugins)

    def getoption(self, name: str) -> Any:
        return self.options[name]


def specs(count: int) -> list[Any]:
    return [SimpleNamespace(env={}) for _ in range(count)]


@given(ID, ID, ID)
def test_tests_of_a_model_on_a_hardware_are_one_group(model: str, format_id: str, hardware: str) -> None:
    """Every test of every format of a model on one hardware has the same scope: pairs find their peers measured."""
    cell = f"{model}/{format_id}/{hardware}"
    ids = [
        f"tests/determinism/test_repeat.py::test_repeat[{cell}-decode]",
        f"tests/determinism/test_repeat.py::test_repeat[{cell}-prefill]",
        f"tests/determinism/test_kernel.py::test_kernel[{cell}]",
        f"tests/determinism/test_distinct.py::test_distinct[{model}/another/{hardware}]",
    ]

    scopes = {workers.scope_of(name) for name in ids if not hardware.endswith(("-decode", "-prefill"))}

    assert scopes <= {f"{model}/{hardware}"}


def test_claims_are_a_group_of_the_hardware_that_verifies() -> None:
    """It starts its engines itself; beside the cells of the same model, which take as long."""
    names = [f"test_reexecution.py::test_reexecution[m/{f}/sm90@v0.26.0-by-cpu-amx]" for f in ("f", "g")]

    assert ["m/cpu-amx/claims"] * 2 == [workers.scope_of(name) for name in names]


def test_other_models_and_hardware_are_other_groups() -> None:
    """Groups may run at the same time."""
    names = ["test_kernel.py::test_kernel[a/f/x]", "test_kernel.py::test_kernel[b/f/x]", "test_kernel.py::test_kernel[a/f/y]"]

    assert ["a/x", "b/x", "a/y"] == [workers.scope_of(name) for name in names]


@pytest.mark.parametrize("name", ["test_x", "test_x[1/2]", "test_x[p]", "T::test"])
def test_a_self_test_is_a_group_of_its_own(name: str) -> None:
    """It has no cell, so it can run anywhere."""
    assert f"tests/a.py::{name}" == workers.scope_of(f"tests/a.py::{name}")


def test_each_worker_has_its_own_gpu() -> None:
    """By UUID, in the order that the caller left visible; indices mean the same in every worker."""
    found = specs(3)

    workers.pin(Config(GPUS), found)  # type: ignore[arg-type]

    assert ["GPU-a", "GPU-b", "GPU-c"] == [spec.env["CUDA_VISIBLE_DEVICES"] for spec in found]
    assert {"PCI_BUS_ID"} == {spec.env["CUDA_DEVICE_ORDER"] for spec in found}


def test_fewer_workers_than_gpus() -> None:
    """The first GPUs are used."""
    found = specs(1)

    workers.pin(Config(GPUS), found)  # type: ignore[arg-type]

    assert "GPU-a" == found[0].env["CUDA_VISIBLE_DEVICES"]


def test_more_workers_than_gpus_are_refused() -> None:
    """Two engines on one GPU would disturb each other: a usage error."""
    with pytest.raises(pytest.UsageError, match="-n 4: one worker per GPU, and 3 are visible"):
        workers.pin(Config(GPUS), specs(4))  # type: ignore[arg-type]


def test_gpus_of_two_kinds_are_refused_or_chosen_from() -> None:
    """A worker with the wrong GPU would skip the cells it gets; with --hardware only GPUs of that row are used."""
    gpus = (Gpu("A100", "GPU-x", "8.0", 40.0), *GPUS)
    with pytest.raises(pytest.UsageError, match=r"-n 2: GPUs of several kinds are visible \(8.0, 9.0\)"):
        workers.pin(Config(gpus), specs(2))  # type: ignore[arg-type]
    found = specs(2)

    workers.pin(Config(gpus, hardware="sm90"), found)  # type: ignore[arg-type]

    assert ["GPU-a", "GPU-b"] == [spec.env["CUDA_VISIBLE_DEVICES"] for spec in found]
    assert 3 == workers.count(Config(gpus, hardware="sm90"))  # type: ignore[arg-type]


def test_an_old_vllm_gets_an_index() -> None:
    """It takes what is in CUDA_VISIBLE_DEVICES for integers (vllm#41848)."""
    found = specs(1)

    workers.pin(Config((Gpu("H100", "GPU-a", "9.0", 80.0, index=2),), vllm="0.20.2"), found)  # type: ignore[arg-type]

    assert {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "2"} == found[0].env


def test_without_gpus_nothing_is_pinned() -> None:
    """On a CPU workers are not bound, and their number is xdist's business."""
    found = specs(4)

    workers.pin(Config(), found)  # type: ignore[arg-type]

    assert [{}, {}, {}, {}] == [spec.env for spec in found]
    assert workers.count(Config()) is None  # type: ignore[arg-type]


def test_auto_is_one_worker_per_gpu() -> None:
    """-n auto."""
    assert 3 == workers.count(Config(GPUS))  # type: ignore[arg-type]


@pytest.mark.parametrize("dist", ["each", "worksteal", "loadfile", "no"])
def test_another_distribution_is_left_alone(dist: str) -> None:
    """Who asks for another --dist gets it."""
    assert workers.scheduler(Config(dist=dist), None) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["rerunfailures", "flaky"])
def test_rerun_plugins_are_refused(name: str) -> None:
    """Each is named, with the option that disables it."""
    with pytest.raises(pytest.UsageError, match=f"-p no:{name}"):
        workers.refuse_reruns(Config(plugins=(name,)))  # type: ignore[arg-type]


def test_without_rerun_plugins_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual case."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    workers.refuse_reruns(Config())  # type: ignore[arg-type]
