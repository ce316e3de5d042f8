"""Observations: what one engine lifetime saw in one cell. JSON header + safetensors arrays, schema-versioned.

An observation may come from somebody else, so reading treats it as hostile: sizes before allocation, schema, dtypes,
shapes, finiteness and the SHA-256 of the arrays are checked, and `ObservationError` names the file and the field.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from quantdet.matrix.cell import Cell, Phase
from quantdet.metrics.distances import distance
from quantdet.observations import hidden_states, packed
from quantdet.observations.blocks import Block as Block
from quantdet.observations.blocks import ObservationError as ObservationError
from quantdet.observations.blocks import Output as Output
from quantdet.observations.blocks import PromptRecord as PromptRecord
from quantdet.observations.checks import check_claims, check_prompt, check_reported, prompt_record
from quantdet.observations.header import SCHEMA, Header
from quantdet.observations.hidden_states import HiddenStates
from quantdet.untrusted import flaw, parse_json

HEADER_FILE = "observation.json"
TENSORS_FILE = "tensors.safetensors"
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS_BYTES = 1 << 30


@dataclass(frozen=True, repr=False)
class Observation:
    """A header and, unless the engine refused, the arrays of every prompt.

    `claims`: requests whose generated tokens were kept for re-execution, each with one output.
    `hidden`: what was taken of the hidden states, if anything.
    `vllm`: the version that tells this observation's cell from the same cell of another version (`Cell.vllm`).
    """

    header: Header
    prompts: tuple[PromptRecord, ...] = ()
    path: Path | None = None
    vllm: str = ""
    claims: tuple[PromptRecord, ...] = ()
    hidden: HiddenStates | None = None

    @property
    def cell(self) -> Cell:
        return replace(self.header.cell, vllm=self.vllm)

    @property
    def reported(self) -> bool:
        """Whether the evidence is somebody's reported logprobs and no more."""
        return self.header.evidence == "reported"

    @cached_property
    def prefill_gaps(self) -> NDArray[np.float64]:
        """(repeats, repeats): mean over the prompts of the L2 distance of two repeats' prefill, nats, content positions."""
        total = np.zeros((self.header.repeats, self.header.repeats))
        for prompt in self.prompts:
            total += prefill_gaps(prompt, prompt) / len(self.prompts)
        return total

    @property
    def prefill_spread(self) -> float:
        """The largest of `prefill_gaps`; 0 if all repeats are equal."""
        return float(self.prefill_gaps.max())

    def logits_sha256(self, phase: Phase) -> str:
        """SHA-256 over the logits digests of repeat 0, all prompts: equal on two machines means equal logits.

        Of reported evidence: over what was reported.
        """
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(prompt.run(0).block(phase).digests.tobytes())
        return digest.hexdigest()


def prefill_gaps(one: PromptRecord, other: PromptRecord) -> NDArray[np.float64]:
    """(repeats of `one`, repeats of `other`): L2 distance of the prefill of each two, nats, content positions."""
    content = np.arange(len(one.outputs[0].prefill.digests)) + 1 >= one.header.content_start
    gaps = np.zeros((len(one.outputs), len(other.outputs)))
    for i, j in np.ndindex(gaps.shape):
        if one is other and j <= i:  # symmetric, and nothing is far from itself
            gaps[i, j] = gaps[j, i]
            continue
        a, b = one.outputs[i].prefill, other.outputs[j].prefill
        gaps[i, j] = distance(a.topk_ids, a.topk_logprobs, b.topk_ids, b.topk_logprobs, content).l2
    return gaps[np.ix_(one.header.runs, other.header.runs)]


def write(
    directory: Path, header: Header, prompts: tuple[PromptRecord, ...], claims: tuple[PromptRecord, ...] = (),
    hidden: HiddenStates | None = None,
) -> None:  # fmt: skip
    """Write header and arrays into an existing directory; the header last, since it completes the observation."""
    tensors: dict[str, NDArray[Any]] = {}
    for p, prompt in (*enumerate(prompts), *((f"claim{c}", claim) for c, claim in enumerate(claims))):
        tensors[f"{p}.prompt_ids"] = prompt.prompt_ids
        for o, output in enumerate(prompt.outputs):
            tensors[f"{p}.{o}.output_ids"] = output.output_ids
            for phase in ("decode", "prefill"):
                for name, array in output.block(phase).arrays().items():
                    tensors[f"{p}.{o}.{phase}.{name}"] = np.ascontiguousarray(array)
    tensors |= hidden.arrays() if hidden is not None else {}
    header = header.model_copy(update={"hidden_states": hidden.header if hidden is not None else None})
    if prompts:
        payload = save_tensors(tensors)
        (directory / TENSORS_FILE).write_bytes(payload)
        header = header.model_copy(update={"tensors_sha256": hashlib.sha256(payload).hexdigest()})
    header = header.model_copy(update={"header_sha256": header.digest()})
    text = json.dumps(header.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True)
    # Whole under its name or not there: a full disk, or a kill, leaves no half of one.
    unfinished = directory / f".{HEADER_FILE}"
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, directory / HEADER_FILE)


