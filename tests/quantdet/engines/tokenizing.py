"""Texts and messages of a prompt file to token ids, by the tokenizer of a checkpoint, in a process of its own.

This process imports no transformers and obeys nothing of a checkpoint. What was made once is kept in a folder by the SHA-256 of
the tokenizer's files and the prompts, so that workers beside each other start one process together.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from quantdet.engines.child.packages import version
from quantdet.matrix.prompts import PromptLine
from quantdet.untrusted import parse_json, plain, read_bounded

# Raised when other ids are made of the same files and prompts.
VERSION = 1
TIME_LIMIT_S = 180.0
_MODULE = "quantdet.engines.transformers.tokenizer"
_TESTS = Path(__file__).resolve().parents[2]
_MOST_BYTES = 2**30
# One of these has the vocabulary: transformers makes an empty tokenizer out of a configuration alone.
_VOCABULARY = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "vocab.bpe")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".npz")
_LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "jinja2")
_QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a prompt and of its continuation (None: it has none), or why there are none (`error`)."""

    ids: tuple[int, ...] = ()
    continuation: tuple[int, ...] | None = None
    error: str = ""


@dataclass(frozen=True)
class Tokenized:
    """What a checkpoint's tokenizer made of prompts.

    Attributes:
        prompts: one for each line, in order.
        bos: id of the token that begins a text; None: there is none, or no tokenizer was needed.
        vocabulary: tokens that the tokenizer has, added ones included; None as above. A model may have more or fewer.
        warnings: what is not wrong and worth a word.
        error: why there is no tokenizer; the prompts that need one then have no ids.
    """

    prompts: tuple[TokenizedPrompt, ...]
    bos: int | None = None
    vocabulary: int | None = None
    warnings: tuple[str, ...] = ()
    error: str = ""


def has_tokenizer(checkpoint: Path) -> bool:
    """Whether the folder has a file with a vocabulary. Whether that can be read, `tokenize` tells."""
    return any(path.is_file() for pattern in _VOCABULARY for path in checkpoint.glob(pattern))


def tokenize(
    checkpoint: Path, lines: Sequence[PromptLine], *, cache: Path | None = None, time_limit_s: float = TIME_LIMIT_S
) -> Tokenized:
    """Token ids of `lines` by the tokenizer in the folder `checkpoint`; starts a process if a line needs it.

    Text is encoded with the tokenizer's special tokens, messages by its chat template and the prompt for an answer, without
    more special tokens; a continuation without any.

    Args:
        cache: folder that keeps answers, made if it is not there; None: nothing is kept.
    """
    needing = [line for line in lines if line.needs_tokenizer]
    if not needing:
        return Tokenized(tuple(_as_given(line) for line in lines))
    if not has_tokenizer(checkpoint):
        answer: dict[str, Any] = {"error": f"no file with a vocabulary in {plain(checkpoint.name)}"}
    else:
        request = {"folder": str(checkpoint), "prompts": [_asked(line) for line in needing]}
        answer = _kept(request, cache, time_limit_s)
    error = plain(str(answer.get("error", "")))
    found = iter([TokenizedPrompt() for _ in needing] if error else [_told(row) for row in answer["prompts"]])
    prompts = tuple(_joined(line, next(found)) if line.needs_tokenizer else _as_given(line) for line in lines)
    if error:
        return Tokenized(prompts, error=error)
    return Tokenized(prompts, answer["bos"], answer["vocabulary"], tuple(plain(one) for one in answer["warnings"]))


def _asked(line: PromptLine) -> dict[str, Any]:
    row: dict[str, Any] = {"continuation": line.continuation if isinstance(line.continuation, str) else None}
    if line.text is not None:
        row["text"] = line.text
    if line.messages is not None:
        row["messages"] = [{"role": role, "content": content} for role, content in line.messages]
    return row


def _told(row: dict[str, Any]) -> TokenizedPrompt:
    if "error" in row:
        return TokenizedPrompt(error=plain(row["error"]))
    return TokenizedPrompt(tuple(row["ids"]), None if row["continuation"] is None else tuple(row["continuation"]))


