"""The repro script of a bug bundle: one request, as the engine got it, in a file that needs no suite."""

import hashlib
import pprint
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantdet.engines.child.packages import NOT_IN_FORKSERVER
from quantdet.engines.plan import Plan
from quantdet.matrix.cell import PHASES
from quantdet.observations.observation import Observation

_TEMPLATE = Path(__file__).resolve().parents[1] / "templates" / "repro.py.txt"
# They choose a device of one machine, or name what is on its disk.
_MACHINE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LD_PRELOAD")
# A recording is another's word, and the script is run by strangers: only variables of numerics, and none that names a file.
_NUMERICS = re.compile(
    r"(?:VLLM|TORCH|PYTORCH|TORCHINDUCTOR|OMP|KMP|MKL|CUDA|CUBLAS|CUDNN|NVIDIA|ONEDNN|DNNL|ATEN|TRITON|FLASHINFER|NCCL|HIP|ROCM)_[A-Z0-9_]+"
)
_NAMES_A_FILE = re.compile(r"PATH|DIR|ROOT|HOME|FILE|PLUGIN|LIB|PRELOAD|CMD|COMMAND|EXEC|URL|HOST")
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


def script(
    request: Request, *, title: str, note: str, model: str | None, hides: Sequence[str], made: bool, known: Collection[str]
) -> str:
    """The script. `made`: its weights are random numbers, so that no digest can be one that was seen.

    `known`: the engine arguments that the matrix gives; any other one of a recording is left out, and the script says so.
    """
    args = {name: value for name, value in request.args.items() if name in known}
    env = {name: value for name, value in request.env.items() if of_numerics(name)}
    if made:
        args["skip_tokenizer_init"] = True
    environment = request.environment
    hidden = [name for name in str(environment.get("masked", "")).split(",") if name and name not in NOT_IN_FORKSERVER]
    variables = environment.get("variables", {})
    also = {k: v for k, v in variables.items() if k not in request.env and of_numerics(k)}
    left_out = sorted({*request.args, *request.env} - {*args, *env, *_MACHINE})
    note += f" Left out, since the suite's matrix has none such: {', '.join(left_out)}." if left_out else ""
    values: dict[str, Any] = {
        "MODEL": model, "DTYPE": request.dtype, "ARGS": args, "ALSO_SET": also,
        "ENV": env,
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
    made_of = {name: pprint.pformat(value, width=124, compact=True, sort_dicts=False) for name, value in values.items()}
    made_of |= {name: " ".join(value.replace("\\", "/").replace('"', "'").split()) for name, value in words.items()}
    # At once: what is put in may hold a placeholder itself.
    return re.sub(r"@@([A-Z0-9_]+)@@", lambda found: made_of[found[1]], text)


def of_numerics(name: str) -> bool:
    """Whether an environment variable may go into a script: it may change numbers, and names no file and no device."""
    fine = _NUMERICS.fullmatch(name) is not None and _NAMES_A_FILE.search(name) is None
    return fine and name not in _MACHINE and "VISIBLE_DEVICES" not in name


def device(environment: Mapping[str, Any]) -> str:
    """The device that was measured, in words."""
    gpu = environment.get("device") or environment.get("gpu")
    return str(gpu or environment.get("cpu") or "?")
