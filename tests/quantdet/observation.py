"""Observations: what one engine lifetime saw in one cell. JSON header + safetensors arrays, schema-versioned.

An observation may come from somebody else, so reading treats it as hostile: sizes before allocation, schema, dtypes,
shapes, finiteness and the SHA-256 of the arrays are checked, and `ObservationError` names the file and the field.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from quantdet.distance import distance
from quantdet.observation_header import SCHEMA, Header, PromptHeader
from quantdet.schema import Cell, Phase

HEADER_FILE = "observation.json"
TENSORS_FILE = "tensors.safetensors"
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS_BYTES = 1 << 30


class ObservationError(Exception):
    """An observation cannot be used; the message names the file and the field."""


@dataclass(frozen=True, repr=False)
class Block:
    """One phase of one output; n positions, k = top_k.

    digests: uint8 (n, 32), SHA-256 of the position's full-vocabulary float32 logits (little-endian bytes);
    chosen: float32 (n,), logprob in nats of the generated (decode) or given (prefill) token;
    topk_ids: int32 (n, k); topk_logprobs: float32 (n, k), each row sorted by (-logprob, id).
    """

    digests: NDArray[np.uint8]
    chosen: NDArray[np.float32]
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[np.float32]

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "digests": self.digests,
            "chosen": self.chosen,
            "topk_ids": self.topk_ids,
            "topk_logprobs": self.topk_logprobs,
        }

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 over all bits of the block."""
        digest = hashlib.sha256()
        for array in self.arrays().values():
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()


@dataclass(frozen=True, repr=False)
class Output:
    """One distinct answer to a request: `output_ids` int32 (decode_tokens,) and its two phases."""

    output_ids: NDArray[np.int32]
    decode: Block
    prefill: Block

    def block(self, phase: Phase) -> Block:
        return self.decode if phase == "decode" else self.prefill

    @cached_property
    def fingerprint(self) -> bytes:
        return hashlib.sha256(self.output_ids.tobytes() + self.decode.fingerprint + self.prefill.fingerprint).digest()


@dataclass(frozen=True, repr=False)
class PromptRecord:
    """A prompt's forced ids (int32, (length,)) and its distinct outputs in order of first appearance."""

    header: PromptHeader
    prompt_ids: NDArray[np.int32]
    outputs: tuple[Output, ...]

    def run(self, repeat: int) -> Output:
        return self.outputs[self.header.runs[repeat]]


