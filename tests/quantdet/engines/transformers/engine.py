"""Hugging Face transformers, driven in this process. The only module that imports transformers; runs in a child process only.

A forward pass over the whole prompt gives the logits of all of its positions; greedy decoding goes on from its KV cache, a
token a step. No flag for determinism is set, and no precision: what is measured is what `from_pretrained` gives people.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet.engines.child import device, executed_transformers, faults, layers, lifetime, packages
from quantdet.engines.child.capture import digest_rows, to_numpy, turn_over
from quantdet.engines.child.lifetime import Answer
from quantdet.engines.child.packages import module_is_here
from quantdet.engines.child.requests import Limits
from quantdet.engines.plan import EngineLacks, InvalidMeasurement, NeedsSpawn, Plan
from quantdet.matrix.cell import PHASES, Phase
from quantdet.metrics.bits import stable_topk
from quantdet.observations import trace
from quantdet.observations.observation import Block

_NAMED = 3  # tensors that a message names


class TransformersEngine:
    """Loads one checkpoint once, executes a plan, writes one observation."""

    def measure(self, plan: Plan, directory: Path) -> None:
        """See `quantdet.engines.plan.Engine`."""
        began = time.monotonic()
        packages.hide(packages.broken() if "torchao" in plan.packages else packages.in_forkserver())
        lifetime.hide_instruction_sets(plan.hides)
        import torch
        from transformers import AutoModelForCausalLM

        if plan.device == "cuda" and not plan.spawn:
            try:
                torch.cuda.init()
            except RuntimeError as error:  # something that the server imported has touched the device
                raise NeedsSpawn(str(error)) from error
        device.check(plan)
        imported = time.monotonic()
        model = _load(AutoModelForCausalLM, plan)
        loaded = _Loaded(model, plan)
        read = time.monotonic()
        with torch.inference_mode():
            with _refusing():
                loaded.generate([1, 2], 2)  # what unpacks its weights, or looks for its kernel, does so in the first call
            ready = time.monotonic()
            if plan.identity.get("role") == trace.ROLE:
                lifetime.trace(loaded, plan, directory)
                return
            executed = executed_transformers.describe(model)
            faults.fire(plan.inject)
            done = lifetime.whole(loaded, plan)
        timings = {
            "import_s": imported - began,
            "load_s": read - imported,
            "prepare_s": ready - read,
            **({"compile_s": done.recorder.first_call_s} if plan.repeats > 1 else {}),
            "measure_s": done.ended - ready - done.recorder.first_call_s,
        }
        lifetime.save(plan, directory, executed, done, timings)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """See `lifetime.refusing`; a package, or a kernel from a hub, that is not here says nothing about the format.

    Raises:
        EngineLacks: that.
    """
    try:
        with lifetime.refusing(ImportError):
            yield
    except ImportError as error:
        raise EngineLacks(str(error)) from error


def _load(auto: Any, plan: Plan) -> Any:
    """The model on its device, in evaluation mode.

    Raises:
        EngineLacks: a package is missing.
        EngineRefused: transformers, or the package that it hands the format to, does not take it.
        InvalidMeasurement: it does, and leaves out or makes up tensors, which transformers only reports.
    """
    import torch

    arguments = {name: value for name, value in plan.args.items() if name != "torchao"}
    where = plan.device
    if where != "cpu" and module_is_here("accelerate"):
        arguments["device_map"] = {"": 0}  # weights are quantized, or unpacked, where they are used
    with _refusing():
        if "torchao" in plan.args:
            from transformers import TorchAoConfig

            arguments["quantization_config"] = TorchAoConfig.from_dict(
                {"quant_type": {"default": json.loads(plan.args["torchao"])}}
            )
        model, report = auto.from_pretrained(
            plan.checkpoint, dtype=getattr(torch, plan.dtype), local_files_only=True, output_loading_info=True, **arguments
        )
        if "device_map" not in arguments:
            model.to(where)
    wrong = {word: sorted(map(str, report.get(f"{word}_keys", ()))) for word in ("missing", "unexpected", "mismatched")}
    words = [f"{len(names)} {word} ({', '.join(names[:_NAMED])}, ...)" for word, names in wrong.items() if names]
    if words:
        raise InvalidMeasurement(f"transformers loaded other weights than the checkpoint's: tensors {'; '.join(words)}")
    return model.eval()


class _Loaded:
    """See `quantdet.engines.child.lifetime.Loaded`."""

    def __init__(self, model: Any, plan: Plan) -> None:
        self.model = model
        self._checkpoint = plan.checkpoint
        self._tokenizer: Any = None

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self._checkpoint, local_files_only=True)
        return self._tokenizer

    def limits(self) -> Limits:
        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", None)
        return Limits(None if vocabulary is None else int(vocabulary))

    def noise(self) -> layers.SeededNoise:
        return layers.SeededNoise(self.model)

    def answer(self, plan: Plan, ids: list[int], flips: Mapping[Phase, tuple[int, int]]) -> Answer:
        import torch

        began = time.monotonic()
        whole, cache = self._forward(ids, None)
        rows: dict[Phase, Any] = {"prefill": whole[:-1], "decode": whole[-1:].clone()}
        _flip("prefill", rows, flips)
        steps: list[Any] = []
        tokens: list[int] = []
        for step in range(plan.decode_tokens):
            if step:
                rows["decode"], cache = self._forward(tokens[-1:], cache)
            _flip("decode", rows, flips, step)
            steps.append(rows["decode"])
            tokens.append(int(rows["decode"][-1].argmax()))
        seconds = time.monotonic() - began
        rows["decode"] = torch.cat(steps)
        logits = {phase: to_numpy(rows[phase]) for phase in PHASES}
        chosen = {"decode": tokens, "prefill": ids[1:]}
        blocks = {phase: _block(rows[phase], logits[phase], chosen[phase], plan.top_k) for phase in PHASES}
        return Answer(np.asarray(tokens, dtype=np.int32), logits, blocks, seconds)

    def generate(self, ids: Sequence[int], n_tokens: int, /) -> None:
        cache = None
        for _ in range(n_tokens):
            logits, cache = self._forward(ids, cache, logits_to_keep=1)
            ids = [int(logits[-1].argmax())]

    def _forward(self, ids: Sequence[int], cache: Any, **more: Any) -> tuple[Any, Any]:
        """Logits of shape (positions, V) on their native dtype, and the KV cache with these ids added."""
        import torch

        given = torch.tensor([list(ids)], device=self.model.device)
        output = self.model(input_ids=given, past_key_values=cache, use_cache=True, **more)
        return output.logits[0], output.past_key_values


def _flip(phase: Phase, rows: Mapping[Phase, Any], flips: Mapping[Phase, tuple[int, int]], first: int = 0) -> None:
    """Turn over a bit in `rows`, of which the first is number `first` of its phase."""
    if phase in flips:
        position, token = flips[phase]
        if 0 <= position - first < len(rows[phase]):
            turn_over(rows[phase], position - first, token)


def _block(rows: Any, logits: NDArray[Any], chosen: list[int], k: int) -> Block:
    """Float32 log-softmax of `rows`, as transformers' users take it, beside the digests of the logits."""
    import torch

    logprobs = torch.log_softmax(rows.float(), dim=-1)
    least = torch.topk(logprobs, k, dim=-1).values[:, -1:].cpu().numpy()
    values = logprobs.cpu().numpy()
    # Of equal logprobs at the end, those of the smallest ids: topk does not say which it takes.
    kept = [np.flatnonzero(row >= bound).astype(np.int32) for row, bound in zip(values, least, strict=True)]
    ranked = [stable_topk(ids[None], row[ids][None]) for ids, row in zip(kept, values, strict=True)]
    best, scores = (np.concatenate([pair[part][:, :k] for pair in ranked]) for part in (0, 1))
    return Block(digest_rows(logits), values[np.arange(len(chosen)), chosen], best, scores)
