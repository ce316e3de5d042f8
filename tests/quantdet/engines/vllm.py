"""vLLM, driven in this process. The only module that imports vllm; runs in a child process only."""

import contextlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet import diagnosis, kernels
from quantdet.compare import stable_topk
from quantdet.engines import (
    FLIPS,
    EngineRefused,
    NeedsSpawn,
    Plan,
    PlannedPrompt,
    activations,
    device,
    faults,
    layers,
    masks,
    speed,
)  # fmt: skip
from quantdet.engines.capture import LogitsTap, digest_rows
from quantdet.engines.recorder import Recorder
from quantdet.engines.stopwatch import Stopwatch
from quantdet.observation import Block, write
from quantdet.observation_header import SCHEMA, Executed, Header
from quantdet.schema import Phase

# Start-up failures that say nothing about the format.
_NOT_A_REFUSAL = re.compile(
    r"failed to be inspected|out of memory|can't allocate|No available memory|less than desired|No space left"
    r"|Address already in use|ninja|nvcc|unexpected keyword argument",
    re.IGNORECASE,
)


class VllmEngine:
    """Loads one checkpoint once, executes a plan, writes one observation."""

    def measure(self, plan: Plan, directory: Path) -> None:
        """See `quantdet.engines.Engine`."""
        began = time.monotonic()
        preloaded = sys.modules.get("quantdet.engines.preload_vllm")
        if not plan.extra.get("spawn") and not getattr(preloaded, "FORK_SAFE", True):
            raise NeedsSpawn("CUDA was initialised in the forkserver")
        masks.hide(masks.broken() if plan.extra.get("spawn") else masks.in_forkserver())
        if plan.extra.get("hide"):
            _hide_instruction_sets(plan.extra["hide"])
        import vllm

        if plan.args.get("enforce_eager"):
            # Eager cells: leave Inductor out of vLLM's helpers too (ranks of logprobs), 3 s a process and no logits.
            import torch._dynamo

            torch._dynamo.config.disable = True
        if plan.extra.get("onednn_fp8") is False:
            _fp8_outside_onednn()
        stopwatch = _watched()
        imported = time.monotonic()
        try:
            llm = self._load(vllm, plan)
        finally:  # not before: vLLM is the first to touch the device; not after a refusal: that says nothing of another one
            device.check(plan)
        loaded = time.monotonic()
        if plan.identity.get("role") == diagnosis.ROLE:
            self._trace(vllm, llm, plan, directory)
            return
        executed = self._executed(llm)
        faults.fire(plan.inject)
        tap = LogitsTap(_model(llm))
        hidden = activations.Recorded(tap, _model(llm), plan)
        recorder = self._run(vllm, llm, tap, plan)
        measured = time.monotonic()
        hidden.repeat(lambda again: self._run(vllm, llm, tap, again))
        repeated = time.monotonic()
        claims = self._run(vllm, llm, tap, plan.claiming)
        claimed = time.monotonic()
        found = hidden.result(len(recorder.records))
        longest = max((self._ids(llm, prompt)[0] for prompt in plan.prompts), key=len)
        pace = speed.timings(plan, lambda ids, n_tokens: _generate(vllm, llm, ids, n_tokens), longest)
        header = Header.model_validate(
            {
                **plan.identity,
                "schema": SCHEMA,
                "kind": "observation",
                "environment": {**plan.identity.get("environment", {}), **environment(plan)},
                "executed": executed.model_copy(update={"logits_dtype": recorder.logits_dtype}).model_dump(),
                "nonfinite": [row.model_dump() for row in (*recorder.nonfinite, *claims.nonfinite)],
                "divergences": [row.model_dump() for row in recorder.divergences],
                "prompts": [record.header.model_dump() for record in recorder.records],
                "claims": [record.header.model_dump() for record in claims.records],
                "repeats": recorder.repeats,
                "timings": {
                    "import_s": imported - began,
                    "start_s": loaded - imported - stopwatch.seconds.total(),
                    "load_s": stopwatch.seconds["load"],
                    "prepare_s": stopwatch.seconds["prepare"],
                    "compile_s": stopwatch.seconds["compile"] + recorder.first_call_s,
                    "measure_s": measured - loaded - recorder.first_call_s,
                    **({"claims_s": claimed - repeated} if plan.claims else {}),
                    "generate_s": recorder.generate_s,
                    "tokens_per_second": recorder.tokens / max(recorder.generate_s - recorder.first_call_s, 1e-9),
                    **pace,
                },
            }
        )
        write(directory, header, tuple(recorder.records), tuple(claims.records), found)

    def _run(self, vllm: Any, llm: Any, tap: LogitsTap, plan: Plan) -> Recorder:
        """Every prompt of the plan, each repeat of one before the next."""
        recorder = Recorder(plan)
        noise = layers.Noise(_model(llm)) if plan.inject == "noise" else None
        for prompt in plan.prompts:
            given, forced_from = self._ids(llm, prompt)
            recorder.begin(prompt, given, forced_from)
            for repeat in range(plan.repeats):
                if recorder.enough(repeat):
                    break
                last = prompt is plan.prompts[0] and repeat == plan.repeats - 1
                if noise is not None:
                    noise.arm(last)
                self._request(vllm, llm, tap, recorder, plan, given, FLIPS.get(plan.inject, {}) if last else {})
            recorder.end()
        return recorder

    def _trace(self, vllm: Any, llm: Any, plan: Plan, directory: Path) -> None:
        """One prompt with hooks on every layer; the numbers are those of `_run`, the time is not."""
        noise = layers.Noise(_model(llm)) if plan.inject == "noise" else None  # before the hooks that have to see it
        tap = layers.LayerTap(_model(llm))
        (prompt,) = plan.prompts
        given, _ = self._ids(llm, prompt)
        for repeat in range(plan.repeats):
            if noise is not None:
                noise.arm(repeat == plan.repeats - 1)
            tap.start()
            _answer(vllm, llm, plan, given)
            tap.stop()
        diagnosis.write(tap.trace(prompt.id), directory / diagnosis.TRACE_FILE)

    @staticmethod
    def _load(vllm: Any, plan: Plan) -> Any:
        try:
            return vllm.LLM(model=plan.checkpoint, dtype=plan.dtype, **plan.args)
        except (ImportError, OSError, MemoryError):
            raise
        except Exception as error:
            if _NOT_A_REFUSAL.search(str(error)) or "OutOfMemory" in type(error).__name__:
                raise
            import traceback

            traceback.print_exc()
            raise EngineRefused(_first_reason(error)) from error

    @staticmethod
    def _ids(llm: Any, prompt: PlannedPrompt) -> tuple[list[int], int]:
        """Forced ids of the request, and where its continuation begins."""
        if prompt.text is None:
            return [*prompt.token_ids, *prompt.forced_ids], len(prompt.token_ids)
        tokenizer = llm.get_tokenizer()
        ids = tokenizer.encode(prompt.text)
        return [*ids, *tokenizer.encode(prompt.forced_text or "", add_special_tokens=False)], len(ids)

    @staticmethod
    def _request(
        vllm: Any,
        llm: Any,
        tap: LogitsTap,
        recorder: Recorder,
        plan: Plan,
        ids: list[int],
        flips: Mapping[Phase, tuple[int, int]],
    ) -> None:
        tap.start(flips)
        began = time.monotonic()
        answer = _answer(vllm, llm, plan, ids)
        recorder.seconds(time.monotonic() - began)
        decode, prefill = tap.assemble(len(ids), plan.decode_tokens)
        output = answer.outputs[0]
        recorder.add(
            np.asarray(output.token_ids, dtype=np.int32),
            decode,
            prefill,
            _block(decode, output.logprobs, output.token_ids, plan.top_k),
            _block(prefill, answer.prompt_logprobs[1:], ids[1:], plan.top_k),
        )

    @staticmethod
    def _executed(llm: Any) -> Executed:
        executed = kernels.describe(_model(llm))
        config = llm.llm_engine.vllm_config
        eager = bool(config.model_config.enforce_eager)
        runner = {True: "V2", False: "V1"}.get(bool(getattr(config, "use_v2_model_runner", False)), "")
        return executed.model_copy(update={"mode": "eager" if eager else "compiled", "runner": runner})


