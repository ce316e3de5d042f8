"""Versioned workloads: the prompts that every format of a model is given.

A workload is a JSON file `<id>.json`. A request is a prompt and a fixed continuation (*forced*: the same for every format
of the model), prefilled as one sequence. Prompts come as token ids, which are what runs, or as text for models whose
tokenizer is known only with the checkpoint; the text beside token ids is documentation.

    {"schema": 1, "id": "example-v1", "title": "...", "prompts": [
      {"id": "p0", "token_ids": [9, 8, 7], "forced_ids": [6, 5], "content_start": 1},
      {"id": "p1", "text": "...", "forced_text": "...", "content_start": 4}]}

`content_start` is the first index into the joined sequence that counts for distances: what lies before is template, BOS
or has too little context to say anything about the weights. Every mistake in a file is reported at once (`WorkloadError`).
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

MAX_BYTES = 16 * 2**20
# A name is a file name: nothing in it can lead out of the directory.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_NAMES = "lower-case letters, digits, '.', '_', '-'"
MIN_JOINED = 4  # tokens of a prompt and its continuation


class WorkloadError(Exception):
    """The workload cannot be used; `str()` lists every mistake, one a line."""

    def __init__(self, where: Path | str, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n".join([f"{where}: {count}", *(f"  {mistake}" for mistake in mistakes)]))


@dataclass(frozen=True)
class Prompt:
    """A prompt and its forced continuation.

    Attributes:
        token_ids, forced_ids: what runs; both empty for a prompt given as text.
        content_start: first index into the joined sequence that counts for distances.
        text, forced_text: for a prompt given as text, each to be tokenised by itself; otherwise documentation or None.
    """

    id: str
    token_ids: tuple[int, ...]
    forced_ids: tuple[int, ...]
    content_start: int
    text: str | None
    forced_text: str | None

    @property
    def joined(self) -> tuple[int, ...]:
        """Prompt and forced ids as one sequence; empty for a prompt given as text."""
        return self.token_ids + self.forced_ids


@dataclass(frozen=True)
class Workload:
    """The prompts of one file; `sha256` is over their canonical JSON, so it does not depend on the file's layout."""

    id: str
    sha256: str
    prompts: tuple[Prompt, ...]

    @property
    def has_text(self) -> bool:
        """Whether a prompt has to be tokenised by the model's own tokenizer."""
        return any(not prompt.token_ids for prompt in self.prompts)


TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]


class _PromptRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
    content_start: Annotated[StrictInt, Field(ge=1)]
    token_ids: list[TokenId] | None = None
    forced_ids: list[TokenId] | None = None
    text: StrictStr | None = None
    forced_text: StrictStr | None = None

    @model_validator(mode="after")
    def _runnable(self) -> "_PromptRow":
        if self.token_ids is None and self.forced_ids is None:
            if not self.text or not self.forced_text:
                raise ValueError("needs 'token_ids' and 'forced_ids', or 'text' and 'forced_text', not empty")
            return self
        if not self.token_ids or not self.forced_ids:
            raise ValueError("'token_ids' and 'forced_ids' belong together and must not be empty")
        joined = len(self.token_ids) + len(self.forced_ids)
        if joined < MIN_JOINED:
            raise ValueError(f"prompt and forced ids together must be at least {MIN_JOINED}; they are {joined}")
        if self.content_start >= joined:
            raise ValueError(f"'content_start' {self.content_start} leaves no content in a sequence of {joined}")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_: Literal[1] = Field(alias="schema")
    id: StrictStr
    title: Annotated[StrictStr, Field(min_length=1)]
    prompts: list[_PromptRow] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique(self) -> "_File":
        ids = [prompt.id for prompt in self.prompts]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"prompts: id used twice: {', '.join(twice)}")
        return self


def load(name: str, directory: Path) -> Workload:
    """Read and check the workload `name` in `directory`.

    Raises:
        WorkloadError: no such workload, or its file is wrong; all mistakes at once.
    """
    if not _NAME.fullmatch(name):
        raise WorkloadError(repr(name), [f"a workload's name is {_NAMES}"])
    path = directory / f"{name}.json"
    found = load_file(path)
    if found.id != name:
        raise WorkloadError(path, [f"id: is {found.id!r}, the file's name says {name!r}"])
    return found


def load_file(path: Path) -> Workload:
    """Read and check the workload at `path`, wherever that is and whatever the file is called; its id is the file's own.

    Raises:
        WorkloadError: no such workload, or its file is wrong; all mistakes at once.
    """
    try:
        file = _File.model_validate(_read(path))
    except ValidationError as error:
        raise WorkloadError(path, [_mistake(e) for e in error.errors()]) from None
    if not _NAME.fullmatch(file.id):
        raise WorkloadError(path, [f"id: a workload's id is {_NAMES} (is {file.id[:80]!r})"])
    return of_prompts(
        file.id,
        tuple(
            Prompt(
                row.id,
                tuple(row.token_ids or ()),
                tuple(row.forced_ids or ()),
                row.content_start,
                row.text,
                row.forced_text,
            )
            for row in file.prompts
        ),
    )


def of_prompts(name: str, prompts: tuple[Prompt, ...]) -> Workload:
    """The workload of these prompts, whose `sha256` is that of a file that holds the same."""
    rows = [
        {key: value for key, value in vars(prompt).items() if value is not None and value != ()}  # as a file leaves them out
        for prompt in prompts
    ]
    canonical = json.dumps(rows, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return Workload(name, hashlib.sha256(canonical.encode("ascii")).hexdigest(), prompts)


def find(name: str, directory: Path, relative_to: Path) -> Workload:
    """The workload of the suite with this name, or the file at a path: a name has no slash and no `.json` at its end.

    Args:
        directory: the suite's workloads.
        relative_to: the folder that relative paths start from.

    Raises:
        WorkloadError: see `load`.
    """
    return load_file(relative_to / name) if is_path(name) else load(name, directory)


def is_path(name: str) -> bool:
    """Whether a model's `workload` names a file, and no workload of the suite."""
    return "/" in name or name.endswith((".json", ".jsonl"))


def max_tokens(workload: Workload) -> int:
    """Length in tokens of the longest joined sequence; prompts given as text count 0."""
    return max(len(prompt.joined) for prompt in workload.prompts)


def check_vocab(workload: Workload, vocab_size: int) -> None:
    """Check that a vocabulary of `vocab_size` tokens has every id.

    Raises:
        WorkloadError: it has not; one mistake a prompt.
    """
    mistakes = [
        f"prompts.{prompt.id}: token id {max(prompt.joined)} is outside a vocabulary of {vocab_size}"
        for prompt in workload.prompts
        if prompt.joined and max(prompt.joined) >= vocab_size
    ]
    if mistakes:
        raise WorkloadError(workload.id, mistakes)


def _read(path: Path) -> Any:
    try:
        if not path.is_file():
            raise WorkloadError(path, ["no such workload"])
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise WorkloadError(path, [f"larger than {MAX_BYTES // 2**20} MiB"])
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise WorkloadError(path, [f"not readable as JSON: {error}"]) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a key given twice json keeps the last: two readers could see two workloads in one file.
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is given twice")
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _mistake(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    text = {"extra_forbidden": "unknown key", "missing": "missing"}.get(error["type"])
    if text is None:
        text = str(error["msg"]).removeprefix("Value error, ")
        value = error.get("input")
        if isinstance(value, str | int | float | bool):
            text += f" (is {str(value)[:80]!r})"
    return f"{where}: {text}" if where else text