def read(directory: Path) -> Observation:
    """Read and check one observation.

    Raises:
        ObservationError: missing, damaged, of another schema version, or inconsistent.
    """
    header = read_header(directory)
    if header.kind == "refusal":
        return Observation(header, (), directory)
    path = directory / TENSORS_FILE
    payload = payload_of(directory, header)
    try:
        tensors = load_tensors(payload)
    except Exception as error:  # safetensors raises types of its own
        raise ObservationError(f"{path}: not safetensors: {error}") from None
    lengths = (header.decode_tokens, header.top_k)
    reported = header.reported or (None,) * len(header.prompts)
    prompts = tuple(
        prompt_record(path, header, row, str(p), lengths, tensors, covered)
        for p, (row, covered) in enumerate(zip(header.prompts, reported, strict=True))
    )
    lengths = (header.claim_tokens, header.claim_top_k)
    claims = tuple(prompt_record(path, header, row, f"claim{c}", lengths, tensors) for c, row in enumerate(header.claims))
    hidden = hidden_states.take(path, header, tensors)
    if tensors:
        raise ObservationError(f"{path}: {min(tensors)}: belongs to no prompt")
    check_claims(str(path), claims)
    return Observation(header, prompts, directory, claims=claims, hidden=hidden)


def payload_of(directory: Path, header: Header) -> bytes:
    """The arrays as they were written: of the folder itself, else of the packed file that the recording has for them.

    Raises:
        ObservationError: missing, larger than allowed, or not those that the header was written with.
    """
    path = directory / TENSORS_FILE
    archive = packed.path_of(directory, header)
    if archive is not None and os.path.lexists(archive) and not os.path.lexists(path):
        path = archive
        payload = packed.payload(archive, header.tensors_sha256)
    elif archive is not None and not os.path.lexists(path):
        raise ObservationError(f"{path}: No such file or directory, and no packed {archive} (of a copied part of a recording?)")
    else:
        payload = packed.bounded(path, MAX_TENSORS_BYTES)
    if hashlib.sha256(payload).hexdigest() != header.tensors_sha256:
        raise ObservationError(f"{path}: SHA-256 differs from {HEADER_FILE}: tensors_sha256 (damaged or edited)")
    return payload


def read_header(directory: Path) -> Header:
    """Read and check the JSON part only."""
    path = directory / HEADER_FILE
    try:
        raw = parse_json(packed.bounded(path, MAX_HEADER_BYTES))
    except ValueError as error:
        raise ObservationError(f"{path}: not JSON: {error}") from None
    if isinstance(raw, dict) and raw.get("schema") != SCHEMA:
        raise ObservationError(f"{path}: schema: is {ascii(raw.get('schema'))[:40]}, this suite reads {SCHEMA}")
    found = flaw({name: value for name, value in raw.items() if name != "refusal"} if isinstance(raw, dict) else raw)
    if found is not None:
        raise ObservationError(f"{path}: {found[0]}: {found[1]}")
    try:
        header = Header.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "(file)"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ObservationError(f"{path}: {where}: {first['msg']}{more}") from None
    if header.kind == "refusal" and (header.prompts or header.claims or header.hidden_states):
        raise ObservationError(f"{path}: a refusal has no prompts, no claims and no hidden states")
    if header.kind == "observation":
        if (header.executed is None and header.evidence == "logits") or not header.prompts:
            raise ObservationError(f"{path}: an observation needs 'executed' and 'prompts'")
        for p, prompt in enumerate(header.prompts):
            check_prompt(f"{path}: prompts.{p}", prompt, header.repeats)
        for c, claim in enumerate(header.claims):
            check_prompt(f"{path}: claims.{c}", claim, 1)
        check_reported(str(path), header)
        hidden_states.check(str(path), header)
        if header.claims and not (header.claim_tokens and header.claim_top_k):
            raise ObservationError(f"{path}: claims: need 'claim_tokens' and 'claim_top_k'")
        ids = [prompt.id for prompt in (*header.prompts, *header.claims)]
        if len(set(ids)) != len(ids):
            raise ObservationError(f"{path}: prompts: id used twice: {next(name for name in ids if ids.count(name) > 1)}")
    if header.header_sha256 != header.digest():
        raise ObservationError(f"{path}: header_sha256: differs from the header's content (damaged or edited)")
    return header


def vllm_of(observation: Observation) -> str:
    """The vLLM version that an observation was made with."""
    return str(observation.header.environment.get("vllm") or "")