def _answer(vllm: Any, llm: Any, plan: Plan, ids: list[int]) -> Any:
    parameters = vllm.SamplingParams(
        temperature=0.0, max_tokens=plan.decode_tokens, ignore_eos=True, detokenize=False,
        logprobs=plan.top_k, prompt_logprobs=plan.top_k,
    )  # fmt: skip
    (answer,) = llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
    return answer


def _generate(vllm: Any, llm: Any, ids: Sequence[int], n_tokens: int) -> None:
    """A call that only its time is taken of: no logprobs, and the tap does not record."""
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=n_tokens, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": list(ids)}], parameters, use_tqdm=False)


def _watched() -> Stopwatch:
    """The parts of vLLM's start-up: weights read, weights repacked, and the profile and warm-up runs, which compile."""
    stopwatch = Stopwatch()
    with contextlib.suppress(ImportError):  # a vLLM that moved them: their time counts as "start"
        from vllm.model_executor.model_loader import base_loader

        stopwatch.watch("load", base_loader.BaseModelLoader, "load_model")
        stopwatch.watch("prepare", base_loader, "process_weights_after_loading")
    with contextlib.suppress(ImportError):
        from vllm.v1.engine.core import EngineCore

        stopwatch.watch("compile", EngineCore, "_initialize_kv_caches")
    return stopwatch


