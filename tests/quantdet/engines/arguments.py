"""Engine arguments that somebody asks for, `NAME=VALUE`: typed as vLLM's own annotations say, checked before anything starts.

An argument is obeyed or refused, never replaced. `REFUSED` has those that the suite cannot obey, each with its reason; what is
not there goes to the engine as it stands.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from quantdet.engines.signatures import ANYTHING, Type
from quantdet.untrusted import parse_json, plain

_NAME = re.compile(r"[a-z_][a-z0-9_]*", re.IGNORECASE)
_LONGEST = 40
_WORDS = {
    "boolean": "true or false", "integer": "an integer", "number": "a number", "text": "text", "list": "a JSON list",
    "object": "a JSON object",
}  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """An argument that the suite cannot obey.

    Attributes:
        reason: stands on its own.
        obeyed: values that change nothing of what is measured, or are what the suite does anyhow.
        only: where it is given, nothing but these values is refused.
        keys: where it is given, nothing but an object with one of these names, at any depth, is refused.
    """

    reason: str
    obeyed: tuple[Any, ...] = ()
    only: tuple[Any, ...] = ()
    keys: tuple[str, ...] = ()

    def concerns(self, value: Any) -> bool:
        """Whether `value` is refused."""
        if self.keys:
            return bool(set(self.keys) & set(_names_in(value)))
        return _among(value, self.only) if self.only else not _among(value, self.obeyed)


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(type(one) is type(value) and one == value for one in values)  # 1 is not true here


def _names_in(value: Any) -> list[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*(value if isinstance(value, dict) else ()), *(name for one in inner for name in _names_in(one))]


_NO_TOKENIZER = "prompts reach the engine as token ids, and it loads no tokenizer"
_ONE_BY_ONE = "the logits of each step are taken for one token at a time, and a draft gives several"
_RANKS = "the suite starts one process for each rank of tensor parallelism, and no other"
_WEIGHTS = "what is measured is the checkpoint's own weights, in its folder"
_REVISION = "give the revision with the model: --model REPO@REVISION"
_FOREIGN_CODE = "nothing runs code that is not vLLM's own"
_GREEDY = "requests are greedy, by sampling parameters of the suite, which do not read it"
_KV_FROM_ELSEWHERE = "keys and values would come from elsewhere: each repeat has to compute its own"
_POOLING = "tokens are generated: a pooled model has no logits to compare"

REFUSED: Mapping[str, Refusal] = {
    "model": Refusal("name it with --model"),
    "model_weights": Refusal(_WEIGHTS, obeyed=("",)),
    "revision": Refusal(_REVISION, obeyed=(None,)),
    "code_revision": Refusal(_REVISION, obeyed=(None,)),
    "tokenizer_revision": Refusal(_REVISION, obeyed=(None,)),
    "tokenizer": Refusal(_NO_TOKENIZER, obeyed=(None,)),
    "tokenizer_mode": Refusal(_NO_TOKENIZER, obeyed=("auto",)),
    "skip_tokenizer_init": Refusal(_NO_TOKENIZER),
    "chat_template": Refusal(_NO_TOKENIZER, obeyed=(None,)),
    "hf_config_path": Refusal("the checkpoint's own configuration says what it is", obeyed=(None,)),
    "hf_overrides": Refusal(
        "the checkpoint's own configuration says what it is and how it is quantized",
        keys=("quantization_config", "compression_config", "architectures", "model_type", "auto_map"),
    ),
    "model_class_overrides": Refusal(_FOREIGN_CODE, obeyed=({},)),
    "trust_remote_code": Refusal("nothing runs the code of a checkpoint", obeyed=(False,)),
    "worker_cls": Refusal(_FOREIGN_CODE, obeyed=("auto",)),
    "worker_extension_cls": Refusal(_FOREIGN_CODE, obeyed=("",)),
    "scheduler_cls": Refusal(_FOREIGN_CODE, obeyed=(None,)),
    "logits_processors": Refusal("tokens would follow from other logits than those that are compared", obeyed=(None, [])),
    "io_processor_plugin": Refusal(_FOREIGN_CODE, obeyed=(None,)),
    "hf_token": Refusal("it would stand in every record, and engines download nothing", obeyed=(None,)),
    "load_format": Refusal("dummy weights are random numbers, not the checkpoint's", only=("dummy",)),
    "weight_transfer_config": Refusal(_WEIGHTS, obeyed=(None,)),
    "runner": Refusal(_POOLING, obeyed=("auto", "generate")),
    "convert": Refusal(_POOLING, obeyed=("auto", "none")),
    "pooler_config": Refusal(_POOLING, obeyed=(None,)),
    "logprobs_mode": Refusal("raw log-probabilities are compared at each position", obeyed=("raw_logprobs",)),
    "enable_prefix_caching": Refusal(
        "repeats would never read it: vLLM does not read the prefix cache for requests with prompt logprobs",
        obeyed=(False, None),
    ),
    "kv_sharing_fast_prefill": Refusal("vLLM's prompt logprobs are wrong with it", obeyed=(False,)),
    "kv_transfer_config": Refusal(_KV_FROM_ELSEWHERE, obeyed=(None,)),
    "ec_transfer_config": Refusal(_KV_FROM_ELSEWHERE, obeyed=(None,)),
    "kv_offloading_size": Refusal(
        "repeats would never read it: vLLM reads no stored keys and values for requests with prompt logprobs", obeyed=(None,)
    ),
    "async_scheduling": Refusal(
        "steps would be scheduled ahead of the one whose logits are taken, which was never measured", obeyed=(False, None)
    ),
    "speculative_config": Refusal(_ONE_BY_ONE, obeyed=(None,)),
    "spec_method": Refusal(_ONE_BY_ONE, obeyed=(None,)),
    "spec_model": Refusal(_ONE_BY_ONE, obeyed=(None,)),
    "spec_tokens": Refusal(_ONE_BY_ONE, obeyed=(None,)),
    "diffusion_config": Refusal(_ONE_BY_ONE, obeyed=(None,)),
    "watermark_config": Refusal("tokens would be drawn by a watermark's key", obeyed=(None,)),
    "generation_config": Refusal(_GREEDY, obeyed=("auto", "vllm")),
    "override_generation_config": Refusal(_GREEDY, obeyed=({},)),
    "distributed_executor_backend": Refusal(_RANKS, obeyed=(None,)),
    "pipeline_parallel_size": Refusal(_RANKS, obeyed=(1,)),
    "data_parallel_size": Refusal(_RANKS, obeyed=(1,)),
    "data_parallel_rank": Refusal(_RANKS, obeyed=(None,)),
    "data_parallel_size_local": Refusal(_RANKS, obeyed=(None,)),
    "prefill_context_parallel_size": Refusal(_RANKS, obeyed=(1,)),
    "decode_context_parallel_size": Refusal(_RANKS, obeyed=(1,)),
    "nnodes": Refusal(_RANKS, obeyed=(1,)),
    "enable_expert_parallel": Refusal("rank 0, whose layers are read, would have only some of the experts", obeyed=(False,)),
    "enable_eplb": Refusal("experts would move between ranks while they are measured", obeyed=(False,)),
    "device_ids": Refusal("the device follows from the hardware row", obeyed=(None,)),
}


def parse(text: str, known: Mapping[str, Type] | None) -> tuple[str, Any]:
    """Name and value of `NAME=VALUE`: a text argument stays text, others are JSON; dashes in the name are underscores.

    A value that is not of the argument's type is what it is as JSON, or text; `mistakes` then tells of it. So is every value
    where `known` is None, and that of a name that is not in it.

    Raises:
        ValueError: not of this form; need and have.
    """
    name, equals, value = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if not equals or not _NAME.fullmatch(name):
        raise ValueError(f"needs NAME=VALUE, have {_short(text)}")
    return name, _typed(value.strip(), ANYTHING if known is None else known.get(name, ANYTHING))


def _typed(text: str, wanted: Type) -> Any:
    if text in ("null", "None") and ("null" in wanted.kinds or wanted.anything):
        return None
    if text in wanted.choices or text.upper() in wanted.names:
        return text
    if text in ("true", "True", "false", "False") and ("boolean" in wanted.kinds or wanted.anything):
        return text in ("true", "True")
    value = _json(text)
    taken = not isinstance(value, str) and _fits(value, wanted)
    return text if "text" in wanted.kinds and not taken else value


def _json(text: str) -> Any:
    """What `text` is as JSON; itself where it is none, or has a number that JSON has not."""
    try:
        value = parse_json(text.encode())
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value


def _fits(value: Any, wanted: Type) -> bool:
    if wanted.anything or _among(value, wanted.choices):
        return True
    if isinstance(value, str) and ("text" in wanted.kinds or value.upper() in wanted.names):
        return True
    if isinstance(value, list) and wanted.items is not None:
        return "list" in wanted.kinds and all(_fits(one, wanted.items) for one in value)
    return _kind(value) in wanted.kinds


def _kind(value: Any) -> str:
    for kind, types in (
        ("null", type(None)), ("boolean", bool), ("integer", int), ("number", float), ("text", str), ("list", list | tuple),
        ("object", dict),
    ):  # fmt: skip
        if isinstance(value, types):
            return kind
    return type(value).__name__


def mistakes(args: Mapping[str, Any], known: Mapping[str, Type] | None) -> list[str]:
    """What vLLM would not take, each as `NAME: need and have`; nothing where vLLM's arguments are not known."""
    if known is None:
        return []
    found = []
    for name, value in args.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, list(known), 1, 0.5)
            hint = f"; the nearest name is {nearest[0]}" if nearest else ""
            found.append(f"{plain(name)[:_LONGEST]}: vLLM has no such engine argument{hint}")
        elif not _fits(value, known[name]):
            found.append(f"{name}: needs {_words(known[name])}, have {_have(value)}{_nearest(value, known[name])}")
        elif _unregistered(value, known[name]):
            needs = _words(Type(choices=known[name].choices))
            found.append(f"{name}: needs {needs}, have {_have(value)}{_nearest(value, known[name])}")
    return found