@dataclass(frozen=True, repr=False)
class Observation:
    """A header and, unless the engine refused, the arrays of every prompt.

    `claims`: requests whose generated tokens were kept for re-execution, each with one output.
    `vllm`: the version that tells this observation's cell from the same cell of another version (`Cell.vllm`).
    """

    header: Header
    prompts: tuple[PromptRecord, ...] = ()
    path: Path | None = None
    vllm: str = ""
    claims: tuple[PromptRecord, ...] = ()

    @property
    def cell(self) -> Cell:
        return replace(self.header.cell, vllm=self.vllm)

    @cached_property
    def prefill_spread(self) -> float:
        """Largest mean L2 distance (nats, content positions) between two repeats' prefill; 0 if all are equal."""
        largest = 0.0
        seen: dict[tuple[int, ...], list[Output]] = {}
        for repeat in range(self.header.repeats):
            runs = tuple(prompt.header.runs[repeat] for prompt in self.prompts)
            seen.setdefault(runs, [prompt.run(repeat) for prompt in self.prompts])
        for one, other in combinations(seen.values(), 2):
            gaps = []
            for prompt, x, y in zip(self.prompts, one, other, strict=True):
                content = np.arange(len(x.prefill.digests)) + 1 >= prompt.header.content_start
                a, b = x.prefill, y.prefill
                gaps.append(distance(a.topk_ids, a.topk_logprobs, b.topk_ids, b.topk_logprobs, content).l2)
            largest = max(largest, float(np.mean(gaps)))
        return largest

    def logits_sha256(self, phase: Phase) -> str:
        """SHA-256 over the logits digests of repeat 0, all prompts: equal on two machines means equal logits."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(prompt.run(0).block(phase).digests.tobytes())
        return digest.hexdigest()


def write(directory: Path, header: Header, prompts: tuple[PromptRecord, ...], claims: tuple[PromptRecord, ...] = ()) -> None:
    """Write header and arrays into an existing directory; the header last, since it completes the observation."""
    tensors: dict[str, NDArray[Any]] = {}
    for p, prompt in (*enumerate(prompts), *((f"claim{c}", claim) for c, claim in enumerate(claims))):
        tensors[f"{p}.prompt_ids"] = prompt.prompt_ids
        for o, output in enumerate(prompt.outputs):
            tensors[f"{p}.{o}.output_ids"] = output.output_ids
            for phase in ("decode", "prefill"):
                for name, array in output.block(phase).arrays().items():
                    tensors[f"{p}.{o}.{phase}.{name}"] = np.ascontiguousarray(array)
    if prompts:
        payload = save_tensors(tensors)
        (directory / TENSORS_FILE).write_bytes(payload)
        header = header.model_copy(update={"tensors_sha256": hashlib.sha256(payload).hexdigest()})
    header = header.model_copy(update={"header_sha256": header.digest()})
    text = json.dumps(header.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True)
    (directory / HEADER_FILE).write_text(text + "\n", encoding="utf-8")


def read(directory: Path) -> Observation:
    """Read and check one observation.

    Raises:
        ObservationError: missing, damaged, of another schema version, or inconsistent.
    """
    header = read_header(directory)
    if header.kind == "refusal":
        return Observation(header, (), directory)
    path = directory / TENSORS_FILE
    try:
        if path.stat().st_size > MAX_TENSORS_BYTES:
            raise ObservationError(f"{path}: larger than {MAX_TENSORS_BYTES} bytes")
        payload = path.read_bytes()
    except OSError as error:
        raise ObservationError(f"{path}: {error.strerror}") from None
    if hashlib.sha256(payload).hexdigest() != header.tensors_sha256:
        raise ObservationError(f"{path}: SHA-256 differs from {HEADER_FILE}: tensors_sha256 (damaged or edited)")
    try:
        tensors = load_tensors(payload)
    except Exception as error:  # safetensors raises types of its own
        raise ObservationError(f"{path}: not safetensors: {error}") from None
    lengths = (header.decode_tokens, header.top_k)
    prompts = tuple(_prompt(path, header, row, str(p), lengths, tensors) for p, row in enumerate(header.prompts))
    lengths = (header.claim_tokens, header.claim_top_k)
    claims = tuple(_prompt(path, header, row, f"claim{c}", lengths, tensors) for c, row in enumerate(header.claims))
    if tensors:
        raise ObservationError(f"{path}: {min(tensors)}: belongs to no prompt")
    return Observation(header, prompts, directory, claims=claims)


def read_header(directory: Path) -> Header:
    """Read and check the JSON part only."""
    path = directory / HEADER_FILE
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ObservationError(f"{path}: larger than {MAX_HEADER_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ObservationError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ObservationError(f"{path}: not JSON: {error}") from None
    if isinstance(raw, dict) and raw.get("schema") != SCHEMA:
        raise ObservationError(f"{path}: schema: is {raw.get('schema')!r}, this suite reads {SCHEMA}")
    try:
        header = Header.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "(file)"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ObservationError(f"{path}: {where}: {first['msg']}{more}") from None
    if header.kind == "observation":
        if header.executed is None or not header.prompts:
            raise ObservationError(f"{path}: an observation needs 'executed' and 'prompts'")
        for p, prompt in enumerate(header.prompts):
            _check_prompt(f"{path}: prompts.{p}", prompt, header.repeats)
        for c, claim in enumerate(header.claims):
            _check_prompt(f"{path}: claims.{c}", claim, 1)
        if header.claims and not (header.claim_tokens and header.claim_top_k):
            raise ObservationError(f"{path}: claims: need 'claim_tokens' and 'claim_top_k'")
        ids = [prompt.id for prompt in (*header.prompts, *header.claims)]
        if len(set(ids)) != len(ids):
            raise ObservationError(f"{path}: prompts: id used twice: {next(name for name in ids if ids.count(name) > 1)}")
    if header.header_sha256 != header.digest():
        raise ObservationError(f"{path}: header_sha256: differs from the header's content (damaged or edited)")
    return header


def _check_prompt(where: str, prompt: PromptHeader, repeats: int) -> None:
    if prompt.content_start >= prompt.length:
        raise ObservationError(f"{where}.content_start: {prompt.content_start} of {prompt.length} ids")
    if len(prompt.runs) != repeats:
        raise ObservationError(f"{where}.runs: {len(prompt.runs)} runs of {repeats} repeats")
    # Bounded before anything is made of it: the number may be anything.
    if max(prompt.runs) >= len(prompt.runs) or list(dict.fromkeys(prompt.runs)) != list(range(max(prompt.runs) + 1)):
        raise ObservationError(f"{where}.runs: indices do not number the outputs in order")


def _prompt(
    path: Path, header: Header, prompt: PromptHeader, p: str, lengths: tuple[int, int], tensors: dict[str, NDArray[Any]]
) -> PromptRecord:
    """The arrays of one prompt, whose names begin with `p`; `lengths` are its generated tokens and top-k."""
    decode_tokens, k = lengths

    def take(name: str, dtype: str, *shape: int) -> NDArray[Any]:
        array = tensors.pop(f"{p}.{name}", None)
        if array is None:
            raise ObservationError(f"{path}: {p}.{name}: missing")
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            raise ObservationError(f"{path}: {p}.{name}: {array.dtype} {array.shape}, needs {dtype} {shape}")
        if dtype == "int32" and array.size and int(array.min()) < 0:
            raise ObservationError(f"{path}: {p}.{name}: has a negative id")
        return array

    def block(o: int, phase: str, n: int) -> Block:
        at = f"{o}.{phase}"
        found = Block(
            take(f"{at}.digests", "uint8", n, 32),
            take(f"{at}.chosen", "float32", n),
            take(f"{at}.topk_ids", "int32", n, k),
            take(f"{at}.topk_logprobs", "float32", n, k),
        )
        ordered = np.sort(found.topk_ids, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ObservationError(f"{path}: {p}.{at}.topk_ids: an id stands twice in one row")
        reported = any((bad.prompt, bad.phase) == (prompt.id, phase) for bad in header.nonfinite)
        for name, values in ("chosen", found.chosen[:, None]), ("topk_logprobs", found.topk_logprobs):
            bad_rows = np.isnan(values).any(axis=1) | np.isposinf(values).any(axis=1) | ~np.isfinite(values).any(axis=1)
            if bad_rows.any() and not reported:
                raise ObservationError(f"{path}: {p}.{at}.{name}: no logprob, and the header reports no non-finite logits")
        return found

    ids = take("prompt_ids", "int32", prompt.length)
    outputs = tuple(
        Output(
            take(f"{o}.output_ids", "int32", decode_tokens),
            block(o, "decode", decode_tokens),
            block(o, "prefill", prompt.length - 1),
        )
        for o in range(max(prompt.runs) + 1)
    )
    return PromptRecord(prompt, ids, outputs)
