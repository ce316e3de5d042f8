"""vLLM, driven in this process. The only module that imports vllm; runs in a child process only."""

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet.engines.child import device, executed_vllm, faults, layers, lifetime, packages
from quantdet.engines.child.capture import LogitsTap, digest_rows
from quantdet.engines.child.lifetime import Answer
from quantdet.engines.child.requests import Limits
from quantdet.engines.child.stopwatch import Stopwatch
from quantdet.engines.child.stored import Stored
from quantdet.engines.plan import NeedsSpawn, Plan
from quantdet.engines.vllm import loading, ranks
from quantdet.matrix.cell import Phase
from quantdet.metrics.bits import stable_topk
from quantdet.observations import trace
from quantdet.observations.header import Executed, Loading
from quantdet.observations.observation import Block


class VllmEngine:
    """Loads one checkpoint once, executes a plan, writes one observation."""

    def measure(self, plan: Plan, directory: Path) -> None:
        """See `quantdet.engines.plan.Engine`."""
        began = time.monotonic()
        preloaded = sys.modules.get("quantdet.engines.vllm.preload")
        if not plan.spawn and not getattr(preloaded, "FORK_SAFE", True):
            raise NeedsSpawn("CUDA was initialised in the forkserver")
        packages.hide(packages.broken() if plan.spawn else packages.in_forkserver())
        if plan.hides:
            lifetime.hide_instruction_sets(plan.hides)
        import vllm

        if plan.args.get("enforce_eager"):
            # Eager cells: leave Inductor out of vLLM's helpers too (ranks of logprobs), 3 s a process and no logits.
            import torch._dynamo

            torch._dynamo.config.disable = True
        if plan.onednn_fp8 is False:
            _fp8_outside_onednn()
        size = _size(plan)
        others = ranks.OtherRanks(size, lambda connection: self._follow(vllm, plan, connection)) if size > 1 else None
        with contextlib.closing(others) if others is not None else contextlib.nullcontext():
            self._whole(vllm, plan, directory, began, others)

    def _whole(self, vllm: Any, plan: Plan, directory: Path, began: float, others: ranks.OtherRanks | None) -> None:
        stopwatch = _watched()
        imported = time.monotonic()
        try:
            engine = self._load(vllm, plan, others)
        except Exception as error:
            reason = error if others is None else others.explain(error)
            if reason is error:
                raise  # with its own cause, which the log is to have
            raise reason from error
        loaded = time.monotonic()
        executed = engine.executed()
        if others is not None:
            others.agree(executed)
        if plan.identity.get("role") == trace.ROLE:
            lifetime.trace(engine, plan, directory)
            return
        faults.fire(plan.inject, 0, _size(plan))
        engine.tap = LogitsTap(engine.model)
        done = lifetime.whole(engine, plan)
        if others is not None:
            others.stop()
        start = loaded - imported - stopwatch.seconds.total()
        if plan.repeats > 1:  # what first calls took longer than the later ones
            stopwatch.seconds["compile"] += done.recorder.first_call_s  # type: ignore[assignment]  # a Counter of floats
        timings = {
            "import_s": imported - began,
            "start_s": start,
            **{f"{part}_s": seconds for part, seconds in stopwatch.seconds.items()},
            "measure_s": done.ended - loaded - done.recorder.first_call_s,
        }
        lifetime.save(plan, directory, executed, done, timings, engine.loading)

    @staticmethod
    def _load(vllm: Any, plan: Plan, others: ranks.OtherRanks | None) -> "_Loaded":
        launcher = {}
        # Another rank than 0 says it once it has loaded: the others would wait for it, and not hear why.
        watch = loading.Watch(plan.checkpoint, plan.unfilled, at_once=_size(plan) == 1 or others is not None)
        if _size(plan) > 1:
            launcher = {"distributed_executor_backend": ranks.LAUNCHER}
            _meet_by_address()
        try:
            with lifetime.refusing(ImportError), watch.watching():
                llm = vllm.LLM(model=plan.checkpoint, dtype=plan.dtype, **plan.args, **launcher)
        finally:  # not before: vLLM is the first to touch the device; not after a refusal: that says nothing of another one
            device.check(plan)
        return _Loaded(vllm, llm, others, watch.layers, watch.found())

    def _follow(self, vllm: Any, plan: Plan, connection: Connection) -> None:
        """As another rank than 0: load, say what is executed, then generate what rank 0 asks for."""
        engine = self._load(vllm, plan, None)
        noise = engine.noise() if plan.inject == "noise" else None

        def generate(request: ranks.Request) -> Any:
            faults.fire(plan.inject, int(os.environ["RANK"]), _size(plan))  # not before: rank 0 waits for it by now
            if noise is not None:
                noise.arm(request.noisy)
            return engine.request(request.ids, request.tokens, **request.logprobs).outputs[0].token_ids

        ranks.follow(connection, engine.executed(), generate)