def _as_given(line: PromptLine) -> TokenizedPrompt:
    return TokenizedPrompt(line.ids or (), line.continuation if isinstance(line.continuation, tuple) else None)


def _joined(line: PromptLine, found: TokenizedPrompt) -> TokenizedPrompt:
    """What the tokenizer made of a line, beside what it had as ids."""
    if found.error:
        return found
    given = _as_given(line)
    return TokenizedPrompt(given.ids or found.ids, given.continuation or found.continuation)


def _kept(request: dict[str, Any], cache: Path | None, time_limit_s: float) -> dict[str, Any]:
    """The answer to `request` out of the cache, or made and put there."""
    if cache is None:
        return _made(request, time_limit_s)
    cache.mkdir(parents=True, exist_ok=True)
    name = _key(request)
    path = cache / f"{name}.json"
    with FileLock(cache / f".{name}.lock"):
        try:
            answer = parse_json(read_bounded(path, _MOST_BYTES))
            if _whole(answer, len(request["prompts"])):
                return dict(answer)
        except (OSError, ValueError):
            pass  # not there, or cut off: made again
        answer = _made(request, time_limit_s)
        if not answer.get("passing"):
            part = cache / f".{name}.part"
            part.write_text(json.dumps(answer), encoding="utf-8")
            os.replace(part, path)
    return answer


def _key(request: dict[str, Any]) -> str:
    """SHA-256 over all that an answer depends on. Which files a tokenizer reads only transformers knows: all but weights."""
    folder = Path(request["folder"])
    found = hashlib.sha256(json.dumps([VERSION, request["prompts"], [(one, version(one)) for one in _LIBRARIES]]).encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in _WEIGHTS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found.update(json.dumps([path.relative_to(folder).as_posix(), digest]).encode())
    return found.hexdigest()


def _made(request: dict[str, Any], time_limit_s: float) -> dict[str, Any]:
    """The answer of a process to `request`. One that gives none leaves an error that is not kept ("passing")."""
    path = os.pathsep.join(filter(None, (str(_TESTS), os.environ.get("PYTHONPATH", ""))))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", _MODULE], stdin=subprocess.PIPE, stdout=out, stderr=log,
            env={**os.environ, **_QUIET, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        try:
            child.communicate(json.dumps(request).encode(), timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            return {"error": f"the tokenizer gave no answer within {time_limit_s:g} s", "passing": True}
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        out.seek(0)
        log.seek(0)
        try:
            answer = parse_json(out.read(_MOST_BYTES))
        except ValueError:
            answer = None
        if child.returncode == 0 and _whole(answer, len(request["prompts"])):
            return dict(answer)
        last = plain(log.read()[-2000:].decode(errors="replace").strip().rpartition("\n")[2])[:300]
        how = f"exit code {child.returncode}" if child.returncode >= 0 else f"signal {-child.returncode}"
        return {
            "error": f"the tokenizer's process ended with {how} and no answer: {last or 'it said nothing'}",
            "passing": True,
        }


def _whole(answer: Any, count: int) -> bool:
    """Whether it is an answer about `count` prompts: a kept one may have been cut off or changed."""
    if not isinstance(answer, dict):
        return False
    if "error" in answer:
        return isinstance(answer["error"], str)
    rows, warnings = answer.get("prompts"), answer.get("warnings")
    return (
        isinstance(rows, list) and len(rows) == count and all(_whole_row(row) for row in rows)
        and isinstance(warnings, list) and all(isinstance(one, str) for one in warnings)
        and type(answer.get("vocabulary")) is int and type(answer.get("bos", "")) in (int, type(None))
    )  # fmt: skip


def _whole_row(row: Any) -> bool:
    if not isinstance(row, dict) or "error" in row:
        return isinstance(row, dict) and isinstance(row["error"], str)
    return _ids(row.get("ids")) and ("continuation" in row) and (row["continuation"] is None or _ids(row["continuation"]))


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**31 for one in value)
