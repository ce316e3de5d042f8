"""Which observations may be compared: the same requests, the same evidence, the same environment."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet.matrix.cell import OTHER_ENGINES, PHASES, Phase
from quantdet.metrics.bits import bits_equal
from quantdet.observations.header import Header
from quantdet.observations.observation import Observation, Output, PromptRecord

# Fields that say what happened in a run; the others say which run it was.
_OUTCOME = {
    "key", "created", "lifetime", "caches", "executed", "nonfinite", "divergences", "prompts", "claims", "timings", "refusal",
    "hidden_states", "tensors_sha256", "header_sha256",
}  # fmt: skip
# What follows from the checkpoint's hashes, or may be another for the same bytes: a hub's later commit may hold them unchanged.
_ORIGIN = {"checkpoint_source", "numbers"}
# Facts of the environment that differ between formats measured side by side, and change no number.
_PER_FORMAT = ("start", "masked", "onednn_fp8", "suite", "engine_packages")
_OF_VLLM = ("vllm", "vllm_flavour")
# Which device of one kind it was: formats may be compared across two of them, and the verdict says that they were two.
_UNIT = ("gpu_uuid", "device_uuid")
_UNIT_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# What CPU kernels divide their work by; a GPU's do not.
_OF_THE_HOST = ("cpus", "torch_threads")
# They are read by ranks that exchange sums: part of a format of several, nothing to a format of one.
_OF_RANKS = re.compile(r"^((TORCH_)?NCCL_|RCCL_|NVSHMEM_|TORCH_SYMM_MEM_|VLLM_(ALLREDUCE_|USE_NCCL_|DISABLE_PYNCCL))")


def different(a: Header, b: Header) -> list[str]:
    """Names of the fields in which two lifetimes are not of the same run."""
    left_out = {*_OUTCOME, *_ORIGIN, "environment", *(("repeats",) if a.max_flip_rate and b.max_flip_rate else ())}
    one, other = ({**h.model_dump(exclude=left_out), "environment": _lifetime_environment(h)} for h in (a, b))
    return [name for name in one if one[name] != other[name]]


def _lifetime_environment(header: Header) -> dict[str, Any]:
    # A lifetime with cold caches is spawned, and a spawned process hides nothing from vLLM.
    return {name: fact for name, fact in header.environment.items() if name not in ("start", "masked")}


def environment_differences(a: Header, b: Header) -> list[str]:
    """What two observations' environments differ in, but for what goes with a format or a unit and changes no number."""
    # What vLLM is installed says nothing of what another engine computes.
    left_out = {*_PER_FORMAT, *_UNIT, "variables", *(_OF_VLLM if OTHER_ENGINES & {a.engine, b.engine} else ())}
    if all("device_uuid" in one.environment for one in (a, b)):
        left_out |= {*_OF_THE_HOST}
    names = sorted({*a.environment, *b.environment} - left_out)
    found = [name for name in names if a.environment.get(name) != b.environment.get(name)]
    variables = _variables(a, b)
    if variables:
        found.append(f"variables ({', '.join(variables)})")
    return found


def _variables(a: Header, b: Header) -> list[str]:
    """Names of the environment variables that differ, without those that show a device or that only ranks read."""
    one, other = (header.environment.get("variables", {}) for header in (a, b))
    alone = any(header.executed is not None and header.executed.tensor_parallel_size == 1 for header in (a, b))
    names = (name for name in {*one, *other} if name not in _UNIT_VARIABLES and not (alone and _OF_RANKS.match(name)))
    return sorted(name for name in names if one.get(name) != other.get(name))


Rows = NDArray[np.intp]


def comparable(a: Observation, b: Observation) -> str | None:
    """Why two observations are not of the same forced ids in the same environment; None if they are."""
    why = comparable_requests(a, b)
    if why is None and (names := environment_differences(a.header, b.header)):
        why = f"environments differ in {', '.join(names)}"
    return why


def comparable_requests(a: Observation, b: Observation) -> str | None:
    """Why two observations are not of the same forced ids and run lengths; None if they are."""
    if a.header.workload_sha256 != b.header.workload_sha256 or len(a.prompts) != len(b.prompts):
        return "workloads differ"
    for one, other in zip(a.prompts, b.prompts, strict=True):
        if not bits_equal(one.prompt_ids, other.prompt_ids):
            return f"token ids of prompt {one.header.id} differ"
    if a.header.top_k != b.header.top_k or a.header.decode_tokens != b.header.decode_tokens:
        return "run lengths differ"
    return same_evidence(a, b)


def same_evidence(a: Observation, b: Observation) -> str | None:
    """Why two observations are not of one kind of evidence, or have no row in common; None if they are."""
    if a.header.evidence != b.header.evidence:
        return "one has full-vocabulary logits, the other reported logprobs only"
    if a.reported and phase_in_common(a, b) is None:
        return "no row was reported of both"
    return None


def phase_in_common(a: Observation, b: Observation) -> Phase | None:
    """The phase that two formats are compared in: prefill, since its tokens are the same; else decode."""
    for phase in reversed(PHASES):
        if all(rows_in_common(x, y, x.run(0), y.run(0), phase)[0].size for x, y in zip(a.prompts, b.prompts, strict=True)):
            return phase
    return None


def rows_in_common(
    one: PromptRecord, other: PromptRecord, x: Output, y: Output, phase: Phase, last: int | None = None
) -> tuple[Rows, Rows]:
    """Indices of the rows that both sides have after the same tokens; `last`: none of a later position."""
    places, at_x, at_y = np.intersect1d(one.rows(phase), other.rows(phase), assume_unique=True, return_indices=True)
    if phase == "decode":
        shorter = min(len(x.output_ids), len(y.output_ids))
        parted = np.flatnonzero(x.output_ids[:shorter] != y.output_ids[:shorter])
        end = int(parted[0]) if parted.size else shorter
        last = end if last is None else min(last, end)
    if last is not None:
        at_x, at_y = at_x[places <= last], at_y[places <= last]
    return at_x, at_y