class _Loaded:
    """See `quantdet.engines.child.lifetime.Loaded`. `tap` is set once the model may be wrapped."""

    def __init__(
        self, vllm: Any, llm: Any, others: ranks.OtherRanks | None, layers: Mapping[int, Stored], found: Loading | None
    ) -> None:
        self.model = _model(llm)
        self.loading = found
        self.tap: LogitsTap | None = None
        self._vllm, self._llm, self._others, self._layers = vllm, llm, others, layers

    def executed(self) -> Executed:
        """What the model runs, read from its layers."""
        config = self._llm.llm_engine.vllm_config
        eager = bool(config.model_config.enforce_eager)
        runner = {True: "V2", False: "V1"}.get(bool(getattr(config, "use_v2_model_runner", False)), "")
        size = int(config.parallel_config.tensor_parallel_size)
        facts = {"mode": "eager" if eager else "compiled", "runner": runner, "tensor_parallel_size": size}
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        return executed_vllm.describe(self.model, self._layers, dtype).model_copy(update=facts)

    def limits(self) -> Limits:
        config = self._llm.llm_engine.vllm_config.model_config
        return Limits(int(config.get_vocab_size()), int(config.max_model_len))

    def tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    def noise(self) -> lifetime.SeededNoise:
        return layers.SeededNoise(self.model) if self._others is None else self._others

    def answer(self, plan: Plan, ids: list[int], flips: Mapping[Phase, tuple[int, int]]) -> Answer:
        if self.tap is not None:
            self.tap.start(flips)
        began = time.monotonic()
        answer = self.request(ids, plan.decode_tokens, logprobs=plan.top_k, prompt_logprobs=plan.top_k)
        seconds = time.monotonic() - began
        output = answer.outputs[0]
        tokens = np.asarray(output.token_ids, dtype=np.int32)
        if self.tap is None:
            return Answer(tokens, {}, {}, seconds)
        decode, prefill = self.tap.assemble(len(ids), plan.decode_tokens)
        blocks: dict[Phase, Block] = {
            "decode": _block(decode, output.logprobs, output.token_ids, plan.top_k),
            "prefill": _block(prefill, answer.prompt_logprobs[1:], ids[1:], plan.top_k),
        }
        return Answer(tokens, {"decode": decode, "prefill": prefill}, blocks, seconds)

    def generate(self, ids: Sequence[int], n_tokens: int, /) -> None:
        self.request(ids, n_tokens)

    def request(self, ids: Sequence[int], tokens: int, **logprobs: int) -> Any:
        """One request to vLLM, by all ranks."""
        if self._others is None:
            return self._generated(ids, tokens, logprobs)
        try:
            self._others.ask(ids, tokens, logprobs)
            answer = self._generated(ids, tokens, logprobs)
            self._others.answered(answer.outputs[0].token_ids)
        except BaseException as error:
            self._others.broke(error)
            raise
        return answer

    def _generated(self, ids: Sequence[int], tokens: int, logprobs: Mapping[str, int]) -> Any:
        parameters = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **logprobs
        )
        (answer,) = self._llm.generate([{"prompt_token_ids": list(ids)}], parameters, use_tqdm=False)
        return answer


def _size(plan: Plan) -> int:
    return int(plan.args.get("tensor_parallel_size", 1))


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


def _meet_by_address() -> None:
    """Ranks meet at the address that `ranks` chose, not at "env://", where it is the same.

    On a CPU vLLM names the memory that ranks share after this: two engines at once would take the same.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    ExecutorWithExternalLauncher._distributed_args = lambda _: ranks.meeting()


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
