"""The repro script of a bug bundle: one request, as the engine got it, in a file that needs no suite."""

import hashlib
import pprint
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantdet.engines import Plan
from quantdet.engines.masks import NOT_IN_FORKSERVER
from quantdet.observation import Observation
from quantdet.schema import PHASES

_TEMPLATE = Path(__file__).parent / "templates" / "repro.py.txt"
# They choose a device of one machine, or name what is on its disk.
_MACHINE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LD_PRELOAD")
_LEAST_REPEATS = 10


@dataclass(frozen=True)
class Request:
    """What was asked of the engine. `seen`: per phase, the digest of a prompt's logits and the repeats that gave them."""

    args: Mapping[str, Any]
    env: Mapping[str, str]
    environment: Mapping[str, Any]
    dtype: str
    prompt: str
    ids: tuple[int, ...]
    repeats: int
    decode_tokens: int
    top_k: int
    lifetimes: int = 1
    seen: Mapping[str, Mapping[str, str]] | None = None

    @classmethod
    def observed(cls, observations: Sequence[Observation], prompt: str, lifetimes: int) -> "Request":
        """The request of a prompt of observations of one cell."""
        header = observations[0].header
        number = [record.header.id for record in observations[0].prompts].index(prompt)
        return cls(
            args=header.engine_args, env=header.engine_env, environment=header.environment, dtype=header.dtype, prompt=prompt,
            ids=tuple(map(int, observations[0].prompts[number].prompt_ids)), repeats=header.repeats, lifetimes=lifetimes,
            decode_tokens=header.decode_tokens, top_k=header.top_k, seen=_seen(observations, number),
        )  # fmt: skip

    @classmethod
    def planned(cls, plan: Plan) -> "Request | None":
        """The first request of a plan that left no observation; None if only the engine knows its token ids."""
        first = plan.prompts[0]
        if first.text is not None:
            return None
        return cls(
            args=plan.args, env=plan.env, environment=plan.identity["environment"], dtype=plan.dtype, prompt=first.id,
            ids=(*first.token_ids, *first.forced_ids), repeats=plan.repeats, decode_tokens=plan.decode_tokens, top_k=plan.top_k,
        )  # fmt: skip


def digest(observation: Observation, number: int, output: int, phase: Any) -> str:
    """SHA-256 over the digests of a prompt's positions, as the script prints it."""
    return hashlib.sha256(observation.prompts[number].outputs[output].block(phase).digests.tobytes()).hexdigest()


def _seen(observations: Sequence[Observation], number: int) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, list[str]]] = {phase: {} for phase in PHASES}
    for observation in observations:
        lifetime = f" of lifetime {observation.header.lifetime}" if len(observations) > 1 else ""
        for repeat, output in enumerate(observation.prompts[number].header.runs):
            for phase in PHASES:
                found[phase].setdefault(digest(observation, number, output, phase), []).append(f"{repeat}{lifetime}")
    return {phase: {key: ", ".join(where) for key, where in rows.items()} for phase, rows in found.items()}


def script(request: Request, *, title: str, note: str, model: str | None, hides: Sequence[str], made: bool) -> str:
    """The script. `made`: its weights are random numbers, so that no digest can be one that was seen."""
    args = dict(request.args)
    if made:
        args["skip_tokenizer_init"] = True
    environment = request.environment
    hidden = [name for name in str(environment.get("masked", "")).split(",") if name and name not in NOT_IN_FORKSERVER]
    variables = environment.get("variables", {})
    also = {k: v for k, v in variables.items() if k not in _MACHINE and k not in request.env and not k.startswith("QUANTDET_")}
    values: dict[str, Any] = {
        "MODEL": model, "DTYPE": request.dtype, "ARGS": args, "ALSO_SET": also,
        "ENV": {name: value for name, value in request.env.items() if name not in _MACHINE},
        "HIDDEN": hidden, "DENIED": list(hides), "FP8_OUTSIDE_ONEDNN": environment.get("onednn_fp8") is False,
        "REPEATS": max(_LEAST_REPEATS, request.repeats), "LIFETIMES": request.lifetimes,
        "DECODE_TOKENS": request.decode_tokens, "TOP_K": request.top_k, "SEEN": {} if made else request.seen or {},
        "IDS": list(request.ids),
    }  # fmt: skip
    words = {
        "TITLE": title, "NOTE": note, "PROMPT": request.prompt, "LENGTH": str(len(request.ids)),
        "VLLM": str(environment.get("vllm") or "?"), "DEVICE": device(environment),
        "TORCH": str(environment.get("torch") or environment.get("torch_package") or "?"),
    }  # fmt: skip
    text = _TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@@{name}@@", pprint.pformat(value, width=124, compact=True, sort_dicts=False))
    for name, value in words.items():  # in a docstring and in comments
        text = text.replace(f"@@{name}@@", " ".join(value.replace("\\", "/").replace('"', "'").split()))
    return text


def device(environment: Mapping[str, Any]) -> str:
    """The device that was measured, in words."""
    gpu = environment.get("device") or environment.get("gpu")
    return str(gpu or environment.get("cpu") or "?")