def _hide_instruction_sets(names: list[str]) -> None:
    """Let torch deny instruction sets, before vLLM asks it which of its own libraries and kernels to take."""
    import torch.cpu

    for name in names:
        setattr(torch.cpu, f"_is_{name}_supported", lambda: False)


def _fp8_outside_onednn() -> None:
    """Let torch multiply FP8 on the CPU with its own code, as it does by itself on processors without AMX.

    Only around this one call: vLLM's attention needs oneDNN.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # otherwise oneDNN's first matmul asks Linux for the tiles; vLLM's attention uses them too
    scaled_mm = torch._scaled_mm

    def outside(*args: Any, **kwargs: Any) -> Any:
        with torch.backends.mkldnn.flags(enabled=False):
            return scaled_mm(*args, **kwargs)

    torch._scaled_mm = outside


def _model(llm: Any) -> Any:
    (model,) = llm.apply_model(lambda model: model)
    return model


def _block(logits: NDArray[Any], logprobs: Any, chosen: Any, k: int) -> Block:
    """What vLLM answered at each position, beside the digests of what it computed."""
    ids = np.empty((len(logits), k), dtype=np.int32)
    values = np.empty((len(logits), k), dtype=np.float32)
    picked = np.empty(len(logits), dtype=np.float32)
    for position, (row, token) in enumerate(zip(logprobs, chosen, strict=True)):
        best = sorted(((-entry.logprob, token_id) for token_id, entry in row.items()))[:k]
        ids[position] = [token_id for _, token_id in best]
        values[position] = [-negative for negative, _ in best]
        picked[position] = row[int(token)].logprob
    ids, values = stable_topk(ids, values)
    return Block(digest_rows(logits), picked, ids, values)


def _first_reason(error: BaseException) -> str:
    """The engine's own words: the root cause's message, without pydantic's frame."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip() and "pydantic.dev" not in line]
    if lines and lines[0].endswith("ModelConfig") and len(lines) > 1:
        lines = lines[1:]
    return f"{type(error).__name__}: {' '.join(lines)}"[:2000]


def environment(plan: Plan) -> dict[str, Any]:
    """What the child knows better than its parent: torch, threads, instruction set, device, variables."""
    import torch

    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "start": "spawn" if plan.extra.get("spawn") else "forkserver",
        "masked": ",".join(masks.hidden()),
    }
    for flag in ("amx_tile", "avx512_bf16", "avx512", "avx2"):
        with contextlib.suppress(Exception):
            facts[flag] = bool(getattr(torch.cpu, f"_is_{flag}_supported")())
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "cuda": torch.version.cuda,
            "device": properties.name,
            "device_uuid": str(getattr(properties, "uuid", "")),
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    for name in ("transformers", "compressed-tensors", "safetensors", "numpy", "flashinfer-python", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    return facts
