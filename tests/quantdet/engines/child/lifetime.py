"""What every engine does once its model is loaded: the whole plan, in one order, and one observation of it."""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantdet.engines.child import hidden_states, layers, packages, requests, speed
from quantdet.engines.child.recorder import Recorder
from quantdet.engines.plan import EngineRefused, InvalidMeasurement, Plan
from quantdet.matrix.cell import Phase
from quantdet.observations import trace as traces
from quantdet.observations.header import SCHEMA, Executed, Header, Loading
from quantdet.observations.hidden_states import HiddenStates
from quantdet.observations.observation import Block, write
from quantdet.observations.seeded_flips import FLIPS

# Start-up failures that say nothing about the format.
_NOT_A_REFUSAL = re.compile(
    r"failed to be inspected|out of memory|can't allocate|No available memory|less than desired|No space left"
    r"|Address already in use|ninja|nvcc|unexpected keyword argument"
    r"|gloo|NCCL|Connection (?:closed|reset) by peer",
    re.IGNORECASE,
)

# What an engine says that was built without the code for a kernel on this device: an operator that no library registered, a
# dtype or a backend that a registered one does not take, a GPU that nothing was compiled for.
_NO_CODE = re.compile(
    r"'_OpNamespace' '\w+' object has no attribute|no kernel image is available|Could not run '\S+' with arguments from the"
    r"|module 'vllm\._(?:\w*C|custom_ops)\w*' has no attribute|No module named 'vllm\._\w*C|undefined symbol"
    r"|(?:No such operator|operator \S+ does not exist)|not implemented for '\w+'|not compiled (?:with|for)"
    r"|could not create a primitive|invalid device function|ptxas fatal|(?:only|not) supported (?:on|for|by)"
    r"|Unsupported (?:ISA|instruction set|compute capability|architecture)",
    re.IGNORECASE,
)
# What an engine raises without meaning to: a mistake in its own code, or in how it is called, and no word about the format.
_MISTAKES = (AttributeError, NameError, KeyError, IndexError)
# What pydantic puts around an engine's own words.
_FRAME = re.compile(r"\d+ validation errors? for \w+")
_INPUT = re.compile(r"\s*\[type=\w+, input_value=.*$")
_PACKAGES = (
    "transformers", "compressed-tensors", "safetensors", "numpy", "flashinfer-python", "humming-kernels", "triton",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """One request: generated ids int32 (decode_tokens,), and by phase the logits on their native dtype and what was reported.

    Decode has a row for each generated token, prefill one for each token of the prompt but the first.
    """

    output_ids: NDArray[np.int32]
    logits: Mapping[Phase, NDArray[Any]]
    blocks: Mapping[Phase, Block]
    seconds: float


class Loaded(Protocol):
    """A loaded model. `model`: the torch module, whose layers may be given hooks."""

    @property
    def model(self) -> Any: ...

    def tokenizer(self) -> Any:
        """Of the checkpoint; asked for where a prompt is text."""

    def limits(self) -> requests.Limits:
        """What a request may be."""

    def noise(self) -> "SeededNoise":
        """The seeded defect `noise`, not armed yet."""

    def answer(self, plan: Plan, ids: list[int], flips: Mapping[Phase, tuple[int, int]]) -> Answer:
        """One request with everything captured; `flips`: see `quantdet.observations.seeded_flips.FLIPS`."""

    def generate(self, ids: Sequence[int], n_tokens: int, /) -> None:
        """`n_tokens` greedy tokens after `ids`, nothing captured: see `quantdet.engines.child.speed.Generate`."""


class SeededNoise(Protocol):
    """A seeded defect in one layer: see `quantdet.engines.child.layers.SeededNoise`."""

    def arm(self, on: bool, /) -> None:
        """Whether the next request has the defect."""


@dataclass(frozen=True)
class Done:
    """The whole plan, executed. `ended`: when the repeats were over (monotonic seconds); `timings`: of what came after them."""

    recorder: Recorder
    claims: Recorder
    hidden: HiddenStates | None
    ended: float
    timings: Mapping[str, float]


def whole(loaded: Loaded, plan: Plan) -> Done:
    """The repeats, then what must not disturb them: hidden states, claims, and calls that only their time is taken of."""
    with needing_code():
        return _whole(loaded, plan)


def _whole(loaded: Loaded, plan: Plan) -> Done:
    given = requests.encoded(loaded, plan)
    hidden = hidden_states.Recorded(loaded.model, plan)
    recorder = execute(loaded, plan, hidden, given)
    ended = time.monotonic()
    hidden.repeat(lambda again: execute(loaded, again, hidden, given), recorder.generate_s)
    began = time.monotonic()
    claims = execute(loaded, plan.claiming, hidden, given)
    claimed = time.monotonic() - began
    found = hidden.result(len(recorder.records))
    longest = max((given[prompt].ids for prompt in plan.prompts), key=len)
    pace = speed.timings(plan, loaded.generate, longest)
    return Done(recorder, claims, found, ended, {**({"claims_s": claimed} if plan.claims else {}), **pace})


def execute(loaded: Loaded, plan: Plan, hidden: hidden_states.Recorded, requested: requests.Encoded) -> Recorder:
    """Every prompt of the plan, each repeat of one before the next."""
    recorder = Recorder(plan)
    noise = loaded.noise() if plan.inject == "noise" else None
    for prompt in plan.prompts:
        given = requested[prompt].ids
        recorder.begin(prompt, given, requested[prompt].forced_from)
        for repeat in range(plan.repeats):
            if recorder.enough(repeat):
                break
            last = prompt is plan.prompts[0] and repeat == plan.repeats - 1
            if noise is not None:
                noise.arm(last)
            hidden.start()
            answer = loaded.answer(plan, given, FLIPS.get(plan.inject, {}) if last else {})
            logits, blocks = answer.logits, answer.blocks
            hidden.finish(len(given), logits["decode"], logits["prefill"])
            recorder.seconds(answer.seconds)
            recorder.add(answer.output_ids, logits["decode"], logits["prefill"], blocks["decode"], blocks["prefill"])
        recorder.end()
    return recorder


def trace(loaded: Loaded, plan: Plan, directory: Path) -> None:
    """One prompt with hooks on every layer; the numbers are those of `execute`, the time is not."""
    noise = loaded.noise() if plan.inject == "noise" else None  # before the hooks that have to see it
    tap = layers.LayerTap(loaded.model)
    (prompt,) = plan.prompts
    given = requests.encoded(loaded, plan)[prompt].ids
    for repeat in range(plan.repeats):
        if noise is not None:
            noise.arm(repeat == plan.repeats - 1)
        tap.start()
        loaded.answer(plan, given, {})
        tap.stop()
    traces.write(tap.trace(prompt.id), directory / traces.TRACE_FILE)


def save(
    plan: Plan, directory: Path, executed: Executed, done: Done, timings: Mapping[str, float], loading: Loading | None = None
) -> None:
    """Write the observation; `timings`: of what came before, seconds by the names of `stopwatch.PARTS`.

    loading: what filled the model's parameters; None: not known.
    """
    recorder, claims = done.recorder, done.claims
    timed = recorder.generate_s - recorder.first_call_s
    header = Header.model_validate(
        {
            **plan.identity,
            "schema": SCHEMA,
            "kind": "observation",
            "environment": {**plan.identity.get("environment", {}), **environment(plan)},
            "executed": executed.model_copy(update={"logits_dtype": recorder.logits_dtype}).model_dump(),
            "loading": None if loading is None else loading.model_dump(),
            "nonfinite": [row.model_dump() for row in (*recorder.nonfinite, *claims.nonfinite)],
            "divergences": [row.model_dump() for row in recorder.divergences],
            "prompts": [record.header.model_dump() for record in recorder.records],
            "claims": [record.header.model_dump() for record in claims.records],
            "repeats": recorder.repeats,
            "timings": {
                **timings,
                "generate_s": recorder.generate_s,
                **({"tokens_per_second": recorder.tokens / timed} if timed > 0 else {}),
                **done.timings,
            },
        }
    )
    write(directory, header, tuple(recorder.records), tuple(claims.records), done.hidden)


@contextlib.contextmanager
def needing_code() -> Iterator[None]:
    """What is raised inside because the engine has no code for a kernel is its refusal of the cell, as it is at load.

    vLLM chooses a kernel by what its Python knows; whether the library that was loaded has it shows at the first call.

    Raises:
        EngineRefused: with the root cause's message; its traceback is in the log.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, NotImplementedError) and not _NO_CODE.search(_first_reason(error)):
            raise
        import traceback

        traceback.print_exc()
        raise EngineRefused(_first_reason(error)) from error


@contextlib.contextmanager
def refusing(*not_refusals: type[BaseException]) -> Iterator[None]:
    """What is raised inside is the engine's refusal of the cell, unless it says nothing about the format.

    Raises:
        EngineRefused: with the root cause's message; its traceback is in the log.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, MemoryError, EngineRefused, InvalidMeasurement, *not_refusals)):
            raise
        if isinstance(error, _MISTAKES) and not _NO_CODE.search(_first_reason(error)):
            raise
        if _NOT_A_REFUSAL.search(str(error)) or "OutOfMemory" in type(error).__name__:
            raise
        import traceback

        traceback.print_exc()
        raise EngineRefused(_first_reason(error)) from error


def hide_instruction_sets(names: Sequence[str]) -> None:
    """Let torch deny instruction sets, before an engine asks it which of its own libraries and kernels to take."""
    import torch.cpu

    for name in names:
        setattr(torch.cpu, f"_is_{name}_supported", lambda: False)


def environment(plan: Plan) -> dict[str, Any]:
    """What the child knows better than its parent: torch, threads, instruction set, device, versions."""
    import torch

    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "start": "spawn" if plan.spawn else "forkserver",
        "masked": ",".join(packages.hidden()),
    }
    for flag in ("amx_tile", "avx512_bf16", "avx512", "avx2"):
        with contextlib.suppress(Exception):
            facts[flag] = bool(getattr(torch.cpu, f"_is_{flag}_supported")())
    if torch.cuda.is_available() and plan.device != "cpu":  # vLLM for CPUs has a torch without CUDA
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "cuda": torch.version.cuda,
            "device": properties.name,
            "device_uuid": str(getattr(properties, "uuid", "")),
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    return facts


def _first_reason(error: BaseException) -> str:
    """The engine's own words: the root cause's message, without pydantic's frame."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip() and "pydantic.dev" not in line]
    if lines and _FRAME.fullmatch(lines[0]) and len(lines) > 1:
        lines = [_INPUT.sub("", line.removeprefix("Value error, ")) for line in lines[1:]]
    return f"{type(error).__name__}: {' '.join(lines)}"[:2000]