def _unregistered(value: Any, wanted: Type) -> bool:
    """Names beside a list of names, where any text may stand: a plugin may have registered them, nobody else can have."""
    named = isinstance(value, str) and "text" in wanted.kinds and any(isinstance(one, str) for one in wanted.choices)
    return named and value not in wanted.choices and not _plugins()


@lru_cache(maxsize=1)
def _plugins() -> bool:
    """Whether a package beside vLLM adds something to it."""
    groups = ("vllm.general_plugins", "vllm.platform_plugins")
    return any(not point.value.startswith("vllm.") for group in groups for point in entry_points(group=group))


def refused(args: Mapping[str, Any]) -> list[str]:
    """What the suite cannot obey, each as `NAME: have VALUE: reason`."""
    return [
        f"{name}: cannot be obeyed, have {_have(value)}: {REFUSED[name].reason}"
        for name, value in args.items()
        if name in REFUSED and REFUSED[name].concerns(value)
    ]


def asked(texts: Iterable[str], known: Mapping[str, Type] | None) -> tuple[dict[str, Any], list[str]]:
    """The arguments of all `texts`, and everything that is wrong with them: `parse`, `mistakes`, `refused`, a name twice."""
    args: dict[str, Any] = {}
    wrong: list[str] = []
    for text in texts:
        try:
            name, value = parse(text, known)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if name in args:
            wrong.append(f"{name}: given twice, as {_have(args[name])} and as {_have(value)}")
        args.setdefault(name, value)
    return args, [*wrong, *mistakes(args, known), *refused(args)]


