"""The two layouts of the published files: what stands in them, checked.

Investigation: one format a file; per repeat the generated ids and their logprobs. Generation: several formats a file, one
run each; per reference the ids and the top-k logprobs at a few positions, counted from the end (`pos_-3`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantdet.observations.published.checked import Field, shown

# Names in the files -> formats of the matrix.
FORMATS = {
    "awq": "awq", "awq_marlin": "awq_marlin", "gptq": "gptq", "gptq_marlin": "gptq_marlin",
    "torchao": "pytorch_int4", "pytorch_int4": "pytorch_int4", "bf16": "bf16", "awq_auto": "awq_auto",
    "gptq_auto": "gptq_auto",
}  # fmt: skip
INVESTIGATION, GENERATION = "published-investigation", "published-generation"
MAX_TOKENS = 1 << 20  # of a prompt
MAX_GENERATED = 4096
MAX_REPEATS = 10_000
MAX_REFERENCES = 1000
MAX_ROWS = 4096
MAX_K = 1000
_POSITION = re.compile(r"pos_-([1-9][0-9]{0,6})")
_VERSIONS = {
    "vllm_version": "vllm", "torch_version": "torch_package", "transformers_version": "transformers_package",
    "cuda_version": "cuda", "cudnn_version": "cudnn", "python_version": "python",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What was reported of one position: ids and their logprobs in the file's order, and that of the token there."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    chosen: float | None


@dataclass(frozen=True)
class Answer:
    """One run of a request. Rows by index, as in a whole observation (prefill row r is about token r + 1)."""

    generated: tuple[int, ...]
    prefill: dict[int, Row]
    decode: dict[int, Row]


@dataclass(frozen=True)
class Request:
    """A prompt and its repeats; `ids` empty where only the length was reported."""

    id: str
    length: int
    ids: tuple[int, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Report:
    """One format of one file."""

    file: str
    layout: str
    format_id: str
    checkpoint: str
    args: dict[str, Any]
    dtype: str
    created: str
    gpu: str
    environment: dict[str, str]
    top_k: int
    decode_tokens: int
    requests: tuple[Request, ...]


def read(file: Field) -> list[Report]:
    """The reports of one file.

    Raises:
        ImportRefused: neither layout, or a field that is not as it has to be.
    """
    if file.has("generations"):
        return list(_generation(file))
    if file.has("baseline"):
        return [_investigation(file)]
    raise file.refuse("of neither layout: has no 'generations' and no 'baseline'")


def _investigation(file: Field) -> Report:
    if file.has("success") and file["success"].value is not True:
        raise file["success"].refuse("the run did not succeed")
    format_id = _format(file["variant"])
    if _format(file["quantization"]) != format_id:
        raise file["quantization"].refuse(f"is another format than variant {file['variant'].value!r}")
    config = file["config"]
    tokens = file["baseline"]["tokens"].each(1, MAX_REPEATS)
    if config.has("repetitions") and config["repetitions"].integer(1, MAX_REPEATS) != len(tokens):
        raise config["repetitions"].refuse(f"is {config['repetitions'].value}, baseline.tokens has {len(tokens)}")
    if config.has("temperature") and config["temperature"].number() != 0:
        raise config["temperature"].refuse("not greedy: repeats of a sampled request may differ")
    generated = [row.ids(1, MAX_GENERATED) for row in tokens]
    answers = []
    for row, ids, field in zip(file["baseline"]["logprobs"].each(len(tokens), len(tokens)), generated, tokens, strict=True):
        if len(ids) != len(generated[0]):
            raise field.refuse(f"has {len(ids)} tokens, the first repeat {len(generated[0])}")
        values = row.logprobs(len(ids), len(ids))
        answers.append(Answer(ids, {}, {i: Row((ids[i],), (value,), value) for i, value in enumerate(values)}))
    request = Request("investigation", file["prompt_length"].integer(2, MAX_TOKENS), (), tuple(answers))
    args = {name: value.number() for name, value in config.items(100) if type(value.value) in (int, float)}
    return Report(
        file.file, INVESTIGATION, format_id, file["model"].text(), {"quantization": file["quantization"].text(), **args},
        "", _created(file), *_environment(file), 1, len(generated[0]), (request,),
    )  # fmt: skip


def _generation(file: Field) -> Iterator[Report]:
    meta = file["metadata"]
    gpu, environment = _environment(meta)
    found: dict[str, tuple[str, Field]] = {}
    for name, references in file["generations"].items(len(FORMATS)):
        format_id = _format(Field(references.file, references.at, name))
        if format_id in found:
            raise references.refuse(f"is {format_id}, as {found[format_id][0]!r} is")
        found[format_id] = name, references
    read_ = {
        format_id: [_reference(one) for one in references.each(1, MAX_REFERENCES)]
        for format_id, (_, references) in found.items()
    }
    every = [answer for requests in read_.values() for request in requests for answer in request.answers]
    longest = max(len(answer.generated) for answer in every)
    tokens = meta["max_new_tokens"].integer(longest, MAX_GENERATED) if meta.has("max_new_tokens") else longest
    rows = [row for answer in every for block in (answer.prefill, answer.decode) for row in block.values()]
    widest = max(len(row.ids) for row in rows)
    # One more than asked for is the token at the position, where it is not among the first.
    top_k = meta["top_k_logprobs"].integer(max(widest - 1, 1), MAX_K) if meta.has("top_k_logprobs") else widest
    for format_id, (name, references) in found.items():
        model = meta["model_configs"][name]
        if _format(model["quantization"]) != format_id:
            raise model["quantization"].refuse(f"is another format than {name!r}")
        seen = [request.id for request in read_[format_id]]
        if len(set(seen)) != len(seen):
            raise references.refuse("a ref_idx stands twice")
        yield Report(
            file.file, GENERATION, format_id, model["model_name"].text(),
            {"quantization": model["quantization"].text(), "logprobs": top_k},
            model["dtype"].text(20) if model.has("dtype") else "", _created(meta), gpu, environment, top_k, tokens,
            tuple(read_[format_id]),
        )  # fmt: skip


def _reference(one: Field) -> Request:
    ids = one["prompt_ids"].ids(2, MAX_TOKENS) if one.has("prompt_ids") else ()
    length = one["prompt_length"].integer(2, MAX_TOKENS) if one.has("prompt_length") or not ids else len(ids)
    if ids and length != len(ids):
        raise one["prompt_length"].refuse(f"is {length}, prompt_ids has {len(ids)}")
    generated = one["generated_ids"].ids(1, MAX_GENERATED)
    if one.has("num_generated") and one["num_generated"].integer(1, MAX_GENERATED) != len(generated):
        raise one["num_generated"].refuse(f"is {one['num_generated'].value}, generated_ids has {len(generated)}")
    prefill = {place - 1: row for place, row in _signals(one["prefill_signals"], length, ids)}
    decode = dict(_signals(one["decode_signals"], len(generated), generated))
    if -1 in prefill:
        raise one["prefill_signals"].refuse("the first token of a prompt has no logprob")
    if not prefill and not decode:
        raise one.refuse("no position was reported")
    return Request(f"ref{one['ref_idx'].integer(0, 10**6)}", length, ids, (Answer(generated, prefill, decode),))


def _signals(signals: Field, length: int, tokens: tuple[int, ...]) -> Iterator[tuple[int, Row]]:
    """(index of the token, what was reported of it)."""
    for name, signal in signals.items(MAX_ROWS) if signals.value != {} else ():
        match = _POSITION.fullmatch(name)
        if match is None:
            raise signal.refuse("needs a name like pos_-3")
        place = length - int(match[1])
        if place < 0:
            raise signal.refuse(f"lies before the first of {length} tokens")
        ids = signal["logprobs"]["token_ids"].ids(1, MAX_K)
        if len(set(ids)) != len(ids):
            raise signal["logprobs"]["token_ids"].refuse("an id stands twice")
        values = signal["logprobs"]["log_probs"].logprobs(len(ids), len(ids))
        known = dict(zip(ids, values, strict=True))
        yield place, Row(ids, values, known.get(tokens[place]) if tokens else None)


def _format(name: Field) -> str:
    if not isinstance(name.value, str) or name.value not in FORMATS:
        raise name.refuse(f"format {shown(name.value)} is not known here; known: {', '.join(FORMATS)}")
    return FORMATS[name.value]


def _created(part: Field) -> str:
    return part["timestamp"].text(40) if part.has("timestamp") else ""


def _environment(part: Field) -> tuple[str, dict[str, str]]:
    """The GPU's name ("" where the file names none) and the versions."""
    if not part.has("environment"):
        return "", {}
    environment = part["environment"]
    versions = {ours: environment[theirs].text(40) for theirs, ours in _VERSIONS.items() if environment.has(theirs)}
    return environment["gpu_name"].text() if environment.has("gpu_name") else "", versions
