"""Which observations may be compared."""

from typing import Any

import pytest

from quantdet.judging.verdicts import Verdict
from quantdet.observations.comparable import comparable
from quantdet.observations.observation import Observation
from quantdet.session.machine.environment import RELEVANT
from selftest.fakes.engine import executed
from selftest.fakes.observation import observation
from selftest.judging.test_pairs import BF16, judge


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (observation("gptq", workload_sha256="3" * 64), "workloads differ"),
        (observation("gptq", lengths=(6,)), "workloads differ"),
        (observation("gptq", lengths=(6, 10)), "token ids of prompt p1 differ"),
        (observation("gptq", top_k=5), "run lengths differ"),
        (observation("gptq", decode_tokens=5), "run lengths differ"),
    ],
)
def test_what_cannot_be_compared_is_invalid(other: Observation, words: str) -> None:
    """Other prompts, ids or lengths: no distance is given, the verdict is INVALID and says why."""
    assert words == comparable(BF16, other)

    found = judge(BF16, other)

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert f"cannot be compared with gptq: {words}" in found.message


def test_the_same_workload_can_be_compared() -> None:
    """Repeats may differ in number."""
    assert comparable(BF16, observation("gptq", repeats=7)) is None


def test_formats_of_two_environments_are_not_compared() -> None:
    """Another torch or CPU makes other bits of the same format; another unit of one GPU, and what a format brings, do not."""
    here = observation("bf16", environment={"torch": "2.13", "gpu_uuid": "GPU-a", "start": "spawn"})

    assert comparable(here, observation("gptq", environment={"torch": "2.13", "gpu_uuid": "GPU-b", "start": "fork"})) is None
    other = observation("gptq", environment={"torch": "2.12", "gpu_uuid": "GPU-a", "cpus": 2})
    assert "environments differ in cpus, torch" == comparable(here, other)
    found = judge(here, other)
    assert (Verdict.INVALID, False) == (found.verdict, found.expected)


def here(ranks: int = 1, **environment: Any) -> Observation:
    """Something measured in this environment, by so many ranks."""
    ran = executed("UnquantizedLinearMethod").model_copy(update={"tensor_parallel_size": ranks})
    return observation("gptq", environment=environment, executed=ran.model_dump())


def test_the_host_decides_on_a_cpu_only() -> None:
    """Threads and CPUs divide a CPU's work, not a GPU's; of two observations both have to be a GPU's."""
    few, many = {"cpus": 2, "torch_threads": 2}, {"cpus": 64, "torch_threads": 64}
    gpu = {"device_uuid": "GPU-a"}

    assert comparable(here(**few, **gpu), here(**many, device_uuid="GPU-b")) is None
    assert comparable(here(**few), here(**many)) == "environments differ in cpus, torch_threads"
    assert comparable(here(**few, **gpu), here(**many)) == "environments differ in cpus, torch_threads"
    assert comparable(here(cpu="A", **gpu), here(cpu="B", **gpu)) == "environments differ in cpu"


def test_variables_that_differ_are_named() -> None:
    """Each by its name, set or not."""
    one = here(variables={"VLLM_USE_DEEP_GEMM": "0", "OMP_NUM_THREADS": "2"})
    other = here(variables={"VLLM_USE_DEEP_GEMM": "1"})

    assert comparable(one, other) == "environments differ in variables (OMP_NUM_THREADS, VLLM_USE_DEEP_GEMM)"
    assert comparable(here(), here(variables={})) is None


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_which_device_is_shown_is_no_difference(name: str) -> None:
    """Whichever of several like devices it was."""
    assert comparable(here(variables={name: "0"}), here(variables={name: "1"})) is None


@pytest.mark.parametrize(
    "name",
    [
        "NCCL_ALGO", "TORCH_NCCL_AVOID_RECORD_STREAMS", "RCCL_MSCCL_ENABLE", "NVSHMEM_DISABLE_NVLS",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST", "VLLM_ALLREDUCE_USE_SYMM_MEM", "VLLM_USE_NCCL_SYMM_MEM", "VLLM_DISABLE_PYNCCL",
    ],
)  # fmt: skip
def test_what_ranks_exchange_sums_by(name: str) -> None:
    """It is part of a format of several ranks, and nothing to one of a single rank; two such formats need it to be the same."""
    told, otherwise = {name: "0"}, {name: "1"}

    assert comparable(here(variables=told), here()) is None
    assert comparable(here(ranks=2, variables=told), here(variables=otherwise)) is None
    assert comparable(here(ranks=2, variables=told), here(ranks=2)) == f"environments differ in variables ({name})"
    assert comparable(here(ranks=2, variables=told), here(ranks=2, variables=otherwise)) is not None
    assert RELEVANT.match(name)  # or it would not be recorded


@pytest.mark.parametrize("name", ["VLLM_USE_DEEP_GEMM", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "VLLM_NCCL_SO_PATH", "XNCCL_ALGO"])
def test_other_variables_stay_strict(name: str) -> None:
    """For formats of one rank too."""
    assert comparable(here(variables={name: "0"}), here()) == f"environments differ in variables ({name})"


def test_unknown_ranks_are_strict() -> None:
    """Of what did not tell what it executed."""
    mute = [observation("gptq", executed=None, environment={"variables": {"NCCL_ALGO": value}}) for value in ("Ring", "Tree")]

    assert comparable(*mute) == "environments differ in variables (NCCL_ALGO)"