def _words(wanted: Type) -> str:
    """What an argument needs, for people."""
    listed = [f"'{one}'" if isinstance(one, str) else str(one) for one in (*wanted.choices, *wanted.names)]
    shown = ", ".join(listed[:8]) + (f", ... ({len(listed)} in all)" if len(listed) > 8 else "")
    parts = [f"one of {shown}"] if listed else []
    kinds = wanted.kinds - {"integer"} if "number" in wanted.kinds else wanted.kinds
    parts += [words for kind, words in _WORDS.items() if kind in kinds]
    if kinds == {"list"} and wanted.items is not None and not wanted.items.anything:
        parts[-1] += f" (each {_words(wanted.items)})"
    return " or ".join(parts) or "null"


def _have(value: Any) -> str:
    return f"text {_short(value)}" if isinstance(value, str) else _short(json.dumps(value, default=str), quoted=False)


def _short(text: str, quoted: bool = True) -> str:
    shown = plain(text)
    shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."
    return f"'{shown}'" if quoted else shown


def _nearest(value: Any, wanted: Type) -> str:
    names = {str(one).lower(): str(one) for one in (*wanted.choices, *wanted.names)}
    near = difflib.get_close_matches(value.lower(), list(names), 1, 0.6) if isinstance(value, str) else []
    return f"; the nearest is '{names[near[0]]}'" if near else ""
