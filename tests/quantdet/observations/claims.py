"""Claims: what recordings from other machines say that a format generated, to be re-executed here.

Only headers are read while cases are collected; arrays when a claim is judged.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np

from quantdet.matrix.cell import Cell
from quantdet.matrix.models import Model
from quantdet.matrix.rows import Dtype
from quantdet.matrix.workload import Prompt, Workload
from quantdet.observations.header import Header
from quantdet.observations.observation import HEADER_FILE, Observation, ObservationError, read, read_header

ROLE = "verify"


@dataclass(frozen=True)
class Sequences:
    """The distinct token sequences (prompt and generated ids) of some claims, as one workload of single prefills."""

    workload: Workload
    index: dict[tuple[int, ...], int]
    top_k: int
    hidden_states: bool = False  # whether some claim carries fingerprints of its hidden states

    @classmethod
    def of(cls, claims: Iterable[Observation]) -> "Sequences":
        """Sequences in the order in which the claims bring them."""
        index: dict[tuple[int, ...], int] = {}
        starts: dict[tuple[int, ...], int] = {}
        top_k, hidden = 2, False
        for claim in claims:
            hidden |= claim.hidden is not None and bool(claim.hidden.fingerprints)
            top_k = max(top_k, claim.header.claim_top_k)
            for c in range(len(claim.claims)):
                ids = sequence(claim, c)
                index.setdefault(ids, len(index))
                starts.setdefault(ids, claim.claims[c].header.content_start)
        prompts = tuple(Prompt(f"s{n}", ids[:-1], ids[-1:], starts[ids], None, None) for ids, n in index.items())
        digest = hashlib.sha256()
        for ids in index:
            digest.update(np.asarray([len(ids), *ids], "<i4").tobytes())
        return cls(Workload("reexecution", digest.hexdigest(), prompts), index, top_k, hidden)


def sequence(claim: Observation, c: int) -> tuple[int, ...]:
    """Prompt and generated ids of a claim's request `c`, as they are prefilled by the verifier."""
    record = claim.claims[c]
    return (*map(int, record.prompt_ids), *map(int, record.outputs[0].output_ids))


@dataclass(frozen=True, order=True)
class Claim(Cell):
    """A recorded format of a model, to be verified on `hardware_id`; `source` is the hardware it was recorded on.

    `origin`: what else tells it from other claims of the same name (vLLM version, key); empty where nothing has to.
    """

    source: str = ""
    origin: str = ""
    path: Path = Path()

    @property
    def id(self) -> str:
        return f"{self.model_id}/{self.format_id}/{self.source}{self.origin}-by-{self.hardware_id}"

    def __str__(self) -> str:
        return self.id


class References:
    """Recordings with claims below some folders.

    Raises:
        ObservationError: a damaged or foreign file; the message names it and the field.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._found: list[tuple[Path, Header]] = []
        for folder in folders:
            if not folder.is_dir():
                raise ObservationError(f"{folder}: no such folder")
            for path in sorted(path.parent for path in folder.rglob(HEADER_FILE) if not path.parent.name.startswith(".")):
                header = read_header(path)
                # Another lifetime or a copy claims nothing new; a seeded defect says nothing of the format.
                new = header.header_sha256 not in {known.header_sha256 for _, known in self._found}
                if header.kind == "observation" and header.claims and not header.inject and not header.lifetime and new:
                    self._found.append((path, header))

    def claims(self, hardware: Iterable[str]) -> list[Claim]:
        """Every claim, for each verifying hardware row."""
        names = Counter(header.cell for _, header in self._found)
        versions = Counter((header.cell, vllm) for _, header in self._found for vllm in [_vllm(header)])
        claims = []
        for verifier in hardware:
            for path, header in self._found:
                origin = f"@{_vllm(header)}" if names[header.cell] > 1 else ""
                if versions[header.cell, _vllm(header)] > 1:
                    origin += f"#{header.header_sha256[:8]}"
                cell = header.cell
                claims.append(Claim(cell.model_id, cell.format_id, verifier, "", cell.hardware_id, origin, path))
        return claims

    def header(self, claim: Claim) -> Header:
        return next(header for path, header in self._found if path == claim.path)

    @cached_property
    def _read(self) -> dict[Path, Observation]:
        return {}

    def observation(self, claim: Claim) -> Observation:
        """The claim with its arrays.

        Raises:
            ObservationError: a damaged file.
        """
        if claim.path not in self._read:
            self._read[claim.path] = read(claim.path)
        return self._read[claim.path]


def check(claim: Observation, model: Model) -> None:
    """Can the claim's ids be given to `model` at all? One that cannot would spoil the plan that all claims share.

    Raises:
        ObservationError: an id outside the vocabulary, or a dtype that no format has.
    """
    if claim.header.dtype not in get_args(Dtype):
        raise ObservationError(f"{claim.path}: dtype: {claim.header.dtype!r}, needs one of {', '.join(get_args(Dtype))}")
    if model.synthetic is None:
        return
    vocabulary = model.synthetic.vocab_size
    for c, one in enumerate(claim.claims):
        largest = max(int(one.prompt_ids.max()), int(one.outputs[0].output_ids.max()))
        if largest >= vocabulary:
            raise ObservationError(f"{claim.path}: claim{c}: token id {largest} of a vocabulary of {vocabulary}")


def _vllm(header: Header) -> str:
    """Safe in a test id and in a table: a header is another's word."""
    return re.sub(r"[^A-Za-z0-9.+_-]", "_", str(header.environment.get("vllm") or "unknown"))[:40]
